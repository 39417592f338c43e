"""Batches for all processes of a run in step: what befalls one of them is known to all before the next step.

Before each step, the processes add up a few small numbers: who has received a signal, whose loader has failed or has
come to its end, and whether the main process finds it time for a checkpoint. So all of them stop after the same step,
and none waits in a sum of gradients for another that will never come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import distributed
from dali_saliencymix.training.distributed import OtherProcessError
from dali_saliencymix.training.preemption import STOP_SIGNALS, Preempted, StopSignals
from dali_saliencymix.training.watchdog import WAITING_FOR_DATA, WAITING_FOR_OTHERS, Watchdog

Batch = TypeVar("Batch")
Yielded = TypeVar("Yielded", covariant=True)


class SizedIterable(Protocol[Yielded]):
    """What has a length and gives batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Yielded]: ...


class Lockstep:
    """Gives the batches of loaders, and says after which step to write a checkpoint or to stop.

    As a context it takes signals and watches over the progress; outside of one it only gives batches.

    Parameters
    ----------
    processes : Processes
        Which process of the run this is.
    checkpoint_every : int, optional
        Steps from one checkpoint of an epoch to the next.
    checkpoint_interval : float, optional
        Minutes from one checkpoint to the next, by the main process's clock.
    stall_timeout : float
        Seconds without progress after which the process is ended, see `Watchdog`; 0 waits for ever.
    roots : sequence of path
        Folders of the data.
    """

    def __init__(
        self,
        processes: Processes,
        *,
        checkpoint_every: int | None = None,
        checkpoint_interval: float | None = None,
        stall_timeout: float = 0.0,
        roots: Sequence[str | Path] = (),
    ) -> None:
        self._processes = processes
        self._checkpoint_every = checkpoint_every
        self._checkpoint_interval = checkpoint_interval
        self._signals = StopSignals()
        self._watchdog = Watchdog(stall_timeout, processes.rank, roots)
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._interval_is_over = False
        self._stop_signal: str | None = None

    def __enter__(self) -> Lockstep:
        self._signals.__enter__()
        self._watchdog.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._watchdog.__exit__(*raised)
        self._signals.__exit__(*raised)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches of a loader, as long as no process has failed.

        Raises
        ------
        OtherProcessError
            If the loader of another process has failed, or has come to its end before this one's, or after it.
        """
        iterator = iter(loader)
        while True:
            self._watchdog.beat(WAITING_FOR_DATA)
            batch, error = None, None
            try:
                batch = next(iterator)
            except StopIteration:
                pass
            except Exception as raised:  # whatever it is, the others have to know before this process ends
                error = raised
            self._watchdog.beat(WAITING_FOR_OTHERS)
            failed, ended = self._agree(failed=error is not None, ended=error is None and batch is None)
            if error is not None:
                raise error
            if failed:
                raise OtherProcessError
            if ended == self._processes.world_size:
                return
            if ended:
                msg = f"{ended} of {self._processes.world_size} processes have no batch left, the others have"
                raise OtherProcessError(msg)
            self._watchdog.beat("in a step")
            assert batch is not None
            yield batch

    def _agree(self, *, failed: bool, ended: bool) -> tuple[int, int]:
        """Return how many loaders have failed and have ended, and note what else the processes have to say."""
        minutes = (time.monotonic() - self._saved_at) / 60
        interval = self._checkpoint_interval
        is_over = self._processes.is_main and interval is not None and minutes >= interval
        counts = distributed.sum_of_counts([failed, ended, is_over, *self._signals.received])
        failures, ends, over, *received = counts
        self._interval_is_over = over > 0
        for number, count in zip(STOP_SIGNALS, received, strict=True):
            if count and self._stop_signal is None:
                self._stop_signal = number.name
        return failures, ends

    def checkpoint_is_due(self, step: int) -> bool:
        """Return whether to write a checkpoint after this step of the epoch; it is the same in all processes."""
        if self._stop_signal is not None or self._interval_is_over:
            return True
        every = self._checkpoint_every
        return every is not None and step // every > self._saved_step // every

    def writing(self, step: int) -> None:
        """Note that a checkpoint is written now, after this step of the epoch."""
        self._watchdog.beat("writing a checkpoint")
        self._saved_at, self._saved_step = time.monotonic(), step
        self._interval_is_over = False

    def stop_if_asked(self) -> None:
        """Raise `Preempted` if a process had received a signal before the step that is just over."""
        if self._stop_signal is not None:
            raise Preempted(self._stop_signal)


class Interruptible(Generic[Batch]):
    """The batches of a loader in step, until a signal comes: iterating raises `Preempted` then.

    For a validation, of which nothing is worth keeping when it is stopped.
    """

    def __init__(self, loader: SizedIterable[Batch], lockstep: Lockstep) -> None:
        self._loader = loader
        self._lockstep = lockstep

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._lockstep.batches(self._loader):
            self._lockstep.stop_if_asked()
            yield batch

"""Batches for all processes of a run in step: what befalls one of them is known to all before the next step.

Before each step, the processes add up a few small numbers: who has received a signal, whose loader has failed or has
come to its end, and whether the main process finds it time for a checkpoint. So all of them stop after the same step,
and none waits in a sum of gradients for another that will never come.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from dali_saliencymix.loaders.base import Batches
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.monitor import Monitor
from dali_saliencymix.measure.processes import sum_of_counts
from dali_saliencymix.training.distributed import OtherProcessError
from dali_saliencymix.training.watchdog import WAITING_FOR_DATA, WAITING_FOR_OTHERS, Watchdog

Batch = TypeVar("Batch")

# "Temporary failure, try again" in sysexits.h: nothing is wrong with the run, and it wants to be started again.
EXIT_PREEMPTED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run stops because a signal asked it to: after its step, with a checkpoint. The text names the signal."""


class Lockstep:
    """Gives the batches of loaders, and says after which step to write a checkpoint or to stop.

    As a context it takes signals and watches over the progress; outside of one it only gives batches. Checkpoints are
    due every `checkpoint_every` steps of an epoch, and every `checkpoint_interval` minutes of the main process's clock.
    `Watchdog` ends the process after `stall_timeout` seconds without progress; `roots` are folders of the data.
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
        self._received = [0] * len(STOP_SIGNALS)  # 1 for each that has come to this process
        self._handlers: list[Any] = []  # of these signals before
        self._watchdog = Watchdog(stall_timeout, processes.rank, roots)
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._interval_is_over = False
        self._stop_signal: str | None = None

    def __enter__(self) -> Lockstep:
        self._handlers = [signal.signal(number, self._note) for number in STOP_SIGNALS]
        self._watchdog.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._watchdog.__exit__(*raised)
        for number, handler in zip(STOP_SIGNALS, self._handlers, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received[STOP_SIGNALS.index(signal.Signals(number))] = 1

    def batches(self, loader: Iterable[Batch], monitor: Monitor | None = None) -> Iterator[Batch]:
        """Give the batches of a loader, as long as no process has failed; `monitor` times how long each takes to come.

        Raises
        ------
        OtherProcessError
            If the loader of another process has failed, or has come to its end before this one's, or after it.
        """
        if monitor is not None:
            monitor.start()
        iterator = iter(loader)
        while True:
            self._watchdog.beat(WAITING_FOR_DATA)
            batch, error = None, None
            try:
                batch = monitor.next(iterator) if monitor is not None else next(iterator)
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
        """Return how many loaders have failed and have ended, and note signals and the time of all processes."""
        minutes = (time.monotonic() - self._saved_at) / 60
        interval = self._checkpoint_interval
        is_over = self._processes.is_main and interval is not None and minutes >= interval
        counts = sum_of_counts([failed, ended, is_over, *self._received])
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


class Interruptible:
    """The batches of a validation in step, of which nothing is worth keeping when a signal comes: `Preempted` then."""

    def __init__(self, loader: Batches, lockstep: Lockstep) -> None:
        self._loader = loader
        self._lockstep = lockstep

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in self._lockstep.batches(self._loader):
            self._lockstep.stop_if_asked()
            yield batch

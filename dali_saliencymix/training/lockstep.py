"""Batches for all processes of a run in step: what befalls one of them is known to all before the next step.

Before each step, the processes add up a few small numbers (`distributed.sum_of_counts`): who has received a signal,
whose loader has failed or has come to its end, and whether the main process finds it time for a checkpoint. So all of
them stop after the same step, and none waits in a sum of gradients for another that will never come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dali_saliencymix.training import distributed
from dali_saliencymix.training.distributed import OtherProcessError, Processes
from dali_saliencymix.training.preemption import STOP_SIGNALS, Preempted, StopSignals
from dali_saliencymix.training.watchdog import Watchdog

Batch = TypeVar("Batch")


class Lockstep:
    """Gives the batches of loaders, and says after which step to write a checkpoint or to stop.

    Parameters
    ----------
    processes : Processes
        Which process of the run this is.
    signals : StopSignals
        What has been received.
    watchdog : Watchdog
        Is told what this process is doing.
    checkpoint_every : int or None
        Steps from one checkpoint to the next, counted from the epoch's beginning.
    checkpoint_minutes : float or None
        Minutes from one checkpoint to the next, by the main process's clock.
    """

    def __init__(
        self,
        processes: Processes,
        signals: StopSignals,
        watchdog: Watchdog,
        *,
        checkpoint_every: int | None = None,
        checkpoint_minutes: float | None = None,
    ) -> None:
        self._processes = processes
        self._signals = signals
        self._watchdog = watchdog
        self._checkpoint_every = checkpoint_every
        self._checkpoint_minutes = checkpoint_minutes
        self._saved_at = time.monotonic()
        self._time_to_save = False
        self.stop_signal: str | None = None

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches of a loader, as long as no process has failed.

        Raises
        ------
        OtherProcessError
            If the loader of another process has failed, or has come to its end before this one's, or after it.
        """
        iterator = iter(loader)
        while True:
            self._watchdog.beat("waiting for data")
            batch, error = None, None
            try:
                batch = next(iterator)
            except StopIteration:
                pass
            except Exception as raised:  # whatever it is, the others have to know before this process ends
                error = raised
            self._watchdog.beat("waiting for the other processes")
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
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self._processes.is_main and self._checkpoint_minutes is not None and minutes >= self._checkpoint_minutes
        counts = distributed.sum_of_counts([*self._signals.received, failed, ended, due])
        *signals, failures, ends, due_now = counts
        for number, count in zip(STOP_SIGNALS, signals, strict=True):
            if count and self.stop_signal is None:
                self.stop_signal = number.name
        self._time_to_save = due_now > 0
        return failures, ends

    def checkpoint_is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step of the epoch, in all processes alike."""
        every = self._checkpoint_every
        return self.stop_signal is not None or self._time_to_save or (every is not None and step % every == 0)

    def saved(self) -> None:
        """Start the time to the next checkpoint anew."""
        self._saved_at = time.monotonic()
        self._time_to_save = False

    def stop_if_asked(self) -> None:
        """Raise `Preempted` if a process has received a signal before the step that is just over."""
        if self.stop_signal is not None:
            raise Preempted(self.stop_signal)

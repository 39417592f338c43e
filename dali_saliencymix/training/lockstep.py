"""Keep the processes of a run in lockstep: before each step, all know about signals and failures in any of them.

Before each step, the processes sum up a few numbers: received signals, failed and exhausted loaders, and whether a
checkpoint is due by the clock of the main process. All processes therefore stop after the same step, and none waits in
an all-reduce for a process that has ended.
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
from dali_saliencymix.training.options import RunOptions
from dali_saliencymix.training.watchdog import WAITING_FOR_DATA, WAITING_FOR_OTHERS, Watchdog

Batch = TypeVar("Batch")

# EX_TEMPFAIL of sysexits.h, "temporary failure, retry later": the run is fine, and should be started again.
EXIT_PREEMPTED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """A signal stops the run, after the current step and a checkpoint. The message is the name of the signal."""


class Lockstep:
    """Yields the batches of loaders, and decides after which step to write a checkpoint or to stop.

    As a context manager, it handles signals and runs a watchdog; without the context, it only yields batches.
    Checkpoints are due every ``checkpoint_every`` steps of an epoch, and every ``checkpoint_interval`` minutes by the
    clock of the main process. `Watchdog` ends the process after ``stall_timeout`` seconds without progress; `roots` are
    the folders of the data.
    """

    def __init__(self, processes: Processes, run: RunOptions, roots: Sequence[Path] = ()) -> None:
        self._processes = processes
        self._run = run
        self._received = [0] * len(STOP_SIGNALS)  # 1 for each signal that this process has received
        self._handlers: list[Any] = []  # the previous handlers of these signals
        self._watchdog = Watchdog(run.stall_timeout, processes.rank, roots)
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
        """Yield the batches of a loader as long as no process fails; `monitor` measures the wait for each batch.

        Raises
        ------
        OtherProcessError
            If the loader of another process has failed, or the loaders do not end at the same step.
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
            except Exception as raised:  # the other processes must know before this one ends
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
                msg = f"{ended} of {self._processes.world_size} processes have no batches left, but the others do"
                raise OtherProcessError(msg)
            self._watchdog.beat("in a step")
            assert batch is not None
            yield batch

    def _agree(self, *, failed: bool, ended: bool) -> tuple[int, int]:
        """Return the numbers of failed and exhausted loaders; record signals, and whether a checkpoint is due."""
        minutes = (time.monotonic() - self._saved_at) / 60
        is_over = self._processes.is_main and 0 < self._run.checkpoint_interval <= minutes
        counts = sum_of_counts([failed, ended, is_over, *self._received])
        failures, ends, over, *received = counts
        self._interval_is_over = over > 0
        for number, count in zip(STOP_SIGNALS, received, strict=True):
            if count and self._stop_signal is None:
                self._stop_signal = number.name
        return failures, ends

    def checkpoint_is_due(self, step: int) -> bool:
        """Return whether to write a checkpoint after this step of the epoch, the same in all processes."""
        if self._stop_signal is not None or self._interval_is_over:
            return True
        every = self._run.checkpoint_every
        return every is not None and step // every > self._saved_step // every

    def writing(self, step: int) -> None:
        """Record that a checkpoint is being written after this step of the epoch."""
        self._watchdog.beat("writing a checkpoint")
        self._saved_at, self._saved_step = time.monotonic(), step
        self._interval_is_over = False

    def stop_if_asked(self) -> None:
        """Raise `Preempted` if any process received a signal before the step that just ended."""
        if self._stop_signal is not None:
            raise Preempted(self._stop_signal)


class Interruptible:
    """Validation batches in lockstep. A signal raises `Preempted` at once, since there is nothing to save."""

    def __init__(self, loader: Batches, lockstep: Lockstep) -> None:
        self._loader = loader
        self._lockstep = lockstep

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in self._lockstep.batches(self._loader):
            self._lockstep.stop_if_asked()
            yield batch

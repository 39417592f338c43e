"""A lightweight monitor for training loops: it measures how long each step waits for its data, and warns once.

It reads a clock on the host twice per step and never waits for a GPU. A GPU with queued work does not notice every
wait of the host, so the shares are upper bounds of the stall. ``python -m dali_saliencymix bottleneck`` measures the
stall itself.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dali_saliencymix._checks import check_at_least, check_fraction, check_positive

Batch = TypeVar("Batch")

STARVING_SHARE = 0.2  # share of the time from which the loader is too slow
_OWN_COST_STEPS = 200
_CURE = "What to do about it: python -m dali_saliencymix bottleneck --help"


def write_line(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(line + "\n")


class Monitor:
    """Measure data wait, step time and images per second over the last steps of a training.

    Parameters
    ----------
    batch_size : int, optional
        Images in a step; give those of all processes to get the total rate. Without it, there is no rate.
    window : int
        Number of last steps that the figures are averages of, at least 2.
    warn_share : float
        Share of the time spent waiting, in (0, 1], from which the loader is too slow.
    patience : float
        Seconds for which the loader must be too slow before the warning; positive.
    say : callable, optional
        Called with the warning, which is one line. By default, the warning is written to stderr.
    clock : callable
        Returns the time in seconds.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> monitor = Monitor(batch_size=32)
    >>> for batch in monitor.watch([1, 2, 3]):
    ...     pass  # the training step
    >>> monitor.steps
    3
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        window: int = 100,
        warn_share: float = STARVING_SHARE,
        patience: float = 60.0,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_at_least(window, "window", 2)
        if batch_size is not None:
            check_at_least(batch_size, "batch_size", 1)
        self._warn_share = check_fraction(warn_share, "warn_share")
        if not warn_share:
            msg = "warn_share must be in (0, 1], got 0"
            raise ValueError(msg)
        self._patience = check_positive(patience, "patience")
        self._batch_size = batch_size
        self._say = say or write_line
        self._clock = clock
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)  # seconds waited, seconds of the whole step
        self._waited = self._total = 0.0  # sums over _steps
        self._recorded, self._ever_waited, self._ever_total = 0, 0.0, 0.0  # of all steps
        self._starving_for = 0.0
        self._step: tuple[float, float | None] | None = None  # time of the request, and the wait
        self.steps = 0
        self.warned = False
        self.start()

    def start(self) -> None:
        """Start an epoch. The figures leave out its first step, which includes the start of the loader."""
        self._begun, self.waited = self._clock(), 0.0
        self._step = None
        self._is_first = True

    @property
    def seconds(self) -> float:
        """Seconds since the start of the epoch, with its first batch; `waited` are those spent waiting for data."""
        return self._clock() - self._begun

    @property
    def epoch_wait_share(self) -> float:
        """Share of `seconds`, 0 to 1, in which the host waited for data."""
        return self.waited / max(self.seconds, 1e-9)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch, and measure the wait for each batch and the duration of its step.

        The figures leave out the first step of each call, which includes the start of the loader.
        """
        self.start()
        iterator = iter(batches)
        while True:
            try:
                batch = self.next(iterator)
            except StopIteration:
                return
            yield batch

    def next(self, iterator: Iterator[Batch]) -> Batch:
        """Return the next batch, for loops that do not use `watch`; raises StopIteration at the end of the epoch.

        Call `start` before the first batch of each epoch.
        """
        self.ask()
        try:
            return next(iterator)
        finally:
            self.arrived()

    def ask(self) -> None:
        """Record that the loop requests a batch: its wait starts. For loops with hooks.

        This also ends the current step if `ended` was not called. A previous request without a batch is discarded.
        """
        now = self._clock()
        self._end(now)
        self._step = now, None

    def arrived(self) -> None:
        """Record that the batch has arrived: its step starts. Without a call of `ask` before, do nothing."""
        if self._step is not None:
            asked, _ = self._step
            waited = self._clock() - asked
            self._step = asked, waited
            self.waited += waited

    def ended(self) -> None:
        """Record that the step has ended. The time until the next `ask` counts neither as wait nor as step."""
        self._end(self._clock())

    def _end(self, now: float) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        asked, waited = step
        if waited is None:
            return
        if self._is_first:
            self._is_first = False
            self.steps += 1
        else:
            self.record(waited, now - asked)

    def record(self, waited: float, total: float) -> None:
        """Add a step that the caller has timed.

        Parameters
        ----------
        waited : float
            Seconds from the request for the batch until its arrival.
        total : float
            Seconds from the request for the batch until the end of the step, including `waited`.
        """
        steps = self._steps
        if len(steps) == steps.maxlen:
            old_waited, old_total = steps[0]
            self._waited -= old_waited
            self._total -= old_total
        steps.append((waited, total))
        self._waited += waited
        self._total += total
        self._recorded += 1
        self._ever_waited += waited
        self._ever_total += total
        self.steps += 1
        if self._waited >= self._warn_share * self._total and len(steps) > 1:
            self._starving_for += total
            if self._starving_for >= self._patience and not self.warned:
                self.warned = True
                self._say(self._warning())
        else:
            self._starving_for = 0.0

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time, 0 to 1, waiting for data in the last steps; None before the second step."""
        return max(self._waited, 0.0) / self._total if self._steps and self._total > 0 else None

    @property
    def data_wait_ms(self) -> float | None:
        """Mean wait of a step for its data in milliseconds, over the last steps; None before the second step."""
        return 1000 * max(self._waited, 0.0) / len(self._steps) if self._steps else None

    @property
    def step_ms(self) -> float | None:
        """Mean duration of a step in milliseconds with its wait, over the last steps; None before the second step."""
        return 1000 * self._total / len(self._steps) if self._steps else None

    @property
    def images_per_second(self) -> float | None:
        """Images per second over the last steps; None without `batch_size` or before the second step."""
        if self._batch_size is None or not self._steps or self._total <= 0:
            return None
        return self._batch_size * len(self._steps) / self._total

    def summary(self) -> dict[str, Any]:
        """Return the figures over the last steps by name, for a log.

        Returns
        -------
        dict
            `data_wait_share`, `data_wait_ms`, `step_ms` and `images_per_second`, each a float or None.
        """
        return {
            "data_wait_share": self.data_wait_share,
            "data_wait_ms": self.data_wait_ms,
            "step_ms": self.step_ms,
            "images_per_second": self.images_per_second,
        }

    @property
    def share_of_all(self) -> float:
        """Share of the time, 0 to 1, in which the host waited for data in all steps; 0 before the second step."""
        return self._ever_waited / self._ever_total if self._ever_total else 0.0

    def verdict(self) -> str:
        """Return one line on all steps so far: how long they waited for data, and whether the loader keeps up."""
        steps, share = self._recorded, self.share_of_all
        if not steps:
            return "data wait: not measured: there was no step after the first of an epoch"
        starves = f"the loader is too slow; on a GPU this is an upper bound. {_CURE}"
        judged = "the loader keeps up" if share < self._warn_share else starves
        figures = _of_a_step(self._ever_waited / steps, self._ever_total / steps)
        return f"data wait {share:.0%} of the time ({figures}): {judged}"

    def own_cost_ms(self) -> float:
        """Measure and return the time that this monitor adds to a step on this machine, in milliseconds."""
        trial = Monitor(batch_size=1, window=self._steps.maxlen or 2, say=lambda line: None, patience=1e9)
        start = time.perf_counter()
        for _ in trial.watch(range(_OWN_COST_STEPS)):
            pass
        return 1000 * (time.perf_counter() - start) / _OWN_COST_STEPS

    def own_cost_share(self) -> float | None:
        """Return `own_cost_ms` as a share of a step; None before the second step."""
        return self.own_cost_ms() / self.step_ms if self.step_ms else None

    def _warning(self) -> str:
        count = len(self._steps)
        return (
            f"warning: the training waits for its data: {self.data_wait_share:.0%} of the time, for the last "
            f"{self._starving_for:.0f} s ({_of_a_step(self._waited / count, self._total / count)}). {_CURE}"
        )


def _of_a_step(waited: float, total: float) -> str:
    return f"{1000 * waited:.1f} of {1000 * total:.1f} ms per step, measured on the host"

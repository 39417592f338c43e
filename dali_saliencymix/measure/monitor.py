"""A light monitor for training loops: how long a step waits for its data, and one warning when that is long.

It reads a clock twice a step, on the host, and never waits for a GPU. On a GPU that still has work queued, a wait that
the host sees need not be one that the GPU feels: the shares here are an upper bound of the stall, and the tool behind
``python -m dali_saliencymix bottleneck`` measures the stall itself.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dali_saliencymix._checks import check_at_least, check_fraction, check_positive

Batch = TypeVar("Batch")

STARVING_SHARE = 0.2  # of the time: from here on the loader starves the step
_OWN_COST_STEPS = 200
_CURE = "What to do about it: python -m dali_saliencymix bottleneck --help"


def write_line(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(line + "\n")


class Monitor:
    """Data wait, step time and images per second of the last steps of a training.

    Parameters
    ----------
    batch_size : int, optional
        Images in a step, of all processes if the rate is to be that of all of them; without it there is no rate.
    window : int
        How many of the last steps the figures are of.
    warn_share : float
        Share of the time spent waiting, in (0, 1], from which the loader starves the step.
    patience : float
        Seconds for which that has to last before the warning.
    say : callable, optional
        Takes the warning, one line; by default it goes to stderr.
    clock : callable
        Returns seconds.

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
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)  # seconds waited, seconds in all
        self._waited = self._total = 0.0  # sums of what is in there
        self._recorded, self._ever_waited, self._ever_total = 0, 0.0, 0.0  # of all steps
        self._starving_for = 0.0
        self._step: tuple[float, float | None] | None = None  # when its batch was asked for, and the wait once over
        self.steps = 0
        self.warned = False
        self.start()

    def start(self) -> None:
        """Begin an epoch: the first batch after this pays for the loader's start, and the figures leave it out."""
        self._begun, self.waited = self._clock(), 0.0
        self._step = None
        self._is_first = True

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, its first batch included. `waited` are those in which a batch was awaited."""
        return self._clock() - self._begun

    @property
    def epoch_wait_share(self) -> float:
        """Share, 0 to 1, of these seconds in which the host waited for data."""
        return self.waited / max(self.seconds, 1e-9)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches of an epoch, and time how long each takes to come and how long it is used.

        The first batch of each call is left out: it pays for the loader's start.
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
        """Return the next batch, for loops that ask for it themselves: after `start`, and for the end as well."""
        self.ask()
        try:
            return next(iterator)
        finally:
            self.arrived()

    def ask(self) -> None:
        """Note that the loop asks for a batch, for loops that call hooks: the wait for it begins.

        A step that has not `ended` yet ends here; an `ask` before that got no batch is forgotten.
        """
        now = self._clock()
        self._end(now)
        self._step = now, None

    def arrived(self) -> None:
        """Note that the batch has come: the step on it begins. Without `ask` before, nothing is noted."""
        if self._step is not None:
            asked, _ = self._step
            waited = self._clock() - asked
            self._step = asked, waited
            self.waited += waited

    def ended(self) -> None:
        """Note that the step has ended: what comes until the next `ask` counts neither as wait nor as step."""
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
        """Take in a step, for loops that `watch` does not suit.

        Parameters
        ----------
        waited : float
            Seconds from asking for the batch until it came.
        total : float
            Seconds from asking for the batch until the step's end, of which `waited` is a part.
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
        """Share, 0 to 1, of the last steps' time in which the host waited for data; None before the second step."""
        return max(self._waited, 0.0) / self._total if self._steps and self._total > 0 else None

    @property
    def data_wait_ms(self) -> float | None:
        """Milliseconds that a step waited for its data, on average over the last steps."""
        return 1000 * max(self._waited, 0.0) / len(self._steps) if self._steps else None

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of a step with its wait, on average over the last steps."""
        return 1000 * self._total / len(self._steps) if self._steps else None

    @property
    def images_per_second(self) -> float | None:
        """Images per second over the last steps; None without a batch size, or before the second step."""
        if self._batch_size is None or not self._steps or self._total <= 0:
            return None
        return self._batch_size * len(self._steps) / self._total

    def summary(self) -> dict[str, Any]:
        """Return the figures by name, for a log."""
        return {
            "data_wait_share": self.data_wait_share,
            "data_wait_ms": self.data_wait_ms,
            "step_ms": self.step_ms,
            "images_per_second": self.images_per_second,
        }

    @property
    def share_of_all(self) -> float:
        """Share, 0 to 1, of the time of all steps so far in which the host waited for data; 0 before the second."""
        return self._ever_waited / self._ever_total if self._ever_total else 0.0

    def verdict(self) -> str:
        """Say in one line what all steps so far show: how long they waited for data, and what to do about it."""
        steps, share = self._recorded, self.share_of_all
        if not steps:
            return "data wait: not measured: no step was seen but the first of an epoch"
        starves = f"the loader starves the step; on a GPU this is an upper bound. {_CURE}"
        judged = "the loader keeps up" if share < self._warn_share else starves
        figures = _of_a_step(self._ever_waited / steps, self._ever_total / steps)
        return f"data wait {share:.0%} of the time ({figures}): {judged}"

    def own_cost_ms(self) -> float:
        """Measure what this monitor adds to a step on this machine, in milliseconds."""
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
            f"warning: the training waits for its data: {self.data_wait_share:.0%} of the time, and that for "
            f"{self._starving_for:.0f} s ({_of_a_step(self._waited / count, self._total / count)}). {_CURE}"
        )


def _of_a_step(waited: float, total: float) -> str:
    return f"{1000 * waited:.1f} of {1000 * total:.1f} ms a step, as the host sees it"

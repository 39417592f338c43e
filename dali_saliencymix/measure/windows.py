"""Measure a loader, a step, or both together, in interleaved windows, on all processes together.

The device is synchronised only at window boundaries. Prefetched batches are discarded before each window. After a
window, there is a pause in which the loader fills its queue again, so that it does not do so in the next window.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from dali_saliencymix.measure.figures import LEAST_ROUNDS
from dali_saliencymix.measure.processes import agree, are_several, gather, is_lost_connection, longest
from dali_saliencymix.measure.results import one_line
from dali_saliencymix.measure.rounds import in_turns

Step = Callable[[Any], Any]
T = TypeVar("T")

MOST_STEPS = 500  # in one window
LEAST_SECONDS = 0.08  # of one window: the time of a single short batch is too noisy
MOST_REST = 2.0  # seconds of the pause after a window


class MeasurementError(ValueError):
    """Raised if something cannot be measured. The message says what and why in one line."""


@contextlib.contextmanager
def in_one_line(what: str, explain: Callable[[Exception], str] = one_line) -> Iterator[None]:
    """Turn an error of the block into a `MeasurementError` of one line that starts with `what`."""
    try:
        yield
    except (MeasurementError, StopIteration):
        raise
    except Exception as error:
        if are_several() and is_lost_connection(error):  # the other process failed and reports why
            raise
        msg = f"{what}: {explain(error)}"
        raise MeasurementError(msg) from error


# What is measured.


class Batches:
    """An endless stream of the batches of a loader, epoch after epoch, without the very first one.

    Parameters
    ----------
    loader : iterable
        One iteration over it is one epoch. An iterator cannot start again, and can be used until it ends.
    nominal : int, optional
        Images in a full batch; by default those of the first batch.
    ahead : int
        Batches that the loader may prefetch.
    """

    def __init__(self, loader: Iterable[Any], *, nominal: int | None = None, ahead: int = 2) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._given = 0  # batches of this epoch so far
        self.ahead = ahead
        self.epochs = 0
        self.epoch_length = _length(loader)
        first = self.next()
        found = nominal or images_in(first)
        if found is None:
            msg = f"the number of images in a batch of type {type(first).__name__} is unknown; give the batch size"
            raise MeasurementError(msg)
        self.nominal = found

    def next(self) -> Any:
        """Return the next batch; after the end of an epoch, the first of the next one."""
        while True:
            try:
                with in_one_line("the loader failed"):
                    if self._iterator is None:
                        self._iterator = iter(self._loader)
                        self.epochs += 1
                    batch = next(self._iterator)
            except StopIteration:
                if not self._given:
                    msg = "the loader produces no batches" if self.epochs == 1 else _ended(self.epochs)
                    raise MeasurementError(msg) from None
                self.epoch_length, self._given, self._iterator = self._given, 0, None
                continue
            self._given += 1
            return batch

    def discard_prefetched(self) -> None:
        """Discard the prefetched batches, and one more, which may have been in progress."""
        for _ in range(self.ahead + 1):
            self.next()

    def size(self, batch: Any) -> float:
        """Return the size of a batch as a share of a full one."""
        return (images_in(batch) or self.nominal) / self.nominal


def _length(loader: Any) -> int | None:
    """Return the number of batches in an epoch, or None if the loader has no length."""
    try:
        return len(loader) or None
    except Exception:  # any error means that there is no length; batches are counted until the end of the epoch
        return None


def _ended(epochs: int) -> str:
    return (
        f"the loader ended after {epochs - 1} epoch{'s' if epochs > 2 else ''} and produces no more batches; "
        "it must support repeated iteration: return a DataLoader or a list, not a generator or an iterator"
    )


def images_in(batch: Any) -> int | None:
    """Return the number of images in a batch: the length of its first array that has one; None if there is none.

    Examples
    --------
    >>> import numpy as np
    >>> images_in({"image": np.zeros((4, 3, 8, 8)), "label": np.zeros(4)})
    4
    """
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        found = (images_in(part) for part in batch)
        return next((count for count in found if count is not None), None)
    if getattr(batch, "ndim", None) == 0 or isinstance(batch, (str, bytes)):
        return None
    try:
        return len(batch)
    except TypeError:
        return None


def copied(batch: Any, *, tensors: bool) -> Any:
    """Return a batch in new containers of the same types; with `tensors` these are copied too."""
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        for name in list(new):
            if (part := copied(new[name], tensors=tensors)) is not new[name]:
                new[name] = part
        return new
    if isinstance(batch, (list, tuple)):
        parts = [copied(part, tensors=tensors) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    torch = sys.modules.get("torch")
    if tensors and torch is not None and isinstance(batch, torch.Tensor):
        return batch.clone(memory_format=torch.preserve_format)
    return batch


@dataclass
class Subject:
    """What is measured: a loader, a training step, or both together as in a training."""

    batches: Batches | None = None
    step: Step | None = None
    constant: Any = None  # the batch for a step without a loader
    update: int = 1  # batches in an update of the weights
    waits: list[list[float]] = field(default_factory=list)  # ms until the batch arrived, by window and step
    totals: list[list[float]] = field(default_factory=list)  # ms of the whole step, by window and step

    @property
    def ahead(self) -> int:
        """Number of batches that are prefetched."""
        return self.batches.ahead if self.batches else 0

    @property
    def epoch(self) -> int:
        """Number of batches in an epoch; 1 if unknown."""
        return (self.batches and self.batches.epoch_length) or 1

    def settle(self) -> None:
        """Discard prefetched batches and do one step, or two with a loader, to fill its queue as in a training."""
        if self.batches:
            self.batches.discard_prefetched()
        if self.step:
            for _ in range(2 if self.batches else 1):
                self._one()

    def run(self, count: int) -> float:
        """Process `count` batches; return their number as full batches."""
        waits, totals, done = zip(*(self._one() for _ in range(count)), strict=True)
        self.waits.append(list(waits))
        self.totals.append(list(totals))
        return sum(done)

    def _one(self) -> tuple[float, float, float]:
        start = time.perf_counter()
        batch = self.batches.next() if self.batches else self.constant
        arrived = time.perf_counter()
        size = self.batches.size(batch) if self.batches else 1.0
        if self.step:
            with in_one_line("the training step failed"):
                self.step(copied(batch, tensors=False))  # a step may modify the containers
        return 1000 * (arrived - start), 1000 * (time.perf_counter() - start), size


# How it is measured.


class Windows(NamedTuple):
    """Milliseconds per batch of each subject, one value for each round; and the number of batches in a window."""

    ms: dict[str, list[float]]
    steps: dict[str, int]


@dataclass(frozen=True)
class Meter:
    """Measures subjects in windows; `synchronise` waits for the device, `notify` is called with lines of text."""

    synchronise: Callable[[], None] = lambda: None
    notify: Callable[[str], None] = lambda line: None

    def in_turns(self, subjects: Mapping[str, Subject], *, seconds: float, rounds: int = LEAST_ROUNDS) -> Windows:
        """Measure subjects, by name, in at most `rounds` rounds, with one window of each subject in each round.

        `seconds` is the approximate total duration, which determines the length of the windows. There are always at
        least `LEAST_ROUNDS` rounds and one batch in a window, regardless of `seconds`.

        Raises
        ------
        MeasurementError
            If a loader or a step fails.
        ValueError
            If `rounds` is less than `LEAST_ROUNDS`.
        """
        if rounds < LEAST_ROUNDS:
            msg = f"rounds must be at least {LEAST_ROUNDS}, got {rounds}"
            raise ValueError(msg)
        start = time.perf_counter()
        share = seconds / (rounds + 2) / max(len(subjects), 1)  # of a subject in a round; two more for the warm-up
        batch, around = {}, {}  # seconds of a batch, and around a window
        for name, subject in subjects.items():
            batch[name], around[name] = self._tried(subject, share)
        # Medians of window means are comparable only if the windows have equally many steps: same count with and
        # without the loader.
        stepping = [name for name, subject in subjects.items() if subject.step]
        steps: dict[str, int] = {}
        for names in (stepping, *([name] for name in subjects if name not in stepping)):
            lasts = {name: max(share - around[name], LEAST_SECONDS) for name in names}
            count = min((int(lasts[name] / batch[name]) for name in names), default=1)
            update = math.lcm(*(subjects[name].update for name in names))
            count = max(min(count, MOST_STEPS) // update, 1) * update
            epoch = math.lcm(update, *(agree(subjects[name].epoch, max) for name in names))
            if all(epoch * batch[name] <= 2 * share for name in names):  # whole epochs include the cost of starting one
                count = max(round(count / epoch), 1) * epoch
            steps |= dict.fromkeys(names, count)
        needed = LEAST_ROUNDS * sum(around[name] + steps[name] * batch[name] for name in subjects)
        if needed > 1.5 * seconds:
            self.notify(f"batches are slow here: this part will take about {needed:.0f} s")
        for subject in subjects.values():
            subject.waits.clear()
            subject.totals.clear()
        variants = {name: partial(self._window, subject, steps[name]) for name, subject in subjects.items()}
        left = seconds - (time.perf_counter() - start)
        *_, ms = in_turns(variants, rounds, seconds=left, least=LEAST_ROUNDS, warm_up=False)
        return Windows(ms, steps)

    def _tried(self, subject: Subject, share: float) -> tuple[float, float]:
        """Return the seconds of a batch, and those before and after a window; this also serves as warm-up."""
        count = 1
        while True:
            start = time.perf_counter()
            batch = longest(self._window(subject, count) / 1000)
            around = longest(time.perf_counter() - start - batch * count)
            if batch * count > share and count == 1:  # repeat once, in case it was an outlier
                batch = min(batch, longest(self._window(subject, 1) / 1000))
            epoch = agree(subject.epoch, max)
            least = epoch if epoch * batch <= 4 * share else 1  # whole epochs if they are short
            if count >= least and (batch * count >= share / 8 or count >= MOST_STEPS):
                return batch, around
            count = max(min(4 * count, MOST_STEPS), least)

    def _window(self, subject: Subject, count: int) -> float:
        """Return milliseconds per batch of one window."""
        gather(None)  # before settling: a process that waits after it would refill its queue
        subject.settle()
        self.synchronise()
        start = time.perf_counter()
        done = subject.run(count)
        self.synchronise()
        ms = max(1000 * (time.perf_counter() - start), 1e-6) / done  # positive even if the clock has not advanced
        time.sleep(min(subject.ahead * ms / 1000, MOST_REST))
        return ms


def on_all(action: Callable[[], T]) -> T:
    """Return the result of an action; if it raises a `MeasurementError` on one process, raise it on all of them."""
    failure = None
    try:
        result = action()
    except MeasurementError as error:
        failure = error
    reasons = [why for why in gather(failure and str(failure)) if why is not None]
    if reasons:
        raise MeasurementError(reasons[0]) from failure
    return result

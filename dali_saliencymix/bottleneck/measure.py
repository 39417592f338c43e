"""Windows: how long a thing takes, timed from edge to edge, in turns with the other things that are timed.

Nothing inside a window waits for a GPU; its edges do. What is measured takes turns within each round, so that what
else the machine does hits all of it alike. Before each window what was made in advance is thrown away; after it, a
loader gets the time to fill its queue again, which would else be taken from the next window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dali_saliencymix.bottleneck import ranks
from dali_saliencymix.bottleneck.errors import BottleneckError, one_line
from dali_saliencymix.bottleneck.spread import LEAST_WINDOWS

Step = Callable[[Any], Any]

MOST_STEPS = 500  # in one window
MOST_REST = 2.0  # seconds after one


class Subject(Protocol):
    """Something that can be run for some batches, all of them of the same nominal size."""

    @property
    def ahead(self) -> int:
        """Batches that are made in the background when a window is over."""

    def settle(self) -> None:
        """Get ready for a window: nothing made in advance is left that the window would not pay for."""

    def run(self, count: int) -> float:
        """Work on `count` batches; return how many batches of nominal size that were."""


class Batches:
    """The batches of a loader without end, epoch after epoch.

    Parameters
    ----------
    loader : iterable
        Whose iteration is one epoch. An iterator, which cannot begin again, serves until it ends.
    nominal : int, optional
        Images in a full batch; by default what the first batch has.
    ahead : int
        Batches that the loader may hold ready.
    """

    def __init__(self, loader: Iterable[Any], *, nominal: int | None = None, ahead: int = 2) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._given = 0  # in this epoch
        self.ahead = ahead
        self.epochs = 0
        self.nominal = nominal
        self.first = self.next()
        if self.nominal is None:
            self.nominal = images_in(self.first)
        if self.nominal is None:
            msg = f"cannot see how many images a batch has, which is a {type(self.first).__name__}; give the batch size"
            raise BottleneckError(msg)

    def next(self) -> Any:
        """Return the next batch, of the next epoch where this one has ended."""
        while True:
            try:
                if self._iterator is None:
                    self._iterator = iter(self._loader)
                    self.epochs += 1
                batch = next(self._iterator)
            except StopIteration:
                if not self._given:
                    msg = "the loader gives no batches" if self.epochs == 1 else _ended(self.epochs)
                    raise BottleneckError(msg) from None
                self._given = 0
                self._iterator = None
                continue
            except BottleneckError:
                raise
            except Exception as error:
                msg = f"the loader failed: {one_line(error)}"
                raise BottleneckError(msg) from error
            self._given += 1
            return batch

    def drop_ahead(self) -> None:
        """Throw away what was made in advance, and one more, which may have been half made."""
        for _ in range(self.ahead + 1):
            self.next()

    def size(self, batch: Any) -> float:
        """Return a batch as a share of a full one."""
        assert self.nominal is not None
        return (images_in(batch) or self.nominal) / self.nominal


def _ended(epochs: int) -> str:
    return (
        f"the loader ended after {epochs - 1} epoch{'s' if epochs > 2 else ''} and gives no more batches; "
        "it must be possible to iterate over it again: return a DataLoader or a list, not a generator or an iterator"
    )


def images_in(batch: Any) -> int | None:
    """Return how many images a batch has: the length of its first array with a dimension; None if there is none.

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


@dataclass
class LoaderAlone:
    """The loader with nobody who uses its batches."""

    batches: Batches

    @property
    def ahead(self) -> int:
        """Batches in the loader's queue."""
        return self.batches.ahead

    def settle(self) -> None:
        """Empty its queue."""
        self.batches.drop_ahead()

    def run(self, count: int) -> float:
        """Take batches."""
        return sum(self.batches.size(self.batches.next()) for _ in range(count))


@dataclass
class StepAlone:
    """The training step on one batch, again and again; `group` batches make an update."""

    step: Step
    batch: Any
    group: int = 1
    ahead: int = 0

    def settle(self) -> None:
        """Do one step, which warms the caches that another subject has filled."""
        self.run(1)

    def run(self, count: int) -> float:
        """Train."""
        for _ in range(count):
            take_step(self.step, self.batch)
        return count


@dataclass
class EndToEnd:
    """The loader and the step, as in a training.

    Attributes
    ----------
    group : int
        Batches that make an update.
    waits, totals : list of list of float
        Of each window, for each of its steps: milliseconds that the host waited for the batch, and of the whole step.
    """

    step: Step
    batches: Batches
    group: int = 1
    waits: list[list[float]] = field(default_factory=list)
    totals: list[list[float]] = field(default_factory=list)

    @property
    def ahead(self) -> int:
        """Batches in the loader's queue."""
        return self.batches.ahead

    def settle(self) -> None:
        """Empty the queue, then do two steps, so that the queue is as a training would have it."""
        self.batches.drop_ahead()
        for _ in range(2):
            take_step(self.step, self.batches.next())

    def run(self, count: int) -> float:
        """Train on what the loader gives."""
        done, waits, totals = 0.0, [], []
        for _ in range(count):
            start = time.perf_counter()
            batch = self.batches.next()
            arrived = time.perf_counter()
            take_step(self.step, batch)
            done += self.batches.size(batch)
            waits.append(1000 * (arrived - start))
            totals.append(1000 * (time.perf_counter() - start))
        self.waits.append(waits)
        self.totals.append(totals)
        return done


def take_step(step: Step, batch: Any) -> None:
    """Run a step; what it raises becomes one line."""
    try:
        step(batch)
    except Exception as error:
        if ranks.is_lost(error):  # it is the other process that has failed, and says why
            raise
        msg = f"the training step failed: {one_line(error)}"
        raise BottleneckError(msg) from error


@dataclass
class Windows:
    """What was timed: milliseconds per batch in each window, one in each round, with the batches that each had."""

    ms: list[float] = field(default_factory=list)
    steps: int = 0


def measure_in_turns(
    subjects: Mapping[str, Subject],
    *,
    seconds: float,
    rounds: int = 9,
    synchronise: Callable[[], None] = lambda: None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Windows]:
    """Time subjects in rounds, each subject one window in each round.

    Parameters
    ----------
    subjects : mapping from str to Subject
        What is timed, in this order.
    seconds : float
        Time for all of it. The windows are made as long as fits; they have at least one batch, and there are at
        least five rounds, however long that takes.
    rounds : int
        Most windows of each subject, at least 5.
    synchronise : callable
        Waits until the device has done all that was asked of it; called at the edges of windows only.
    notify : callable
        Is told in a sentence when it will take much longer than `seconds`.

    Returns
    -------
    dict from str to Windows
        The same number of windows for all subjects, warm-up not among them.
    """
    if rounds < LEAST_WINDOWS:
        msg = f"rounds must be at least {LEAST_WINDOWS}, got {rounds}"
        raise ValueError(msg)
    start = time.perf_counter()
    counts, settling, batch = {}, {}, {}  # batches of a window; seconds before and after one, and of one batch
    share = seconds / (rounds + 1) / max(len(subjects), 1)  # of a subject in a round
    for name, subject in subjects.items():
        subject.settle()  # warm-up, not counted; nor is the window that follows
        one = agree_longest(_window(subject, 1, synchronise) / 1000)
        if one > share:  # was that bad luck?
            subject.settle()
            one = min(one, agree_longest(_window(subject, 1, synchronise) / 1000))
        batch[name], settling[name] = one, 2 * one + _rest(subject, one)
        counts[name] = min(max(int((share - settling[name]) / one), 1), MOST_STEPS)
        time.sleep(_rest(subject, one))
    # Steps that come one after the other in one window and alone in another would not be comparable: where single steps
    # are slow at times, the median of means over more of them is larger. And each has its share of updates.
    stepping = {name: subject.group for name, subject in subjects.items() if isinstance(subject, (StepAlone, EndToEnd))}
    for name, group in stepping.items():
        counts[name] = max(min(counts[other] for other in stepping) // group, 1) * group
    lasts = sum(settling[name] + counts[name] * batch[name] for name in subjects)
    if LEAST_WINDOWS * lasts > 1.5 * seconds:
        notify(f"a batch takes long here: this part will need about {LEAST_WINDOWS * lasts:.0f} s")
    found = {name: Windows(steps=count) for name, count in counts.items()}
    for subject in subjects.values():
        if isinstance(subject, EndToEnd):
            subject.waits.clear()
            subject.totals.clear()
    for number in range(rounds):
        passed = agree_longest(time.perf_counter() - start)
        if number >= LEAST_WINDOWS and passed * (number + 1) / max(number, 1) > 1.1 * seconds:
            break
        for name, subject in subjects.items():
            subject.settle()
            found[name].ms.append(_window(subject, counts[name], synchronise))
            time.sleep(_rest(subject, found[name].ms[-1] / 1000))
    return found


def _rest(subject: Subject, seconds: float) -> float:
    """Return for how many seconds to leave a subject alone that takes `seconds` a batch."""
    return min(subject.ahead * seconds, MOST_REST)


def agree_longest(seconds: float) -> float:
    """Return the longest time of all processes: they have to take the same number of steps."""
    return ranks.agree(max(seconds, 1e-6), max)


def _window(subject: Subject, count: int, synchronise: Callable[[], None]) -> float:
    """Return milliseconds per batch of one window."""
    ranks.meet()
    synchronise()
    start = time.perf_counter()
    done = subject.run(count)
    synchronise()
    return 1000 * (time.perf_counter() - start) / done

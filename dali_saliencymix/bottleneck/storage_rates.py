"""How fast batches come when their files are not in memory, beside the same with the files in memory."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dali_saliencymix.bottleneck import ranks, storage
from dali_saliencymix.bottleneck.errors import BottleneckError
from dali_saliencymix.bottleneck.measure import Batches
from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.bottleneck.spread import LEAST_WINDOWS

T = TypeVar("T")

PASSES = LEAST_WINDOWS
MOST_BYTES = 4 << 30
MOST_FILES = 20_000


@dataclass
class StorageRates:
    """Times of passes over the files, ms per batch, and why there are none where there are none.

    A pass begins with a new loader, which has nothing ready, and reads ahead of the batches that it gives. How much was
    read from storage is seen by what is in memory after the pass: the time of a cold pass is that of as many batches.

    Attributes
    ----------
    cold_ms : list of float
        The whole loader, with no file in memory.
    read_cold_ms : list of float
        The reading alone, likewise, where the loader can be cut.
    warm_ms : list of float
        The whole loader, with all files in memory, where it cannot be cut. Each goes with the cold pass before it: what
        that one took more is the reading.
    batches : int
        Batches of one pass.
    not_measured : str, optional
        The reason; then there are no times.
    """

    cold_ms: list[float] = field(default_factory=list)
    read_cold_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    batches: int = 0
    not_measured: str | None = None

    def from_storage(self, loader_ms: float) -> tuple[float, ...] | None:
        """Return what the loader takes for a batch from storage, of what it takes from memory in a window."""
        # A loader that begins may have to start processes first: both kinds of passes have that, and windows do not.
        pairs = zip(self.cold_ms, self.warm_ms, strict=True) if self.warm_ms else ()
        return _at_least(loader_ms, [loader_ms + cold - warm for cold, warm in pairs] or self.cold_ms)

    def reading(self, read_ms: float) -> tuple[float, ...] | None:
        """Return what reading alone takes for a batch from storage, of what it takes from memory in a window."""
        return _at_least(read_ms, self.read_cold_ms)


def _at_least(warm_window: float, cold: list[float]) -> tuple[float, ...] | None:
    # Storage does not make a loader faster; what looks so is noise.
    return tuple(max(warm_window, ms) for ms in cold) or None


def measure_storage(
    source: Source,
    *,
    images: int,
    loader_ms: float,
    read_cut: Callable[[], Any] | None,
    seconds: float,
    synchronise: Callable[[], None],
) -> StorageRates:
    """Time passes over the source's files: two kinds in turns, by which the cost of reading from storage can be told.

    Each kind starts from files that were dropped from memory, or read into it; at the end all are in memory again.

    Parameters
    ----------
    source : Source
        With its files.
    images : int
        In a batch.
    loader_ms : float
        What a batch takes from memory, to choose the length of a pass.
    read_cut : callable, optional
        Makes the pipeline that only reads.
    seconds : float
        For all passes.
    synchronise : callable
        Waits for the device.
    """
    files = source.files
    why = None
    if not files:
        why = "which files the loader reads is not known; --files says so"
    elif len(files) > MOST_FILES or source.dataset_bytes is None:
        why = f"{len(files)} files are too many to drop from memory, or cannot be seen; --files names a part of them"
    elif sum(os.stat(file).st_size for file in files) > MOST_BYTES:
        why = f"more than {MOST_BYTES >> 30} GiB of files; --files names a part of them"
    why = ranks.agree(why, _first)
    if why or not files:
        return StorageRates(not_measured=why)

    share = seconds / (2 * PASSES + 1)
    fits = int(1000 * share / loader_ms)
    found = StorageRates(batches=min(max(fits, 2), max(len(files) // images // ranks.count(), 1), 100))
    found.batches = ranks.agree(found.batches, min)
    kinds: list[tuple[list[float], Callable[[], Iterable[Any]], bool]] = [
        (found.cold_ms, lambda: source.open({}), True)
    ]
    if read_cut:
        kinds.append((found.read_cold_ms, lambda: PipelineBatches(read_cut(), raw=True), True))
    else:
        kinds.append((found.warm_ms, lambda: source.open({}), False))
    try:
        for times, open_it, cold in kinds * PASSES:
            loader, why = _agreed(open_it)  # what is slow to make is made before the clock starts
            why = why or _prepare(files, cold=cold)
            if why or loader is None:
                return StorageRates(not_measured=why)
            passed, why = _agreed(functools.partial(_pass, loader, found.batches, images, synchronise))
            if why or passed is None:
                return StorageRates(not_measured=why)
            taken, given = passed
            if cold:
                read = max(given, (storage.resident_share(files) or 0) * len(files) / images / ranks.count())
            times.append(ranks.agree(taken / read, max))  # a warm pass reads ahead as far as the cold one before it
    finally:
        with contextlib.suppress(OSError):
            storage.read_into_memory(files)  # what is measured after this expects them there
    return found


def _agreed(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what an action gives, and why it failed, on this process or another one: none goes on without the rest."""
    result = why = None
    try:
        result = action()
    except BottleneckError as error:
        why = str(error)
    return result, ranks.agree(why, _first)


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _prepare(files: list[str], *, cold: bool) -> str | None:
    """Bring files into memory or out of it, on all processes; return why that failed."""
    ranks.meet()
    why = None
    if cold:
        why = storage.why_not_dropped(files)
    else:
        try:
            storage.read_into_memory(files)
        except OSError as error:
            why = f"the files could not be read ({error})"
    return ranks.agree(why, _first)


def _pass(loader: Iterable[Any], count: int, images: int, synchronise: Callable[[], None]) -> tuple[float, float]:
    """Return how many ms the next batches of a loader took, and how many full batches they make up."""
    start = time.perf_counter()
    batches = Batches(loader, nominal=images)
    batches.first = None
    done = 1.0
    for _ in range(count - 1):
        done += batches.size(batches.next())
    synchronise()
    return 1000 * (time.perf_counter() - start), done

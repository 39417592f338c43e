"""How fast batches come when their files are not in memory, beside the same with the files in memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.measure import page_cache
from dali_saliencymix.measure.figures import LEAST_ROUNDS
from dali_saliencymix.measure.processes import agree, first_reason, gather
from dali_saliencymix.measure.windows import Batches, MeasurementError

T = TypeVar("T")

PASSES = LEAST_ROUNDS
MOST_BYTES = 4 << 30
MOST_FILES = 20_000


@dataclass
class StorageRates:
    """Milliseconds per batch of passes over the files, or the reason why there are none.

    A pass begins with a new loader, which has nothing ready, and reads ahead of the batches that it gives. How much was
    read from storage is seen by what is in memory after the pass: the time of a cold pass is that of as many batches.
    """

    cold_ms: list[float] = field(default_factory=list)  # the whole loader, with no file in memory
    read_cold_ms: list[float] = field(default_factory=list)  # reading alone, likewise, where the loader can be cut;
    warm_ms: list[float] = field(default_factory=list)  # where it cannot: the whole loader, with all files in memory
    batches: int = 0  # of one pass
    not_measured: str | None = None

    def from_storage(self, loader_ms: float) -> tuple[float, ...] | None:
        """Return what the loader takes for a batch from storage, of what it takes from memory in a window."""
        # A loader that begins may have to start processes first: both kinds of passes have that, and windows do not.
        pairs = zip(self.cold_ms, self.warm_ms, strict=True) if self.warm_ms else ()
        cold_ms = [loader_ms + cold - warm for cold, warm in pairs] or self.cold_ms
        # Storage does not make a loader faster; what looks so is noise.
        return tuple(max(loader_ms, ms) for ms in cold_ms) or None

    def reading(self, read_ms: float) -> tuple[float, ...] | None:
        """Return what reading alone takes for a batch from storage, of what it takes from memory in a window."""
        return tuple(max(read_ms, ms) for ms in self.read_cold_ms) or None


def measure_storage(
    source: Source,
    *,
    images: int,
    loader_ms: float,
    read_cut: Callable[[], Any] | None,
    seconds: float,
    synchronise: Callable[[], None],
) -> StorageRates:
    """Time passes over the source's files: two kinds in turns, which tell what reading from storage costs.

    Each kind starts from files that were dropped from memory, or read into it; at the end all are in memory again.
    `loader_ms`, what a batch of `images` takes from memory, chooses the length of a pass; `read_cut` makes the pipeline
    that only reads, where there is one.
    """
    files = source.files
    why = None
    if not files:
        why = "which files the loader reads is not known; --files says so"
    elif len(files) > MOST_FILES or source.dataset_bytes is None:
        why = f"{len(files)} files are too many to drop from memory, or cannot be seen; --files names a part of them"
    elif sum(os.stat(file).st_size for file in files) > MOST_BYTES:
        why = f"more than {MOST_BYTES >> 30} GiB of files; --files names a part of them"
    why = first_reason(why)
    if why or not files:
        return StorageRates(not_measured=why)

    world = len(gather(None))
    fits = int(1000 * seconds / (2 * PASSES + 1) / loader_ms)
    count = agree(min(max(fits, 2), max(len(files) // images // world, 1), 100), min)
    found = StorageRates(batches=count)

    whole = partial(source.open, {})
    kinds: list[tuple[list[float], Callable[[], Iterable[Any]], bool]] = [(found.cold_ms, whole, True)]
    if read_cut:
        kinds.append((found.read_cold_ms, lambda: PipelineBatches(read_cut(), raw=True), True))
    else:
        kinds.append((found.warm_ms, whole, False))
    try:
        for times, open_it, cold in kinds * PASSES:
            loader, why = _on_all(open_it)  # what is slow to make is made before the clock starts
            _, why = (None, why) if why else _on_all(partial(_prepare, files, cold=cold))
            if why or loader is None:
                return StorageRates(not_measured=why)
            passed, why = _on_all(partial(_pass, loader, count, images, synchronise))
            if why or passed is None:
                return StorageRates(not_measured=why)
            taken, given = passed
            if cold:
                read = max(given, (page_cache.resident_share(files) or 0) * len(files) / images / world)
            times.append(agree(taken / read, max))  # a warm pass reads ahead as far as the cold one before it
    finally:
        with contextlib.suppress(OSError):
            page_cache.read_into_memory(files)  # what is measured after this expects them there
    return found


def _on_all(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what an action gives, and why it failed on this process or another: none continues without the rest."""
    result = why = None
    try:
        result = action()
    except MeasurementError as error:
        why = str(error)
    return result, first_reason(why)


def _prepare(files: list[str], *, cold: bool) -> None:
    """Bring files into memory or out of it."""
    gather(None)
    if cold:
        if why := page_cache.why_not_dropped(files):
            raise MeasurementError(why)
        return
    try:
        page_cache.read_into_memory(files)
    except OSError as error:
        msg = f"the files could not be read ({error})"
        raise MeasurementError(msg) from error


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

"""Measure the rate of batches from storage, with files that were dropped from memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.measure import page_cache
from dali_saliencymix.measure.figures import LEAST_ROUNDS
from dali_saliencymix.measure.processes import agree, gather
from dali_saliencymix.measure.windows import Batches, MeasurementError, Meter, on_all

PASSES = LEAST_ROUNDS
MOST_BYTES = 4 << 30
MOST_FILES = 20_000


@dataclass
class StorageRates:
    """Milliseconds per batch in passes over the files, or the reason why they were not measured.

    A pass starts with a new loader, which has prefetched nothing, and which reads ahead of the batches that it returns.
    The files that are in memory after a cold pass are those that it read from storage, so the time of the pass is
    divided by that many batches.
    """

    cold_ms: list[float] = field(default_factory=list)  # the whole loader, no files in memory
    read_cold_ms: list[float] = field(default_factory=list)  # reading alone, no files in memory, if it can be split
    warm_ms: list[float] = field(default_factory=list)  # the whole loader, all files in memory, if it cannot be split
    batches: int = 0  # in one pass
    not_measured: str | None = None

    def from_storage(self, loader_ms: float) -> tuple[float, ...] | None:
        """Return the loader's ms per batch from storage; `loader_ms` is that from memory, measured in windows."""
        # Passes include the start of the loader's processes, and windows do not: the difference of passes cancels it.
        pairs = zip(self.cold_ms, self.warm_ms, strict=True) if self.warm_ms else ()
        cold_ms = [loader_ms + cold - warm for cold, warm in pairs] or self.cold_ms
        # Storage cannot make a loader faster: anything below `loader_ms` is noise.
        return tuple(max(loader_ms, ms) for ms in cold_ms) or None

    def reading(self, read_ms: float) -> tuple[float, ...] | None:
        """Return the ms per batch of reading alone from storage; `read_ms` is that from memory, measured in windows."""
        return tuple(max(read_ms, ms) for ms in self.read_cold_ms) or None


def measure_storage(
    source: Source, *, images: int, loader_ms: float, read_cut: Callable[[], Any] | None, seconds: float, meter: Meter
) -> StorageRates:
    """Measure the cost of reading a source's files from storage, in interleaved passes of two kinds.

    Before each pass, the files are dropped from memory or read into it. At the end, all files are in memory again. The
    length of a pass follows from `seconds` for all passes, and from `loader_ms`, the milliseconds per batch with files
    in memory. `read_cut` returns the pipeline that only reads, if the source can be split.

    Raises
    ------
    MeasurementError
        If storage cannot be measured on one of the processes; it is then raised on all of them.
    """
    files = on_all(lambda: _measurable_files(source))
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
            loader = on_all(open_it)  # the pass does not include the creation of the loader
            on_all(partial(_prepare, files, cold=cold))
            taken, given = on_all(partial(_pass, loader, count, images, meter))
            if cold:
                read = max(given, (page_cache.resident_share(files) or 0) * len(files) / images / world)
            times.append(agree(taken / read, max))  # also for the following warm pass, which reads ahead as far
    finally:
        with contextlib.suppress(OSError):
            page_cache.read_into_memory(files)  # later measurements expect them there
    return found


def _measurable_files(source: Source) -> list[str]:
    """Return the files of a source, if they are known and not too large."""
    files = source.files
    if not files:
        msg = "the files of the loader are not known; name them with --files"
    elif len(files) > MOST_FILES or source.dataset_bytes is None:
        msg = f"{len(files)} files are too many, or their size is unknown; name some of them with --files"
    elif sum(os.stat(file).st_size for file in files) > MOST_BYTES:
        msg = f"more than {MOST_BYTES >> 30} GiB of files; name some of them with --files"
    else:
        return files
    raise MeasurementError(msg)


def _prepare(files: list[str], *, cold: bool) -> None:
    """Drop files from memory, or read them into it."""
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


def _pass(loader: Iterable[Any], count: int, images: int, meter: Meter) -> tuple[float, float]:
    """Return the milliseconds for the next batches of a loader, and their number as full batches."""
    start = time.perf_counter()
    batches = Batches(loader, nominal=images)
    done = 1.0
    for _ in range(count - 1):
        done += batches.size(batches.next())
    meter.synchronise()
    return 1000 * (time.perf_counter() - start), done

"""Multithreading for batches in host memory.

NumPy and compiled kernels release the GIL while they compute, so plain threads are enough. A batch is split into
chunks that fit into a core's cache, which alone makes NumPy faster, and the chunks are divided among the threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dali_saliencymix._array import Array

_num_threads: contextvars.ContextVar[int] = contextvars.ContextVar("num_threads", default=0)


@contextlib.contextmanager
def limited_to(num_threads: int) -> Iterator[None]:
    """Limit `in_chunks` to `num_threads` threads inside the ``with`` block, including the caller; 0 means all cores."""
    token = _num_threads.set(num_threads)
    try:
        yield
    finally:
        _num_threads.reset(token)


def in_chunks(function: Callable[[Array], Array], batch: Array, size: int) -> Array:
    """Return ``function(batch)`` for a function that processes the samples of a NumPy batch independently.

    The function is called on chunks of `size` samples, by as many threads as `limited_to` allows; by default one per
    core.
    """
    results: dict[int, Array] = {}

    def work(chunk: slice) -> None:
        results[chunk.start] = function(batch[chunk])

    for_each_chunk(work, len(batch), size)
    return results[0] if len(results) == 1 else np.concatenate([results[start] for start in sorted(results)])


def for_each_chunk(work: Callable[[slice], None], count: int, size: int) -> None:
    """Call `work` for slices of at most `size` that cover ``range(count)``, on the threads of `in_chunks`."""
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    threads = min(_num_threads.get() or len(os.sched_getaffinity(0)), len(chunks))

    def share(first: int) -> None:
        for chunk in chunks[first::threads]:
            work(chunk)

    others = [_pool(os.getpid()).submit(share, first) for first in range(1, threads)]
    try:
        share(0)
    finally:
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the thread pool of this process. Threads do not survive a fork, so the process id is the cache key."""
    del process  # only part of the key
    return ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 2), thread_name_prefix="dali_saliencymix")

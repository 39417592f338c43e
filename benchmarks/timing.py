"""Time calls on arrays, on a CPU and on a GPU."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any


def array_library(gpu: bool) -> Any:
    """Return CuPy or NumPy."""
    return importlib.import_module("cupy" if gpu else "numpy")


class Timed:
    """Measure the milliseconds of a call on arrays, repeated until the calls take at least `least_ms`.

    On a GPU the time is that between two CUDA events on the current stream, without synchronisation in between. The
    first call, which compiles and allocates, is not timed. If `call` is a `Graph`, the time is that of one of the
    calls in it.
    """

    def __init__(self, call: Callable[[], object], *, gpu: bool, least_ms: float = 5.0) -> None:
        self._call, self._gpu, self._least_ms = call, gpu, least_ms
        self._repeats = 0
        self._calls = call.calls if isinstance(call, Graph) else 1

    def __call__(self) -> float:
        """Return the milliseconds of one call."""
        if self._repeats:
            return self._measured(self._repeats)
        self._call()
        once = self._measured(1)
        self._repeats = min(1000, math.ceil(self._least_ms / max(once, 1e-3)))
        return once

    def _measured(self, repeats: int) -> float:
        if not self._gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                self._call()
            return (time.perf_counter() - start) * 1000 / repeats
        import cupy

        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.get_current_stream().synchronize()
        first.record()
        for _ in range(repeats):
            self._call()
        last.record()
        last.synchronize()
        return cupy.cuda.get_elapsed_time(first, last) / (repeats * self._calls)


class Graph:
    """Capture a number of calls on CuPy arrays as a CUDA graph, to time the work of the GPU without that of the host.

    `call` must enqueue its work on the current stream and must not synchronise. It is captured when the graph is first
    called.
    """

    def __init__(self, call: Callable[[], object], calls: int) -> None:
        self._call, self.calls = call, calls
        self._graph: Any = None

    def __call__(self) -> None:
        """Replay the graph on the current stream."""
        if self._graph is None:
            self._capture()
        self._graph.launch()

    def _capture(self) -> None:
        import cupy

        self._pool = cupy.cuda.MemoryPool()  # the memory that the graph writes to must not be reused
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()  # another stream produced the inputs
        with cupy.cuda.using_allocator(self._pool.malloc), stream:
            self._call()
            stream.synchronize()
            stream.begin_capture()
            try:
                for _ in range(self.calls):
                    self._call()
            finally:
                graph = stream.end_capture()
        self._graph = graph

"""How long the Python functions that DALI calls hold up everything else: their time, and that of the GIL.

While one thread holds the lock no other one can run Python code, such as the training step that feeds a GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from dali_saliencymix._dali import python_operator as operator


class Call(NamedTuple):
    """One call: its time, and the processor time of its thread. Where the two differ it waited, or was held up."""

    wall_seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Record each later call of the Python functions in pipelines that are defined inside this context.

    What DALI does around a call, such as making an array of each sample, is not part of it.
    """
    calls: list[Call] = []
    original = operator._limited

    def timed(*arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        made = original(*arguments)
        calls.append(Call(time.perf_counter() - wall, time.thread_time() - cpu))
        return made

    # What every operator of the package is called through, whoever puts it into the pipeline.
    with mock.patch.object(operator, "_limited", timed):
        yield calls


class Probe(threading.Thread):
    """Measures for how long other threads hold the GIL, while it runs as a context.

    It sleeps for about a tenth of a millisecond again and again. A thread that wakes needs the lock: by how much it
    comes late is how long somebody still held it. Half of a usual sleep is added each time, for the part of the hold
    that it slept through.

    Limits: a hold shorter than a sleep is found at random and counts half to whole. The lock is not taken away from a
    holder meanwhile, so holds are as long as the holder makes them. Where cores are short, waiting for one counts as
    waiting for the lock: compare with the same loader without the function in question, on a quiet machine.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.held_seconds = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Probe:
        self._usual = statistics.median(self._slept() for _ in range(200))
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(10)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        sys.setswitchinterval(self._interval)

    def run(self) -> None:
        """Sleep and wake until the context ends."""
        while not self._over.is_set():
            late = self._slept() - self._usual
            if late > self._usual:
                self.held_seconds += late + self._usual / 2

    @staticmethod
    def _slept() -> float:
        start = time.perf_counter()
        time.sleep(50e-6)
        return time.perf_counter() - start

"""Measure how long the Python functions that DALI calls take, and how long they hold the GIL.

While one thread holds the GIL, no other thread can run Python code, such as the training step that feeds a GPU.
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
    """The wall-clock time of a call and the processor time of its thread; they differ if the call waited."""

    wall_seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Record the calls of the Python functions in pipelines that are defined inside this context.

    The list grows also after the context has ended. The work of DALI around a call, such as making an array of each
    sample, is not included.
    """
    calls: list[Call] = []
    original = operator._limited

    def timed(*arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        made = original(*arguments)
        calls.append(Call(time.perf_counter() - wall, time.thread_time() - cpu))
        return made

    # Every operator of the package is called through this function.
    with mock.patch.object(operator, "_limited", timed):
        yield calls


class Probe(threading.Thread):
    """Measure for how long other threads hold the GIL; used as a context manager.

    The probe sleeps for about a tenth of a millisecond again and again. A thread that wakes needs the GIL, so its delay
    is the time for which another thread still held it. Half of a usual sleep is added to each delay, for the part of
    the hold that the probe slept through.

    Limits: the probe may miss a hold that is shorter than a sleep, and counts between half and all of it otherwise.
    While the probe runs, the interpreter does not force a thread to release the GIL. If cores are scarce, waiting for a
    core counts as waiting for the GIL: compare with the same loader without the function in question, on an idle
    machine.
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

"""Which of three routes computes a step: array operations, Numba or CUDA.

All routes give the same result; where they do not agree to the last bit, the function says so.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dali_saliencymix._array import Namespace, is_host
from dali_saliencymix._checks import check_choice
from dali_saliencymix.packages import is_installed, require

if TYPE_CHECKING:
    from collections.abc import Iterator

ALGORITHMS = ("auto", "array", "kernel")


@dataclass
class GpuRoute:
    """The defaults on a GPU, one line each: turn one on once a measurement on a GPU says that it pays."""

    # DALI passes an operator each input as one array. Off: fn.python_function, with a list of samples for each input.
    whole_batches: bool = False
    # The operator of the training loaders normalises. Off: fn.crop_mirror_normalize does.
    normalise: bool = False


gpu_route = GpuRoute()


@contextlib.contextmanager
def on_gpu(**route: bool) -> Iterator[None]:
    """Change `gpu_route` inside a ``with`` block, in all threads: for tests and measurements.

    A pipeline keeps the `whole_batches` and `normalise` under which it was defined.
    """
    before = {name: getattr(gpu_route, name) for name in route}
    vars(gpu_route).update(route)
    try:
        yield
    finally:
        vars(gpu_route).update(before)


def route_of(algorithm: str, xp: Namespace) -> str:
    """Return what computes with arrays of `xp`: ``"array"``, ``"numba"`` (on a CPU) or ``"cuda"`` (on a GPU).

    ``"auto"`` takes kernels on a GPU, where CuPy brings their compiler, and on a CPU where Numba is installed. A step
    for which there is no kernel of that kind, or none for arguments such as these, takes array operations.
    """
    check_choice(algorithm, "algorithm", ALGORITHMS)
    if algorithm == "array":
        return "array"
    if not is_host(xp):
        return "cuda"
    if _numba_is_installed():
        return "numba"
    if algorithm == "kernel":
        require("numba", by="algorithm='kernel' on a CPU")
    return "array"


@functools.cache
def _numba_is_installed() -> bool:
    return is_installed("numba")

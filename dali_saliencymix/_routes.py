"""Choice of the route that computes a step: array operations, Numba or CUDA.

All routes give the same result. If they are not bit-identical, the docstring of the function says so.
"""

from __future__ import annotations

import functools

from dali_saliencymix._array import Namespace, is_host
from dali_saliencymix._checks import check_choice
from dali_saliencymix.packages import is_installed, require

ALGORITHMS = ("auto", "array", "kernel")


def route_of(algorithm: str, xp: Namespace) -> str:
    """Return the route for arrays of `xp`: ``"array"``, ``"numba"`` (on a CPU) or ``"cuda"`` (on a GPU).

    ``"auto"`` selects kernels on a GPU, where CuPy provides the compiler, and on a CPU if Numba is installed. A step
    without a kernel on this route, or without one for its arguments, falls back to array operations.
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

"""Which of three routes computes a step: array operations, Numba or CUDA.

All routes give the same result; where they do not agree to the last bit, the function says so.
"""

from __future__ import annotations

import functools

from dali_saliencymix._array import Namespace, is_host
from dali_saliencymix._checks import check_choice
from dali_saliencymix.packages import is_installed, require

ALGORITHMS = ("auto", "array", "kernel")


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

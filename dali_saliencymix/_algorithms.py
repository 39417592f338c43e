"""Which of two routes computes a step: array operations, or a kernel that is compiled for it.

The two give the same result; where they do not agree to the last bit, the function says so.
"""

from __future__ import annotations

import functools
import importlib.util

from dali_saliencymix._array import Namespace, is_host
from dali_saliencymix._checks import check_choice

ALGORITHMS = ("auto", "array", "kernel")


def uses_kernel(algorithm: str, xp: Namespace) -> bool:
    """Tell whether arrays of `xp` go to a kernel: Numba's on a CPU, CUDA's on a GPU.

    ``"auto"`` takes Numba where it is installed, and no CUDA kernels: these have not been measured yet.

    Raises
    ------
    ImportError
        If a kernel is asked for on a CPU and Numba is not installed.
    ValueError
        If there is no such algorithm.
    """
    check_choice(algorithm, "algorithm", ALGORITHMS)
    if algorithm == "array" or (algorithm == "auto" and not is_host(xp)):
        return False
    if not is_host(xp) or _numba_is_installed():
        return True
    if algorithm == "kernel":
        msg = (
            "algorithm='kernel' on a CPU needs Numba, which is not installed: pip install 'dali-saliencymix[compiled]'"
        )
        raise ImportError(msg)
    return False


@functools.cache
def _numba_is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None

"""Detection of the array library, NumPy or CuPy.

Array functions are written once, for a namespace `xp` that is either ``numpy`` or ``cupy``. This module never imports
CuPy: a CuPy array can only exist if its owner has already imported CuPy.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Array = Any  # numpy.ndarray | cupy.ndarray; CuPy has no type stubs
Namespace = Any  # the module numpy or cupy


def array_namespace(array: Array) -> Namespace:
    """Return the library of `array`, ``numpy`` or ``cupy``; None for any other object."""
    if isinstance(array, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return None


def is_host(xp: Namespace) -> bool:
    """Return whether arrays of `xp` are in host memory, where reading values needs no synchronisation."""
    return xp is np


class LentStream:
    """Wrapper of another library's ``cudaStream_t`` for ``cupy.cuda.Stream.from_external``."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:  # protocol version, stream
        return 0, self._pointer


def device_of(xp: Namespace) -> int:
    """Return the index of the current device; 0 for host memory."""
    return 0 if is_host(xp) else xp.cuda.runtime.getDevice()


def fft_module(xp: Namespace) -> Any:
    """Return the FFT module for arrays of `xp`; its functions compute float32 input in single precision.

    In host memory it is ``scipy.fft``, which is several times as fast as ``numpy.fft`` on batches of small images.
    """
    if is_host(xp):
        from scipy import fft

        return fft
    return xp.fft


@functools.lru_cache(maxsize=256)
def _constant(xp: Namespace, device: int, build: Callable[..., Any], args: tuple[Any, ...]) -> Array:
    del device  # only part of the key
    constant = xp.asarray(build(*args))
    if not is_host(xp):
        # Other streams will read this array, so the copy must be complete before it enters the cache.
        xp.cuda.get_current_stream().synchronize()
    return constant


def constant(xp: Namespace, build: Callable[..., Any], *args: Any) -> Array:
    """Return the NumPy array ``build(*args)`` as an array of `xp`, cached per device.

    All callers share the array, so they must not write to it.
    """
    return _constant(xp, device_of(xp), build, args)

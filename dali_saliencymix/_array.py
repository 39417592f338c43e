"""Which array library an array belongs to: the only place that asks.

Everything above this module is written once, for a namespace `xp` that is either ``numpy`` or ``cupy``.
CuPy is never imported here: an array can only be a CuPy array if its owner has imported CuPy already.
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
    """Return ``numpy`` or ``cupy``, whichever `array` belongs to; None for anything else."""
    if isinstance(array, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return None


def is_host(xp: Namespace) -> bool:
    """Tell whether arrays of `xp` live in host memory, where looking at values costs no synchronisation."""
    return xp is np


class LentStream:
    """A CUDA stream of another library, its ``cudaStream_t``, as ``cupy.cuda.Stream.from_external`` takes it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:  # version of the protocol, stream
        return 0, self._pointer


def device_of(xp: Namespace) -> int:
    """Return the number of the current device; 0 for host memory."""
    return 0 if is_host(xp) else xp.cuda.runtime.getDevice()


def fft_module(xp: Namespace) -> Any:
    """Return the module with the FFT functions for arrays of `xp`, which keep float32 in single precision.

    In host memory it is SciPy's, which on batches of small images is several times as fast as NumPy's.
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
        # Other streams will read this array: it has to have arrived before anybody can find it.
        xp.cuda.get_current_stream().synchronize()
    return constant


def constant(xp: Namespace, build: Callable[..., Any], *args: Any) -> Array:
    """Return ``build(*args)``, a NumPy array, as an array of `xp`, built and copied once per device.

    The array is shared by all callers and must not be written to.
    """
    return _constant(xp, device_of(xp), build, args)

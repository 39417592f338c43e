"""Compilation and launch of the kernels, and preparation of their array arguments.

NVRTC compiles a kernel on its first use on a device, and CuPy caches the binary on disk. Kernels are launched on CuPy's
current stream, and no function here waits for them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dali_saliencymix._array import Array, Namespace, device_of, is_host

if TYPE_CHECKING:
    from collections.abc import Callable

# Without fused multiply-add, products are rounded before they are added, as in the array functions, so boxes and maps
# are bit-identical. The kernel with an FFT is not bit-identical anyway and may fuse. CuPy compiles all kernels,
# including its own, with -ftz=true, so subnormal numbers are 0 on a GPU on both routes.
_EXACT = ("--fmad=false",)
OPTIONS = {
    "fine_grained": _EXACT,
    "paste": _EXACT,
    "paste_normalised": _EXACT,
    "peaks_and_boxes": _EXACT,
    "small_luma": _EXACT,
    "spectral_residual": (),
}

_INDEX_DTYPES = tuple(map(np.dtype, ("int32", "uint32", "int64", "uint64")))

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)


@functools.cache
def source(file: str) -> str:
    """Return the text of ``file.cu`` with its headers inlined, each once.

    CuPy's cache depends only on the text of a kernel, not on the files that it includes.
    """
    seen = set()

    def expanded(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return _INCLUDE.sub(lambda match: expanded(match[1]), (Path(__file__).parent / name).read_text())

    return expanded(f"{file}.cu")


@functools.cache
def _compiled(file: str, name: str, device: int) -> Any:
    del device  # only part of the key: each device loads the binary
    import cupy

    return cupy.RawModule(code=source(file), options=OPTIONS[file]).get_function(name)


def find_kernel(xp: Namespace, file: str, name: str) -> Any:
    """Return the kernel `name` of ``file.cu``, compiled for the current device: ``kernel(grid, block, arguments)``."""
    if is_host(xp):
        msg = "images and all other arrays must be CuPy arrays for a CUDA kernel, got NumPy arrays"
        raise TypeError(msg)
    return _compiled(file, name, device_of(xp))


GIVEN = object()  # placeholder for an argument that differs from call to call


class Launch:
    """A kernel, ``"file:name"``, or ``"file"`` if both are the same, with its grid and its constant arguments.

    `GIVEN` is a placeholder for each argument that is passed with a call. A Python int is passed as int32.
    """

    def __init__(self, xp: Namespace, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        file, _, name = kernel.partition(":")
        self._name = (xp, file, name or file)
        self._grid, self._block = (blocks,), (threads,)
        self._arguments = [np.int32(argument) if isinstance(argument, int) else argument for argument in arguments]
        self._given = [place for place, argument in enumerate(arguments) if argument is GIVEN]

    def __call__(self, *given: Array | None) -> None:
        """Launch the kernel on the current stream."""
        arguments = self._arguments.copy()
        for place, argument in zip(self._given, given, strict=True):
            arguments[place] = argument
        find_kernel(*self._name)(self._grid, self._block, tuple(arguments))


_Prepared = TypeVar("_Prepared")


def prepared(make: Callable[..., _Prepared]) -> Callable[..., _Prepared]:
    """Cache the launches that ``make(xp, *key)`` returns, for each device and key.

    For three launches per batch, the cache saves 0.05 of 0.19 ms.
    """

    @functools.lru_cache(maxsize=256)
    def kept(xp: Namespace, device: int, *key: Any) -> _Prepared:
        del device  # only part of the key
        return make(xp, *key)

    @functools.wraps(make)
    def launch(xp: Namespace, *key: Any) -> _Prepared:
        return kept(xp, device_of(xp), *key)

    return launch


def blocks_for(count: int, threads: int) -> int:
    """Return the number of blocks of `threads` threads that cover `count` threads."""
    return -(-count // threads)


def with_image_stride(images: Array, xp: Namespace) -> tuple[Array, int]:
    """Return images and the distance between them in bytes.

    There may be gaps between the images of a batch, as in DALI's batches. Each image must be contiguous; otherwise the
    batch is copied.
    """
    if len(images) and images[0].nbytes >= 2**31:
        msg = f"images must be smaller than 2 GiB each for the kernels, got shape {images.shape}"
        raise ValueError(msg)
    if len(images) and not images[0].flags.c_contiguous:
        images = xp.ascontiguousarray(images)
    return images, images.strides[0]


def with_step(values: Array, dtypes: tuple[np.dtype[Any], ...], unit: int) -> tuple[Array, int]:
    """Return a one-dimensional array and the distance between its entries in units of `unit` bytes.

    An array with a dtype not in `dtypes` is converted to the first of them.
    """
    if values.dtype not in dtypes or values.strides[0] % unit:
        values = values.astype(dtypes[0])
    return values, values.strides[0] // unit


def index_with_step(source_index: Array) -> tuple[Array, int]:
    """Return an index of any integer dtype and the distance between its entries in 32-bit words, for the kernels.

    Kernels read the lower half of 64-bit integers, which comes first, since no batch has 2**31 images.
    """
    return with_step(source_index, _INDEX_DTYPES, 4)


def int32_rows(values: Array | None, xp: Namespace) -> Array | None:
    """Return points or boxes as contiguous int32, usually without a copy; None stays None."""
    return None if values is None else xp.ascontiguousarray(values, dtype=xp.int32)

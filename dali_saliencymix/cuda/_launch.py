"""Finding, compiling and launching the kernels; what they need to know about an array.

A kernel is compiled by NVRTC when it is first used on a device, and CuPy keeps the binary on disk. Launches go to
CuPy's current stream, and nothing here waits for them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from dali_saliencymix._array import Array, Namespace, is_host

# Products are rounded before they are added, as in the array functions: boxes and maps then have the same bits. The one
# kernel that goes through an FFT has other bits anyway, and may fuse. CuPy adds -ftz=true, here as for its own kernels:
# on a GPU subnormal numbers are 0 on either route.
_EXACT = ("--fmad=false",)
OPTIONS = {
    "fine_grained": _EXACT,
    "paste": _EXACT,
    "paste_normalised": _EXACT,
    "peaks_and_boxes": _EXACT,
    "small_luma": _EXACT,
    "spectral_residual": (),
}

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)


@functools.cache
def source(file: str) -> str:
    """Return the text of ``file.cu``, with that of the headers it includes in their places, each once.

    CuPy looks at the text of a kernel alone to see whether it has compiled it before, not at the files it includes.
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
    del device  # only part of the key: a binary is loaded on each device
    import cupy

    return cupy.RawModule(code=source(file), options=OPTIONS[file]).get_function(name)


def find_kernel(xp: Namespace, file: str, name: str) -> Any:
    """Return the kernel `name` of ``file.cu``, compiled for the current device: ``kernel(grid, block, arguments)``.

    Raises
    ------
    TypeError
        If `xp` is not CuPy.
    """
    if is_host(xp):
        msg = "images and all other arrays must be CuPy arrays: a CUDA kernel was asked for, got NumPy arrays"
        raise TypeError(msg)
    return _compiled(file, name, xp.cuda.runtime.getDevice())


def launch(xp: Namespace, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
    """Launch a kernel, given as ``"file:name"``, on the current stream. A plain int is passed as a 32-bit one."""
    file, _, name = kernel.partition(":")
    typed = tuple(np.int32(argument) if isinstance(argument, int) else argument for argument in arguments)
    find_kernel(xp, file, name or file)((blocks,), (threads,), typed)


def blocks_for(count: int, threads: int) -> int:
    """Return the number of blocks of `threads` threads that make `count` threads."""
    return -(-count // threads)


def with_image_stride(images: Array, xp: Namespace) -> tuple[Array, np.int64]:
    """Return images, and the bytes from one to the next.

    Images of a batch may lie apart, as DALI's do, but the pixels of one follow each other: others are copied.
    """
    if len(images) and images[0].nbytes >= 2**31:
        msg = f"images must be smaller than 2 GiB each for the kernels, got shape {images.shape}"
        raise ValueError(msg)
    if len(images) and not images[0].flags.c_contiguous:
        images = xp.ascontiguousarray(images)
    return images, np.int64(images.strides[0])


def with_step(values: Array, dtypes: tuple[str, ...], unit: int) -> tuple[Array, int]:
    """Return a one-dimensional array, and the distance of its entries in units of `unit` bytes.

    An array of another dtype than `dtypes` is converted to the first of them.
    """
    if values.dtype.name not in dtypes or values.strides[0] % unit:
        values = values.astype(dtypes[0])
    return values, values.strides[0] // unit


def index_with_step(source_index: Array) -> tuple[Array, int]:
    """Return an index of any integer dtype as the kernels read it, by 32-bit words.

    Of 64 bits they read the lower half, which comes first: no batch has 2**31 images.
    """
    return with_step(source_index, ("int32", "uint32", "int64", "uint64"), 4)


def int32_rows(values: Array | None, xp: Namespace) -> Array | None:
    """Return points or boxes as the kernels read them; they are small, and most often they are so already."""
    return None if values is None else xp.ascontiguousarray(values, dtype=xp.int32)

"""Pixels of mixed batches: `dali_saliencymix.pixels` in CUDA.

Images are (N, H, W, C) CuPy arrays. Batches with gaps between the images are read in place. No input is modified.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, is_host
from dali_saliencymix._cuda.launch import (
    GIVEN,
    Launch,
    blocks_for,
    index_with_step,
    int32_rows,
    prepared,
    with_image_stride,
)

_PASTE_THREADS, _PASTE_CHUNKS = 256, 4  # as in paste.cu


def paste_boxes(images: Array, source_index: Array, boxes: Array, *, source_boxes: Array | None = None) -> Array:
    """Return the result of `dali_saliencymix.paste_boxes`; an index outside the batch wraps around."""
    xp = array_namespace(images)
    mixed = xp.empty(images.shape, images.dtype)
    if not mixed.size:
        return mixed
    images, stride = with_image_stride(images, xp)
    source_index, step = index_with_step(source_index)
    pixel = images.shape[3] * images.dtype.itemsize
    # The widest vector whose size divides the addresses of all rows and images.
    places = _address(images, xp) | _address(mixed, xp) | stride | images.shape[2] * pixel
    vector = next(size for size in (16, 4, 1) if places % size == 0)
    launch = _paste(xp, images.shape[:3], pixel, stride, step, vector)
    launch(images, source_index, int32_rows(boxes, xp), int32_rows(source_boxes, xp), mixed)
    return mixed


@prepared
def _paste(xp: Namespace, shape: tuple[int, int, int], pixel: int, stride: int, index_step: int, vector: int) -> Launch:
    count, height, width = shape
    blocks = blocks_for(height * width * pixel, vector * _PASTE_THREADS * _PASTE_CHUNKS)
    batch = (GIVEN, *shape, pixel, np.int64(stride))
    patches = (GIVEN, index_step, GIVEN, GIVEN)
    return Launch(xp, f"paste:paste_{vector}", count * blocks, _PASTE_THREADS, *batch, *patches, blocks, GIVEN)


def paste_normalised(
    images: Array,
    source_index: Array,
    boxes: Array,
    source_boxes: Array | None,
    mirror: Array | None,
    scaling: Array,
    dtype: np.dtype[Any],
    layout: str,
    out: Array | None = None,
) -> Array:
    """Return the result of `dali_saliencymix.paste_normalised`, bit-identical, in one pass over the pixels.

    `scaling` (2, C) float32 holds the number to subtract from each channel, and then the factor. An index outside the
    batch wraps around.
    """
    xp = array_namespace(images)
    if out is None:
        count, height, width, channels = images.shape
        out = xp.empty((count, channels, height, width) if layout == "CHW" else images.shape, dtype)
    images, stride = with_image_stride(images, xp)
    source_index, step = index_with_step(source_index)
    if mirror is not None:
        mirror = xp.ascontiguousarray(mirror if mirror.dtype == np.bool_ else mirror != 0)
    launch = _paste_normalised(xp, images.shape, stride, step, dtype, layout)
    launch(images, source_index, int32_rows(boxes, xp), int32_rows(source_boxes, xp), mirror, scaling, out)
    return out


@prepared
def _paste_normalised(
    xp: Namespace,
    shape: tuple[int, int, int, int],
    stride: int,
    index_step: int,
    dtype: np.dtype[Any],
    layout: str,
) -> Launch:
    count, height, width, channels = shape
    blocks = blocks_for(height * width * (1 if layout == "CHW" else channels), 256)
    batch = (GIVEN, *shape, np.int64(stride))
    patches = (GIVEN, index_step, GIVEN, GIVEN, GIVEN)
    kernel = f"paste_normalised:paste_normalised_{dtype.name}_{layout}"
    return Launch(xp, kernel, count * blocks, 256, *batch, *patches, GIVEN, blocks, GIVEN)


def _address(array: Array, xp: Namespace) -> int:
    return array.ctypes.data if is_host(xp) else array.data.ptr

"""Peaks and pixels of a batch, as CPU kernels compiled by Numba. Imported only if Numba is installed.

The reference implementations are in `dali_saliencymix.boxes` and `dali_saliencymix.pixels`; the kernels are
bit-identical to them. All kernels release the GIL.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array
from dali_saliencymix._numba.kernel import as_input, kernel
from dali_saliencymix._threads import for_each_chunk

_CHUNK = 4  # images per call of a thread


def most_salient(maps: Array, closeness: Array) -> Array:
    """Return the flat index of the maximum of each map (N, h, w) float32; ties go to the largest `closeness`.

    NaN counts as minus infinity.
    """
    found = np.empty(len(maps), np.int64)
    _most_salient(as_input(maps), closeness, found)
    return found


@kernel
def _most_salient(maps, closeness, found):  # type: ignore[no-untyped-def]
    count, height, width = maps.shape
    tops = np.empty(width, np.float32)  # of the columns, so that the loop vectorises
    for i in range(count):
        _tops_of_columns(maps[i], tops)
        top = tops.max()
        best = 0
        for x in range(width):
            if tops[x] == top:
                for y in range(height):
                    # A value that is not greater than minus infinity is NaN or minus infinity.
                    is_top = maps[i, y, x] == top or (top == -np.inf and not maps[i, y, x] > top)
                    if is_top and closeness[y, x] > best:
                        best = closeness[y, x]
                        found[i] = y * width + x


@kernel
def _tops_of_columns(saliency_map, tops):  # type: ignore[no-untyped-def]
    height, width = saliency_map.shape
    tops[:] = -np.inf
    for y in range(height):
        for x in range(width):
            tops[x] = saliency_map[y, x] if saliency_map[y, x] > tops[x] else tops[x]


def paste_normalised(
    images: Array,
    source_index: Array,
    boxes: Array,
    source_boxes: Array,
    mirror: Array | None,
    scaling: Array,
    layout: str,
    out: Array,
) -> None:
    """Write the float32 result of `dali_saliencymix.paste_normalised` to `out`, without checks.

    `scaling` (2, C) float32 holds the number to subtract from each channel, and then the factor.
    """
    count, height, width, channels = images.shape
    images = as_input(np.ascontiguousarray(images).reshape(count, height, width * channels))
    sources, boxes, source_boxes = (
        as_input(np.ascontiguousarray(each, np.int64)) for each in (source_index, boxes, source_boxes)
    )
    mirrored = np.zeros(count, np.bool_) if mirror is None else mirror != 0
    if layout == "HWC" or channels == 1:
        out = out.reshape(count, 1, height, width * channels)
        scaling = np.tile(scaling, width)  # one entry per number in a row

    def paste(chunk: slice) -> None:
        patches = sources[chunk], boxes[chunk], source_boxes[chunk], mirrored[chunk]
        _paste_normalised(images, chunk.start, *patches, channels, scaling, out[chunk])

    for_each_chunk(paste, count, _CHUNK)


@kernel
def _paste_normalised(images, first, sources, boxes, source_boxes, mirrored, channels, scaling, out):  # type: ignore[no-untyped-def]
    """Fill `out` with the mixed images from index `first` on, as planes (n, C, H, W) or rows (n, 1, H, W C)."""
    count, planes, height, _ = out.shape
    mixed, flipped = np.empty((height, images.shape[2]), np.uint8), np.empty((height, images.shape[2]), np.uint8)
    for i in range(count):
        y0, y1, v0 = boxes[i, 0], boxes[i, 2], source_boxes[i, 0]
        x0, x1, u0 = boxes[i, 1] * channels, boxes[i, 3] * channels, source_boxes[i, 1] * channels
        _copy(images[first + i], mixed)
        _copy(images[sources[i], v0 : v0 + y1 - y0, u0 : u0 + x1 - x0], mixed[y0:y1, x0:x1])
        if mirrored[i]:
            _mirror(mixed, channels, flipped)
        pixels = flipped if mirrored[i] else mixed
        if planes == 1:
            _scale_rows(pixels, scaling, out[i, 0])
        else:
            _scale_planes(pixels, scaling, out[i, 0], out[i, 1], out[i, 2])


@kernel
def _copy(pixels, copied):  # type: ignore[no-untyped-def]
    height, width = copied.shape
    for y in range(height):
        for x in range(width):
            copied[y, x] = pixels[y, x]


@kernel
def _mirror(mixed, channels, flipped):  # type: ignore[no-untyped-def]
    # A signed index could be negative and count from the end, which prevents vectorisation; use unsigned indices.
    height, width = mixed.shape
    last = np.uint64(width - channels)
    for y in range(height):
        if channels == 1:
            for x in range(width):
                flipped[y, x] = mixed[y, last - np.uint64(x)]
        else:
            for x in range(width // 3):
                flipped[y, 3 * x] = mixed[y, last - np.uint64(3 * x)]
                flipped[y, 3 * x + 1] = mixed[y, last - np.uint64(3 * x) + np.uint64(1)]
                flipped[y, 3 * x + 2] = mixed[y, last - np.uint64(3 * x) + np.uint64(2)]


@kernel
def _scale_rows(mixed, scaling, rows):  # type: ignore[no-untyped-def]
    height, width = mixed.shape
    for y in range(height):
        for x in range(width):
            rows[y, x] = (np.float32(mixed[y, x]) - scaling[0, x]) * scaling[1, x]


@kernel
def _scale_planes(mixed, scaling, red, green, blue):  # type: ignore[no-untyped-def]
    # The number of channels and the distance between pixels are literals, and each loop writes to one array, so that
    # the loops vectorise.
    height, width = red.shape
    red_shift, green_shift, blue_shift = scaling[0, 0], scaling[0, 1], scaling[0, 2]
    red_scale, green_scale, blue_scale = scaling[1, 0], scaling[1, 1], scaling[1, 2]
    for y in range(height):
        for x in range(width):
            red[y, x] = (np.float32(mixed[y, 3 * x]) - red_shift) * red_scale
        for x in range(width):
            green[y, x] = (np.float32(mixed[y, 3 * x + 1]) - green_shift) * green_scale
        for x in range(width):
            blue[y, x] = (np.float32(mixed[y, 3 * x + 2]) - blue_shift) * blue_scale

"""Detector steps as CPU kernels compiled by Numba. Imported only if Numba is installed.

Each kernel has a reference implementation in NumPy, in `dali_saliencymix.saliency`, and is bit-identical to it. Each
loop over the pixels of a row writes to one array only, and rows are passed to separate functions. LLVM can then prove
that arrays do not overlap, and vectorises the loops. All kernels release the GIL.

Numba's cache of a kernel depends only on the kernel's own file. After changing a kernel that is called from another
file, delete ``__pycache__``.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, constant
from dali_saliencymix._numba.kernel import as_input, kernel
from dali_saliencymix._tables import BLUE, GREEN, RED, SHIFT, SURROUNDS, tap_indices, tap_weights

_MARGIN = max(SURROUNDS)
_LARGEST_SUM = len(SURROUNDS) * 255


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the result of `dali_saliencymix.saliency.grey.small_luma`, in float32."""
    count, full_height, full_width, _ = images.shape
    grey = np.empty((count, height, width), np.float32)
    rows, columns = constant(np, tap_indices, full_height, height), constant(np, tap_indices, full_width, width)
    row_weights = constant(np, tap_weights, full_height, height)
    column_weights = constant(np, tap_weights, full_width, width)
    _small_luma(rows_of_pixels(images), full_width, rows, columns, row_weights, column_weights, grey)
    return grey


def rows_of_pixels(images: Array) -> Array:
    """Return contiguous RGB images as rows of bytes, (N, H, 3 W), and other images unchanged; read-only.

    In rows of bytes the distance between pixels is a compile-time constant, which makes reading four times as fast.
    """
    count, height, width, channels = images.shape
    rows = images.reshape(count, height, 3 * width) if channels == 3 and images.flags.c_contiguous else images
    return as_input(rows)


@kernel
def _small_luma(pixels, full_width, rows, columns, row_weights, column_weights, grey):  # type: ignore[no-untyped-def]
    levels, line = np.empty((2, full_width), np.uint8), np.empty(full_width, np.int32)
    for i in range(len(grey)):
        reduce_luma(pixels[i], rows, columns, row_weights, column_weights, levels, line, grey[i])


@kernel
def reduce_luma(image, rows, columns, row_weights, column_weights, levels, line, grey):  # type: ignore[no-untyped-def]
    """Reduce the grey levels of one image of `rows_of_pixels`; `levels` (2, W) and `line` (W,) are work arrays."""
    height, width = grey.shape
    for y in range(height):
        _luma_of_row(image[rows[y]], levels[0])
        if row_weights[y]:
            _luma_of_row(image[rows[height + y]], levels[1])
        _between_rows(levels[0], levels[1], row_weights[y], line)
        for x in range(width):
            near, far, weight = line[columns[x]], line[columns[width + x]], column_weights[x]
            grey[y, x] = (near * (256 - weight) + far * weight + (1 << 15)) >> 16


@kernel
def _between_rows(upper, lower, weight, line):  # type: ignore[no-untyped-def]
    for x in range(line.size):
        line[x] = upper[x] * (256 - weight) + lower[x] * weight


@kernel
def _luma_of_row(row, grey):  # type: ignore[no-untyped-def]
    """Compute the grey levels of a row of pixels, (3 W,) bytes or (W, C)."""
    if row.ndim == 1:
        for x in range(grey.size):
            grey[x] = _luma(row[3 * x], row[3 * x + 1], row[3 * x + 2])
    elif row.shape[1] == 1:
        grey[:] = row[:, 0]
    else:
        for x in range(grey.size):
            grey[x] = _luma(row[x, 0], row[x, 1], row[x, 2])


@kernel
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return (RED * np.int32(red) + GREEN * np.int32(green) + BLUE * np.int32(blue) + (1 << (SHIFT - 1))) >> SHIFT


def fine_grained(images: Array) -> Array:
    """Return the result of `dali_saliencymix.saliency.contrast.fine_grained`."""
    maps = np.empty(images.shape[:3], np.float32)
    _fine_grained(rows_of_pixels(images), maps)
    return maps


@kernel
def _fine_grained(images, maps):  # type: ignore[no-untyped-def]
    count, height, width = maps.shape
    # The first row and column of the integral image are 0. Each row is padded on both sides with its first and its last
    # value, so that windows that cross the border of the image need no special case.
    integral = np.zeros((height + 1, width + 1 + 2 * _MARGIN), np.float32)
    grey = np.empty((height, width), np.float32)
    on, off = np.empty((height, width), np.int32), np.empty((height, width), np.int32)
    columns = np.empty((len(SURROUNDS), width), np.float32)  # in the window around each pixel
    for k in range(len(SURROUNDS)):
        for x in range(width):
            columns[k, x] = min(x + SURROUNDS[k] + 1, width) - max(x - SURROUNDS[k] + 1, 0)
    for i in range(count):
        _blurred_luma(images[i], on, off)
        for y in range(height):
            _sum_row(on[y], grey[y], integral[y], integral[y + 1])
        _on_and_off(grey, integral, columns, on, off)
        _stretch_and_add(on, off, maps[i])


@kernel
def _blurred_luma(image, grey, spare):  # type: ignore[no-untyped-def]
    height = len(image)
    for y in range(height):
        _luma_of_row(image[y], grey[y])
    for _ in range(2):
        for y in range(height):
            _blur_along(grey[y], spare[y])
        for y in range(height):
            above = min(1, height - 1) if y == 0 else y - 1
            below = max(height - 2, 0) if y == height - 1 else y + 1
            _blur_across(spare[y], spare[above], spare[below], grey[y])


@kernel
def _on_and_off(grey, integral, columns, on, off):  # type: ignore[no-untyped-def]
    height, width = grey.shape
    difference = np.empty(width, np.int32)
    for y in range(height):
        on[y] = 0
        off[y] = 0
        for k in range(len(SURROUNDS)):
            half = SURROUNDS[k]
            top, bottom = max(y - half + 1, 0), min(y + half + 1, height)
            left, right = _MARGIN - half + 1, _MARGIN + half + 1
            _difference(
                grey[y],
                integral[top, left : left + width],
                integral[top, right : right + width],
                integral[bottom, left : left + width],
                integral[bottom, right : right + width],
                columns[k],
                np.float32(bottom - top),
                difference,
            )
            _add_both(difference, on[y], off[y])


@kernel
def _stretch_and_add(on, off, saliency_map):  # type: ignore[no-untyped-def]
    """Scale both sums to 0..255, each by its own maximum, and add them in 8 bits."""
    stretched = np.empty((2, _LARGEST_SUM + 1), np.int32)
    largest_on, largest_off = max(on.max(), 1), max(off.max(), 1)
    for level in range(_LARGEST_SUM + 1):
        stretched[0, level] = level * 255 // largest_on
        stretched[1, level] = level * 255 // largest_off
    height, width = on.shape
    for y in range(height):
        for x in range(width):
            total = (stretched[0, on[y, x]] + stretched[1, off[y, x]]) & 255
            saliency_map[y, x] = np.float32(total) * np.float32(1 / 255)


@kernel
def _blur_along(row, blurred):  # type: ignore[no-untyped-def]
    """Blur with weights (1, 2, 1) along a row, mirrored at its ends, without rounding."""
    last = row.size - 1
    for x in range(1, last):
        blurred[x] = 2 * row[x] + row[x - 1] + row[x + 1]
    blurred[0] = 2 * row[0] + 2 * row[min(1, last)]
    blurred[last] = 2 * row[last] + 2 * row[max(last - 1, 0)]


@kernel
def _blur_across(row, above, below, blurred):  # type: ignore[no-untyped-def]
    """Blur with weights (1, 2, 1) over three rows, and round the result of both blurs."""
    for x in range(row.size):
        blurred[x] = (2 * row[x] + above[x] + below[x] + 8) >> 4


@kernel
def _sum_row(row, grey, above, sums):  # type: ignore[no-untyped-def]
    """Add a row to the integral image, in float32 and in the order of NumPy's cumsum."""
    total = np.float32(0)
    for x in range(row.size):
        grey[x] = row[x]
        total += grey[x]
        sums[_MARGIN + 1 + x] = above[_MARGIN + 1 + x] + total
    sums[_MARGIN + 1 + row.size :] = sums[_MARGIN + row.size]


@kernel
def _difference(grey, above_left, above_right, below_left, below_right, columns, rows, difference):  # type: ignore[no-untyped-def]
    """Compute the grey level minus the mean of the other pixels in the window, rounded towards 0."""
    for x in range(grey.size):
        surround = below_right[x] + above_left[x]
        surround -= below_left[x]
        surround -= above_right[x]
        surround -= grey[x]
        surround /= max(rows * columns[x] - np.float32(1), np.float32(1))
        difference[x] = np.int32(grey[x] - surround)


@kernel
def _add_both(difference, on, off):  # type: ignore[no-untyped-def]
    for x in range(difference.size):
        on[x] += max(difference[x], 0)
        off[x] += max(-difference[x], 0)

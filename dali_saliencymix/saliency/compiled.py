"""Steps of the detectors as kernels that Numba compiles for the CPU; imported only where Numba is installed.

Each one has a twin in NumPy, beside the detector, and gives the same bits. Loops over the pixels of a row write to one
array only: LLVM can then show that nothing overlaps, and uses the vector units of the CPU. For the same reason rows are
handed to functions of their own. All functions work without Python's lock.
"""

from __future__ import annotations

import numba
import numpy as np
from scipy import fft

from dali_saliencymix._array import Array, constant
from dali_saliencymix.saliency.contrast import SURROUNDS
from dali_saliencymix.saliency.grey import BLUE, GREEN, RED, SHIFT
from dali_saliencymix.saliency.reduction import tap_indices, tap_weights
from dali_saliencymix.saliency.spectral import GAUSSIAN, MEAN

_kernel = numba.njit(nogil=True, cache=True, error_model="numpy")

_REACH = 2  # of the filters of spectral_residual, in pixels to either side
# Weights of the centre and outwards. The mean has none at that distance: adding 0 changes no bit.
_GAUSSIAN = tuple(np.float32(weight) for weight in GAUSSIAN)
_MEAN = (*(np.float32(weight) for weight in MEAN), np.float32(0))

_MARGIN = max(SURROUNDS)
_LARGEST_SUM = len(SURROUNDS) * 255


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return what `dali_saliencymix.saliency.grey.small_luma` returns, in float32."""
    count, full_height, full_width, _ = images.shape
    grey = np.empty((count, height, width), np.float32)
    rows, columns = constant(np, tap_indices, full_height, height), constant(np, tap_indices, full_width, width)
    row_weights = constant(np, tap_weights, full_height, height)
    column_weights = constant(np, tap_weights, full_width, width)
    _small_luma(images, rows, columns, row_weights, column_weights, grey)
    return grey


@_kernel
def _small_luma(images, rows, columns, row_weights, column_weights, grey):  # type: ignore[no-untyped-def]
    count, height, width = grey.shape
    levels = np.empty(2 * width, np.int32)
    lines = np.empty((2, width), np.int32)
    for i in range(count):
        for y in range(height):
            for line in range(2):
                row = images[i, rows[line * height + y]]
                if row.shape[1] == 1:
                    for tap in range(2 * width):
                        levels[tap] = row[columns[tap], 0]
                else:
                    for tap in range(2 * width):
                        x = columns[tap]
                        levels[tap] = _luma(row[x, 0], row[x, 1], row[x, 2])
                for x in range(width):
                    lines[line, x] = levels[x] * (256 - column_weights[x]) + levels[width + x] * column_weights[x]
            weight = row_weights[y]
            for x in range(width):
                grey[i, y, x] = (lines[0, x] * (256 - weight) + lines[1, x] * weight + (1 << 15)) >> 16


@_kernel
def _luma_of_row(row, grey):  # type: ignore[no-untyped-def]
    """Grey levels of a row of pixels (width, C)."""
    if row.shape[1] == 1:
        grey[:] = row[:, 0]
    else:
        for x in range(grey.size):
            grey[x] = _luma(row[x, 0], row[x, 1], row[x, 2])


@_kernel
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return (RED * np.int32(red) + GREEN * np.int32(green) + BLUE * np.int32(blue) + (1 << (SHIFT - 1))) >> SHIFT


def spectral_residual(images: Array, size: tuple[int, int]) -> Array:
    """Return what `dali_saliencymix.saliency.spectral.spectral_residual` returns.

    Transforms, logarithms and exponentials are left to NumPy, which is faster at them than a compiled loop.
    """
    grey = small_luma(images, *size)
    spectrum = fft.rfft2(grey)
    amplitude = np.abs(spectrum)
    residual, whitened = np.empty(grey.shape, np.float32), np.empty(grey.shape, np.complex64)
    _residual(np.log1p(amplitude), _MEAN, residual)
    _whiten(spectrum, amplitude, np.exp(residual, out=residual), whitened)
    saliency_map = np.abs(fft.ifft2(whitened))
    _smooth_and_square(saliency_map, _GAUSSIAN, grey)
    return saliency_map


@_kernel
def _residual(log_amplitude, weights, residual):  # type: ignore[no-untyped-def]
    """From the half of a spectrum that is stored to the whole residual."""
    count, height, stored = log_amplitude.shape
    width = residual.shape[2]
    tall, wide = _margins(height, width)
    whole = tall[_REACH : _REACH + height]
    mean = np.empty((height, width), np.float32)
    for i in range(count):
        for y in range(height):
            whole[y, :stored] = log_amplitude[i, y]
            for x in range(stored, width):
                whole[y, x] = log_amplitude[i, -y % height, width - x]
        _filter(tall, weights, wide, mean)
        for y in range(height):
            for x in range(width):
                residual[i, y, x] = whole[y, x] - mean[y, x]


@_kernel
def _whiten(spectrum, amplitude, factor, whitened):  # type: ignore[no-untyped-def]
    """Phase times factor; the bins that are not stored are those of the mirror image, conjugate."""
    count, height, stored = spectrum.shape
    width = factor.shape[2]
    phase = np.empty((height, stored), np.complex64)
    for i in range(count):
        for y in range(height):
            for x in range(stored):
                level = amplitude[i, y, x]
                inverse = np.float32(1) / (np.float32(1) if level == 0 else level)
                value = spectrum[i, y, x]
                phase[y, x] = complex(np.float32(value.real * inverse), np.float32(value.imag * inverse))
                if level == 0:
                    phase[y, x] = 1
        for y in range(height):
            for x in range(stored):
                value = phase[y, x]
                whitened[i, y, x] = complex(value.real * factor[i, y, x], value.imag * factor[i, y, x])
            for x in range(stored, width):
                value = phase[-y % height, width - x]
                whitened[i, y, x] = complex(value.real * factor[i, y, x], -value.imag * factor[i, y, x])


@_kernel
def _smooth_and_square(maps, weights, grey):  # type: ignore[no-untyped-def]
    """Filter in place, square, and bring each map to a maximum of 1; where `grey` has one level only, to 0."""
    count, height, width = maps.shape
    tall, wide = _margins(height, width)
    tops = np.empty(width, np.float32)  # of the columns: side by side they use the vector units
    for i in range(count):
        if _has_one_level(grey[i]):
            maps[i] = 0
            continue
        tall[_REACH : _REACH + height] = maps[i]
        _filter(tall, weights, wide, maps[i])
        _square_and_divide(maps[i], tops)


@_kernel
def _has_one_level(grey):  # type: ignore[no-untyped-def]
    height, width = grey.shape
    for y in range(height):
        for x in range(width):
            if grey[y, x] != grey[0, 0]:
                return False
    return True


@_kernel
def _square_and_divide(saliency_map, tops):  # type: ignore[no-untyped-def]
    height, width = saliency_map.shape
    tops[:] = 0
    for y in range(height):
        for x in range(width):
            tops[x] = max(tops[x], saliency_map[y, x])
    top = np.float32(0)
    for x in range(width):
        top = max(top, tops[x])
    top *= top
    if top == 0:
        top = np.float32(1)
    for y in range(height):
        for x in range(width):
            saliency_map[y, x] = saliency_map[y, x] * saliency_map[y, x] / top


@_kernel
def _margins(height, width):  # type: ignore[no-untyped-def]
    """Room for a map with margins above and below, and for one with margins to its left and right."""
    return np.empty((height + 2 * _REACH, width), np.float32), np.empty((height, width + 2 * _REACH), np.float32)


@_kernel
def _filter(tall, weights, wide, filtered):  # type: ignore[no-untyped-def]
    """Filter by symmetric weights along columns, then along rows, mirrored at the border.

    The map lies in `tall`, between margins that are filled here.
    """
    height, width = filtered.shape
    for i in range(1, _REACH + 1):
        tall[_REACH - i] = tall[_REACH + _mirrored(-i, height)]
        tall[_REACH + height - 1 + i] = tall[_REACH + _mirrored(height - 1 + i, height)]
    _filter_columns(tall, weights, wide)
    for y in range(height):
        for i in range(1, _REACH + 1):
            wide[y, _REACH - i] = wide[y, _REACH + _mirrored(-i, width)]
            wide[y, _REACH + width - 1 + i] = wide[y, _REACH + _mirrored(width - 1 + i, width)]
    _filter_rows(wide, weights, filtered)


@_kernel
def _filter_columns(tall, weights, wide):  # type: ignore[no-untyped-def]
    centre, near, far = weights
    height, width = len(wide), tall.shape[1]
    for y in range(height):
        for x in range(width):
            wide[y, _REACH + x] = (
                tall[y + 2, x] * centre + (tall[y + 1, x] + tall[y + 3, x]) * near + (tall[y, x] + tall[y + 4, x]) * far
            )


@_kernel
def _filter_rows(wide, weights, filtered):  # type: ignore[no-untyped-def]
    centre, near, far = weights
    height, width = filtered.shape
    for y in range(height):
        for x in range(width):
            filtered[y, x] = (
                wide[y, x + 2] * centre + (wide[y, x + 1] + wide[y, x + 3]) * near + (wide[y, x] + wide[y, x + 4]) * far
            )


@_kernel
def _mirrored(index, size):  # type: ignore[no-untyped-def]
    """Index that stands in for one outside of [0, size), mirrored at the centre of the border pixel."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    index = abs(index) % period
    return min(index, period - index)


def fine_grained(images: Array) -> Array:
    """Return what `dali_saliencymix.saliency.contrast.fine_grained` returns."""
    maps = np.empty(images.shape[:3], np.float32)
    _fine_grained(images, maps)
    return maps


@_kernel
def _fine_grained(images, maps):  # type: ignore[no-untyped-def]
    count, height, width, _ = images.shape
    # Rows and columns of sums start at 0. To either side they go on with their first and their last value, so that a
    # window that sticks out of the image needs no case of its own.
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


@_kernel
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


@_kernel
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


@_kernel
def _stretch_and_add(on, off, saliency_map):  # type: ignore[no-untyped-def]
    """Bring both sums to 0..255, each by its own maximum, and add them in 8 bits."""
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


@_kernel
def _blur_along(row, blurred):  # type: ignore[no-untyped-def]
    """Weights 1-2-1 along a row, mirrored at its ends."""
    last = row.size - 1
    for x in range(1, last):
        blurred[x] = 2 * row[x] + row[x - 1] + row[x + 1]
    blurred[0] = 2 * row[0] + 2 * row[min(1, last)]
    blurred[last] = 2 * row[last] + 2 * row[max(last - 1, 0)]


@_kernel
def _blur_across(row, above, below, blurred):  # type: ignore[no-untyped-def]
    """Weights 1-2-1 over three rows, and the rounding."""
    for x in range(row.size):
        blurred[x] = (2 * row[x] + above[x] + below[x] + 8) >> 4


@_kernel
def _sum_row(row, grey, above, sums):  # type: ignore[no-untyped-def]
    """Add a row to the integral image, in float32 and in the order in which NumPy's cumsum adds."""
    total = np.float32(0)
    for x in range(row.size):
        grey[x] = row[x]
        total += grey[x]
        sums[_MARGIN + 1 + x] = above[_MARGIN + 1 + x] + total
    sums[_MARGIN + 1 + row.size :] = sums[_MARGIN + row.size]


@_kernel
def _difference(grey, above_left, above_right, below_left, below_right, columns, rows, difference):  # type: ignore[no-untyped-def]
    """Grey level less the mean of the others in the window, rounded towards 0."""
    for x in range(grey.size):
        surround = below_right[x] + above_left[x]
        surround -= below_left[x]
        surround -= above_right[x]
        surround -= grey[x]
        surround /= max(rows * columns[x] - np.float32(1), np.float32(1))
        difference[x] = np.int32(grey[x] - surround)


@_kernel
def _add_both(difference, on, off):  # type: ignore[no-untyped-def]
    for x in range(difference.size):
        on[x] += max(difference[x], 0)
        off[x] += max(-difference[x], 0)

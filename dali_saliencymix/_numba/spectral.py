"""`spectral_residual` as a CPU kernel compiled by Numba, from pixels to map, one image at a time.

The kernel supports maps of 64x64, for images of at least that size, and 32x32, for CIFAR images. All arrays of one
image fit into a core's cache, and the GIL is released for a whole chunk of images. Maps differ from those of the NumPy
reference implementation by rounding errors, since the FFT is a different one.

Each step is a separate function with loops over a whole map that write to one array, so that LLVM vectorises them.
Spectra are stored transposed, (kx, ky); see `dali_saliencymix._numba.fft`.
"""

from __future__ import annotations

import math

import numpy as np

from dali_saliencymix._array import Array, constant
from dali_saliencymix._numba.contrast import reduce_luma, rows_of_pixels
from dali_saliencymix._numba.fft import (
    ROW,
    pair_columns,
    take_half,
    transform_columns,
    transpose,
    transpose_half,
    twiddles,
)
from dali_saliencymix._numba.kernel import kernel
from dali_saliencymix._tables import GAUSSIAN, MEAN, tap_indices, tap_weights
from dali_saliencymix._threads import for_each_chunk

SIZES = ((32, 32), (64, 64))

_CHUNK = 8  # images per call of a thread; few, so that all threads finish at about the same time

_HALF, _ONE = np.float32(0.5), np.float32(1)
_BITS_OF_HALF_ROOT = np.int32(np.float32(math.sqrt(0.5)).view(np.int32))
_LOG_2 = math.log(2)

_REACH = 2  # of the filters, in pixels on each side
# Weights from the centre outwards. The mean reaches only 1 pixel; its third weight is 0, which changes no bit.
_GAUSSIAN = tuple(np.float32(weight) for weight in GAUSSIAN)
_MEAN = (*(np.float32(weight) for weight in MEAN), np.float32(0))


def spectral_residual(images: Array, size: int) -> Array:
    """Return the maps of `dali_saliencymix.saliency.spectral.spectral_residual`, (N, size, size), up to rounding."""
    maps = np.empty((len(images), size, size), np.float32)
    height, width = images.shape[1:3]
    taps = (
        constant(np, tap_indices, height, size),
        constant(np, tap_indices, width, size),
        constant(np, tap_weights, height, size),
        constant(np, tap_weights, width, size),
    )
    pixels, factors = rows_of_pixels(images), constant(np, twiddles, size)

    def work(chunk: slice) -> None:
        _maps(pixels[chunk], width, *taps, factors, maps[chunk])

    for_each_chunk(work, len(images), _CHUNK)
    return maps


@kernel
def _maps(pixels, width, rows, columns, row_weights, column_weights, factors, maps):  # type: ignore[no-untyped-def]
    size = maps.shape[1]
    levels, line = np.empty((2, width), np.uint8), np.empty(width, np.int32)
    grey = np.empty((size, size), np.float32)
    planes, spare = np.zeros((2, ROW, ROW), np.float32), np.empty((2, ROW, ROW), np.float32)
    spectrum = np.empty((2, size, size // 2 + 1), np.float32)
    whole, mean = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    tall, wide = np.empty((size + 2 * _REACH, size), np.float32), np.empty((size, size + 2 * _REACH), np.float32)
    for i in range(len(maps)):
        reduce_luma(pixels[i], rows, columns, row_weights, column_weights, levels, line, grey)
        if _has_one_level(grey):
            maps[i] = 0
            continue
        pair_columns(grey, planes)
        transform_columns(planes, spare, factors, size // 2)
        transpose_half(planes, spare, size)
        transform_columns(spare, planes, factors, size // 2)
        take_half(spare, spectrum)
        _amplitude(spectrum, whole)
        _keep_phase(spectrum, whole)
        _log_of_all(whole, tall)
        _filter(tall, _MEAN, wide, mean)
        _exponential(tall, mean)
        _whiten(spectrum, mean, planes)
        transform_columns(planes, spare, factors, size)
        transpose(planes, spare, size)
        transform_columns(spare, planes, factors, size)
        _modulus(spare, tall)
        _filter(tall, _GAUSSIAN, wide, maps[i])
        _square(maps[i])


@kernel
def _has_one_level(grey):  # type: ignore[no-untyped-def]
    height, width = grey.shape
    for y in range(height):
        for x in range(width):
            if grey[y, x] != grey[0, 0]:
                return False
    return True


@kernel
def _whiten(spectrum, factor, planes):  # type: ignore[no-untyped-def]
    """Compute phase times factor for all bins; bins that are not stored are conjugates of their mirror images.

    The real and imaginary parts are swapped, so that the following forward transforms compute the inverse transform.
    """
    _, size, stored = spectrum.shape
    for x in range(size):
        for y in range(stored):
            planes[1, x, y] = spectrum[0, x, y] * factor[x, y]
    for x in range(size):
        for y in range(stored):
            planes[0, x, y] = spectrum[1, x, y] * factor[x, y]
    for x in range(size):
        mirrored = (size - x) % size
        for y in range(stored, size):
            planes[1, x, y] = spectrum[0, mirrored, size - y] * factor[x, y]
        for y in range(stored, size):
            planes[0, x, y] = -spectrum[1, mirrored, size - y] * factor[x, y]


@kernel
def _modulus(planes, tall):  # type: ignore[no-untyped-def]
    size = tall.shape[1]
    for y in range(size):
        for x in range(size):
            real, imaginary = planes[0, y, x], planes[1, y, x]
            tall[_REACH + y, x] = np.sqrt(real * real + imaginary * imaginary)


@kernel
def _amplitude(spectrum, whole):  # type: ignore[no-untyped-def]
    _, size, stored = spectrum.shape
    for x in range(size):
        for y in range(stored):
            real, imaginary = spectrum[0, x, y], spectrum[1, x, y]
            whole[x, y] = np.sqrt(real * real + imaginary * imaginary)


@kernel
def _keep_phase(spectrum, amplitude):  # type: ignore[no-untyped-def]
    """Divide the spectrum by its amplitude; empty bins have phase 0 by convention."""
    _, size, stored = spectrum.shape
    for x in range(size):
        for y in range(stored):
            empty = amplitude[x, y] == 0
            spectrum[0, x, y] = _ONE if empty else spectrum[0, x, y] / amplitude[x, y]
    for x in range(size):
        for y in range(stored):
            empty = amplitude[x, y] == 0
            spectrum[1, x, y] = spectrum[1, x, y] / (_ONE if empty else amplitude[x, y])


@kernel
def _log_of_all(amplitude, tall):  # type: ignore[no-untyped-def]
    """Compute log(1 + amplitude) for all bins from the half that is stored."""
    size = len(amplitude)
    stored = size // 2 + 1
    for x in range(size):
        for y in range(stored):
            tall[_REACH + x, y] = _log(_ONE + amplitude[x, y])
    for x in range(size):
        mirrored = (size - x) % size
        for y in range(stored, size):
            tall[_REACH + x, y] = tall[_REACH + mirrored, size - y]


@kernel
def _exponential(tall, mean):  # type: ignore[no-untyped-def]
    """Compute exp(log amplitude - mean), in place of the mean."""
    size = len(mean)
    for x in range(size):
        for y in range(size):
            mean[x, y] = _exp(tall[_REACH + x, y] - mean[x, y])


@kernel
def _log(value):  # type: ignore[no-untyped-def]
    """Return the logarithm of a normal float32; unlike the library function, it vectorises."""
    bits = np.float32(value).view(np.int32)
    exponent = (bits - _BITS_OF_HALF_ROOT) >> 23
    mantissa = np.int32(bits - (exponent << 23)).view(np.float32)  # in [sqrt(0.5), sqrt(2))
    # log(m) = 2 artanh((m - 1) / (m + 1)): a series in odd powers of at most 0.172.
    power = (mantissa - _ONE) / (mantissa + _ONE)
    square = power * power
    series = np.float32(2 / 7) + square * np.float32(2 / 9)
    series = np.float32(2 / 3) + square * (np.float32(2 / 5) + square * series)
    return np.float32(exponent) * np.float32(_LOG_2) + (power + power + power * square * series)


@kernel
def _exp(value):  # type: ignore[no-untyped-def]
    """Return the exponential of a float32 in -80..80."""
    exponent = np.floor(value * np.float32(1 / _LOG_2) + _HALF)
    # log(2) in two parts. The first has so few bits that its product is exact. The remainder is at most 0.347.
    rest = (value - exponent * np.float32(355 / 512)) - exponent * np.float32(_LOG_2 - 355 / 512)
    series = np.float32(1 / 120) + rest * (np.float32(1 / 720) + rest * np.float32(1 / 5040))
    series = _HALF + rest * (np.float32(1 / 6) + rest * (np.float32(1 / 24) + rest * series))
    series = _ONE + rest * (_ONE + rest * series)
    return series * np.int32((np.int32(exponent) + np.int32(127)) << 23).view(np.float32)


@kernel
def _filter(tall, weights, wide, filtered):  # type: ignore[no-untyped-def]
    """Filter with symmetric weights along columns, then along rows, mirrored at the border.

    `tall` contains the map between margins, which this function fills.
    """
    size = len(filtered)
    for i in range(1, _REACH + 1):
        tall[_REACH - i] = tall[_REACH + i]
        tall[_REACH + size - 1 + i] = tall[_REACH + size - 1 - i]
    _filter_columns(tall, weights, wide)
    for y in range(size):
        for i in range(1, _REACH + 1):
            wide[y, _REACH - i] = wide[y, _REACH + i]
            wide[y, _REACH + size - 1 + i] = wide[y, _REACH + size - 1 - i]
    _filter_rows(wide, weights, filtered)


@kernel
def _filter_columns(tall, weights, wide):  # type: ignore[no-untyped-def]
    centre, near, far = weights
    size = len(wide)
    for y in range(size):
        for x in range(size):
            wide[y, _REACH + x] = (
                tall[y + 2, x] * centre + (tall[y + 1, x] + tall[y + 3, x]) * near + (tall[y, x] + tall[y + 4, x]) * far
            )


@kernel
def _filter_rows(wide, weights, filtered):  # type: ignore[no-untyped-def]
    centre, near, far = weights
    size = len(filtered)
    for y in range(size):
        for x in range(size):
            filtered[y, x] = (
                wide[y, x + 2] * centre + (wide[y, x + 1] + wide[y, x + 3]) * near + (wide[y, x] + wide[y, x + 4]) * far
            )


@kernel
def _square(saliency_map):  # type: ignore[no-untyped-def]
    """Scale to a maximum of 1 and square."""
    size = len(saliency_map)
    tops = np.zeros(size, np.float32)  # of the columns, so that the loop vectorises
    for y in range(size):
        for x in range(size):
            tops[x] = max(tops[x], saliency_map[y, x])
    top = np.max(tops)
    if top == 0:
        top = _ONE
    for y in range(size):
        for x in range(size):
            relative = saliency_map[y, x] / top
            saliency_map[y, x] = relative * relative

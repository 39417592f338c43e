"""Fourier transforms of maps of 64x64 or 32x32, as CPU kernels compiled by Numba.

A complex map is an array (2, 64, 64) of real and imaginary parts. Smaller maps use its first rows and columns.
Transforms take the array flat, because LLVM vectorises loops if it knows the distance between rows. It also vectorises
loops over a whole map that write to one array.

Spectra are stored transposed, (kx, ky), so that the transform along rows is also one along columns.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from dali_saliencymix._numba.kernel import kernel

ROW = 64  # distance between rows in numbers, for maps of any size
_PLANE = ROW * ROW

_put_in = numba.njit(inline="always", error_model="numpy")

_HALF = np.float32(0.5)
_HALF_ROOT = np.float32(math.sqrt(0.5))


def twiddles(size: int) -> np.ndarray:
    """Return exp(-2 pi i j m / size) for `size` / 8 rows j and 8 columns m, complex64."""
    return np.exp(-2j * np.pi / size * np.outer(np.arange(size // 8), np.arange(8))).astype(np.complex64)


@kernel
def transform_columns(planes, spare, twiddles, width):  # type: ignore[no-untyped-def]
    """Transform the first `width` columns of `planes` in place."""
    if len(twiddles) == 8:
        _transform_64(planes.reshape(2 * _PLANE), spare.reshape(2 * _PLANE), twiddles, width)
    else:
        _transform_32(planes.reshape(2 * _PLANE), spare.reshape(2 * _PLANE), twiddles, width)


@kernel
def _transform_64(planes, spare, twiddles, width):  # type: ignore[no-untyped-def]
    _by_eights(planes, spare, twiddles, width, 8)
    for j in range(8):
        for x in range(width):
            i, o = 8 * j * ROW + x, j * ROW + x
            _put_eight(planes, o, 8 * ROW, _dft8(*_eight(spare, i, ROW)))


@kernel
def _transform_32(planes, spare, twiddles, width):  # type: ignore[no-untyped-def]
    _by_eights(planes, spare, twiddles, width, 4)
    for j in range(8):
        for x in range(width):
            i, o = 4 * j * ROW + x, j * ROW + x
            _put_four(planes, o, 8 * ROW, _dft4(*_four(spare, i, ROW)))


@_put_in
def _by_eights(planes, spare, twiddles, width, steps):  # type: ignore[no-untyped-def]
    """Transform every `steps`-th row, and multiply the results by the twiddle factors."""
    for j in range(steps):
        w1, w2, w3, w4 = twiddles[j, 1], twiddles[j, 2], twiddles[j, 3], twiddles[j, 4]
        w5, w6, w7 = twiddles[j, 5], twiddles[j, 6], twiddles[j, 7]
        for x in range(width):
            i = j * ROW + x
            y0, y1, y2, y3, y4, y5, y6, y7 = _dft8(*_eight(planes, i, steps * ROW))
            turned = (y0, y1 * w1, y2 * w2, y3 * w3, y4 * w4, y5 * w5, y6 * w6, y7 * w7)
            _put_eight(spare, i, steps * ROW, turned)


@_put_in
def _eight(planes, i, step):  # type: ignore[no-untyped-def]
    return (*_four(planes, i, step), *_four(planes, i + 4 * step, step))


@_put_in
def _four(planes, i, step):  # type: ignore[no-untyped-def]
    return (
        complex(planes[i], planes[i + _PLANE]),
        complex(planes[i + step], planes[i + step + _PLANE]),
        complex(planes[i + 2 * step], planes[i + 2 * step + _PLANE]),
        complex(planes[i + 3 * step], planes[i + 3 * step + _PLANE]),
    )


@_put_in
def _put_eight(planes, i, step, values):  # type: ignore[no-untyped-def]
    _put_four(planes, i, step, values[:4])
    _put_four(planes, i + 4 * step, step, values[4:])


@_put_in
def _put_four(planes, i, step, values):  # type: ignore[no-untyped-def]
    a, b, c, d = values
    planes[i], planes[i + _PLANE] = a.real, a.imag
    planes[i + step], planes[i + step + _PLANE] = b.real, b.imag
    planes[i + 2 * step], planes[i + 2 * step + _PLANE] = c.real, c.imag
    planes[i + 3 * step], planes[i + 3 * step + _PLANE] = d.real, d.imag


@kernel
def _dft8(a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    y0, y2, y4, y6 = _dft4(a + e, b + f, c + g, d + h)
    b, d = b - f, d - h
    # Times exp(-i pi / 4) and exp(-3 i pi / 4).
    b = complex(_HALF_ROOT * (b.real + b.imag), _HALF_ROOT * (b.imag - b.real))
    d = complex(_HALF_ROOT * (d.imag - d.real), -_HALF_ROOT * (d.real + d.imag))
    y1, y3, y5, y7 = _dft4(a - e, b, _turned(c - g), d)
    return y0, y1, y2, y3, y4, y5, y6, y7


@kernel
def _dft4(a, b, c, d):  # type: ignore[no-untyped-def]
    even, odd, rest, turned = a + c, b + d, a - c, _turned(b - d)
    return even + odd, rest + turned, even - odd, rest - turned


@kernel
def _turned(value):  # type: ignore[no-untyped-def]
    """Return -i times the value."""
    return complex(value.imag, -value.real)


@kernel
def pair_columns(grey, planes):  # type: ignore[no-untyped-def]
    """Combine pairs of real columns into complex columns, whose spectra can be separated by symmetry."""
    size = len(grey)
    half = size // 2
    for y in range(size):
        for x in range(half):
            planes[0, y, x] = grey[y, x]
    for y in range(size):
        for x in range(half):
            planes[1, y, x] = grey[y, half + x]


@kernel
def transpose_half(planes, transposed, size):  # type: ignore[no-untyped-def]
    """Separate the pairs and transpose to (x, ky). One complex number holds the lowest and highest ky, both real."""
    half = size // 2
    for x in range(half):
        for y in range(1, half):
            transposed[0, x, y] = _HALF * (planes[0, y, x] + planes[0, size - y, x])
        for y in range(1, half):
            transposed[1, x, y] = _HALF * (planes[1, y, x] - planes[1, size - y, x])
        for y in range(1, half):
            transposed[0, half + x, y] = _HALF * (planes[1, y, x] + planes[1, size - y, x])
        for y in range(1, half):
            transposed[1, half + x, y] = _HALF * (planes[0, size - y, x] - planes[0, y, x])
    for x in range(half):
        transposed[0, x, 0], transposed[1, x, 0] = planes[0, 0, x], planes[0, half, x]
        transposed[0, half + x, 0], transposed[1, half + x, 0] = planes[1, 0, x], planes[1, half, x]


@kernel
def take_half(planes, spectrum):  # type: ignore[no-untyped-def]
    """Fill the half spectrum, (2, kx, ky), and separate the pair of the lowest and the highest ky."""
    _, size, stored = spectrum.shape
    half = stored - 1
    for part in range(2):
        for x in range(size):
            for y in range(1, half):
                spectrum[part, x, y] = planes[part, x, y]
    for x in range(size):
        mirrored = (size - x) % size
        real, imaginary = planes[0, x, 0], planes[1, x, 0]
        other_real, other_imaginary = planes[0, mirrored, 0], planes[1, mirrored, 0]
        spectrum[0, x, 0], spectrum[1, x, 0] = _HALF * (real + other_real), _HALF * (imaginary - other_imaginary)
        spectrum[0, x, half], spectrum[1, x, half] = _HALF * (imaginary + other_imaginary), _HALF * (other_real - real)


@kernel
def transpose(planes, transposed, size):  # type: ignore[no-untyped-def]
    """Transpose a complex map."""
    for part in range(2):
        for y in range(size):
            for x in range(size):
                transposed[part, y, x] = planes[part, x, y]

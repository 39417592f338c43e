"""Detectors that look at the spectrum of the whole image, a Fourier or a cosine one.

They take images (N, H, W, C) uint8 and give maps (N, h, w) float32 of at most 64x64, in 0..1: smooth maps, for which
a larger size would add cost and no detail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, constant, fft_module, is_host
from dali_saliencymix._checks import check_images
from dali_saliencymix._routes import route_of
from dali_saliencymix._tables import GAUSSIAN, MAP_SIZE, MEAN
from dali_saliencymix._threads import in_chunks
from dali_saliencymix.saliency.filters import filtered, filtered_narrowly, gaussian_matrix, with_margin
from dali_saliencymix.saliency.grey import small_luma
from dali_saliencymix.saliency.lab import lab, small_planes

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 32  # maps for one thread at a time: the more, the seldomer the threads wait for the GIL

# Relative to the largest amplitude, that of the mean, which is the sum of all grey levels: less is taken for 0. The
# error of an FFT in any bin is at most that sum, times the unit roundoff, times the roundings on the way of one grey
# level: fewer than 2**9 for two axes of 64 and any radices. By Bluestein's algorithm it could come to 2**12; cuFFT is
# documented to have a radix for every prime under 128 and so to need none here. In float64 this leaves at most 2**-41
# in an empty bin. In float32 it would be 2**-15 to 2**-12, and many photographs have bins of less. Rounding an image to
# 8 bits alone gives 18 to a bin of 64x64, of which the threshold is at most 2**-20.
_EMPTY_BIN = 2**-36

# The inverse of less may be infinite.
_SMALLEST_NORMAL = 2**-126

# Relative to the norm of a channel: less is taken for 0. Float64 transforms leave up to 2**-48 in coefficients that
# are 0.
_EMPTY_COEFFICIENT = 2**-40

# Relative to the largest power before the border is left out: rounding leaves 2**-48 of it, with an FFT that has an
# error of log2(size) times the unit roundoff.
_NOTHING_INSIDE = 2**-36

# Relative to its maximum: a map that varies less is flat but for the rounding of the filters.
_FLAT = 2**-16


def spectral_residual(images: Array, *, algorithm: str = "auto") -> Array:
    """Return the spectral residual saliency of `images`.

    What repeats all over an image shows as the smooth part of its log amplitude spectrum. Taking that part away and
    keeping the phase leaves what stands out.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel, whose maps differ by rounding: compiled by Numba on a CPU, for maps of 64x64 and
        32x32, or in CUDA, for those of 64x64. ``"auto"`` takes the kernel on a GPU, and on a CPU where Numba is
        installed.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has its maximum at 1; the map of an image that is reduced to one grey level is all 0.

    Raises
    ------
    ImportError
        If a kernel is asked for and what compiles it is not installed.
    TypeError, ValueError
        If `images` is not such an array; images that are not uint8 are refused.

    Notes
    -----
    Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, in the form that OpenCV computes
    (``StaticSaliencySpectralResidual``): log(1 + amplitude), mean over 3x3 bins of the unshifted spectrum with
    mirrored border, 5x5 Gaussian of sigma 8 over the modulus, then the square. Two differences: an image under 64
    pixels is not enlarged, since enlarging leaves the high frequencies empty and whitening fills them with noise; and
    the map is not brought back to the size of the image.

    In a bin that is empty rounding decides on the phase, as in OpenCV. Photographs have none, but the map of an image
    that is constant along rows or columns, or that repeats exactly, depends on the FFT, and so does its peak.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((1, 96, 128, 3), np.uint8)
    >>> images[0, 60:72, 20:32] = 255
    >>> saliency_map = spectral_residual(images)
    >>> saliency_map.shape
    (1, 64, 64)
    """
    xp = check_images(images)
    route, size = route_of(algorithm, xp), _map_size(images)
    if route == "numba":
        from dali_saliencymix._numba import spectral

        if size in spectral.SIZES:
            return spectral.spectral_residual(images, size[0])
    if route == "cuda" and size == (MAP_SIZE, MAP_SIZE):
        from dali_saliencymix import _cuda

        return _cuda.spectral_residual(images)
    return _of_small_luma(_spectral_residual, images, xp, route)


def _spectral_residual(grey: Array) -> Array:
    xp = array_namespace(grey)
    fft = fft_module(xp)
    spectrum = fft.rfft2(grey)
    amplitude = xp.abs(spectrum)
    log_amplitude = _whole(xp.log1p(amplitude), grey.shape[2], margin=1)
    factor = xp.exp(log_amplitude[:, 1:-1, 1:-1] - filtered_narrowly(log_amplitude, MEAN))
    smallest = xp.float32(_SMALLEST_NORMAL)
    phase = spectrum * (1 / xp.maximum(amplitude, smallest))  # a product costs less than a division does
    phase = xp.where(amplitude < smallest, xp.complex64(1), phase)  # by convention
    modulus = xp.abs(fft.ifft2(_whole(phase, grey.shape[2]) * factor))
    margins = constant(xp, _with_margins, *grey.shape[1:], len(GAUSSIAN) - 1)
    saliency_map = filtered_narrowly(xp.take(modulus.reshape(len(grey), -1), margins, axis=1), GAUSSIAN)
    saliency_map *= saliency_map
    return _normalised(saliency_map, grey)


def phase_spectrum(images: Array, *, algorithm: str = "auto") -> Array:
    """Return the phase spectrum saliency of `images`: spectral residual with the amplitudes left out altogether.

    The phase says where something is in the image, the amplitude how much of it there is. With all amplitudes set to 1
    what is rare counts as much as what is frequent.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel for the reduction to grey levels, which gives the same bits: compiled by Numba
        on a CPU, in CUDA on a GPU. ``"auto"`` takes the kernel on a GPU, and on a CPU where Numba is installed.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has its maximum at 1; the map of an image that is reduced to one grey level, or in which nothing but
        the outermost pixels stands out, is all 0.

    Raises
    ------
    ImportError
        If a kernel is asked for and what compiles it is not installed.
    TypeError, ValueError
        If `images` is not such an array; images that are not uint8 are refused.

    Notes
    -----
    PFT of Guo, Ma and Zhang, "Spatio-temporal Saliency Detection Using Phase Spectrum of Quaternion Fourier Transform",
    CVPR 2008: g * abs(IFFT(F / abs(F)))**2 with a Gaussian g of sigma 8 pixels in 64, in proportion where the map is
    smaller and mirrored at the border. Empty bins, in which rounding alone would decide on a phase, are left out. The
    transform takes the image for periodic, so that opposite borders that differ stand out as an edge would: as in the
    authors' code, the outermost pixels are set to 0 before the Gaussian, along axes of three pixels or more.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((1, 96, 128, 3), np.uint8)
    >>> images[0, 60:72, 20:32] = 255
    >>> saliency_map = phase_spectrum(images)
    >>> saliency_map.shape, float(saliency_map[0, 40:48, 10:16].max())
    ((1, 64, 64), 1.0)
    """
    xp = check_images(images)
    return _of_small_luma(_phase_spectrum, images, xp, route_of(algorithm, xp))


def _phase_spectrum(grey: Array) -> Array:
    xp = array_namespace(grey)
    fft = fft_module(xp)
    # In float64 what rounding leaves in empty bins is far below what an image has in any other.
    spectrum = fft.rfft2(grey.astype(xp.float64)).astype(xp.complex64)
    amplitude = xp.abs(spectrum)
    mean = amplitude[:, :1, :1]
    empty = amplitude <= mean * xp.float32(_EMPTY_BIN)
    phase = spectrum * (1 / xp.where(empty, xp.float32(xp.inf), amplitude))  # 0 in empty bins
    # The spectrum of a real image stays one: its half is enough.
    power = fft.irfft2(phase, s=grey.shape[1:]) ** 2
    saliency_map = filtered(power, _wide_gaussian_matrix)
    # Nothing but rounding is left where all that stands out lay in the outermost pixels.
    saliency_map *= saliency_map > power.max(axis=(1, 2), keepdims=True) * xp.float32(_NOTHING_INSIDE)
    return _normalised(saliency_map, grey)


def image_signature(images: Array) -> Array:
    """Return the image signature saliency of `images`: what the signs of their cosine transform give back.

    The signs of a sparse foreground's cosine coefficients are spread over all frequencies, those of a smooth
    background are not: transforming the signs back concentrates on the foreground.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has its minimum at 0 and its maximum at 1; the map of an image that is reduced to one colour is all 0.

    Raises
    ------
    TypeError, ValueError
        If `images` is not such an array; images that are not uint8 are refused.

    Notes
    -----
    Hou, Harel and Koch, "Image Signature: Highlighting Sparse Salient Regions", IEEE TPAMI 34(1), 2012, on CIE L*a*b*
    as in the authors' code: for each channel the square of IDCT(sign(DCT)), their mean, and a Gaussian of sigma 0.045
    times the side. Here the reduced image has min(64, H) rows and min(64, W) columns, where theirs keeps the
    proportions. The sign of a coefficient that is 0 is 0: rounding does not decide on it, so a grey image, whose a* and
    b* are 0, has the map of its L* alone.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((1, 96, 128, 3), np.uint8)
    >>> images[0, 60:72, 20:32] = 255
    >>> saliency_map = image_signature(images)
    >>> saliency_map.shape, float(saliency_map[0, 40:48, 10:16].max())
    ((1, 64, 64), 1.0)
    """
    xp = check_images(images)
    # The signs of small coefficients count as much as those of large ones. In float64 they are the same on every device
    # and for every way of multiplying matrices, TF32 included.
    planes = lab(small_planes(images, *_map_size(images)), "float64")
    _, _, height, width = planes.shape
    down, along = constant(xp, _cosine_matrix, height), constant(xp, _cosine_matrix, width)
    coefficients = down @ planes @ along.T
    norm = xp.sqrt((planes * planes).sum(axis=(2, 3), keepdims=True))
    signs = xp.where(xp.abs(coefficients) > norm * _EMPTY_COEFFICIENT, xp.sign(coefficients), 0)
    signature = down.T @ signs @ along
    # Grey images have no planes for a* and b*, which would add nothing: the sum is the mean but for a factor.
    saliency_map = filtered((signature * signature).sum(axis=1).astype(xp.float32), _signature_gaussian_matrix)

    lowest = saliency_map.min(axis=(1, 2), keepdims=True)
    highest = saliency_map.max(axis=(1, 2), keepdims=True)
    flat = highest - lowest <= highest * xp.float32(_FLAT)
    return (saliency_map - lowest) / xp.where(flat, xp.float32(1), highest - lowest) * ~flat


def _of_small_luma(detector: Callable[[Array], Array], images: Array, xp: Namespace, route: str) -> Array:
    """Return ``detector(grey)`` of the grey levels of `images`, reduced to (N, h, w) float32."""
    size = _map_size(images)
    if route == "cuda":
        from dali_saliencymix import _cuda

        return detector(_cuda.small_luma(images, *size).astype(xp.float32))
    if route == "numba":
        from dali_saliencymix._numba import contrast

        return in_chunks(lambda chunk: detector(contrast.small_luma(chunk, *size)), images, _CHUNK)

    def detect(chunk: Array) -> Array:
        return detector(small_luma(chunk, *size).astype(xp.float32))

    return in_chunks(detect, images, _CHUNK) if is_host(xp) else detect(images)


def _whole(half: Array, width: int, margin: int = 0) -> Array:
    """Return the spectrum of real images, (N, h, w), of its half as ``rfft2`` gives it: the rest is mirrored.

    With a `margin` of so many bins around it, mirrored at the centres of the outermost ones.
    """
    xp = array_namespace(half)
    count, height, _ = half.shape
    whole = xp.take(half.reshape(count, -1), constant(xp, _mirrored_bins, height, width, margin), axis=1)
    if whole.dtype.kind == "c":
        imaginary = whole.imag
        imaginary *= constant(xp, _mirrored_sign, height, width)
    return whole


def _mirrored_bins(height: int, width: int, margin: int) -> np.ndarray:
    """Flat index, in the half spectrum, of each bin of the whole one with a margin, or of its mirror image."""
    stored = width // 2 + 1
    row, column = with_margin(height, margin)[:, None], with_margin(width, margin)
    mirrored = column >= stored
    return np.where(mirrored, -row % height, row) * stored + np.where(mirrored, width - column, column)


def _mirrored_sign(height: int, width: int) -> np.ndarray:
    """Sign of the imaginary part of each bin of the whole spectrum against that of the half: (height, width)."""
    return np.tile(np.where(np.arange(width) > width // 2, -1, 1).astype(np.float32), (height, 1))


def _with_margins(height: int, width: int, reach: int) -> np.ndarray:
    """Flat index of each pixel of a map with a mirrored margin: (height + 2 * reach, width + 2 * reach)."""
    return with_margin(height, reach)[:, None] * width + with_margin(width, reach)


def _map_size(images: Array) -> tuple[int, int]:
    return min(MAP_SIZE, images.shape[1]), min(MAP_SIZE, images.shape[2])


def _normalised(saliency_map: Array, grey: Array) -> Array:
    """Bring (N, h, w) maps to a maximum of 1; where `grey`, (N, h, w), has one level only, to 0."""
    xp = array_namespace(grey)
    several_levels = (grey != grey[:, :1, :1]).any(axis=(1, 2), keepdims=True)
    top = saliency_map.max(axis=(1, 2), keepdims=True)
    return saliency_map / xp.maximum(top, xp.float32(_SMALLEST_NORMAL)) * several_levels


def _wide_gaussian_matrix(size: int) -> np.ndarray:
    sigma = size / 8
    matrix = gaussian_matrix(size, sigma, round(3 * sigma))
    if size >= 3:
        matrix[:, [0, -1]] = 0  # weights of the outermost pixels
    return matrix


def _signature_gaussian_matrix(size: int) -> np.ndarray:
    sigma = 0.045 * size
    return gaussian_matrix(size, sigma, round(4 * sigma))


def _cosine_matrix(size: int) -> np.ndarray:
    """Return the (size, size) float64 matrix of the orthonormal DCT-II: coefficients = matrix @ values."""
    frequency, position = np.arange(size)[:, None], np.arange(size)
    matrix = np.cos(np.pi / size * frequency * (position + 0.5))
    matrix *= np.sqrt(np.where(frequency == 0, 1, 2) / size)
    return matrix

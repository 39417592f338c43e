"""Detectors based on the spectrum of the whole image, a Fourier or a cosine transform.

They take images (N, H, W, C) uint8 and return maps (N, h, w) float32 of at most 64x64, in 0..1. The maps are smooth, so
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

_CHUNK = 32  # maps per call of a thread; with more maps, threads wait for the GIL less often

# Threshold for an empty bin, relative to the largest amplitude: that of the mean, which is the sum of all grey levels.
# The error of an FFT in any bin is at most this sum times the unit roundoff times the number of roundings that one grey
# level undergoes. That number is below 2**9 for two axes of 64 and any radices. With Bluestein's algorithm it could
# reach 2**12, but according to its documentation cuFFT has a radix for every prime below 128, so it does not need that
# algorithm here. Hence in float64 an empty bin holds at most 2**-41 of the sum. In float32 it would hold up to 2**-15
# to 2**-12 of it, and many photographs have smaller bins than that. For comparison, rounding a 64x64 image to 8 bits
# adds about 18 to each bin, and the threshold is at most 2**-20 of that.
_EMPTY_BIN = 2**-36

# The inverse of a smaller number may be infinite.
_SMALLEST_NORMAL = 2**-126

# Threshold for a zero coefficient, relative to the norm of a channel. float64 transforms leave up to 2**-48 in
# coefficients that are 0.
_EMPTY_COEFFICIENT = 2**-40

# Threshold for an empty map, relative to the largest power before the border is removed. Rounding leaves 2**-48 of it,
# for an FFT with an error of log2(size) times the unit roundoff.
_NOTHING_INSIDE = 2**-36

# Threshold for a flat map, relative to its maximum: a smaller variation comes from rounding in the filters.
_FLAT = 2**-16


def spectral_residual(images: Array, *, algorithm: str = "auto") -> Array:
    """Return the spectral residual saliency of `images`.

    The smooth part of the log amplitude spectrum represents what repeats across the image. The detector removes this
    part, keeps the phase and transforms back; what remains are the regions that stand out.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel, whose maps differ by rounding errors. There are kernels compiled by Numba on a
        CPU, for maps of 64x64 and 32x32, and in CUDA on a GPU, for maps of 64x64. ``"auto"`` selects the kernel on a
        GPU, and on a CPU if Numba is installed.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has the maximum 1. The map of an image that reduces to one grey level is all 0.

    Raises
    ------
    ImportError
        If ``algorithm="kernel"`` and the compiler of the kernel is not installed.
    TypeError, ValueError
        If `images` has the wrong type, dtype or shape.

    Notes
    -----
    Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, as implemented in OpenCV
    (``StaticSaliencySpectralResidual``): log(1 + amplitude), mean over 3x3 bins of the unshifted spectrum with
    mirrored border, 5x5 Gaussian with sigma 8 on the modulus, then the square. There are two differences. Images
    smaller than 64 pixels are not enlarged, since enlarging leaves the high frequencies empty and whitening fills them
    with noise. The map is not resized to the size of the image.

    In an empty bin, rounding determines the phase, as in OpenCV. Photographs have no empty bins. The map and the peak
    of an image that is constant along rows or columns, or that repeats exactly, depend on the FFT implementation.

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
    phase = spectrum * (1 / xp.maximum(amplitude, smallest))  # multiplication is faster than division
    phase = xp.where(amplitude < smallest, xp.complex64(1), phase)  # empty bins have phase 0 by convention
    modulus = xp.abs(fft.ifft2(_whole(phase, grey.shape[2]) * factor))
    margins = constant(xp, _with_margins, *grey.shape[1:], len(GAUSSIAN) - 1)
    saliency_map = filtered_narrowly(xp.take(modulus.reshape(len(grey), -1), margins, axis=1), GAUSSIAN)
    saliency_map *= saliency_map
    return _normalised(saliency_map, grey)


def phase_spectrum(images: Array, *, algorithm: str = "auto") -> Array:
    """Return the phase spectrum saliency of `images`: spectral residual with all amplitudes set to 1.

    The phase encodes where something is in the image, and the amplitude how much of it there is. With equal amplitudes,
    rare structures count as much as frequent ones.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a bit-identical kernel for the reduction to grey levels: compiled by Numba on a CPU, in
        CUDA on a GPU. ``"auto"`` selects the kernel on a GPU, and on a CPU if Numba is installed.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has the maximum 1. The map of an image that reduces to one grey level, or in which only the outermost
        pixels stand out, is all 0.

    Raises
    ------
    ImportError
        If ``algorithm="kernel"`` and the compiler of the kernel is not installed.
    TypeError, ValueError
        If `images` has the wrong type, dtype or shape.

    Notes
    -----
    PFT of Guo, Ma and Zhang, "Spatio-temporal Saliency Detection Using Phase Spectrum of Quaternion Fourier Transform",
    CVPR 2008: g * abs(IFFT(F / abs(F)))**2, where g is a Gaussian with sigma 8 pixels for maps of 64 pixels, in
    proportion for smaller maps, and with mirrored border. Empty bins are set to 0, since rounding alone would determine
    their phase. The transform treats the image as periodic, so opposite borders that differ act like an edge.
    Therefore, as in the authors' code, the outermost pixels are set to 0 before the Gaussian, along axes of three
    pixels or more.

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
    # In float64, rounding errors in empty bins are far below the amplitude of any other bin of an image.
    spectrum = fft.rfft2(grey.astype(xp.float64)).astype(xp.complex64)
    amplitude = xp.abs(spectrum)
    mean = amplitude[:, :1, :1]
    empty = amplitude <= mean * xp.float32(_EMPTY_BIN)
    phase = spectrum * (1 / xp.where(empty, xp.float32(xp.inf), amplitude))  # 0 in empty bins
    # This is still the spectrum of a real image, so half of it suffices.
    power = fft.irfft2(phase, s=grey.shape[1:]) ** 2
    saliency_map = filtered(power, _wide_gaussian_matrix)
    # If only the outermost pixels stood out, the rest of the map is rounding errors: set it to 0.
    saliency_map *= saliency_map > power.max(axis=(1, 2), keepdims=True) * xp.float32(_NOTHING_INSIDE)
    return _normalised(saliency_map, grey)


def image_signature(images: Array) -> Array:
    """Return the image signature saliency of `images`, reconstructed from the signs of the cosine transform.

    The cosine coefficients of a sparse foreground are spread over all frequencies, and those of a smooth background are
    not. The inverse transform of the signs therefore concentrates on the foreground.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has the minimum 0 and the maximum 1. The map of an image that reduces to one colour is all 0.

    Raises
    ------
    TypeError, ValueError
        If `images` has the wrong type, dtype or shape.

    Notes
    -----
    Hou, Harel and Koch, "Image Signature: Highlighting Sparse Salient Regions", IEEE TPAMI 34(1), 2012, on CIE L*a*b*
    as in the authors' code: the square of IDCT(sign(DCT)) for each channel, their mean, and a Gaussian with sigma 0.045
    times the side. Here the reduced image has min(64, H) rows and min(64, W) columns; the authors' code keeps the
    aspect ratio. The sign of a coefficient that is 0 up to rounding is 0. Hence the map of a grey image, whose a* and
    b* are 0, is that of its L*.

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
    # The signs of small coefficients count as much as those of large ones. In float64 the signs are the same on every
    # device and for every matrix product, including TF32.
    planes = lab(small_planes(images, *_map_size(images)), "float64")
    _, _, height, width = planes.shape
    down, along = constant(xp, _cosine_matrix, height), constant(xp, _cosine_matrix, width)
    coefficients = down @ planes @ along.T
    norm = xp.sqrt((planes * planes).sum(axis=(2, 3), keepdims=True))
    signs = xp.where(xp.abs(coefficients) > norm * _EMPTY_COEFFICIENT, xp.sign(coefficients), 0)
    signature = down.T @ signs @ along
    # The sum is proportional to the mean over channels, also for grey images, whose missing a* and b* would add 0.
    saliency_map = filtered((signature * signature).sum(axis=1).astype(xp.float32), _signature_gaussian_matrix)

    lowest = saliency_map.min(axis=(1, 2), keepdims=True)
    highest = saliency_map.max(axis=(1, 2), keepdims=True)
    flat = highest - lowest <= highest * xp.float32(_FLAT)
    return (saliency_map - lowest) / xp.where(flat, xp.float32(1), highest - lowest) * ~flat


def _of_small_luma(detector: Callable[[Array], Array], images: Array, xp: Namespace, route: str) -> Array:
    """Return ``detector(grey)`` for the grey levels of `images`, reduced to (N, h, w) float32."""
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
    """Return the whole spectrum of real images, (N, h, w), from the half that ``rfft2`` returns.

    The result has a margin of `margin` bins on each side, mirrored at the centres of the outermost bins.
    """
    xp = array_namespace(half)
    count, height, _ = half.shape
    whole = xp.take(half.reshape(count, -1), constant(xp, _mirrored_bins, height, width, margin), axis=1)
    if whole.dtype.kind == "c":
        imaginary = whole.imag
        imaginary *= constant(xp, _mirrored_sign, height, width)
    return whole


def _mirrored_bins(height: int, width: int, margin: int) -> np.ndarray:
    """Return the flat index, in the half spectrum, of each bin of the whole one with margin or of its mirror image."""
    stored = width // 2 + 1
    row, column = with_margin(height, margin)[:, None], with_margin(width, margin)
    mirrored = column >= stored
    return np.where(mirrored, -row % height, row) * stored + np.where(mirrored, width - column, column)


def _mirrored_sign(height: int, width: int) -> np.ndarray:
    """Return the sign of the imaginary part of each bin relative to the bin stored in the half: (height, width)."""
    return np.tile(np.where(np.arange(width) > width // 2, -1, 1).astype(np.float32), (height, 1))


def _with_margins(height: int, width: int, reach: int) -> np.ndarray:
    """Return the flat index of each pixel of a map with mirrored margin: (height + 2 * reach, width + 2 * reach)."""
    return with_margin(height, reach)[:, None] * width + with_margin(width, reach)


def _map_size(images: Array) -> tuple[int, int]:
    return min(MAP_SIZE, images.shape[1]), min(MAP_SIZE, images.shape[2])


def _normalised(saliency_map: Array, grey: Array) -> Array:
    """Scale (N, h, w) maps to a maximum of 1; set them to 0 where `grey`, (N, h, w), has only one level."""
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

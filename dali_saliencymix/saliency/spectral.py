"""Detectors that look at the spectrum of the whole image.

They take images (N, H, W, C) uint8 and give maps (N, h, w) float32 of at most 64x64, in 0..1: smooth maps, for which
a larger size would add cost and no detail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix._checks import check_images
from dali_saliencymix.saliency.grey import small_luma

if TYPE_CHECKING:
    from collections.abc import Callable

_MAP_SIZE = 64


def spectral_residual(images: Array) -> Array:
    """Return the spectral residual saliency of `images`.

    What repeats all over an image shows as the smooth part of its log amplitude spectrum. Taking that part away and
    keeping the phase leaves what stands out.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        Each map has its maximum at 1; the map of an image that is reduced to one grey level is all 0.

    Raises
    ------
    TypeError, ValueError
        If `images` is not such an array; images that are not uint8 are refused.

    Notes
    -----
    Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, in the form that OpenCV computes
    (``StaticSaliencySpectralResidual``): log(1 + amplitude), mean over 3x3 bins of the unshifted spectrum with
    mirrored border, 5x5 Gaussian of sigma 8 over the modulus, then the square. Two differences: an image under 64
    pixels is not enlarged, since enlarging leaves the high frequencies empty and whitening fills them with noise; and
    the map is not brought back to the size of the image.

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
    height, width = (min(_MAP_SIZE, size) for size in images.shape[1:3])
    grey = small_luma(images, height, width)

    spectrum = xp.fft.fft2(grey.astype(xp.complex64))
    amplitude = xp.abs(spectrum)
    log_amplitude = xp.log1p(amplitude)
    residual = log_amplitude - _filter(log_amplitude, _mean_matrix)
    # The phase is spectrum / amplitude; an empty bin has phase 0 by convention.
    empty = amplitude == 0
    phase = xp.where(empty, xp.complex64(1), spectrum) / xp.where(empty, xp.float32(1), amplitude)

    saliency_map = _filter(xp.abs(xp.fft.ifft2(phase * xp.exp(residual))), _gaussian_matrix)
    saliency_map *= saliency_map
    saliency_map /= saliency_map.max(axis=(1, 2), keepdims=True)
    one_level = grey.max(axis=(1, 2), keepdims=True) == grey.min(axis=(1, 2), keepdims=True)
    return saliency_map * ~one_level


def _filter(images: Array, matrix: Callable[[int], np.ndarray]) -> Array:
    """Filter (N, h, w) float32 `images` along rows and columns: small and batched, so two matrix products."""
    xp = array_namespace(images)
    _, height, width = images.shape
    return constant(xp, matrix, height) @ images @ constant(xp, matrix, width).T


def _mean_matrix(size: int) -> np.ndarray:
    return _filter_matrix(size, np.full(3, 1 / 3))


def _gaussian_matrix(size: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 8.0**2))
    return _filter_matrix(size, weights / weights.sum())


def _filter_matrix(size: int, weights: np.ndarray) -> np.ndarray:
    """Return the (size, size) float32 matrix that applies `weights` with the border mirrored at its pixel centres."""
    matrix = np.zeros((size, size))
    reach = len(weights) // 2
    mirrored = np.pad(np.arange(size), reach, mode="reflect")
    for offset, weight in enumerate(weights):
        matrix[np.arange(size), mirrored[offset : offset + size]] += weight
    return matrix.astype(np.float32)

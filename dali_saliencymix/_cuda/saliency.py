"""Detectors: `dali_saliencymix.saliency` in CUDA. They return maps, or their peaks without storing maps.

Images are (N, H, W, C) uint8 CuPy arrays. Batches with gaps between the images are read in place.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, constant
from dali_saliencymix._cuda.boxes import cell_tables
from dali_saliencymix._cuda.launch import GIVEN, Launch, blocks_for, prepared, with_image_stride
from dali_saliencymix._tables import MAP_SIZE, tap_indices, tap_weights


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the result of ``saliency.grey.small_luma``: reduced grey levels, (N, height, width) int32."""
    xp = array_namespace(images)
    images, stride = with_image_stride(images, xp)
    grey = xp.empty((len(images), height, width), xp.int32)
    _small_luma(xp, images.shape, stride, height, width)(images, grey)
    return grey


@prepared
def _small_luma(xp: Namespace, shape: tuple[int, int, int, int], stride: int, height: int, width: int) -> Launch:
    count, full_height, full_width, channels = shape
    rows, columns = _taps(xp, full_height, height), _taps(xp, full_width, width)
    size = count * height * width
    arguments = (*rows, height, *columns, width, np.int64(size), GIVEN)
    return Launch(
        xp, "small_luma", blocks_for(size, 256), 256, GIVEN, np.int64(stride), full_width, channels, *arguments
    )


def _taps(xp: Namespace, full: int, reduced: int) -> tuple[Array, Array]:
    return constant(xp, tap_indices, full, reduced), constant(xp, tap_weights, full, reduced)


def spectral_residual(images: Array) -> Array:
    """Return the result of `dali_saliencymix.spectral_residual` for images of at least 64x64.

    The maps differ from those of the array function by rounding errors, since this FFT adds in another order.
    """
    xp = array_namespace(images)
    maps = xp.empty((len(images), MAP_SIZE, MAP_SIZE), xp.float32)
    images, stride = with_image_stride(images, xp)
    _spectral_residual(xp, images.shape, stride, MAP_SIZE, MAP_SIZE, False)(images, maps, None)
    return maps


def spectral_residual_peaks(images: Array, height: int, width: int, *, least: bool = False) -> Array:
    """Return ``saliency_peaks(spectral_residual(images), height, width, least=least)``."""
    xp = array_namespace(images)
    peaks = xp.empty((len(images), 2), xp.int32)
    images, stride = with_image_stride(images, xp)
    _spectral_residual(xp, images.shape, stride, height, width, least)(images, None, peaks)
    return peaks


@prepared
def _spectral_residual(
    xp: Namespace, shape: tuple[int, int, int, int], stride: int, height: int, width: int, least: bool
) -> Launch:
    count, full_height, full_width, channels = shape
    taps = *_taps(xp, full_height, MAP_SIZE), *_taps(xp, full_width, MAP_SIZE)
    tables = constant(xp, _turns, MAP_SIZE), *cell_tables(xp, MAP_SIZE, MAP_SIZE, height, width)
    batch = (GIVEN, np.int64(stride), full_width, channels)
    return Launch(xp, "spectral_residual", count, 512, *batch, *taps, *tables, height, width, int(least), GIVEN, GIVEN)


def fine_grained(images: Array) -> Array:
    """Return the result of `dali_saliencymix.fine_grained`.

    It is bit-identical to that of the array function in host memory for images of any size, since the integral image
    is summed in a fixed order.
    """
    xp = array_namespace(images)
    on_off, maxima = _sums_over_surrounds(images, xp)
    maps = xp.empty(on_off.shape, xp.float32)
    _contrast_maps(xp, on_off.shape)(on_off, maxima, maps)
    return maps


def fine_grained_peaks(images: Array, *, least: bool = False) -> Array:
    """Return ``saliency_peaks(fine_grained(images), H, W, least=least)``."""
    xp = array_namespace(images)
    on_off, maxima = _sums_over_surrounds(images, xp)
    peaks = xp.empty((len(on_off), 2), xp.int32)
    _contrast_peaks(xp, on_off.shape, least)(on_off, maxima, peaks)
    return peaks


def _turns(size: int) -> np.ndarray:
    """Return the twiddle factors of a forward transform, (size, 2) float32: real and imaginary parts."""
    angle = -2 * np.pi / size * np.arange(size)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _sums_over_surrounds(images: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return the packed sums of positive and negative differences, (N, H, W) uint32, and their maxima, (N, 2) int32."""
    images, stride = with_image_stride(images, xp)
    count, height, width, _ = images.shape
    grey = xp.empty((count, height, width), xp.uint8)
    integral = xp.empty((count, height, width), xp.float32)
    on_off = xp.empty((count, height, width), xp.uint32)
    maxima = xp.empty((count, 2), xp.int32)
    integral_image, surrounds = _steps(xp, images.shape, stride)
    integral_image(images, grey, integral, maxima)
    surrounds(grey, integral, on_off, maxima)
    return on_off, maxima


@prepared
def _steps(xp: Namespace, shape: tuple[int, int, int, int], stride: int) -> tuple[Launch, Launch]:
    count, height, width, channels = shape
    bands, strips = blocks_for(height, 32), blocks_for(width, 512)
    columns = 32 * blocks_for(width, 32 * strips)
    rows = 512 // columns
    integral = (GIVEN, np.int64(stride), height, width, channels, GIVEN, GIVEN, GIVEN)
    around = (GIVEN, GIVEN, height, width, strips, columns, rows, GIVEN, GIVEN)
    return (
        Launch(xp, "fine_grained:integral_image", count, 1024, *integral),
        Launch(xp, "fine_grained:surrounds", count * bands * strips, rows * columns, *around),
    )


@prepared
def _contrast_maps(xp: Namespace, shape: tuple[int, int, int]) -> Launch:
    count, height, width = shape
    size = count * height * width
    arguments = (GIVEN, GIVEN, height * width, np.int64(size), GIVEN)
    return Launch(xp, "fine_grained:contrast_maps", blocks_for(size, 256), 256, *arguments)


@prepared
def _contrast_peaks(xp: Namespace, shape: tuple[int, int, int], least: bool) -> Launch:
    count, height, width = shape
    arguments = (GIVEN, GIVEN, *cell_tables(xp, height, width, height, width), height, width, int(least), GIVEN)
    return Launch(xp, "fine_grained:contrast_peaks", count, 1024, *arguments)

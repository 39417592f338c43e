"""Detectors: `dali_saliencymix.saliency` in CUDA, down to the maps or to their peaks, which leave no maps behind.

Images are (N, H, W, C) uint8 CuPy arrays; a batch whose images lie apart is read where it is.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, Namespace, constant
from dali_saliencymix._checks import check_images
from dali_saliencymix.boxes import saliency_peaks as peaks_of_maps
from dali_saliencymix.cuda._launch import blocks_for, launch, with_image_stride
from dali_saliencymix.cuda.boxes import cell_tables
from dali_saliencymix.saliency import spectral
from dali_saliencymix.saliency.reduction import tap_indices, tap_weights

_MAP_SIZE = 64  # spectral_residual.cu is written for it


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the grey levels of `images` reduced to (N, height, width) int32.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.
    height, width : int
        Size of the result.

    Returns
    -------
    ndarray of shape (N, height, width), int32
        In 0..255, the same bits as from ``saliency.grey.small_luma``.
    """
    xp = check_images(images)
    images, stride = with_image_stride(images, xp)
    count, full_height, full_width, channels = images.shape
    grey = xp.empty((count, height, width), xp.int32)
    rows = constant(xp, tap_indices, full_height, height), constant(xp, tap_weights, full_height, height)
    columns = constant(xp, tap_indices, full_width, width), constant(xp, tap_weights, full_width, width)
    arguments = (images, stride, full_width, channels, *rows, height, *columns, width, np.int64(grey.size), grey)
    launch(xp, "small_luma", blocks_for(grey.size, 256), 256, *arguments)
    return grey


def spectral_residual(images: Array) -> Array:
    """Return the spectral residual saliency of `images`: see `dali_saliencymix.spectral_residual`.

    One launch where the map is 64x64. Images that are smaller along an axis go through the array function.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.

    Returns
    -------
    ndarray of shape (N, min(64, H), min(64, W)), float32
        The same maps as from the array function but for rounding, since the FFT adds in another order.
    """
    xp = check_images(images)
    if not _has_full_map(images):
        return spectral.spectral_residual(images, algorithm="array")
    maps = xp.empty((len(images), _MAP_SIZE, _MAP_SIZE), xp.float32)
    _launch_spectral_residual(images, xp, False, maps, None)
    return maps


def spectral_residual_peaks(images: Array, height: int, width: int, *, least: bool = False) -> Array:
    """Return the peaks of the spectral residual saliency of `images`.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.
    height, width : int
        Size of the image that the peaks are meant for, most often H and W.
    least : bool
        If true, look for the minimum.

    Returns
    -------
    ndarray of shape (N, 2), int32
        ``saliency_peaks(spectral_residual(images), height, width, least=least)``.
    """
    xp = check_images(images)
    if not _has_full_map(images):
        return peaks_of_maps(spectral.spectral_residual(images, algorithm="array"), height, width, least=least)
    peaks = xp.empty((len(images), 2), xp.int32)
    _launch_spectral_residual(images, xp, least, None, peaks, height, width)
    return peaks


def fine_grained(images: Array) -> Array:
    """Return the fine-grained saliency of `images`: see `dali_saliencymix.fine_grained`.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.

    Returns
    -------
    ndarray of shape (N, H, W), float32
        The same bits as from the array function in host memory, whatever the size of the images: the integral image
        is summed in a fixed order.
    """
    xp = check_images(images)
    on_off, maxima = _sums_over_surrounds(images, xp)
    maps = xp.empty(on_off.shape, xp.float32)
    pixels = on_off[0].size
    arguments = (on_off, maxima, pixels, np.int64(maps.size), maps)
    launch(xp, "fine_grained:contrast_maps", blocks_for(maps.size, 256), 256, *arguments)
    return maps


def fine_grained_peaks(images: Array, *, least: bool = False) -> Array:
    """Return the peaks of the fine-grained saliency of `images`.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1.
    least : bool
        If true, look for the minimum.

    Returns
    -------
    ndarray of shape (N, 2), int32
        ``saliency_peaks(fine_grained(images), H, W, least=least)``.
    """
    xp = check_images(images)
    on_off, maxima = _sums_over_surrounds(images, xp)
    count, height, width = on_off.shape
    peaks = xp.empty((count, 2), xp.int32)
    tables = cell_tables(xp, height, width, height, width)
    arguments = (on_off, maxima, *tables, height, width, int(least), peaks)
    launch(xp, "fine_grained:contrast_peaks", count, 1024, *arguments)
    return peaks


def _has_full_map(images: Array) -> bool:
    return min(images.shape[1:3]) >= _MAP_SIZE


def _launch_spectral_residual(
    images: Array,
    xp: Namespace,
    least: bool,
    maps: Array | None,
    peaks: Array | None,
    height: int = _MAP_SIZE,
    width: int = _MAP_SIZE,
) -> None:
    images, stride = with_image_stride(images, xp)
    count, full_height, full_width, channels = images.shape
    taps = [constant(xp, table, full_height, _MAP_SIZE) for table in (tap_indices, tap_weights)]
    taps += [constant(xp, table, full_width, _MAP_SIZE) for table in (tap_indices, tap_weights)]
    turns = constant(xp, _turns, _MAP_SIZE)
    tables = cell_tables(xp, _MAP_SIZE, _MAP_SIZE, height, width)
    arguments = (images, stride, full_width, channels, *taps, turns, *tables, height, width, int(least), maps, peaks)
    launch(xp, "spectral_residual", count, 512, *arguments)


def _turns(size: int) -> np.ndarray:
    """Return the twiddle factors of a forward transform, (size, 2) float32: real and imaginary parts."""
    angle = -2 * np.pi / size * np.arange(size)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _sums_over_surrounds(images: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return what is brighter and darker than the surrounds, (N, H, W) uint32, and the maxima of both, (N, 2) int32."""
    images, stride = with_image_stride(images, xp)
    count, height, width, channels = images.shape
    grey = xp.empty((count, height, width), xp.uint8)
    integral = xp.empty((count, height + 1, width + 1), xp.float32)
    on_off = xp.empty((count, height, width), xp.uint32)
    maxima = xp.empty((count, 2), xp.int32)

    tiles = blocks_for(height, 32), blocks_for(width, 32)
    arguments: tuple[object, ...] = (images, stride, height, width, channels, *tiles, grey)
    launch(xp, "fine_grained:blurred_luma", count * tiles[0] * tiles[1], 256, *arguments)
    rows, columns = count * height, count * (width + 1)
    launch(xp, "fine_grained:row_sums", blocks_for(rows, 8), 256, grey, height, width, np.int64(rows), integral)
    # Few threads to a block: there are few columns, and all multiprocessors should get some.
    arguments = (height, width, np.int64(columns), integral, maxima)
    launch(xp, "fine_grained:column_sums", blocks_for(columns, 64), 64, *arguments)
    blocks = blocks_for(height * width, 256)
    arguments = (grey, integral, height, width, blocks, on_off, maxima)
    launch(xp, "fine_grained:surrounds", count * blocks, 256, *arguments)
    return on_off, maxima

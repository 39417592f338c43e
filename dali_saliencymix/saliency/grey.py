"""Grey levels, and reduction of images to the size of a small map, in OpenCV's integer arithmetic for 8-bit images.

Images are (N, H, W, C) uint8 with C = 3 (RGB order) or C = 1. Grey images are (N, H, W) int32 in 0..255. With integer
arithmetic, NumPy and CuPy are bit-identical, and the detectors are comparable to OpenCV's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix._tables import BLUE, GREEN, RED, SHIFT, tap_indices, tap_weights

if TYPE_CHECKING:
    from collections.abc import Callable


def luma(images: Array) -> Array:
    """Return the grey levels of RGB or one-channel `images`, (N, H, W, C) uint8 -> (N, H, W) int32."""
    xp = array_namespace(images)
    if images.shape[3] == 1:
        return images[..., 0].astype(xp.int32)
    red, green, blue = (
        xp.multiply(images[..., channel], weight, dtype=xp.int32) for channel, weight in enumerate((RED, GREEN, BLUE))
    )
    return (red + green + blue + (1 << (SHIFT - 1))) >> SHIFT


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the grey levels of `images` reduced to (N, height, width) int32."""
    return reduced(images, height, width, luma)


def reduced(images: Array, height: int, width: int, levels: Callable[[Array], Array]) -> Array:
    """Return ``levels(images)`` reduced to (..., height, width) int32.

    `levels` is a pointwise function from images (N, H, W, C) uint8 to (..., H, W) int32 in 0..255. The reduction is
    bilinear with aligned pixel centres, rounded to integers, like OpenCV's ``INTER_LINEAR_EXACT`` for 8-bit images.
    Only the pixels that contribute are read.
    """
    xp = array_namespace(images)
    _, full_height, full_width, _ = images.shape
    if (height, width) == (full_height, full_width):
        return levels(images)
    sizes = full_height, full_width, height, width
    pixels = images.reshape(len(images), full_height * full_width, -1)
    taps = levels(xp.take(pixels, constant(xp, _taps, *sizes), axis=1)) * constant(xp, _weights, *sizes)
    taps = taps[..., :height, :] + taps[..., height:, :]
    taps = taps[..., :width] + taps[..., width:]
    return (taps + (1 << 15)) >> 16


def _taps(full_height: int, full_width: int, height: int, width: int) -> np.ndarray:
    """Return the indices of the four neighbours of each reduced pixel: (2 * height, 2 * width), see `tap_indices`."""
    return tap_indices(full_height, height)[:, None] * full_width + tap_indices(full_width, width)


def _weights(full_height: int, full_width: int, height: int, width: int) -> np.ndarray:
    """Return the weights of the four neighbours in units of 2**-16: (2 * height, 2 * width) int32."""
    down, along = tap_weights(full_height, height), tap_weights(full_width, width)
    return np.concatenate([256 - down, down])[:, None] * np.concatenate([256 - along, along])

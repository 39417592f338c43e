"""Grey levels and their reduction, in the integer arithmetic that OpenCV uses for 8-bit images.

Images are (N, H, W, C) uint8 with C = 3 (RGB order) or C = 1; grey images are (N, H, W) int32 in 0..255.
Integers make NumPy and CuPy agree bit for bit, and the detectors comparable with OpenCV's.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant

# Rec. 601 luma weights in units of 2**-15, for RGB order. OpenCV's cvtColor gives the same grey level for each of
# the 2**24 colours.
_RED, _GREEN, _BLUE, _SHIFT = 9798, 19235, 3735, 15


def luma(images: Array) -> Array:
    """Return the grey levels of RGB or one-channel `images`, (N, H, W, C) uint8 -> (N, H, W) int32."""
    xp = array_namespace(images)
    if images.shape[3] == 1:
        return images[..., 0].astype(xp.int32)
    red, green, blue = (images[..., channel].astype(xp.int32) for channel in range(3))
    return (_RED * red + _GREEN * green + _BLUE * blue + (1 << (_SHIFT - 1))) >> _SHIFT


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the grey levels of `images` reduced to (N, height, width) int32.

    Bilinear with aligned pixel centres, rounded to integers, as OpenCV's ``INTER_LINEAR_EXACT`` does on 8-bit images.
    Only the pixels that count are read.
    """
    xp = array_namespace(images)
    _, full_height, full_width, _ = images.shape
    if (height, width) == (full_height, full_width):
        return luma(images)
    rows = constant(xp, _tap_indices, full_height, height)
    columns = constant(xp, _tap_indices, full_width, width)
    grey = luma(xp.take(xp.take(images, rows, axis=1), columns, axis=2))

    weight = constant(xp, _tap_weights, full_width, width)
    grey = grey[:, :, :width] * (256 - weight) + grey[:, :, width:] * weight
    weight = constant(xp, _tap_weights, full_height, height)[:, None]
    grey = grey[:, :height] * (256 - weight) + grey[:, height:] * weight
    return (grey + (1 << 15)) >> 16


def _tap_centres(size: int, reduced: int) -> np.ndarray:
    return (np.arange(reduced) + 0.5) * (size / reduced) - 0.5


def _tap_indices(size: int, reduced: int) -> np.ndarray:
    """Index of the lower neighbour of each sample, then of the upper one: (2 * reduced,)."""
    lower = np.floor(_tap_centres(size, reduced)).astype(np.int64)
    return np.concatenate([lower, lower + 1]).clip(0, size - 1)


def _tap_weights(size: int, reduced: int) -> np.ndarray:
    """Weight of each upper neighbour in units of 1/256: (reduced,) int32."""
    centres = _tap_centres(size, reduced)
    return np.rint((centres - np.floor(centres)) * 256).astype(np.int32)

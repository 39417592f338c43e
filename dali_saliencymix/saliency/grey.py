"""Grey levels, in the integer arithmetic that OpenCV uses for 8-bit images.

Images are (N, H, W, C) uint8 with C = 3 (RGB order) or C = 1; grey images are (N, H, W) int32 in 0..255.
"""

from __future__ import annotations

from dali_saliencymix._array import Array, array_namespace
from dali_saliencymix._tables import BLUE, GREEN, RED, SHIFT
from dali_saliencymix.saliency.reduction import reduced


def luma(images: Array) -> Array:
    """Return the grey levels of RGB or one-channel `images`, (N, H, W, C) uint8 -> (N, H, W) int32."""
    xp = array_namespace(images)
    if images.shape[3] == 1:
        return images[..., 0].astype(xp.int32)
    red, green, blue = (images[..., channel].astype(xp.int32) for channel in range(3))
    return (RED * red + GREEN * green + BLUE * blue + (1 << (SHIFT - 1))) >> SHIFT


def small_luma(images: Array, height: int, width: int) -> Array:
    """Return the grey levels of `images` reduced to (N, height, width) int32."""
    return reduced(images, height, width, luma)

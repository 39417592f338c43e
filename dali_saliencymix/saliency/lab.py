"""Colours of RGB images as CIE L*a*b*, in which distances are near to what people see.

Images are (N, H, W, C) uint8 with C = 3 (RGB order) or C = 1. Planes have their channels in front, (N, C, H, W). Lab
planes are floating, L* in 0..100. Grey has a* = b* = 0 exactly, so grey images have one plane, L*, and RGB images of
equal channels have the same L* and two planes of zeros.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix.saliency.grey import reduced

# Red's and blue's share of X, Y and Z, each relative to that of white; green's is the rest. From the chromaticities of
# Rec. 709, which are those of sRGB, with white D65.
_RED = (0.433887345566, 0.212639005872, 0.017750040071)
_BLUE = (0.189888645296, 0.072192315361, 0.872802339074)

_KNEE = (6 / 29) ** 3  # of the cube root: a straight line below


def channel_planes(images: Array) -> Array:
    """Return the channels of `images` as planes, (N, H, W, C) uint8 -> (N, C, H, W) int32 in 0..255."""
    xp = array_namespace(images)
    return xp.moveaxis(images, 3, 1).astype(xp.int32)


def small_planes(images: Array, height: int, width: int) -> Array:
    """Return the channels of `images` reduced to planes (N, C, height, width) int32 in 0..255."""
    return reduced(images, height, width, channel_planes)


def lab(planes: Array, dtype: str = "float32") -> Array:
    """Return the L*a*b* of sRGB `planes`, (N, C, H, W) integers in 0..255 -> (N, C, H, W) of `dtype`.

    IEC 61966-2-1 (sRGB) and CIE 15 (L*a*b*), white D65.
    """
    xp = array_namespace(planes)
    linear = xp.take(constant(xp, _linear_levels, dtype), planes)
    if planes.shape[1] == 1:
        return 116 * _lightness(linear) - 16
    green = linear[:, 1]
    # As differences from green: where the three are equal X, Y and Z are too, to the last bit.
    red, blue = linear[:, 0] - green, linear[:, 2] - green
    x, y, z = (_lightness(green + r * red + b * blue) for r, b in zip(_RED, _BLUE, strict=True))
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _lightness(tristimulus: Array) -> Array:
    """Cube root with a straight line at the dark end."""
    xp = array_namespace(tristimulus)
    line = tristimulus * (1 / (3 * (6 / 29) ** 2)) + 4 / 29
    return xp.where(tristimulus > _KNEE, xp.cbrt(tristimulus), line)


def _linear_levels(dtype: str) -> np.ndarray:
    """Light of each level 0..255 of an sRGB channel, (256,) in 0..1."""
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(dtype)

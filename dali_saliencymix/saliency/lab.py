"""Conversion of RGB images to CIE L*a*b*, in which distances approximate perceived differences.

Images are (N, H, W, C) uint8 with C = 3 (RGB order) or C = 1. Planes are channels first, (N, C, H, W). L*a*b* planes
are floating, with L* in 0..100. Grey has exactly a* = b* = 0. Grey images have one plane, L*. RGB images with three
equal channels have the same L* and two planes of zeros.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix.saliency.grey import reduced

# Shares of red and blue in X, Y and Z, relative to white; green has the rest. From the chromaticities of Rec. 709 and
# sRGB, with white D65.
_RED = (0.433887345566, 0.212639005872, 0.017750040071)
_BLUE = (0.189888645296, 0.072192315361, 0.872802339074)

_KNEE = (6 / 29) ** 3  # below it, a straight line replaces the cube root


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
    # With differences from green, equal channels give exactly equal X, Y and Z.
    red, blue = linear[:, 0] - green, linear[:, 2] - green
    x, y, z = (_lightness(green + r * red + b * blue) for r, b in zip(_RED, _BLUE, strict=True))
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _lightness(tristimulus: Array) -> Array:
    """Return the cube root, with a straight line at the dark end."""
    xp = array_namespace(tristimulus)
    line = tristimulus * (1 / (3 * (6 / 29) ** 2)) + 4 / 29
    return xp.where(tristimulus > _KNEE, xp.cbrt(tristimulus), line)


def _linear_levels(dtype: str) -> np.ndarray:
    """Return the linear intensity of each level 0..255 of an sRGB channel: (256,) in 0..1."""
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(dtype)

"""The saliency of the authors' released code as a detector: OpenCV's fine-grained map computed from the wrong bytes.

The released code passes normalised float32 pixels to OpenCV, with red and blue swapped. OpenCV sums the floats as
floats, but reads the centre pixel of each window as one byte: for pixel x of a row, the x-th byte of the floats, which
is in the first quarter of the row. This module computes both in OpenCV's order, so that the maps are equal.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix.datasets.cifar import MEAN, STD
from dali_saliencymix.saliency.contrast import differences_from_surrounds, neighbours, sum_of_contrasts

_WEIGHTS = (0.114, 0.587, 0.299)  # of the first, second and third channel: OpenCV assumes BGR


def normalised(images: Array) -> Array:
    """Return (N, H, W, 3) uint8 pixels as the released code passes them on: scaled to [0, 1], normalised, float32."""
    xp = array_namespace(images)
    mean, std = constant(xp, _mean_and_std)
    return (images.astype(xp.float32) / xp.float32(255) - mean) / std


def _mean_and_std() -> np.ndarray:
    return np.array([MEAN, STD], np.float32) / np.float32(255)


def maps_of_floats(pixels: Array) -> Array:
    """Return the maps of OpenCV's ``StaticSaliencyFineGrained`` for float32 pixels (N, H, W, 3): (N, H, W) float32."""
    xp = array_namespace(pixels)
    grey = _blurred(_blurred(_grey(pixels)))
    width = grey.shape[2]
    centre = xp.ascontiguousarray(grey).view(xp.uint8)[:, :, :width].astype(xp.float32)  # little-endian bytes
    on, off = (xp.zeros(grey.shape, xp.int32) for _ in range(2))
    for difference in differences_from_surrounds(grey, centre):
        brighter = xp.maximum(difference, 0)
        on += brighter & 255  # OpenCV stores the differences in 8 bits, which they can exceed
        off += (brighter - difference) & 255
    return sum_of_contrasts(on, off)


def as_released(images: Array) -> Array:
    """Return maps (N, H, W) uint8 of images (N, H, W, 3) uint8 that are 1 at the peak of the released code, else 0.

    The released code takes the first maximum of the 8-bit map, row by row. Of several equal maxima this package would
    take the one nearest to the centre, so the maps mark the peak only.
    """
    xp = array_namespace(images)
    maps = (maps_of_floats(normalised(images)) * xp.float32(255)).astype(xp.uint8)
    peaks = maps.reshape(len(maps), -1).argmax(axis=1)
    return (xp.arange(maps[0].size) == peaks[:, None]).reshape(maps.shape).astype(xp.uint8)


def _grey(pixels: Array) -> Array:
    """Return the grey levels; each multiply-add is fused, so it rounds once."""
    xp = array_namespace(pixels)
    first, second, third = (xp.float32(weight) for weight in _WEIGHTS)
    grey = pixels[..., 1] * second
    for channel, weight in ((0, first), (2, third)):
        grey = (pixels[..., channel].astype(xp.float64) * weight + grey).astype(xp.float32)
    return grey


def _blurred(grey: Array) -> Array:
    """Blur with weights (1, 2, 1) / 4, first along rows and then along columns, with reflection at the border."""
    xp = array_namespace(grey)
    for axis in (2, 1):
        before, after = constant(xp, neighbours, grey.shape[axis])
        sides = xp.take(grey, before, axis=axis) + xp.take(grey, after, axis=axis)
        grey = grey * xp.float32(0.5) + sides * xp.float32(0.25)
    return grey

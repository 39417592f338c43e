"""What the authors' released code takes for saliency, as a detector: OpenCV's fine-grained map of the wrong bytes.

The released code hands OpenCV normalised float32 pixels, red where blue belongs. OpenCV sums floats as floats, but it
reads the centre pixel of each window as one byte: in row y the x-th byte of the floats, so of the first quarter of the
row. Both are computed here in OpenCV's order, so that the maps are the same.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix.datasets.cifar import MEAN, STD
from dali_saliencymix.saliency.contrast import differences_from_surrounds, neighbours, sum_of_contrasts

_WEIGHTS = (0.114, 0.587, 0.299)  # of the first, the second and the third channel: OpenCV takes them for BGR


def normalised(images: Array) -> Array:
    """Return (N, H, W, 3) uint8 pixels as the released code hands them on: float32, in 0..1 and then normalised."""
    xp = array_namespace(images)
    mean, std = constant(xp, _mean_and_std)
    return (images.astype(xp.float32) / xp.float32(255) - mean) / std


def _mean_and_std() -> np.ndarray:
    return np.array([MEAN, STD], np.float32) / np.float32(255)


def maps_of_floats(pixels: Array) -> Array:
    """Return what OpenCV's ``StaticSaliencyFineGrained`` makes of float32 pixels (N, H, W, 3): (N, H, W) float32."""
    xp = array_namespace(pixels)
    grey = _blurred(_blurred(_grey(pixels)))
    width = grey.shape[2]
    centre = xp.ascontiguousarray(grey).view(xp.uint8)[:, :, :width].astype(xp.float32)  # little-endian bytes
    on, off = (xp.zeros(grey.shape, xp.int32) for _ in range(2))
    for difference in differences_from_surrounds(grey, centre):
        brighter = xp.maximum(difference, 0)
        on += brighter & 255  # stored in 8 bits, which these differences can exceed
        off += (brighter - difference) & 255
    return sum_of_contrasts(on, off)


def as_released(images: Array) -> Array:
    """Return maps (N, H, W) uint8 of images (N, H, W, 3) uint8, with the peak that the released code finds.

    It is the first one of equal maxima in reading order, of the map in 8 bits. The maps are 1 there and 0 elsewhere:
    this package would take another one of the maxima, the nearest to the centre.
    """
    xp = array_namespace(images)
    maps = (maps_of_floats(normalised(images)) * xp.float32(255)).astype(xp.uint8)
    peaks = maps.reshape(len(maps), -1).argmax(axis=1)
    return (xp.arange(maps[0].size) == peaks[:, None]).reshape(maps.shape).astype(xp.uint8)


def _grey(pixels: Array) -> Array:
    """Return the grey levels: each addition is one fused operation, which rounds once."""
    xp = array_namespace(pixels)
    first, second, third = (xp.float32(weight) for weight in _WEIGHTS)
    grey = pixels[..., 1] * second
    for channel, weight in ((0, first), (2, third)):
        grey = (pixels[..., channel].astype(xp.float64) * weight + grey).astype(xp.float32)
    return grey


def _blurred(grey: Array) -> Array:
    """Blur with weights 1-2-1 over 4, first along rows and then along columns, mirrored at the border."""
    xp = array_namespace(grey)
    for axis in (2, 1):
        before, after = constant(xp, neighbours, grey.shape[axis])
        sides = xp.take(grey, before, axis=axis) + xp.take(grey, after, axis=axis)
        grey = grey * xp.float32(0.5) + sides * xp.float32(0.25)
    return grey

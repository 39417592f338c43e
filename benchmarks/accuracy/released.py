"""What the authors' released code takes for saliency, as a detector: OpenCV's fine-grained map of the wrong bytes.

The released code hands OpenCV normalised float32 pixels, red where blue belongs. OpenCV sums floats as floats, but it
reads the centre pixel of each window as one byte: in row y the x-th byte of the floats, so of the first quarter of the
row. Both are computed here in OpenCV's order, so that the maps are the same.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix.datasets.cifar import MEAN, STD

_WEIGHTS = (0.114, 0.587, 0.299)  # of the first, the second and the third channel: OpenCV takes them for BGR
_HALF_WIDTHS = (12, 24, 48, 28, 56, 112)


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
    count, height, width = grey.shape
    centre = xp.ascontiguousarray(grey).view(xp.uint8)[:, :, :width].astype(xp.float32)  # little-endian bytes
    integral = xp.zeros((count, height + 1, width + 1), xp.float32)
    integral[:, 1:, 1:] = xp.cumsum(xp.cumsum(grey, axis=2), axis=1)
    on, off = (xp.zeros(grey.shape, xp.int32) for _ in range(2))
    for half in _HALF_WIDTHS:
        top, bottom = (xp.clip(xp.arange(height) + at, 0, height) for at in (1 - half, 1 + half))
        left, right = (xp.clip(xp.arange(width) + at, 0, width) for at in (1 - half, 1 + half))
        below, above = integral[:, bottom], integral[:, top]
        total = below[:, :, right] + above[:, :, left] - below[:, :, left] - above[:, :, right]
        others = (bottom - top)[:, None] * (right - left) - 1
        difference = centre - (total - centre) / others.astype(xp.float32)
        on += xp.clip(difference, 0, None).astype(xp.int32) & 255
        off += xp.clip(-difference, 0, None).astype(xp.int32) & 255
    both = (_stretched(on) + _stretched(off)) & 255  # stored in 8 bits
    return both.astype(xp.float32) * xp.float32(1 / 255)


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
        before, after = constant(xp, _neighbours, grey.shape[axis])
        sides = xp.take(grey, before, axis=axis) + xp.take(grey, after, axis=axis)
        grey = grey * xp.float32(0.5) + sides * xp.float32(0.25)
    return grey


def _neighbours(size: int) -> np.ndarray:
    """Return the index of the pixel before and after each, mirrored at the ends: (2, size)."""
    at = np.arange(size)
    return np.stack([abs(at - 1), size - 1 - abs(size - 2 - at)])


def _stretched(sums: Array) -> Array:
    """Bring (N, H, W) int32 from 0..max to 0..255 for each image, rounded down."""
    xp = array_namespace(sums)
    return sums * 255 // xp.maximum(sums.max(axis=(1, 2), keepdims=True), 1)

"""Detectors that compare each pixel with its surroundings or with the mean of the image.

They take images (N, H, W, C) uint8 and return maps (N, H, W) float32 in 0..1, at the size of the images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant, is_host
from dali_saliencymix._checks import check_images
from dali_saliencymix._routes import route_of
from dali_saliencymix._tables import SURROUNDS
from dali_saliencymix._threads import in_chunks
from dali_saliencymix.saliency.filters import with_margin
from dali_saliencymix.saliency.grey import luma
from dali_saliencymix.saliency.lab import channel_planes, lab

# Distances in L*a*b* up to this threshold count as rounding errors, which are about 2e-5. A difference of one level in
# one channel of one pixel causes at least 2.6e-3, the minimum over 3000 colours.
_SAME_COLOUR = 2**-11


def fine_grained(images: Array, *, algorithm: str = "auto") -> Array:
    """Return the fine-grained saliency of `images`, the detector used in the SaliencyMix paper.

    Each grey level is compared with the means of six square surrounds. The positive differences (on) and the negative
    ones (off) are summed over the surrounds. Each sum is scaled to 0..255 by its maximum, and the two are added.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a bit-identical kernel: compiled by Numba on a CPU, in CUDA on a GPU. ``"auto"`` selects
        the kernel on a GPU, and on a CPU if Numba is installed.

    Returns
    -------
    ndarray of shape (N, H, W), float32
        Multiples of 1/255 in 0..1. The map of a constant image of more than one pixel is all 0.

    Raises
    ------
    ImportError
        If ``algorithm="kernel"`` and the compiler of the kernel is not installed.
    TypeError, ValueError
        If `images` has the wrong type, dtype or shape.

    Notes
    -----
    Montabone and Soto, "Human detection using a mobile platform and novel features derived from a visual saliency
    mechanism", Image and Vision Computing 28, 2010. The maps are bit-identical to those of OpenCV's
    ``StaticSaliencyFineGrained`` for 8-bit images. For this, all roundings are OpenCV's, including those of its float32
    sums, which matter if the grey levels of an image sum to more than 2**23. On a GPU, array operations do not sum the
    integral image in a fixed order. If the grey levels sum to more than 2**24, which is impossible for images up to
    256x256, a few pixels may therefore differ.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((1, 37, 23, 3), np.uint8)
    >>> images[0, 30, 5] = 255
    >>> saliency_map = fine_grained(images)
    >>> saliency_map.shape, float(saliency_map[0, 30, 5])
    ((1, 37, 23), 1.0)
    """
    xp = check_images(images)
    route = route_of(algorithm, xp)
    if route == "cuda":
        from dali_saliencymix import _cuda

        return _cuda.fine_grained(images)
    if route == "numba":
        from dali_saliencymix._numba import contrast

        return in_chunks(contrast.fine_grained, images, 4)
    # On a CPU the sums of one image fit the cache and those of a batch do not, so one image at a time is several times
    # as fast.
    return in_chunks(_fine_grained, images, 1) if is_host(xp) else _fine_grained(images)


def _fine_grained(images: Array) -> Array:
    xp = array_namespace(images)
    grey = _blur(_blur(luma(images))).astype(xp.float32)
    on = xp.zeros(grey.shape, xp.int32)
    off = xp.zeros(grey.shape, xp.int32)
    for difference in differences_from_surrounds(grey, grey):
        brighter = xp.maximum(difference, 0)
        on += brighter
        off += brighter - difference
    return sum_of_contrasts(on, off)


def differences_from_surrounds(grey: Array, centre: Array) -> Iterator[Array]:
    """Yield, for each of `SURROUNDS`, `centre` minus the mean around it in `grey`: (N, H, W) int32.

    `grey` and `centre` are (N, H, W) float32. The mean excludes `centre`. The order of summation is OpenCV's.
    """
    xp = array_namespace(grey)
    count, height, width = grey.shape
    integral = xp.zeros((count, height + 1, width + 1), xp.float32)
    integral[:, 1:, 1:] = xp.cumsum(xp.cumsum(grey, axis=2), axis=1)
    for half in SURROUNDS:
        top, bottom = constant(xp, _window, height, half)
        left, right = constant(xp, _window, width, half)
        above, below = xp.take(integral, top, axis=1), xp.take(integral, bottom, axis=1)
        # The first sum can exceed 2**24 and is then rounded.
        surround = xp.take(below, right, axis=2) + xp.take(above, left, axis=2)
        surround -= xp.take(below, left, axis=2)
        surround -= xp.take(above, right, axis=2)
        surround -= centre
        surround /= constant(xp, _neighbour_count, height, width, half)
        yield (centre - surround).astype(xp.int32)


def sum_of_contrasts(on: Array, off: Array) -> Array:
    """Return the maps (N, H, W) float32 for the sums of positive and negative differences, (N, H, W) int32."""
    xp = array_namespace(on)
    # Both scaled sums reach 255 unless they are all 0. OpenCV stores their total in 8 bits, so it wraps around.
    total = (_stretched(on) + _stretched(off)) & 255
    return total.astype(xp.float32) * xp.float32(1 / 255)  # OpenCV multiplies by the rounded inverse


def _blur(grey: Array) -> Array:
    """Blur with weights (1, 2, 1) / 4 along both axes, border mirrored, rounded once: (N, H, W) int32."""
    xp = array_namespace(grey)
    for axis in (1, 2):
        before, after = constant(xp, neighbours, grey.shape[axis])
        grey = 2 * grey + xp.take(grey, before, axis=axis) + xp.take(grey, after, axis=axis)
    return (grey + 8) >> 4


def neighbours(size: int) -> np.ndarray:
    """Return the index of the previous and the next pixel of each pixel, mirrored at the border: (2, size)."""
    mirrored = with_margin(size, 1)
    return np.stack([mirrored[:-2], mirrored[2:]])


def _window(size: int, half: int) -> np.ndarray:
    """Return the start and stop of the window -half + 1 .. half around each pixel, clipped to the image: (2, size)."""
    centre = np.arange(size)
    return np.stack([centre - half + 1, centre + half + 1]).clip(0, size)


def _neighbour_count(height: int, width: int, half: int) -> np.ndarray:
    """Return the number of other pixels in the window around each pixel: (height, width) float32, at least 1."""
    rows, columns = (np.diff(_window(size, half), axis=0)[0] for size in (height, width))
    return np.maximum(rows[:, None] * columns - 1, 1).astype(np.float32)


def _stretched(values: Array) -> Array:
    """Scale (N, H, W) int32 `values` from 0..max to 0..255 for each image."""
    xp = array_namespace(values)
    top = values.max(axis=(1, 2), keepdims=True)
    return values * 255 // xp.maximum(top, 1)


def frequency_tuned(images: Array) -> Array:
    """Return the frequency-tuned saliency of `images`: the distance of each colour to the mean colour of the image.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1.

    Returns
    -------
    ndarray of shape (N, H, W), float32
        Each map has the maximum 1. The map of an image that is constant before or after the blur is all 0.

    Raises
    ------
    TypeError, ValueError
        If `images` has the wrong type, dtype or shape.

    Notes
    -----
    Achanta, Hemami, Estrada and Susstrunk, "Frequency-tuned Salient Region Detection", CVPR 2009, equation 4: the
    distance in CIE L*a*b* between the mean of the image and the image after a 5x5 binomial blur. Here the blur is
    applied to the L*a*b* planes, and the border is mirrored.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((1, 37, 23, 3), np.uint8)
    >>> images[0, 24:32, 3:9] = 255
    >>> saliency_map = frequency_tuned(images)
    >>> saliency_map.shape, float(saliency_map[0, 28, 6])
    ((1, 37, 23), 1.0)
    """
    xp = check_images(images)
    return in_chunks(_frequency_tuned, images, 1) if is_host(xp) else _frequency_tuned(images)


def _frequency_tuned(images: Array) -> Array:
    xp = array_namespace(images)
    planes = lab(channel_planes(images))
    difference = _binomial(planes) - planes.mean(axis=(2, 3), keepdims=True)
    saliency_map = xp.sqrt((difference * difference).sum(axis=1))
    top = saliency_map.max(axis=(1, 2), keepdims=True)
    visible = top > _SAME_COLOUR
    return saliency_map / xp.where(visible, top, xp.float32(1)) * visible


def _binomial(planes: Array) -> Array:
    """Blur (N, C, H, W) `planes` with weights (1, 4, 6, 4, 1) / 16 along rows and columns, border mirrored."""
    xp = array_namespace(planes)
    for axis in (2, 3):
        planes = xp.take(planes, constant(xp, with_margin, planes.shape[axis], 2), axis=axis)
        # Adding neighbours four times gives the weights. Each addition drops one pixel.
        for _ in range(4):
            planes = planes[:, :, 1:] + planes[:, :, :-1] if axis == 2 else planes[..., 1:] + planes[..., :-1]
    return planes * xp.float32(1 / 256)

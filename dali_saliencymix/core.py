"""Whole batches in, whole batches out: the mixing functions on arrays, without DALI and without randomness.

Images are (N, H, W, C) uint8 in NumPy or CuPy; all other arrays of a call belong to the same library. With CuPy all
work is enqueued on the current stream and nothing waits for the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dali_saliencymix._array import Array, array_namespace
from dali_saliencymix._checks import (
    check_images,
    check_lam,
    check_per_image,
    check_range,
    check_source_index,
)
from dali_saliencymix.boxes import boxes_at, kept_fraction, saliency_peaks
from dali_saliencymix.mixing import paste_boxes
from dali_saliencymix.saliency import get_detector

if TYPE_CHECKING:
    from dali_saliencymix.saliency import Detector


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The mixed images, a new array.
    lam : ndarray of shape (N,), float32
        Weight of each receiving image's label: exactly the share of its pixels outside the box.
    boxes : ndarray of shape (N, 4), int32
        Where the source's pixels are: (y0, x0, y1, x1), half-open. Empty where an image was not mixed.
    """

    images: Array
    lam: Array
    boxes: Array


def saliencymix(
    images: Array,
    source_index: Array,
    lam: Array,
    *,
    saliency: str | Detector = "spectral_residual",
    box: str = "fit",
    per_batch: bool = False,
) -> Mixed:
    """Cut the most salient part out of each image's source and paste it at the same place.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1. Not modified.
    source_index : ndarray of shape (N,), integer
        Image `i` receives from ``images[source_index[i]]``. On a GPU the values are not checked.
    lam : ndarray of shape (N,), floating
        Share of each receiving image to keep, in [0, 1]; 1 leaves it as it is.
    saliency : str or callable
        Name of a detector (``"spectral_residual"``, ``"fine_grained"``), or a function from images (N, H, W, C) uint8
        to maps (N, h, w), larger where more salient.
    box : {"fit", "clip"}
        ``"fit"`` moves a box that would stick out inside the image, ``"clip"`` cuts it off. See `boxes_at`.
    per_batch : bool
        If true, ``lam[0]`` and the one box that belongs to the source of image 0 serve all images.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes); `lam` is recomputed from the boxes.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name. Images that are not uint8 are refused.

    Notes
    -----
    Uddin et al., "SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization", ICLR 2021,
    the scheme salient to corresponding. The geometry of the released code is ``box="clip", per_batch=True``.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    >>> mixed = saliencymix(images, np.array([1, 2, 3, 0]), np.full(4, 0.75, np.float32))
    >>> mixed.lam.tolist()
    [0.75, 0.75, 0.75, 0.75]
    """
    detector = get_detector(saliency)
    xp = check_images(images)
    count, height, width, _ = images.shape
    check_source_index(source_index, xp, count)
    if per_batch:
        peaks = saliency_peaks(_checked_map(detector, images[source_index[:1]]), height, width)
        peaks = xp.repeat(peaks, count, axis=0)
    else:
        # The map of every image, then each one's partner: a permutation makes every image a source once.
        peaks = saliency_peaks(_checked_map(detector, images), height, width)[source_index]
    return _mix_at(images, source_index, lam, peaks, box=box, per_batch=per_batch)


def cutmix(
    images: Array, source_index: Array, lam: Array, centre: Array, *, box: str = "clip", per_batch: bool = False
) -> Mixed:
    """Cut a box around a given point out of each image's source and paste it at the same place.

    Parameters
    ----------
    images, source_index, lam, per_batch
        As for `saliencymix`.
    centre : ndarray of shape (N, 2), floating
        Centre of each box as fractions (y, x) of height and width, in [0, 1]; drawn uniformly for CutMix.
    box : {"fit", "clip"}
        ``"clip"``, the default, is CutMix.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes); `lam` is recomputed from the boxes.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name.

    Notes
    -----
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
    with a box and a weight for each sample.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.arange(2, dtype=np.uint8).repeat(64).reshape(2, 8, 8, 1)
    >>> mixed = cutmix(images, np.array([1, 0]), np.array([0.75, 1.0]), np.full((2, 2), 0.5))
    >>> mixed.boxes.tolist(), mixed.lam.tolist()
    ([[2, 2, 6, 6], [4, 4, 4, 4]], [0.75, 1.0])
    """
    xp = check_images(images)
    count, height, width, _ = images.shape
    check_source_index(source_index, xp, count)
    check_per_image(centre, "centre", xp, count, "f", trailing=(2,))
    check_range(centre, "centre", 0, 1, "in [0, 1]")
    size = xp.stack([xp.full(count, height), xp.full(count, width)], axis=1)
    peaks = xp.clip((centre * size).astype(xp.int32), 0, size - 1)
    return _mix_at(images, source_index, lam, peaks, box=box, per_batch=per_batch)


def _mix_at(images: Array, source_index: Array, lam: Array, peaks: Array, *, box: str, per_batch: bool) -> Mixed:
    count, height, width, _ = images.shape
    check_lam(lam, array_namespace(images), count)
    boxes = boxes_at(peaks, lam, height, width, box=box)
    if per_batch:
        boxes = boxes[:1].repeat(count, axis=0)
    return Mixed(paste_boxes(images, source_index, boxes), kept_fraction(boxes, height, width), boxes)


def _checked_map(detector: Detector, images: Array) -> Array:
    saliency_map = detector(images)
    shape: tuple[int, ...] = getattr(saliency_map, "shape", ())
    if array_namespace(saliency_map) is not array_namespace(images) or len(shape) != 3 or shape[0] != len(images):
        kind = type(saliency_map)
        msg = (
            f"saliency must return maps of shape ({len(images)}, h, w), in the array library of the images, "
            f"got {kind.__module__}.{kind.__qualname__} of shape {shape}"
        )
        raise ValueError(msg)
    return saliency_map

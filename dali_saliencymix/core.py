"""Whole batches in, whole batches out: the mixing functions on arrays, without DALI and without randomness.

Images are (N, H, W, C) uint8 in NumPy or CuPy; all other arrays of a call belong to the same library. With CuPy all
work is enqueued on the current stream and nothing waits for the GPU. CuPy keeps FFT plans for each thread, and a plan
has one work area: use one stream in a thread, or synchronise the streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dali_saliencymix._array import Array, array_namespace, is_host
from dali_saliencymix._checks import (
    check_images,
    check_lam,
    check_per_image,
    check_range,
    check_source_index,
)
from dali_saliencymix._routes import uses_kernel
from dali_saliencymix.boxes import boxes_at, kept_fraction, points_at
from dali_saliencymix.draw import MODES
from dali_saliencymix.pixels import blend_images, blend_onto, paste_boxes
from dali_saliencymix.placement import check_given_points, resolve_placement, salient_boxes

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix.saliency import Detector

    Paste = Callable[..., Array]


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The mixed images, a new array; what `paste` made where it was given.
    lam : ndarray of shape (N,), float32
        Weight of each receiving image's label. Where a box was pasted, it is exactly the share of the pixels outside
        the box.
    boxes : ndarray of shape (N, 4), int32
        Where the source's pixels are: (y0, x0, y1, x1), half-open. All 0 where nothing was pasted.
    source_boxes : ndarray of shape (N, 4), int32
        Where in the source they were taken from.
    """

    images: Array
    lam: Array
    boxes: Array
    source_boxes: Array


def saliencymix(
    images: Array,
    source_index: Array,
    lam: Array,
    *,
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: Array | None = None,
    point: Array | None = None,
    algorithm: str = "auto",
    paste: Paste = paste_boxes,
) -> Mixed:
    """Cut the most salient part out of each image's source and paste it into the image.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey ones with C = 1. Not modified.
    source_index : ndarray of shape (N,), integer
        Image `i` receives from ``images[source_index[i]]``. On a GPU the values are not checked.
    lam : ndarray of shape (N,), floating
        Share of each receiving image to keep, in [0, 1]; 1 leaves it as it is.
    preset : {"default", "paper", "released-code"}
        What the options that are None are: ``"default"`` is spectral_residual, salient to corresponding, fit;
        ``"paper"`` takes fine_grained instead; ``"released-code"`` has moreover ``box="clip"`` and ``per_batch=True``.
    saliency : str or callable, optional
        Name of a detector in `DETECTORS`, or a function from images (N, H, W, C) uint8 to maps (N, h, w), larger
        where more salient. On a CPU it is asked for the images that are needed only.
    source : {"salient", "non_salient"}, optional
        Cut around the most or the least salient pixel of the source.
    destination : {"corresponding", "salient", "non_salient", "random"}, optional
        Paste at the same place, around the most or the least salient pixel of the receiver, or around `point`.
    box : {"fit", "clip"}, optional
        ``"fit"`` moves a box that would stick out of the source inside, ``"clip"`` cuts it off; see `boxes_at`. At
        another place than the corresponding one the patch keeps its size and is moved inside.
    per_batch : bool, optional
        If true, ``lam[0]`` and the boxes of image 0 and its source serve all images.
    peaks : ndarray of shape (N, 2), integer, optional
        Most salient pixel (y, x) of each image, where it is known already: in place of `saliency`.
    point : ndarray of shape (N, 2), floating, optional
        Fractions (y, x) of height and width, in [0, 1], for ``destination="random"``, and only for it; drawn uniformly.
    algorithm : {"auto", "array", "kernel"}
        Array operations or kernels, for the steps that have one: see `fine_grained`. On a GPU ``"auto"`` means array
        operations: the CUDA kernels have not been measured yet.
    paste : callable
        What makes the mixed images once boxes are known, ``(images, source_index, boxes, source_boxes=) -> images``:
        `paste_boxes`, or `dali_saliencymix.normalise.paste_normalised` with its options bound.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes); `lam` is recomputed from the boxes.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name, or arguments contradict each other. Images
        that are not uint8 are refused.

    Notes
    -----
    Uddin et al., "SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization", ICLR 2021;
    the schemes are those of its section 3.4, and salient to random, which the released code once had. The paper found
    salient to corresponding best.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    >>> mixed = saliencymix(images, np.array([1, 2, 3, 0]), np.full(4, 0.75, np.float32))
    >>> mixed.lam.tolist()
    [0.75, 0.75, 0.75, 0.75]
    """
    xp = check_images(images)
    check_source_index(source_index, xp, len(images))
    check_lam(lam, xp, len(images))
    options = {"saliency": saliency, "source": source, "destination": destination, "box": box, "per_batch": per_batch}
    placement = resolve_placement(preset, options, peaks_given=peaks is not None)
    check_given_points(placement, images, peaks, point)
    if uses_kernel(algorithm, xp) and not is_host(xp) and not placement.per_batch:
        from dali_saliencymix import _cuda as cuda

        paste = cuda.paste_boxes if paste is paste_boxes else paste
        return Mixed(*cuda.saliencymix(images, source_index, lam, placement, peaks, point, paste))
    boxes, source_boxes = salient_boxes(
        images, source_index, lam, placement, peaks=peaks, point=point, algorithm=algorithm
    )
    return _pasted(images, source_index, boxes, source_boxes, paste)


def cutmix(
    images: Array,
    source_index: Array,
    lam: Array,
    point: Array,
    *,
    box: str = "clip",
    per_batch: bool = False,
    paste: Paste = paste_boxes,
) -> Mixed:
    """Cut a box around a given point out of each image's source and paste it at the same place.

    Parameters
    ----------
    images, source_index, lam, per_batch, paste
        As for `saliencymix`.
    point : ndarray of shape (N, 2), floating
        Centre of each box as fractions (y, x) of height and width, in [0, 1]; drawn uniformly for CutMix.
    box : {"fit", "clip"}
        ``"clip"``, the default, is CutMix.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes); `lam` is recomputed from the boxes.

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
    ([[2, 2, 6, 6], [0, 0, 0, 0]], [0.75, 1.0])
    """
    xp = check_images(images)
    check_source_index(source_index, xp, len(images))
    boxes = _boxes_around(images, point, lam, box)
    return _pasted(images, source_index, _first_for_all(boxes) if per_batch else boxes, None, paste)


def mixup(images: Array, source_index: Array, lam: Array, *, per_batch: bool = False) -> Mixed:
    """Blend each image with its source: `lam` of the image, 1 - `lam` of the source.

    Parameters
    ----------
    images, source_index
        As for `saliencymix`.
    lam : ndarray of shape (N,), floating
        Weight of each receiving image, in [0, 1].
    per_batch : bool
        If true, ``lam[0]`` serves all images.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes); `lam` as it was given, and no boxes: they are all 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or value.

    Notes
    -----
    See `blend_images`.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.array([0, 100], np.uint8).reshape(2, 1, 1, 1)
    >>> mixed = mixup(images, np.array([1, 0]), np.array([0.75, 0.5], np.float32))
    >>> mixed.images.ravel().tolist(), mixed.lam.tolist()
    ([25, 50], [0.75, 0.5])
    """
    xp = check_images(images)
    check_lam(lam, xp, len(images))
    lam = _first_for_all(lam) if per_batch else lam
    no_boxes = xp.zeros((len(images), 4), xp.int32)
    return Mixed(blend_images(images, source_index, lam), lam.astype(xp.float32), no_boxes, no_boxes)


def mix(
    images: Array,
    source_index: Array,
    lam: Array,
    mode: Array,
    point: Array,
    *,
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: Array | None = None,
    algorithm: str = "auto",
) -> Mixed:
    """Mix each image in a way of its own: saliencymix, cutmix or mixup.

    Parameters
    ----------
    images, source_index, lam
        As for `saliencymix`.
    mode : ndarray of shape (N,), integer
        Index into `MODES`: 0 for saliencymix, 1 for cutmix, 2 for mixup. On a GPU, where the values are not checked,
        an image with any other mode stays as it is.
    point : ndarray of shape (N, 2), floating
        Fractions (y, x) of height and width, in [0, 1], drawn uniformly: the centre of a cutmix box, and the place of
        a saliencymix patch with ``destination="random"``.
    preset, saliency, source, destination, box, peaks, algorithm
        As for `saliencymix`, and for its samples only: cutmix boxes are clipped.
    per_batch : bool, optional
        If true, ``lam[0]``, ``mode[0]`` and the boxes of image 0 and its source serve all images.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes); `lam` is recomputed from the boxes where there is one.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name, or arguments contradict each other.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    >>> lam, point = np.full(3, 0.75, np.float32), np.full((3, 2), 0.5)
    >>> mixed = mix(images, np.array([1, 2, 0]), lam, np.array([0, 1, 2]), point)
    >>> mixed.boxes[1:].tolist()
    [[8, 8, 24, 24], [0, 0, 0, 0]]
    """
    xp = check_images(images)
    count = len(images)
    check_source_index(source_index, xp, count)
    check_lam(lam, xp, count)
    check_per_image(mode, "mode", xp, count, "iu")
    check_range(mode, "mode", 0, len(MODES) - 1, f"in [0, {len(MODES)}), which are {', '.join(MODES)}")
    options = {"saliency": saliency, "source": source, "destination": destination, "box": box, "per_batch": per_batch}
    placement = resolve_placement(preset, options, peaks_given=peaks is not None)
    if placement.per_batch:
        lam, mode, point = (_first_for_all(array) for array in (lam, mode, point))

    at = point if placement.destination == "random" else None
    check_given_points(placement, images, peaks, at)
    boxes, source_boxes = salient_boxes(
        images,
        source_index,
        lam,
        placement,
        peaks=peaks,
        point=at,
        wanted=mode == MODES.index("saliencymix"),
        algorithm=algorithm,
    )
    by_saliency, by_point, blended = ((mode == index)[:, None] for index in range(len(MODES)))
    around_point = xp.where(by_point, _boxes_around(images, point, lam, "clip"), 0)
    boxes = xp.where(by_saliency, boxes, around_point)
    if source_boxes is not None:
        source_boxes = xp.where(by_saliency, source_boxes, around_point)
    mixed = _pasted(images, source_index, boxes, source_boxes)
    weight = xp.where(blended[:, 0], lam, 1).astype(xp.float32)
    pixels = blend_onto(mixed.images, images, source_index, weight)
    return mixed._replace(images=pixels, lam=xp.where(blended[:, 0], weight, mixed.lam))


def _pasted(
    images: Array, source_index: Array, boxes: Array, source_boxes: Array | None, paste: Paste = paste_boxes
) -> Mixed:
    xp = array_namespace(images)
    # An empty box can lie anywhere: let all of them look the same.
    covers = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1))[:, None]
    boxes = xp.where(covers, boxes, 0)
    if source_boxes is not None:
        source_boxes = xp.where(covers, source_boxes, 0)
    mixed = paste(images, source_index, boxes, source_boxes=source_boxes)
    lam = kept_fraction(boxes, *images.shape[1:3])
    return Mixed(mixed, lam, boxes, boxes if source_boxes is None else source_boxes)


def _boxes_around(images: Array, point: Array, lam: Array, box: str) -> Array:
    """Return CutMix boxes: around `point`, which is fractions of the image."""
    xp = array_namespace(images)
    check_per_image(point, "point", xp, len(images), "f", trailing=(2,))
    check_range(point, "point", 0, 1, "in [0, 1]")
    size = images.shape[1:3]
    return boxes_at(points_at(point, *size), lam, *size, box=box)


def _first_for_all(array: Array) -> Array:
    return array_namespace(array).repeat(array[:1], len(array), axis=0)

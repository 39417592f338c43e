"""Pixels and labels of a mixed batch, once boxes are known.

Nothing here modifies its arguments, but for `out`.
"""

from __future__ import annotations

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, is_host
from dali_saliencymix._checks import (
    check_array,
    check_at_least,
    check_boxes,
    check_fraction,
    check_images,
    check_lam,
    check_out,
    check_per_image,
    check_range,
    check_source_index,
)
from dali_saliencymix._threads import for_each_chunk

_CHUNK = 16  # images for one thread at a time


def paste_boxes(
    images: Array, source_index: Array, boxes: Array, *, source_boxes: Array | None = None, out: Array | None = None
) -> Array:
    """Return `images` with the pixels inside each box taken from the source image.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), any dtype
        The receiving images. Sources are read from here too, always unmixed.
    source_index : ndarray of shape (N,), integer
        Image `i` receives from ``images[source_index[i]]``.
    boxes : ndarray of shape (N, 4), integer
        (y0, x0, y1, x1), half-open, inside the image.
    source_boxes : ndarray of shape (N, 4), integer, optional
        Where the pixels are taken from, boxes of the same sizes as `boxes`; by default from the same place. On a GPU
        only their first corners are looked at.
    out : ndarray of shape (N, H, W, C), optional
        Where the result goes, of the dtype of `images` and sharing no memory with it; by default a new array.

    Returns
    -------
    ndarray of shape (N, H, W, C)
        A new array of the dtype of `images`, or `out`.

    Raises
    ------
    ValueError
        If a box lies outside the image, a box and its source box differ in size, or `out` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.arange(2, dtype=np.uint8).repeat(4).reshape(2, 2, 2, 1)
    >>> paste_boxes(images, np.array([1, 0]), np.array([[0, 0, 1, 2], [0, 0, 0, 0]]))[..., 0].tolist()
    [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    """
    xp = check_pasting(images, source_index, boxes, source_boxes)
    if out is not None:
        check_out(out, xp, images.shape, images.dtype)
        if xp.may_share_memory(out, images):
            msg = "out must share no memory with images, whose pixels are read until the end"
            raise ValueError(msg)
    if is_host(xp):
        return _paste_by_slices(images, source_index, boxes, source_boxes, out)
    return into(out, _paste_by_mask(images, source_index, boxes, source_boxes))


def into(out: Array | None, made: Array) -> Array:
    """Return `made`, or `out` with the same values where there is one."""
    if out is None:
        return made
    out[...] = made
    return out


def check_pasting(images: Array, source_index: Array, boxes: Array, source_boxes: Array | None) -> Namespace:
    """Require arguments of `paste_boxes` that fit the images; return their array library."""
    xp = check_array(images, "images")
    check_source_index(source_index, xp, len(images))
    check_boxes(boxes, "boxes", xp, *images.shape[:3])
    if source_boxes is not None:
        check_boxes(source_boxes, "source_boxes", xp, *images.shape[:3])
        _check_same_sizes(boxes, source_boxes, xp)
    return xp


def _paste_by_slices(
    images: Array, source_index: Array, boxes: Array, source_boxes: Array | None = None, out: Array | None = None
) -> Array:
    """Two copies for each image: what a CPU does best. The layout of a new array in memory is that of `images`."""
    mixed = np.empty_like(images) if out is None else out
    index = source_index.tolist()
    places, origins = boxes.tolist(), (boxes if source_boxes is None else source_boxes).tolist()

    def paste(chunk: slice) -> None:
        mixed[chunk] = images[chunk]
        for receiver in range(chunk.start, chunk.stop):
            (y0, x0, y1, x1), (v0, u0, v1, u1) = places[receiver], origins[receiver]
            mixed[receiver, y0:y1, x0:x1] = images[index[receiver], v0:v1, u0:u1]

    for_each_chunk(paste, len(images), _CHUNK)
    return mixed


def _paste_by_mask(images: Array, source_index: Array, boxes: Array, source_boxes: Array | None = None) -> Array:
    """One selection over all pixels: what a GPU does best, without asking it where the boxes are."""
    xp = array_namespace(images)
    _, height, width, _ = images.shape
    y0, x0, y1, x1 = boxes.T[:, :, None]
    y, x = xp.arange(height), xp.arange(width)
    inside = ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]
    if source_boxes is None:
        sources = images[source_index]
    else:
        v0, u0, _, _ = source_boxes.T[:, :, None]
        rows = xp.clip(y - y0 + v0, 0, height - 1)
        columns = xp.clip(x - x0 + u0, 0, width - 1)
        sources = images[source_index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return xp.where(inside[..., None], sources, images)


def _check_same_sizes(boxes: Array, source_boxes: Array, xp: Namespace) -> None:
    if not is_host(xp):
        return
    different = ((boxes[:, 2:] - boxes[:, :2]) != (source_boxes[:, 2:] - source_boxes[:, :2])).any(axis=1)
    if different.any():
        i = int(different.argmax())
        msg = f"source_boxes must have the sizes of boxes, got {source_boxes[i].tolist()} for {boxes[i].tolist()}"
        raise ValueError(msg)


def blend_images(images: Array, source_index: Array, lam: Array) -> Array:
    """Return the weighted mean of each image and its source: mixup.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The receiving images. Sources are read from here too, always unmixed.
    source_index : ndarray of shape (N,), integer
        Image `i` is blended with ``images[source_index[i]]``.
    lam : ndarray of shape (N,), floating
        Weight of the receiving image, in [0, 1].

    Returns
    -------
    ndarray of shape (N, H, W, C), uint8
        ``lam * image + (1 - lam) * source`` in float32, rounded to the nearest integer, halves to even ones.

    Notes
    -----
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, on 8-bit pixels: rounding costs at most half
    a grey level.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.array([[[[0]]], [[[100]]]], np.uint8)
    >>> blend_images(images, np.array([1, 0]), np.array([0.75, 1.0], np.float32)).ravel().tolist()
    [25, 100]
    """
    xp = check_images(images)
    check_source_index(source_index, xp, len(images))
    check_lam(lam, xp, len(images))
    return blend_onto(images.copy(order="K"), images, source_index, lam.astype(xp.float32))


def blend_onto(mixed: Array, images: Array, source_index: Array, lam: Array) -> Array:
    """Return `mixed`, which may be written to, with the images whose `lam` is under 1 replaced by blended `images`."""
    xp = array_namespace(images)
    if not is_host(xp):
        weight = lam[:, None, None, None]
        return xp.where(weight < 1, _blended(images, images[source_index], weight), mixed)
    for receiver in np.flatnonzero(lam < 1).tolist():  # image by image: the float32 pixels of one fit the cache
        mixed[receiver] = _blended(images[receiver], images[source_index[receiver]], lam[receiver])
    return mixed


def _blended(image: Array, source: Array, weight: Array) -> Array:
    xp = array_namespace(image)
    return xp.rint(image * weight + source * (1 - weight)).astype(xp.uint8)


def soft_labels(
    labels: Array, source_labels: Array, lam: Array, *, num_classes: int | None = None, smoothing: float = 0.0
) -> Array:
    """Return the targets of mixed images: `lam` on the label, 1 - `lam` on the source's label.

    Parameters
    ----------
    labels, source_labels : ndarray of shape (N,), integer, or (N, K), real
        Labels of the receiving and of the source images: class ids in [0, num_classes), or vectors of K weights, such
        as one-hot or multi-hot ones.
    lam : ndarray of shape (N,), floating
        Weight of `labels`, in [0, 1].
    num_classes : int, optional
        K, the number of classes. Needed for class ids, to be left out for vectors.
    smoothing : float
        Share of the weight that is spread evenly over all classes, in [0, 1]; for class ids.

    Returns
    -------
    ndarray of shape (N, K), float32
        For class ids, rows that sum to 1. On a GPU, where looking at a value would stall the stream, a label outside
        [0, num_classes) is no error: its row is NaN, and so is any loss computed from it.

    Raises
    ------
    TypeError, ValueError
        If a label in host memory lies outside [0, num_classes), or shapes or dtypes do not agree.

    Examples
    --------
    >>> import numpy as np
    >>> lam = np.array([0.75], np.float32)
    >>> soft_labels(np.array([0]), np.array([2]), lam, num_classes=3).tolist()
    [[0.75, 0.0, 0.25]]
    >>> soft_labels(np.array([[1, 1, 0]]), np.array([[0, 1, 1]]), lam).tolist()
    [[0.75, 1.0, 0.25]]
    """
    xp = check_array(labels, "labels")
    smoothing = check_fraction(smoothing, "smoothing")
    if num_classes is None:
        return _mixed_vectors(labels, source_labels, lam, smoothing, xp)
    check_at_least(num_classes, "num_classes", 1)
    if labels.ndim == 2:
        msg = f"num_classes must be left out where labels are vectors, of shape {labels.shape}; got {num_classes}"
        raise ValueError(msg)
    for name, array in (("labels", labels), ("source_labels", source_labels)):
        check_per_image(array, name, xp, labels.size, "iu")
        check_range(array, name, 0, num_classes - 1, f"in [0, {num_classes}), as num_classes={num_classes} says")
    check_lam(lam, xp, labels.size)

    lam = lam.astype(xp.float32)[:, None]
    classes = xp.arange(num_classes)
    label, source_label = labels[:, None], source_labels[:, None]
    targets = lam * (label == classes) + (1 - lam) * (source_label == classes)
    if smoothing:
        targets = targets * xp.float32(1 - smoothing) + xp.float32(smoothing / num_classes)
    if is_host(xp):
        return targets
    known = (label >= 0) & (label < num_classes) & (source_label >= 0) & (source_label < num_classes)
    return xp.where(known, targets, xp.float32(xp.nan))


def _mixed_vectors(labels: Array, source_labels: Array, lam: Array, smoothing: float, xp: Namespace) -> Array:
    if labels.ndim != 2:
        msg = f"num_classes must be given where labels are class ids, of shape {labels.shape}"
        raise ValueError(msg)
    if smoothing:
        msg = f"smoothing must be 0 where labels are vectors, which can be smoothed beforehand; got {smoothing}"
        raise ValueError(msg)
    for name, array in (("labels", labels), ("source_labels", source_labels)):
        check_per_image(array, name, xp, len(labels), "biuf", trailing=labels.shape[1:])
    check_lam(lam, xp, len(labels))
    lam = lam.astype(xp.float32)[:, None]
    return (lam * labels + (1 - lam) * source_labels).astype(xp.float32)

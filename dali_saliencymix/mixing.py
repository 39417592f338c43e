"""Pixels and labels of a mixed batch, once boxes are known.

Nothing here modifies its arguments.
"""

from __future__ import annotations

from dali_saliencymix._array import Array, array_namespace, is_host
from dali_saliencymix._checks import (
    check_array,
    check_at_least,
    check_boxes,
    check_lam,
    check_per_image,
    check_range,
    check_source_index,
)


def paste_boxes(images: Array, source_index: Array, boxes: Array) -> Array:
    """Return `images` with the pixels inside each box taken from the source image, at the same place.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), any dtype
        The receiving images. Sources are read from here too, always unmixed.
    source_index : ndarray of shape (N,), integer
        Image `i` receives from ``images[source_index[i]]``.
    boxes : ndarray of shape (N, 4), integer
        (y0, x0, y1, x1), half-open, inside the image.

    Returns
    -------
    ndarray of shape (N, H, W, C)
        A new array of the dtype of `images`.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.arange(2, dtype=np.uint8).repeat(4).reshape(2, 2, 2, 1)
    >>> paste_boxes(images, np.array([1, 0]), np.array([[0, 0, 1, 2], [0, 0, 0, 0]]))[..., 0].tolist()
    [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    """
    xp = check_array(images, "images")
    check_source_index(source_index, xp, len(images))
    check_boxes(boxes, xp, *images.shape[:3])
    return (_paste_by_slices if is_host(xp) else _paste_by_mask)(images, source_index, boxes)


def _paste_by_slices(images: Array, source_index: Array, boxes: Array) -> Array:
    """One copy for each box: what a CPU does best."""
    mixed = images.copy()
    for receiver, (source, (y0, x0, y1, x1)) in enumerate(zip(source_index.tolist(), boxes.tolist(), strict=True)):
        mixed[receiver, y0:y1, x0:x1] = images[source, y0:y1, x0:x1]
    return mixed


def _paste_by_mask(images: Array, source_index: Array, boxes: Array) -> Array:
    """One selection over all pixels: what a GPU does best, without asking it where the boxes are."""
    xp = array_namespace(images)
    _, height, width, _ = images.shape
    y0, x0, y1, x1 = boxes.T[:, :, None]
    y, x = xp.arange(height), xp.arange(width)
    inside = ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]
    return xp.where(inside[..., None], images[source_index], images)


def soft_labels(labels: Array, source_labels: Array, lam: Array, *, num_classes: int) -> Array:
    """Return the class probabilities of mixed images: `lam` on the label, 1 - `lam` on the source's label.

    Parameters
    ----------
    labels, source_labels : ndarray of shape (N,), integer
        Class ids in [0, num_classes) of the receiving and of the source images.
    lam : ndarray of shape (N,), floating
        Weight of `labels`, in [0, 1].
    num_classes : int
        K, the number of classes.

    Returns
    -------
    ndarray of shape (N, K), float32
        Rows that sum to 1. On a GPU, where looking at a value would stall the stream, a label outside
        [0, num_classes) is no error: its row is NaN, and so is any loss computed from it.

    Raises
    ------
    ValueError
        If a label in host memory lies outside [0, num_classes), or shapes do not agree.

    Examples
    --------
    >>> import numpy as np
    >>> soft_labels(np.array([0]), np.array([2]), np.array([0.75], np.float32), num_classes=3).tolist()
    [[0.75, 0.0, 0.25]]
    """
    check_at_least(num_classes, "num_classes", 1)
    xp = check_array(labels, "labels")
    for name, array in (("labels", labels), ("source_labels", source_labels)):
        check_per_image(array, name, xp, labels.size, "iu")
        check_range(array, name, 0, num_classes - 1, f"in [0, {num_classes}), as num_classes={num_classes} says")
    check_lam(lam, xp, labels.size)

    lam = lam.astype(xp.float32)[:, None]
    classes = xp.arange(num_classes)
    label, source_label = labels[:, None], source_labels[:, None]
    targets = lam * (label == classes) + (1 - lam) * (source_label == classes)
    if is_host(xp):
        return targets
    known = (label >= 0) & (label < num_classes) & (source_label >= 0) & (source_label < num_classes)
    return xp.where(known, targets, xp.float32(xp.nan))

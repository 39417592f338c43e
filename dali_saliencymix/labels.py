"""Soft labels of mixed batches."""

from __future__ import annotations

from dali_saliencymix._array import Array, Namespace, is_host
from dali_saliencymix._checks import (
    check_array,
    check_at_least,
    check_fraction,
    check_lam,
    check_per_image,
    check_range,
)


def soft_labels(
    labels: Array, source_labels: Array, lam: Array, *, num_classes: int | None = None, smoothing: float = 0.0
) -> Array:
    """Return the targets of mixed images: `lam` times the label plus 1 - `lam` times the source's label.

    Parameters
    ----------
    labels, source_labels : ndarray of shape (N,) or (N, 1), integer, or (N, K), real
        Labels of the images, the receivers, and of their sources: class ids in [0, num_classes), or vectors of K
        weights, such as one-hot or multi-hot vectors. Integers of shape (N, 1) are class ids.
    lam : ndarray of shape (N,), floating
        Weight of `labels`, in [0, 1].
    num_classes : int, optional
        K, the number of classes. Required for class ids; omit it for vectors.
    smoothing : float
        Label smoothing in [0, 1]: the share of the weight that is spread evenly over all classes. Only for class ids.

    Returns
    -------
    ndarray of shape (N, K), float32
        The targets. For class ids each row sums to 1. On a GPU the values of labels are not checked, since that would
        synchronise the stream: a label outside [0, num_classes) gives a row of NaN, and so a loss of NaN.

    Raises
    ------
    TypeError, ValueError
        If a label in host memory is outside [0, num_classes), or shapes or dtypes do not match.

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
    if labels.ndim == 2 and _are_class_ids(labels):
        labels = labels[:, 0]
        if getattr(source_labels, "shape", ()) == (len(labels), 1):
            source_labels = source_labels[:, 0]
    if labels.ndim == 2:
        msg = f"num_classes must be left out where labels are vectors, of shape {labels.shape}; got {num_classes}"
        raise ValueError(msg)
    for name, array in (("labels", labels), ("source_labels", source_labels)):
        check_per_image(array, name, xp, labels.size, "iu")
        check_range(array, name, 0, num_classes - 1, f"in [0, {num_classes}) for num_classes={num_classes}")
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


def _are_class_ids(labels: Array) -> bool:
    """Return whether labels are class ids: of shape (N,), or integers of shape (N, 1)."""
    return labels.ndim == 1 or (labels.shape[1:] == (1,) and labels.dtype.kind in "iu")


def check_vectors(labels: Array) -> None:
    """Require vectors of weights (N, K), not class ids."""
    if labels.ndim != 2 or _are_class_ids(labels):
        msg = f"num_classes must be given where labels are class ids, got {labels.dtype} of shape {labels.shape}"
        raise ValueError(msg)


def check_no_smoothing(smoothing: float) -> None:
    """Require 0, for labels that are vectors."""
    if smoothing:
        msg = f"smoothing must be 0 where labels are vectors, which can be smoothed beforehand; got {smoothing}"
        raise ValueError(msg)


def _mixed_vectors(labels: Array, source_labels: Array, lam: Array, smoothing: float, xp: Namespace) -> Array:
    check_vectors(labels)
    check_no_smoothing(smoothing)
    for name, array in (("labels", labels), ("source_labels", source_labels)):
        check_per_image(array, name, xp, len(labels), "biuf", trailing=labels.shape[1:])
    check_lam(lam, xp, len(labels))
    lam = lam.astype(xp.float32)[:, None]
    return (lam * labels + (1 - lam) * source_labels).astype(xp.float32)

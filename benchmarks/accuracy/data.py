"""CIFAR-10 as arrays on one device, and its batches: cropped, flipped, with the random draws for mixing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dali_saliencymix._array import array_namespace
from dali_saliencymix.datasets.cifar import SIZE, CifarImages, read_cifar

if TYPE_CHECKING:
    from dali_saliencymix._array import Array

PADDING = 4


def read_images(folder: Path) -> tuple[CifarImages, CifarImages]:
    """Return the training and the test images of CIFAR-10, from its archive or from mosaics."""
    if not (folder / "labels.json").is_file():
        return read_cifar(folder, "cifar10")
    from benchmarks.accuracy.mosaics import read_mosaics  # needs Pillow

    return read_mosaics(folder)


def first_of_each_class(part: CifarImages, count: int) -> CifarImages:
    """Return the first `count` images in the order of the files, equally many of each class."""
    classes = len(part.classes)
    each, rest = divmod(count, classes)
    found = [np.flatnonzero(part.labels == label)[:each] for label in range(classes)]
    if rest or min(map(len, found)) < each:
        most = classes * int(np.bincount(part.labels, minlength=classes).min())
        msg = f"--images must be a multiple of {classes}, of at most {most}, got {count}"
        raise ValueError(msg)
    chosen = np.sort(np.concatenate(found))
    return CifarImages(part.images[chosen], part.labels[chosen], part.classes)


class Draws(NamedTuple):
    """The random draws for a batch of N images, which are the same in all arms.

    Attributes
    ----------
    index : ndarray of shape (N,), int64
        Indices of the images.
    corner : ndarray of shape (N, 2), int64
        Corner of the crop in the padded image, (y, x) in [0, 2 `PADDING`].
    flipped : ndarray of shape (N,), bool
    source_index : ndarray of shape (N,), int64
        A permutation.
    lam : ndarray of shape (N,), float32
        1 for an image that is not mixed.
    point : ndarray of shape (N, 2), float64
        Uniform in [0, 1).
    """

    index: Array
    corner: Array
    flipped: Array
    source_index: Array
    lam: Array
    point: Array


def draws_of_epoch(
    seed: int, epoch: int, images: int, batch_size: int, *, prob: float, augment: bool, xp: Any = np
) -> Iterator[Draws]:
    """Yield the random draws of each batch of an epoch; the last incomplete batch is dropped."""
    rng = np.random.default_rng([seed, epoch])
    steps = images // batch_size
    count = steps * batch_size
    index = rng.permutation(images)[:count]
    corner = rng.integers(0, 2 * PADDING + 1, (count, 2))
    flipped = rng.random(count) < 0.5
    if not augment:
        corner, flipped = np.full_like(corner, PADDING), np.zeros_like(flipped)
    source = rng.permuted(np.tile(np.arange(batch_size), (steps, 1)), axis=1).ravel()
    lam = np.where(rng.random(count) < prob, rng.random(count), 1).astype(np.float32)  # uniform is Beta(1, 1)
    draws = Draws(index, corner, flipped, source, lam, rng.random((count, 2)))
    on_device = [xp.asarray(drawn) for drawn in draws]
    for start in range(0, count, batch_size):
        yield Draws(*(drawn[start : start + batch_size] for drawn in on_device))


def augmented(images: Array, draws: Draws) -> Array:
    """Return a batch (N, 32, 32, 3) uint8: padded by reflection, cropped, flipped horizontally.

    A border of zeros would attract the peaks of all detectors to its edge.
    """
    xp = array_namespace(images)
    rows, columns = (_reflected(xp, draws.corner[:, axis]) for axis in (0, 1))
    columns = xp.where(draws.flipped[:, None], columns[:, ::-1], columns)
    return images[draws.index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflected(xp: Any, corner: Array) -> Array:
    """Return the indices of the rows or columns of each crop, (N, 32)."""
    at = xp.abs(corner[:, None] - PADDING + xp.arange(SIZE))
    return SIZE - 1 - xp.abs(SIZE - 1 - at)

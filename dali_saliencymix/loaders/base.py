"""The interface of data sets and loaders, for all backends.

A training batch is ``(images, labels, source_labels, lam)``, a validation batch ``(images, labels)``: see
`dali_saliencymix.loaders.dali.Loader`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes


class LoaderError(RuntimeError):
    """A batch could not be made. The text says why in one line, and names the file where it is known."""


class Batches(ABC):
    """The batches of one process.

    Iterating gives one epoch, or what is left of it in a restored state; iterating again gives the next one.
    """

    _length: int  # batches in a whole epoch
    _step: int  # batches given in this epoch

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same for all processes."""
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches that are left of the epoch."""
        while self._step < self._length:
            batch = self._next_batch()
            self._step += 1
            yield batch
        self._step = 0

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        """Return the batch at `_step`: for loaders that have no `__iter__` of their own."""
        raise NotImplementedError

    @abstractmethod
    def state(self) -> Any:
        """Return plain values that a loader of the same kind resumes from: taken between two batches, at the second."""


@dataclass(frozen=True)
class Data(ABC):
    """A data set, and the loaders of its batches.

    Attributes
    ----------
    classes : list of str
        Names of the classes; a label is an index into this list.
    train_images, val_images : int
        How many images there are.
    root : Path
        Where the training images are.
    fingerprint : dict from str to str or int
        What decides the batches of a training beside its options. A resumed training has to find the same.
    mean, std : tuple of float
        What images are normalised with, for pixels in 0..1.
    """

    classes: list[str]
    train_images: int
    val_images: int
    root: Path
    fingerprint: dict[str, str | int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def train_loader(self, options: DataOptions, processes: Processes, *, state: Any = None) -> Batches:
        """Return the training batches of this process, from where `state` stands.

        Parameters
        ----------
        options : DataOptions
            What the batches are like.
        processes : Processes
            Which process this is, and where it computes.
        state : dict, optional
            What ``state()`` of such a loader gave, in a run with the same options.

        Raises
        ------
        ValueError
            If an option does not fit the data set or the device; it is named.
        """

    @abstractmethod
    def val_loader(self, options: DataOptions, processes: Processes) -> Batches:
        """Return the validation batches of this process: all together have every image of `validated` exactly once."""


def validated(images: int, options: DataOptions, processes: Processes) -> range | list[int]:
    """Return which of the validation images count: all, or with --val-steps so many that are spread evenly."""
    if options.val_steps is None:
        return range(images)
    count = min(images, options.val_steps * options.batch_size * processes.world_size)
    return [number * images // count for number in range(count)]


def chosen_backend(options: DataOptions) -> str:
    """Return who makes the batches: what is asked for, or else DALI, on a GPU where the run has one."""
    if options.data_backend is not None:
        return options.data_backend
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return "dali-gpu" if on_gpu else "dali-cpu"


def check_share(images: int, world_size: int, batch_size: int, root: Path, name: str = "--batch-size") -> None:
    """Require enough training images for one batch on each process."""
    share = images // world_size
    if share < batch_size:
        msg = (
            f"{name} must be at most {share}, the share that each of {world_size} processes has of the {images} images "
            f"in {root}, got {batch_size}"
        )
        raise ValueError(msg)


def fingerprint_of(options: DataOptions, train: int, val: int, *train_content: bytes) -> dict[str, str | int]:
    """Return the fingerprint of a data set with so many images; `train_content` is what a digest is made of."""
    digest = hashlib.blake2b(digest_size=16)
    for part in train_content:
        digest.update(part)
    return {
        "dataset": options.dataset,
        "data_backend": chosen_backend(options),
        "train_images": train,
        "val_images": val,
        "train_digest": digest.hexdigest() if train_content else "",
    }

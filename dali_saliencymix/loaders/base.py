"""What a data set and a loader are, whoever makes the batches.

A training batch is ``(images, labels, source_labels, lam)``, one of validation ``(images, labels)``: see
`dali_saliencymix.loaders.dali.Loader`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD


class LoaderError(RuntimeError):
    """A batch could not be made. The text says why in one line, and names the file where it is known."""


class Batches(Protocol):
    """What all loaders are."""

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same for all processes."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches that are left of the epoch."""

    def state(self) -> Any:
        """Return plain values from which another loader of the same making goes on."""


@dataclass(frozen=True)
class Data(ABC):
    """A data set, and who makes batches of it.

    Attributes
    ----------
    classes : list of str
        Names of the classes; a label is an index into this list.
    train_images, val_images : int
        How many images there are.
    root : Path
        Where the training images are.
    mean, std : tuple of float
        What images are normalised with, for pixels in 0..1.
    fingerprint : dict from str to str or int
        What decides the batches of a training beside its options. A training that resumes has to find the same.
    """

    classes: list[str]
    train_images: int
    val_images: int
    root: Path
    fingerprint: dict[str, str | int]

    mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGENET_STD

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
        """Return the validation batches of this process: all together have every image exactly once."""


def chosen_backend(options: DataOptions) -> str:
    """Return who makes the batches: what is asked for, or else DALI, on a GPU where the run has one."""
    if options.data_backend is not None:
        return options.data_backend
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return "dali-gpu" if on_gpu else "dali-cpu"


def check_share(options: DataOptions, processes: Processes, images: int, root: Path) -> None:
    """Require enough training images for one batch on each process."""
    share = images // processes.world_size
    if share < options.batch_size:
        msg = (
            f"--batch-size must be at most {share}, the share that each of {processes.world_size} processes has of the "
            f"{images} images in {root}, got {options.batch_size}"
        )
        raise ValueError(msg)


def fingerprint_of(options: DataOptions, train: int, val: int, train_digest: str) -> dict[str, str | int]:
    """Return the fingerprint of a data set with so many images; `train_digest` is of the training images."""
    return {
        "dataset": options.dataset,
        "data_backend": chosen_backend(options),
        "train_images": train,
        "val_images": val,
        "train_digest": train_digest,
    }


def digest(*parts: bytes) -> str:
    """Return a digest of bytes, 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()

"""The interface of data sets and loaders that all backends share.

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
    """A batch could not be loaded. The message is one line that says why, and names the file if it is known."""


class Batches(ABC):
    """The batches of one process.

    Each iteration yields one epoch. After a resume, the first iteration yields the rest of the interrupted epoch.
    If an iteration is left before its last batch, the next one yields the rest; if it is left after the last batch, the
    next one yields the next epoch.
    """

    _length: int  # batches per epoch
    _step: int  # batches yielded in this epoch

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same for all processes."""
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the remaining batches of the epoch; if there are none, those of the next epoch."""
        if self._step >= self._length:
            # A consumer that counts batches, such as Lightning's Trainer, leaves the iterator after the last one.
            for _ in self._remaining():
                pass
        yield from self._remaining()

    def _remaining(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the remaining batches of the epoch, and begin the next epoch."""
        while self._step < self._length:
            batch = self._next_batch()
            self._step += 1
            yield batch
        self._step = 0

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        """Return the batch at `_step`; not needed by loaders that override `_remaining`."""
        raise NotImplementedError

    @abstractmethod
    def state(self) -> Any:
        """Return plain values from which a loader of the same kind resumes with the next batch."""


@dataclass(frozen=True)
class Data(ABC):
    """A data set that creates the loaders of its batches.

    Attributes
    ----------
    classes : list of str
        Names of the classes; a label is an index into this list.
    train_images : int
        Number of training images.
    val_images : int
        Number of validation images.
    root : Path
        Folder of the training images.
    fingerprint : dict from str to str or int
        Properties of the data which, besides the options, determine the training batches. They must not change when a
        run resumes.
    mean : tuple of float
        Mean of each channel for the normalisation, for pixels in [0, 1].
    std : tuple of float
        Standard deviation of each channel.
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
        """Return the training batches of this process, resumed from `state` if it is given.

        Parameters
        ----------
        options : DataOptions
            Options that determine the batches.
        processes : Processes
            Rank and device of this process.
        state : dict, optional
            Value of ``state()`` of such a loader, from a run with the same options.

        Raises
        ------
        ValueError
            If an option does not suit the data set or the device. The message names the option.
        """

    @abstractmethod
    def val_loader(self, options: DataOptions, processes: Processes) -> Batches:
        """Return the validation batches of this process; over all processes, each image of `validated` appears once."""


def validated(images: int, options: DataOptions, processes: Processes) -> range | list[int]:
    """Return the indices of the images to validate on: all, or with ``--val-steps`` an evenly spaced subset."""
    if options.val_steps is None:
        return range(images)
    count = min(images, options.val_steps * options.batch_size * processes.world_size)
    return [number * images // count for number in range(count)]


def chosen_backend(options: DataOptions) -> str:
    """Return the data backend: the requested one, or by default DALI, on the GPU if the run uses one."""
    if options.data_backend is not None:
        return options.data_backend
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return "dali-gpu" if on_gpu else "dali-cpu"


def check_share(images: int, world_size: int, batch_size: int, root: Path, name: str = "--batch-size") -> None:
    """Require enough training images for one batch in each process."""
    share = images // world_size
    if share < batch_size:
        msg = (
            f"{name} must be at most {share}, the number of images per process ({images} images in {root}, "
            f"{world_size} processes), got {batch_size}"
        )
        raise ValueError(msg)


def fingerprint_of(options: DataOptions, train: int, val: int, *train_content: bytes) -> dict[str, str | int]:
    """Return the fingerprint of a data set: its name, backend and size, and a digest of `train_content`."""
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

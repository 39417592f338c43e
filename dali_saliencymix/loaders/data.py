"""From the options of a run to its batches: which data set, and who makes the batches of it.

`open_data` looks at the data set once; what it returns makes the loaders of each process. A training batch is
``(images, labels, source_labels, lam)``, one of validation ``(images, labels)``: see `dali_saliencymix.loaders.dali.Loader`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

import dali_saliencymix.fn as mix_fn
from dali_saliencymix.datasets.cifar import DATASETS as CIFAR_DATASETS
from dali_saliencymix.datasets.cifar import SIZE as CIFAR_SIZE
from dali_saliencymix.datasets.cifar import CifarImages, read_cifar
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.loaders import cifar, imagenet
from dali_saliencymix.loaders.dali import training_loader, validation_loader
from dali_saliencymix.loaders.torch import (
    FolderImages,
    Mixing,
    PaddedImages,
    TorchLoader,
    TrainingBatches,
    ValidationBatches,
)
from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.distributed import Processes

DATASETS = ("folder", *CIFAR_DATASETS)
BACKENDS = ("dali-gpu", "dali-cpu", "pytorch", "synthetic")

_FILES_LOOKED_AT = 1000  # for their sizes: asking a file server for those of all of ImageNet takes minutes


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
    """A data set and who makes batches of it.

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
        What decides the batches of a training beside its options. A training that goes on has to find the same.
    """

    classes: list[str]
    train_images: int
    val_images: int
    root: Path
    fingerprint: dict[str, str | int]

    mean: ClassVar[tuple[float, ...]] = imagenet.MEAN
    std: ClassVar[tuple[float, ...]] = imagenet.STD

    @abstractmethod
    def train_loader(
        self, args: argparse.Namespace, processes: Processes, *, crop_size: int, state: Any = None
    ) -> Batches:
        """Return the training batches of this process, from where `state` stands.

        Parameters
        ----------
        args : argparse.Namespace
            Options of the run.
        processes : Processes
            Which process this is, and where it computes.
        crop_size : int
            Height and width of the images.
        state : dict, optional
            What ``state()`` of such a loader gave, in a run with the same options.

        Raises
        ------
        ValueError
            If an option does not fit the data set or the device; it is named.
        """

    @abstractmethod
    def val_loader(self, args: argparse.Namespace, processes: Processes) -> Batches:
        """Return the validation batches of this process: all together have every image exactly once."""


def open_data(args: argparse.Namespace, classes: list[str] | None = None) -> Data:
    """Look at the data set that the options of a run name.

    Parameters
    ----------
    args : argparse.Namespace
        Of `dali_saliencymix.training.arguments.parse_arguments`.
    classes : list of str, optional
        Names of the classes in label order, where nothing is trained: the training images, which the names are of
        otherwise, are not looked at and need not be there.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError, NotADirectoryError, ValueError
        If the data set is not there, is damaged, or an option is wrong.
    """
    if chosen_backend(args) == "synthetic":
        images = args.synthetic_steps * args.batch_size
        names = classes or [f"class {number}" for number in range(args.synthetic_classes)]
        fingerprint = _fingerprint(args, images, images, "")
        return SyntheticData(names, images, images, Path("synthetic"), fingerprint, args.synthetic_steps)
    return _open_folder(args, classes) if args.dataset == "folder" else _open_cifar(args, classes)


def _open_folder(args: argparse.Namespace, classes: list[str] | None) -> FolderData:
    if classes is not None:
        train = ImageFolder(args.train_dir, classes, [], [])
    else:
        train = list_image_folder(args.train_dir)
        if len(train.classes) < 2:
            msg = f"{args.train_dir}: one class only, {train.classes[0]!r}; there must be at least two"
            raise ValueError(msg)
        if args.train_list is not None:
            train = _those_of_list(train, args.train_list, "--train-list")
    val = list_image_folder(args.val_dir, classes=train.classes)
    if args.val_list is not None:
        val = _those_of_list(val, args.val_list, "--val-list")
    counts = len(train), len(val)
    return FolderData(train.classes, *counts, train.root, _fingerprint(args, *counts, _files_digest(train)), train, val)


def _open_cifar(args: argparse.Namespace, classes: list[str] | None) -> CifarData:
    train, val = read_cifar(args.data, args.dataset)
    if classes is not None and classes != train.classes:
        msg = f"{args.data}: holds other classes than those asked for, the first of which is {classes[0]!r}"
        raise ValueError(msg)
    counts = len(train), len(val)
    fingerprint = _fingerprint(args, *counts, _digest(train.images.tobytes(), train.labels.tobytes()))
    return CifarData(train.classes, *counts, Path(args.data), fingerprint, train, val)


def chosen_backend(args: argparse.Namespace) -> str:
    """Return who makes the batches: what is asked for, or else DALI, on a GPU where the run has one."""
    if args.data_backend is not None:
        return str(args.data_backend)
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    return "dali-gpu" if on_gpu else "dali-cpu"


def mix_operator(args: argparse.Namespace) -> imagenet.Mix | None:
    """Return the DALI operator that mixes, with its options."""
    if args.mix == "none":
        return None
    return functools.partial(getattr(mix_fn, args.mix), alpha=args.mix_alpha, prob=args.mix_prob, **_mix_options(args))


def _augmentation(args: argparse.Namespace, crop_size: int) -> dict[str, Any]:
    """Return what happens to a training image before it is mixed, in DALI and in workers of PyTorch."""
    return {"crop_size": crop_size, "min_crop_area": args.min_crop_area, "color_jitter": args.color_jitter}


def dali_augmentation(args: argparse.Namespace, crop_size: int) -> dict[str, Any]:
    """Return the options of `dali_saliencymix.loaders.imagenet.training_pipeline` that say what happens to a training image."""
    return {
        **_augmentation(args, crop_size),
        "hflip_prob": args.hflip_prob,
        "mix": mix_operator(args),
        "mix_normalises": args.mix in ("saliencymix", "cutmix"),
    }


def _mix_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the function that mixes takes beside what is drawn, in DALI and on arrays."""
    options: dict[str, Any] = {"per_batch": args.per_batch if args.mix == "saliencymix" else bool(args.per_batch)}
    if args.mix == "saliencymix":
        options |= {name: getattr(args, name) for name in ("preset", "saliency", "source", "destination", "box")}
    elif args.mix == "cutmix":
        options["box"] = args.box or "clip"
    return options


def _mixing(args: argparse.Namespace, **changed: Any) -> Mixing | None:
    if args.mix == "none":
        return None
    return Mixing(args.mix, args.mix_alpha, args.mix_prob, {**_mix_options(args), **changed})


@dataclass(frozen=True)
class FolderData(Data):
    """Two folders of images, with one folder for each class."""

    train: ImageFolder
    val: ImageFolder

    def train_loader(
        self, args: argparse.Namespace, processes: Processes, *, crop_size: int, state: Any = None
    ) -> Batches:
        """Return the training batches of this process, from where `state` stands."""
        _check_training(args, processes, self.train, self.root)
        if chosen_backend(args) == "pytorch":
            images = FolderImages(self.train, **_augmentation(args, crop_size))
            batches = _training_batches(args, processes, images, _mixing(args))
            return _torch_loader(args, processes, batches, self.mean, self.std, state=state)
        return training_loader(
            self.train,
            **_dali_options(args, processes),
            **dali_augmentation(args, crop_size),
            seed=args.seed,
            max_bad_batches=args.max_bad_batches,
            state=state,
        )

    def val_loader(self, args: argparse.Namespace, processes: Processes) -> Batches:
        """Return the validation batches of this process: all together have every image exactly once."""
        sizes = {"resize_size": args.val_resize_size, "crop_size": args.val_crop_size}
        if chosen_backend(args) == "pytorch":
            batches = _validation_batches(args, processes, FolderImages(self.val, **sizes))
            return _torch_loader(args, processes, batches, self.mean, self.std)
        options = {**_dali_options(args, processes), **sizes}
        return validation_loader(self.val, max_bad_batches=args.max_bad_batches, **options)


@dataclass(frozen=True)
class CifarData(Data):
    """CIFAR-10 or CIFAR-100, in memory."""

    train: CifarImages
    val: CifarImages
    mean = tuple(value / 255 for value in cifar.MEAN)
    std = tuple(value / 255 for value in cifar.STD)

    def train_loader(
        self, args: argparse.Namespace, processes: Processes, *, crop_size: int, state: Any = None
    ) -> Batches:
        """Return the training batches of this process, from where `state` stands."""
        if crop_size != CIFAR_SIZE:
            msg = f"--train-crop-size must be {CIFAR_SIZE} with --dataset {args.dataset}, got {crop_size}"
            raise ValueError(msg)
        if args.color_jitter:
            msg = f"--color-jitter must be 0 with --dataset {args.dataset}, got {args.color_jitter}"
            raise ValueError(msg)
        _check_training(args, processes, self.train, self.root)
        detector = _detector_before_padding(args)
        changed = {} if detector is None else {"saliency": None}
        if chosen_backend(args) == "pytorch":
            source = PaddedImages(self.train, args.crop_padding, detector)
            batches = _training_batches(args, processes, source, _mixing(args, **changed))
            return _torch_loader(args, processes, batches, self.mean, self.std, state=state)
        operator = mix_operator(args)
        if detector is not None and operator is not None:
            operator = functools.partial(operator, **changed)
        return cifar.CifarLoader(
            self.train,
            **_dali_options(args, processes),
            seed=args.seed,
            mix=operator,
            find_peaks=None if detector is None else functools.partial(mix_fn.saliency_peaks, saliency=detector),
            padding=args.crop_padding,
            hflip_prob=args.hflip_prob,
            state=state,
        )

    def val_loader(self, args: argparse.Namespace, processes: Processes) -> Batches:
        """Return the validation batches of this process: all together have every image exactly once."""
        batches = _validation_batches(args, processes, PaddedImages(self.val))
        # There is nothing to do but to normalise: other processes would only get in the way.
        return _torch_loader(args, processes, batches, self.mean, self.std, workers=0)


def _detector_before_padding(args: argparse.Namespace) -> str | None:
    """Return the detector that has to look at images before they are padded; None where the mix can do it itself."""
    if args.mix != "saliencymix" or not args.crop_padding:
        return None
    for option in ("source", "destination"):
        if getattr(args, option) == "non_salient":
            msg = (
                f"--{option} must not be non_salient with --crop-padding {args.crop_padding}: the least salient pixel "
                "could be one of the padding; --crop-padding 0 goes with it"
            )
            raise ValueError(msg)
    return str(MixOptions(preset=args.preset, saliency=args.saliency).saliency)


@dataclass(frozen=True)
class SyntheticData(Data):
    """No data: one constant batch, to see how fast a training goes when no loader holds it back."""

    steps: int
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def train_loader(
        self, args: argparse.Namespace, processes: Processes, *, crop_size: int, state: Any = None
    ) -> Batches:
        """Return the training batches of this process, from where `state` stands."""
        images, labels = self._batch(args, processes, crop_size)
        lam = torch.full((args.batch_size,), 1.0 if args.mix == "none" else 0.5, device=processes.device)
        return SyntheticLoader((images, labels, labels.roll(1), lam), self.steps, state=state)

    def val_loader(self, args: argparse.Namespace, processes: Processes) -> Batches:
        """Return the validation batches of this process."""
        return SyntheticLoader(self._batch(args, processes, args.val_crop_size), self.steps)

    def _batch(self, args: argparse.Namespace, processes: Processes, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(args.seed)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        images = torch.randn(args.batch_size, 3, size, size, generator=generator)
        labels = torch.randint(len(self.classes), (args.batch_size,), generator=generator)
        return images.to(processes.device, memory_format=memory_format), labels.to(processes.device)


class SyntheticLoader:
    """The same batch at every step of an epoch.

    Parameters
    ----------
    batch : tuple of torch.Tensor
        What every step gets.
    steps : int
        Batches in an epoch.
    state : dict, optional
        ``{"step": int}``, to go on from.
    """

    def __init__(self, batch: tuple[torch.Tensor, ...], steps: int, *, state: dict[str, int] | None = None) -> None:
        self._batch = batch
        self._steps = steps
        self._step = state["step"] if state else 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self._steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches that are left of the epoch."""
        while self._step < self._steps:
            self._step += 1
            yield self._batch
        self._step = 0

    def state(self) -> dict[str, int]:
        """Return where the loader stands."""
        return {"step": self._step}


def _shard(args: argparse.Namespace, processes: Processes) -> dict[str, int]:
    return {"batch_size": args.batch_size, "rank": processes.rank, "world_size": processes.world_size}


def _dali_options(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    backend = chosen_backend(args)
    if backend == "dali-gpu" and processes.device.type != "cuda":
        msg = f"--data-backend dali-gpu needs a run on a GPU, and this one is on {processes.device}; take dali-cpu"
        raise ValueError(msg)
    return {
        "process_on": "gpu" if backend == "dali-gpu" else "cpu",
        "num_threads": args.workers,
        "device": processes.device,
        "channels_last": args.channels_last,
        **_shard(args, processes),
    }


def _training_batches(
    args: argparse.Namespace, processes: Processes, source: FolderImages | PaddedImages, mixing: Mixing | None
) -> TrainingBatches:
    shard = _shard(args, processes)
    return TrainingBatches(source, mixing=mixing, hflip_prob=args.hflip_prob, seed=args.seed, **shard)


def _validation_batches(
    args: argparse.Namespace, processes: Processes, source: FolderImages | PaddedImages
) -> ValidationBatches:
    if len(source.labels) < processes.world_size:
        msg = f"{len(source.labels)} validation images are too few for {processes.world_size} processes"
        raise ValueError(msg)
    return ValidationBatches(source, **_shard(args, processes))


def _torch_loader(
    args: argparse.Namespace,
    processes: Processes,
    batches: TrainingBatches | ValidationBatches,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    workers: int | None = None,
    state: Any = None,
) -> TorchLoader:
    return TorchLoader(
        batches,
        mean=mean,
        std=std,
        workers=args.workers if workers is None else workers,
        device=processes.device,
        channels_last=args.channels_last,
        state=state,
    )


def _check_training(args: argparse.Namespace, processes: Processes, train: Sized, root: Path) -> None:
    share = len(train) // processes.world_size
    if share < args.batch_size:
        msg = (
            f"--batch-size must be at most {share}, the share that each of {processes.world_size} processes has of the "
            f"{len(train)} images in {root}, got {args.batch_size}"
        )
        raise ValueError(msg)


def _those_of_list(folder: ImageFolder, path: Path, option: str) -> ImageFolder:
    """Return the images whose paths, relative to the folder, are the lines of a text file; their order stays."""
    wanted: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line and wanted.setdefault(line, number) != number:
            msg = f"{option} {path}, line {number}: the same image as in line {wanted[line]}: {line}"
            raise ValueError(msg)
    kept = [number for number, name in enumerate(_relative_names(folder)) if wanted.pop(name, 0)]
    if wanted:
        line, number = next(iter(wanted.items()))
        msg = f"{option} {path}, line {number}: no such image in {folder.root}: {line}"
        raise ValueError(msg)
    if not kept:
        msg = f"{option} {path}: names no image"
        raise ValueError(msg)
    return replace(
        folder, files=[folder.files[number] for number in kept], labels=[folder.labels[number] for number in kept]
    )


def _relative_names(folder: ImageFolder) -> list[str]:
    start = len(str(folder.root / "x")) - 1
    return [file[start:] for file in folder.files]


def _fingerprint(args: argparse.Namespace, train: int, val: int, digest: str) -> dict[str, str | int]:
    return {
        "dataset": args.dataset,
        "data_backend": chosen_backend(args),
        "train_images": train,
        "val_images": val,
        "train_digest": digest,
    }


def _files_digest(folder: ImageFolder) -> str:
    """Return a digest of the names of all files and the sizes of some of them, spread evenly."""
    step = max(len(folder) // _FILES_LOOKED_AT, 1)
    sizes = [_size(file) for file in folder.files[::step]]
    return _digest("\n".join(_relative_names(folder)).encode(), "\n".join(sizes).encode())


def _size(file: str) -> str:
    try:
        return str(os.stat(file).st_size)
    except OSError:  # a link to nothing, or another bad file: the loader says so when it comes to it
        return "none"


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

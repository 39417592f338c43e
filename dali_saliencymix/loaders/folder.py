"""The data set of two image folders: from the options of a run to the loaders of each process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.loaders.base import Batches, Data, check_share, chosen_backend, fingerprint_of, validated
from dali_saliencymix.loaders.dali import process_on
from dali_saliencymix.loaders.imagenet import training_loader, validation_loader
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.loaders.torch import FolderImages, TorchLoader, TrainingBatches, ValidationBatches, policy_of

_FILES_LOOKED_AT = 1000  # the sizes of all of ImageNet's files would take minutes on a file server


def open_folder(options: DataOptions, classes: list[str] | None = None) -> FolderData:
    """List the images in `options.train_dir` and `options.val_dir`; if `classes` is given, only the latter."""
    if options.train_dir is None or options.val_dir is None:
        msg = (
            f"train_dir and val_dir must be given with dataset 'folder', got {options.train_dir} and {options.val_dir}"
        )
        raise ValueError(msg)
    if classes is not None:
        train = ImageFolder(options.train_dir, classes, [], [])
    else:
        train = list_image_folder(options.train_dir)
        if len(train.classes) < 2:
            msg = f"{options.train_dir}: only one class, {train.classes[0]!r}; there must be at least two"
            raise ValueError(msg)
        if options.train_list is not None:
            train = _those_of_list(train, options.train_list, "--train-list")
    val = list_image_folder(options.val_dir, classes=train.classes)
    if options.val_list is not None:
        val = _those_of_list(val, options.val_list, "--val-list")
    counts = len(train), len(val)
    fingerprint = fingerprint_of(options, *counts, *_names_and_sizes(train))
    return FolderData(train.classes, *counts, train.root, fingerprint, options.mean, options.std, train, val)


@dataclass(frozen=True)
class FolderData(Data):
    """Two folders of images, with one folder for each class."""

    train: ImageFolder
    val: ImageFolder

    def train_loader(self, options: DataOptions, processes: Processes, *, state: Any = None) -> Batches:
        """Return the training batches of this process, resumed from `state` if it is given."""
        check_share(len(self.train), processes.world_size, options.batch_size, self.root)
        if chosen_backend(options) == "pytorch":
            sizes = options.train_crop_size, options.min_crop_area
            images = FolderImages(self.train, *sizes, options.color_jitter, policy=policy_of(options))
            batches = TrainingBatches(images, options, processes)
            return TorchLoader(batches, workers=options.workers, state=state)
        arguments = training_arguments(options, processes)
        return training_loader(self.train, max_bad_batches=options.max_bad_batches, state=state, **arguments)

    def val_loader(self, options: DataOptions, processes: Processes) -> Batches:
        """Return the validation batches of this process; over all processes, each image of `validated` appears once."""
        val = self.val.take(validated(len(self.val), options, processes))
        sizes = {"resize_size": options.val_resize_size, "crop_size": options.val_crop_size}
        if chosen_backend(options) == "pytorch":
            images = FolderImages(val, **sizes)
            return TorchLoader(ValidationBatches(images, options, processes), workers=options.workers)
        arguments = {**_common_arguments(options, processes), **sizes}
        return validation_loader(val, max_bad_batches=options.max_bad_batches, **arguments)


def training_arguments(options: DataOptions, processes: Processes) -> dict[str, Any]:
    """Return the arguments of `training_loader` for the options of a run."""
    names = ("min_crop_area", "hflip_prob", "auto_augment", "ra_magnitude", "color_jitter", "random_erase")
    return {
        **_common_arguments(options, processes),
        **{name: getattr(options, name) for name in names},
        "crop_size": options.train_crop_size,
        "mix": options.mix,
        "seed": options.seed,
    }


def _common_arguments(options: DataOptions, processes: Processes) -> dict[str, Any]:
    names = ("batch_size", "prefetch", "hw_decoder_load", "channels_last", "mean", "std")
    return {
        **{name: getattr(options, name) for name in names},
        "num_threads": options.workers,
        "device": processes.device,
        "process_on": process_on(options, processes),
        "rank": processes.rank,
        "world_size": processes.world_size,
    }


def _those_of_list(folder: ImageFolder, path: Path, option: str) -> ImageFolder:
    """Select the images whose relative paths are the lines of a text file; the order of the folder is kept."""
    wanted: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        msg = f"{option} {path}: not UTF-8 text: {error.reason} at byte {error.start}"
        raise ValueError(msg) from error
    for number, line in enumerate(lines, start=1):
        if line and wanted.setdefault(line, number) != number:
            msg = f"{option} {path}, line {number}: the same image as in line {wanted[line]}: {line}"
            raise ValueError(msg)
    kept = [number for number, name in enumerate(_relative_names(folder)) if wanted.pop(name, 0)]
    if wanted:
        line, number = next(iter(wanted.items()))
        msg = f"{option} {path}, line {number}: no such image in {folder.root}: {line}"
        raise ValueError(msg)
    if not kept:
        msg = f"{option} {path}: lists no images"
        raise ValueError(msg)
    return folder.take(kept)


def _relative_names(folder: ImageFolder) -> list[str]:
    start = len(str(folder.root / "x")) - 1
    return [file[start:] for file in folder.files]


def _names_and_sizes(folder: ImageFolder) -> tuple[bytes, bytes]:
    """Return the names of all files, and the sizes of an evenly spaced subset."""
    step = max(len(folder) // _FILES_LOOKED_AT, 1)
    sizes = [_size(file) for file in folder.files[::step]]
    return "\n".join(_relative_names(folder)).encode(), "\n".join(sizes).encode()


def _size(file: str) -> str:
    try:
        return str(os.stat(file).st_size)
    except OSError:  # a broken link or another bad file: the loader reports it when it reads the file
        return "none"

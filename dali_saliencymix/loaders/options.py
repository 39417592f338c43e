"""What decides the batches of a run, with the defaults of ``train.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dali_saliencymix.datasets.cifar import DATASETS as CIFAR_DATASETS
from dali_saliencymix.options import PRESETS, MixOptions

DATASETS = ("folder", *CIFAR_DATASETS)
BACKENDS = ("dali-gpu", "dali-cpu", "pytorch", "synthetic")


@dataclass(frozen=True)
class DataOptions:
    """What all loaders of a run need to know; the options of ``train.py`` have the same names.

    Attributes
    ----------
    data : path, optional
        Folder of CIFAR's archive.
    dataset : {"folder", "cifar10", "cifar100"}
        Class folders, or CIFAR's archive.
    data_backend : {"dali-gpu", "dali-cpu", "pytorch", "synthetic"}, optional
        Who makes the batches; by default DALI, on a GPU if `device` means one.
    train_dir, val_dir : path, optional
        Class folders of the training and of the validation images.
    batch_size : int
        Images of each process in a batch.
    workers : int
        DALI's threads, or worker processes of PyTorch, in each process.
    train_list, val_list : path, optional
        Text file whose lines are the paths of the images to take, relative to their folder; by default all.
    train_crop_size : int
        Height and width of training images, in pixels.
    min_crop_area : float
        Least area of the random crop as a share of the image, in (0, 1].
    hflip_prob : float
        Probability of a horizontal flip.
    color_jitter : float
        Brightness, contrast and saturation change by factors in [1 - color_jitter, 1 + color_jitter].
    crop_padding : int
        With CIFAR: width of the border of zeros that a crop can reach into, in pixels.
    val_resize_size, val_crop_size : int
        Short side of validation images, and height and width of their centre crop, in pixels.
    synthetic_classes, synthetic_steps : int
        Classes of synthetic data, and batches of its epochs.
    mix : MixOptions, optional
        How training images are mixed; with None they are not.
    device : {"auto", "cpu", "cuda"}
        Where the run computes.
    channels_last : bool
        Images are channels-last in memory.
    seed : int
        Seed of the order of the images and of all other draws, of at least 0.
    max_bad_batches : int
        Bad files that DALI's loaders leave out before the next one is an error.
    """

    data: Path | None = None
    dataset: str = "folder"
    data_backend: str | None = None
    train_dir: Path | None = None
    val_dir: Path | None = None
    batch_size: int = 256
    workers: int = 4
    train_list: Path | None = None
    val_list: Path | None = None
    train_crop_size: int = 224
    min_crop_area: float = 0.08
    hflip_prob: float = 0.5
    color_jitter: float = 0.0
    crop_padding: int = 4
    val_resize_size: int = 256
    val_crop_size: int = 224
    synthetic_classes: int = 1000
    synthetic_steps: int = 100
    mix: MixOptions | None = PRESETS["default"]
    device: str = "auto"
    channels_last: bool = False
    seed: int = 0
    max_bad_batches: int = 10

"""What decides the batches of a run, with the defaults of ``train.py``."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from dali_saliencymix.datasets import cifar
from dali_saliencymix.options import PRESETS, MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD

DATASETS = ("folder", *cifar.DATASETS)
AUTO_AUGMENT = ("none", "ra", "ta_wide")  # RandAugment, TrivialAugmentWide
ERASED_AREA, ERASED_ASPECT_RATIO = (0.02, 0.33), (0.3, 3.3)  # of --random-erase, as torchvision has them
BACKENDS = ("dali-gpu", "dali-cpu", "pytorch", "synthetic")


def option(default: Any, text: str, *flags: str, group: str = "data", **about: Any) -> Any:
    """Declare an option of ``train.py``: a field whose metadata holds its help and how its value is read.

    Parameters
    ----------
    default : Any
        The default value.
    text : str
        The help.
    *flags : str
        The flags, if not ``--`` and the name of the field alone.
    group : str
        Group of the help that lists it.
    **about
        Further arguments of ``add_argument``; ``least``, the smallest integer, by default 1; ``within``, the range of
        a number, one of those in `dali_saliencymix.training.arguments`; or ``only_with``, another option and its values
        with which this one has a use, or a list of several such options.
    """
    return field(default=default, metadata={"help": text, "flags": flags, "group": group, **about})


def flags_of(declared: Field[Any]) -> tuple[str, ...]:
    """Return the flags of a declared option, the long one last: those it was given, or one of its name."""
    return declared.metadata["flags"] or (f"--{declared.name.replace('_', '-')}",)


@dataclass(frozen=True)
class DataOptions:
    """What all loaders of a run need to know. Sizes are in pixels; class folders are those of a data set's images."""

    data: Path | None = None  # folder of CIFAR's archive
    dataset: str = option("folder", "what DATA is: class folders, or CIFAR's archive", choices=DATASETS)
    data_backend: str | None = option(
        None,
        "who makes the batches (default: dali-gpu on a GPU, else dali-cpu); synthetic: the same batch in every step, "
        "without DATA",
        choices=BACKENDS,
    )
    train_dir: Path | None = option(None, "folder of training images, instead of DATA/train")
    val_dir: Path | None = option(None, "folder of validation images, instead of DATA/val")
    batch_size: int = option(256, "images of each process (GPU) in a step", "-b", "--batch-size")
    workers: int = option(4, "CPU threads of DALI, or worker processes of PyTorch, in each process", "-j", "--workers")
    prefetch: int = option(
        2,
        "batches made in advance: by DALI's pipeline, or by each worker process of PyTorch",
        only_with=("data_backend", None, *BACKENDS[:3]),
    )
    hw_decoder_load: float = option(
        0.65,
        "share of the JPEG files that go to the GPU's JPEG engine, where it has one",
        metavar="SHARE",
        within="in [0, 1]",
        only_with=[("dataset", "folder"), ("data_backend", None, "dali-gpu"), ("device", "auto", "cuda")],
    )
    train_list: Path | None = option(None, "take only the images whose paths are its lines", metavar="FILE")
    val_list: Path | None = option(None, "the same for validation", metavar="FILE")
    train_crop_size: int = option(224, "size of training images (default: 224, with CIFAR 32)", metavar="PIXELS")
    min_crop_area: float = option(
        0.08,
        "smallest area of the random crop, as a share of the image",
        metavar="A",
        within="in (0, 1]",
        only_with=("dataset", "folder"),
    )
    hflip_prob: float = option(0.5, "probability of a horizontal flip", metavar="P", within="in [0, 1]")
    auto_augment: str = option(
        "none",
        "augment by a policy: RandAugment, with two operations, or TrivialAugmentWide",
        *("--auto-augment", "--aa"),
        choices=AUTO_AUGMENT,
    )
    ra_magnitude: int = option(
        9, "magnitude of RandAugment, out of 0 to 30", least=0, within="in [0, 30]", only_with=("auto_augment", "ra")
    )
    color_jitter: float = option(
        0.0,
        "brightness, contrast and saturation change by factors in [1 - X, 1 + X]",
        metavar="X",
        within="in [0, 1]",
        only_with=("dataset", "folder"),
    )
    random_erase: float = option(
        0.0,
        "probability that a rectangle of an image is set to the mean, after the mix",
        *("--random-erase", "--reprob"),
        metavar="P",
        within="in [0, 1]",
    )
    crop_padding: int = option(
        4, "with CIFAR: zeros around an image to crop from", least=0, only_with=("dataset", *cifar.DATASETS)
    )
    mean: tuple[float, ...] = option(
        IMAGENET_MEAN,
        "mean of each channel to normalise with, for pixels in 0..1 (default: that of ImageNet or CIFAR)",
        nargs=3,
        metavar=("R", "G", "B"),
        within="in [0, 1]",
    )
    std: tuple[float, ...] = option(
        IMAGENET_STD, "the standard deviation", nargs=3, metavar=("R", "G", "B"), within="a positive number"
    )
    val_resize_size: int = option(
        256, "short side of validation images", metavar="PIXELS", only_with=("dataset", "folder")
    )
    val_crop_size: int = option(
        224, "centre crop of validation images", metavar="PIXELS", only_with=("dataset", "folder")
    )
    synthetic_classes: int = option(1000, "classes of synthetic data")
    synthetic_steps: int = option(100, "steps of an epoch of synthetic data")
    mix: MixOptions | None = PRESETS["default"]  # None: no mixing
    val_steps: int | None = option(
        None,
        "validate on N batches of each process only, images spread evenly over the validation set, always the same",
        group="short runs",
    )
    device: str = option("auto", "where to compute", group="speed and precision", choices=("auto", "cpu", "cuda"))
    channels_last: bool = False  # of the images in memory
    seed: int = option(0, "seed of weights, file order and augmentation", group="run", least=0)
    max_bad_batches: int = option(
        10,
        "end with an error after more than N batches with a bad file, which is left out from then on",
        group="checkpoints and faults",
        least=0,
    )


def defaults_of(dataset: str) -> dict[str, Any]:
    """Return the options of `DataOptions` whose defaults follow from the data set, with these."""
    if dataset == "folder":
        return {name: getattr(DataOptions, name) for name in ("train_crop_size", "mean", "std")}
    mean, std = (tuple(value / 255 for value in values) for values in (cifar.MEAN, cifar.STD))
    return {"train_crop_size": cifar.SIZE, "mean": mean, "std": std}

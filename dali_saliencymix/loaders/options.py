"""The options that determine the batches of a run, with the defaults of ``train.py``."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from dali_saliencymix.datasets import cifar
from dali_saliencymix.options import PRESETS, MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD

DATASETS = ("folder", *cifar.DATASETS)
AUTO_AUGMENT = ("none", "ra", "ta_wide")  # RandAugment, TrivialAugmentWide
ERASED_AREA, ERASED_ASPECT_RATIO = (0.02, 0.33), (0.3, 3.3)  # of --random-erase, as in torchvision
BACKENDS = ("dali-gpu", "dali-cpu", "pytorch", "synthetic")


def option(default: Any, text: str, *flags: str, group: str = "data", **about: Any) -> Any:
    """Declare an option of ``train.py``: a dataclass field whose metadata holds the arguments for the parser.

    Parameters
    ----------
    default : Any
        The default value.
    text : str
        The help text.
    *flags : str
        The flags. By default, ``--`` and the name of the field.
    group : str
        The argument group.
    **about
        Further arguments of ``add_argument``, or:

        - ``least``, the minimum of an integer, by default 1;
        - ``within``, the range of a number, one of those in `dali_saliencymix.training.arguments`;
        - ``only_with``, another option and those of its values for which this option has an effect, or a list of
          several such options.
    """
    return field(default=default, metadata={"help": text, "flags": flags, "group": group, **about})


def flags_of(declared: Field[Any]) -> tuple[str, ...]:
    """Return the flags of a declared option, the long one last; the default flag is derived from its name."""
    return declared.metadata["flags"] or (f"--{declared.name.replace('_', '-')}",)


@dataclass(frozen=True)
class DataOptions:
    """The options of all loaders of a run. Sizes are in pixels."""

    data: Path | None = None  # folder of the CIFAR archive
    dataset: str = option("folder", "format of DATA: class folders, or a CIFAR archive", choices=DATASETS)
    data_backend: str | None = option(
        None,
        "data backend (default: dali-gpu on a GPU, else dali-cpu); synthetic: the same batch in every step, without "
        "DATA",
        choices=BACKENDS,
    )
    train_dir: Path | None = option(None, "folder of training images, instead of DATA/train")
    val_dir: Path | None = option(None, "folder of validation images, instead of DATA/val")
    batch_size: int = option(256, "images per step in each process (GPU)", "-b", "--batch-size")
    workers: int = option(4, "DALI's CPU threads, or PyTorch's worker processes, in each process", "-j", "--workers")
    prefetch: int = option(
        2,
        "batches to prefetch, by DALI's pipeline or by each PyTorch worker process",
        only_with=("data_backend", None, *BACKENDS[:3]),
    )
    hw_decoder_load: float = option(
        0.65,
        "fraction of the JPEG files that the GPU's hardware JPEG decoder decodes, if there is one",
        metavar="SHARE",
        within="in [0, 1]",
        only_with=[("dataset", "folder"), ("data_backend", None, "dali-gpu"), ("device", "auto", "cuda")],
    )
    train_list: Path | None = option(
        None, "train only on the images that this file lists, one path on each line", metavar="FILE"
    )
    val_list: Path | None = option(None, "validate only on the images that this file lists", metavar="FILE")
    train_crop_size: int = option(224, "size of training images (default: 224, with CIFAR 32)", metavar="PIXELS")
    min_crop_area: float = option(
        0.08,
        "minimum area of the random crop, as a fraction of the image",
        metavar="A",
        within="in (0, 1]",
        only_with=("dataset", "folder"),
    )
    hflip_prob: float = option(0.5, "probability of a horizontal flip", metavar="P", within="in [0, 1]")
    auto_augment: str = option(
        "none",
        "augmentation policy: RandAugment with two operations, or TrivialAugmentWide",
        *("--auto-augment", "--aa"),
        choices=AUTO_AUGMENT,
    )
    ra_magnitude: int = option(
        9, "magnitude of RandAugment, from 0 to 30", least=0, within="in [0, 30]", only_with=("auto_augment", "ra")
    )
    color_jitter: float = option(
        0.0,
        "random factors in [1 - X, 1 + X] for brightness, contrast and saturation",
        metavar="X",
        within="in [0, 1]",
        only_with=("dataset", "folder"),
    )
    random_erase: float = option(
        0.0,
        "probability of random erasing, which sets a rectangle to the mean after mixing",
        *("--random-erase", "--reprob"),
        metavar="P",
        within="in [0, 1]",
    )
    crop_padding: int = option(
        4, "with CIFAR: zero padding before the random crop", least=0, only_with=("dataset", *cifar.DATASETS)
    )
    mean: tuple[float, ...] = option(
        IMAGENET_MEAN,
        "channel means for the normalisation, for pixels in [0, 1] (default: those of ImageNet or CIFAR)",
        nargs=3,
        metavar=("R", "G", "B"),
        within="in [0, 1]",
    )
    std: tuple[float, ...] = option(
        IMAGENET_STD,
        "channel standard deviations for the normalisation",
        nargs=3,
        metavar=("R", "G", "B"),
        within="a positive number",
    )
    val_resize_size: int = option(
        256, "short side of validation images after the resize", metavar="PIXELS", only_with=("dataset", "folder")
    )
    val_crop_size: int = option(
        224, "size of the centre crop of validation images", metavar="PIXELS", only_with=("dataset", "folder")
    )
    synthetic_classes: int = option(1000, "number of classes of synthetic data")
    synthetic_steps: int = option(100, "steps per epoch of synthetic data")
    mix: MixOptions | None = PRESETS["default"]  # None: no mixing
    val_steps: int | None = option(
        None,
        "validate on N batches per process only, a fixed subset spread evenly over the validation set",
        group="short runs",
    )
    device: str = option("auto", "device of the run", group="speed and precision", choices=("auto", "cpu", "cuda"))
    channels_last: bool = False  # memory format of the images
    seed: int = option(0, "seed of weights, file order and augmentation", group="run", least=0)
    max_bad_batches: int = option(
        10,
        "skip up to N bad files in each process; one more ends the run with an error",
        group="checkpoints and fault tolerance",
        least=0,
    )


def defaults_of(dataset: str) -> dict[str, Any]:
    """Return those defaults of `DataOptions` that depend on the data set."""
    if dataset == "folder":
        return {name: getattr(DataOptions, name) for name in ("train_crop_size", "mean", "std")}
    mean, std = (tuple(value / 255 for value in values) for values in (cifar.MEAN, cifar.STD))
    return {"train_crop_size": cifar.SIZE, "mean": mean, "std": std}

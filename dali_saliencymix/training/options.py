"""The options of ``train.py`` in groups, each for the functions that need it: an option is declared here alone.

The name of a field is that of its flag. `dali_saliencymix.training.arguments` makes the command line of them, and
checks the values.
"""

from __future__ import annotations

import argparse
import functools
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from dali_saliencymix.loaders.options import DataOptions, option
from dali_saliencymix.options import MODES

_EPSILON = "8/255"  # of --fgsm


def read_epsilon(text: str) -> float:
    """Read a number or a fraction in [0, 1].

    Examples
    --------
    >>> read_epsilon("51/255")
    0.2
    """
    try:
        epsilon = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        epsilon = -1.0
    if not 0 <= epsilon <= 1:
        msg = f"must be a number or a fraction in [0, 1], such as {_EPSILON}, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return epsilon


def _size_at_epoch(text: str) -> str:
    """Check a size and the epoch that it begins at. The text stays: it is what files and checkpoints hold."""
    if not re.fullmatch(r"[1-9]\d*@\d+", text):
        msg = f"must be SIZE@EPOCH, such as 160@6, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return text


def _amp_dtype(text: str) -> str:
    """Accept the names of timm and PyTorch too."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(text, text)


_model = functools.partial(option, group="model and optimiser")
_speed = functools.partial(option, group="speed and precision")
_run = functools.partial(option, group="run")
_faults = functools.partial(option, group="checkpoints and faults")
_output = functools.partial(option, group="displays and files")
_evaluation = functools.partial(option, group="with --evaluate")
_short = functools.partial(option, group="short runs")


@dataclass(frozen=True)
class ModelOptions:
    """The network, and how it computes."""

    arch: str = _model(
        "resnet50",
        "a classification model of torchvision, or cifar_resnet18, cifar_resnet50, wrn_28_10",
        *("-a", "--arch", "--model"),
        metavar="NAME",
    )
    dropout: float | None = _model(None, "dropout of a model that has it", metavar="P", within="in [0, 1)")
    amp: bool = _speed(False, "compute in 16 bits where that is safe")
    amp_dtype: str = _speed(
        "bf16",
        "of --amp; fp16 scales the loss",
        type=_amp_dtype,
        choices=("bf16", "fp16"),
        only_with=("amp", True),
    )
    channels_last: bool = _speed(False, "channels-last memory, straight from DALI")
    compile: bool = _speed(False, "compile the model with torch.compile")
    deterministic: bool = _speed(False, "deterministic kernels of PyTorch: slower, repeatable")

    @property
    def precision(self) -> str:
        """``"fp32"``, or the 16 bits that are in use."""
        return self.amp_dtype if self.amp else "fp32"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients could vanish in these 16 bits, so that the loss has to be scaled."""
        return self.precision == "fp16"


@dataclass(frozen=True)
class OptimizerOptions:
    """From the gradients to new weights."""

    accumulation_steps: int = _model(1, "steps whose gradients make one update of the weights")
    lr: float = _model(
        0.1,
        "learning rate at the global batch, of all processes and accumulated steps; never scaled by the script: "
        "0.1 for each 256 images is the usual rule",
        within="a positive number",
    )
    opt: str = _model("sgd", "optimiser", "--opt", "--optimizer", choices=("sgd", "adamw"))
    momentum: float = _model(0.9, "momentum of SGD", metavar="M", within="in [0, 1)", only_with=("opt", "sgd"))
    nesterov: bool = _model(True, "Nesterov momentum of SGD", only_with=("opt", "sgd"))
    opt_betas: tuple[float, float] = _model(
        (0.9, 0.999),
        "decay of AdamW's averages of gradients and of their squares",
        nargs=2,
        type=float,
        metavar=("B1", "B2"),
        within="in [0, 1)",
        only_with=("opt", "adamw"),
    )
    opt_eps: float = _model(
        1e-8, "epsilon of AdamW", metavar="EPS", within="a positive number", only_with=("opt", "adamw")
    )
    weight_decay: float = _model(
        1e-4, "weight decay", "--wd", "--weight-decay", metavar="WD", within="a number of at least 0"
    )
    norm_weight_decay: float | None = _model(
        None, "that of normalisation layers, often 0", metavar="WD", within="a number of at least 0"
    )
    bias_weight_decay: float | None = _model(
        None, "that of all biases, often 0", metavar="WD", within="a number of at least 0"
    )
    label_smoothing: float = _model(0.0, "smoothing of the mixed labels", metavar="S", within="in [0, 1)")
    clip_grad_norm: float | None = _model(
        None, "largest norm of the gradients", metavar="NORM", within="a positive number"
    )
    model_ema: bool = _model(False, "keep an exponential moving average (EMA) of the weights")
    model_ema_decay: float = _model(
        0.9999,
        "how much of the EMA stays at each update",
        metavar="D",
        within="in (0, 1)",
        only_with=("model_ema", True),
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """What changes in the course of a training."""

    epochs: int = _model(300, "length of the training")
    lr_scheduler: str = _model(
        "cosine", "the learning rate falls to 0 along half a cosine, or in steps", choices=("cosine", "step")
    )
    lr_warmup_epochs: float = _model(0.0, "epochs of linear warm-up", metavar="N", within="a number of at least 0")
    lr_milestones: tuple[float, ...] = _model(
        (75.0, 150.0, 225.0), "epochs of the steps", metavar="EPOCH", only_with=("lr_scheduler", "step")
    )
    lr_gamma: float = _model(
        0.1, "factor of each step", metavar="F", within="a positive number", only_with=("lr_scheduler", "step")
    )
    progressive_size: tuple[str, ...] = option(
        (),
        "size of training images from an epoch on, counted from 0: 128@0 160@6 192@12",
        type=_size_at_epoch,
        metavar="SIZE@EPOCH",
        only_with=("dataset", "folder"),
    )
    mix_off_epochs: int = option(
        0, "no mixing in the last N epochs", group="mixing", least=0, only_with=("mix", *MODES)
    )


@dataclass(frozen=True)
class RunOptions:
    """What a run does beside the training itself: checkpoints, faults, displays, and where it ends."""

    output_dir: Path = _run(Path("output"), "folder for checkpoints and log")
    resume: str | None = _run(
        None, "resume from a checkpoint; auto: from that of the output folder, if there is one", metavar="PATH|auto"
    )
    pretrained: Path | None = _run(
        None,
        "begin with the weights of this file: of torchvision, of its scripts or of a checkpoint; another number of "
        "classes leaves the last layer fresh",
        metavar="PATH",
    )
    evaluate: bool = _run(
        False,
        "only validate the checkpoint named by --resume, or the weights of --pretrained; needs no training images",
        *("-e", "--evaluate", "--test-only"),
        action="store_true",
    )
    restart_epoch: bool = _faults(
        False,
        "with --resume: start the epoch again, with other data options, images or processes than before",
        action="store_true",
    )
    checkpoint_every: int | None = _faults(None, "write checkpoints within an epoch too", metavar="STEPS")
    checkpoint_interval: float = _faults(
        30.0, "the same by the clock; 0: never", metavar="MINUTES", within="a number of at least 0"
    )
    keep_checkpoints: int = _faults(2, "keep the last K of them", metavar="K")
    stall_timeout: float = _faults(
        600.0,
        "end with an error after so long a time without progress; 0: wait for ever",
        metavar="SECONDS",
        within="in [0, 1e6]",
    )
    max_nan_steps: int = _faults(3, "end with an error after N steps in a row whose loss is not finite")
    tensorboard: bool = _output(False, "write for TensorBoard as well")
    log_wandb: bool = _output(False, "log to Weights & Biases as well")
    wandb_project: str = _output(
        "dali-saliencymix", "project to log to there", metavar="NAME", only_with=("log_wandb", True)
    )
    save_images: int = _output(0, "draw N images of the first batch, as mixed", least=0)
    print_freq: int = _output(10, "steps between two displays", "-p", "--print-freq")
    profile_loader: bool = _short(False, "only measure whether the loader is the bottleneck", action="store_true")
    max_steps: int | None = _short(None, "end after N steps of this run, and validate", "--max-steps", "--prof")
    training_only: bool = _short(False, "do not validate")
    no_checkpoints: bool = _short(False, "save no checkpoints", action="store_true")


# What --evaluate takes from the checkpoint, unless it is given.
AS_TRAINED = (
    *("arch", "dropout", "model_ema", "dataset", "train_crop_size", "mean", "std", "val_resize_size", "val_crop_size"),
)


@dataclass(frozen=True)
class EvaluationOptions:
    """What ``--evaluate`` reports beyond top-1 and top-5."""

    report: Path | None = _evaluation(None, "file for the result, not evaluation.json", metavar="JSON")
    per_class_csv: bool = _evaluation(False, "write the accuracy of each class", action="store_true")
    fgsm: float | None = _evaluation(
        None,
        f"accuracy under attack, by at most EPSILON of 1 in each pixel value; {_EPSILON} if left out",
        nargs="?",
        type=read_epsilon,
        const=read_epsilon(_EPSILON),
        metavar="EPSILON",
    )
    cam: tuple[str, ...] | None = _evaluation(None, "draw class activation maps of these images", metavar="IMAGE")
    cam_class: str | None = _evaluation(None, "of this class, not of the one that is predicted", metavar="CLASS")


@dataclass(frozen=True)
class TrainingOptions:
    """All options of a training."""

    data: DataOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    run: RunOptions
    evaluation: EvaluationOptions
    # What was given, by the names of the flags, as files and checkpoints hold it: paths are text, and what was left out
    # for a preset to decide is None.
    config: dict[str, Any] = field(repr=False)

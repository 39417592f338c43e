"""The options of ``train.py``, in groups for the functions that need them. Each option is declared only once.

A field has the name of its flag. `dali_saliencymix.training.arguments` builds the command line from the fields, and
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
    """Check a size and its first epoch, and return the text, which files and checkpoints hold."""
    if not re.fullmatch(r"[1-9]\d*@\d+", text):
        msg = f"must be SIZE@EPOCH, such as 160@6, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return text


def _amp_dtype(text: str) -> str:
    """Convert the names that timm and PyTorch use."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(text, text)


_model = functools.partial(option, group="model and optimiser")
_speed = functools.partial(option, group="speed and precision")
_run = functools.partial(option, group="run")
_faults = functools.partial(option, group="checkpoints and fault tolerance")
_output = functools.partial(option, group="logs and outputs")
_evaluation = functools.partial(option, group="with --evaluate")
_short = functools.partial(option, group="short runs")


@dataclass(frozen=True)
class ModelOptions:
    """Options of the network and its computation."""

    arch: str = _model(
        "resnet50",
        "classification model of torchvision, or cifar_resnet18, cifar_resnet50, wrn_28_10",
        *("-a", "--arch", "--model"),
        metavar="NAME",
    )
    dropout: float | None = _model(
        None, "dropout probability, for a model with dropout layers", metavar="P", within="in [0, 1)"
    )
    amp: bool = _speed(False, "automatic mixed precision (AMP)")
    amp_dtype: str = _speed(
        "bf16",
        "data type of --amp; fp16 uses loss scaling",
        type=_amp_dtype,
        choices=("bf16", "fp16"),
        only_with=("amp", True),
    )
    channels_last: bool = _speed(False, "channels-last memory format, in which DALI outputs the images directly")
    compile: bool = _speed(False, "compile the model with torch.compile")
    deterministic: bool = _speed(False, "deterministic kernels of PyTorch: slower, but reproducible")

    @property
    def precision(self) -> str:
        """The precision in use: ``"fp32"``, or the value of `amp_dtype`."""
        return self.amp_dtype if self.amp else "fp32"

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, since gradients can underflow in float16."""
        return self.precision == "fp16"


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimiser and the weight updates."""

    accumulation_steps: int = _model(1, "steps over which gradients are accumulated for one update of the weights")
    lr: float = _model(
        0.1,
        "learning rate for the global batch, over all processes and accumulated steps; the script never scales it: "
        "the usual rule is 0.1 for each 256 images",
        within="a positive number",
    )
    opt: str = _model("sgd", "optimiser", "--opt", "--optimizer", choices=("sgd", "adamw"))
    momentum: float = _model(0.9, "momentum of SGD", metavar="M", within="in [0, 1)", only_with=("opt", "sgd"))
    nesterov: bool = _model(True, "Nesterov momentum of SGD", only_with=("opt", "sgd"))
    opt_betas: tuple[float, float] = _model(
        (0.9, 0.999),
        "betas of AdamW",
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
        None, "weight decay of normalisation layers, often 0", metavar="WD", within="a number of at least 0"
    )
    bias_weight_decay: float | None = _model(
        None, "weight decay of all biases, often 0", metavar="WD", within="a number of at least 0"
    )
    label_smoothing: float = _model(0.0, "label smoothing of the mixed labels", metavar="S", within="in [0, 1)")
    clip_grad_norm: float | None = _model(
        None, "maximum norm of the gradients", metavar="NORM", within="a positive number"
    )
    model_ema: bool = _model(False, "keep an exponential moving average (EMA) of the weights")
    model_ema_decay: float = _model(
        0.9999,
        "decay of the EMA per update",
        metavar="D",
        within="in (0, 1)",
        only_with=("model_ema", True),
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of the schedules: learning rate, image size and mixing."""

    epochs: int = _model(300, "number of epochs")
    lr_scheduler: str = _model(
        "cosine",
        "learning rate schedule: half a cosine down to 0, or a drop at each milestone",
        choices=("cosine", "step"),
    )
    lr_warmup_epochs: float = _model(0.0, "epochs of linear warm-up", metavar="N", within="a number of at least 0")
    lr_milestones: tuple[float, ...] = _model(
        (75.0, 150.0, 225.0),
        "epochs at which the learning rate is multiplied by --lr-gamma",
        metavar="EPOCH",
        only_with=("lr_scheduler", "step"),
    )
    lr_gamma: float = _model(
        0.1, "factor at each milestone", metavar="F", within="a positive number", only_with=("lr_scheduler", "step")
    )
    progressive_size: tuple[str, ...] = option(
        (),
        "sizes of training images and the epochs, counted from 0, from which they apply: 128@0 160@6 192@12",
        type=_size_at_epoch,
        metavar="SIZE@EPOCH",
        only_with=("dataset", "folder"),
    )
    mix_off_epochs: int = option(
        0, "no mixing in the last N epochs", group="mixing", least=0, only_with=("mix", *MODES)
    )


@dataclass(frozen=True)
class RunOptions:
    """Options of a run besides the training itself: checkpoints, faults, displays, and early ends."""

    output_dir: Path = _run(Path("output"), "folder for checkpoints and logs")
    resume: str | None = _run(
        None, "resume from a checkpoint; auto: from the one in the output folder, if there is one", metavar="PATH|auto"
    )
    pretrained: Path | None = _run(
        None,
        "start from the weights in this file, saved by torchvision, its reference scripts or this script; the last "
        "layer keeps its initial weights if the number of classes differs",
        metavar="PATH",
    )
    evaluate: bool = _run(
        False,
        "only validate the checkpoint of --resume, or the weights of --pretrained; needs no training images",
        *("-e", "--evaluate", "--test-only"),
        action="store_true",
    )
    restart_epoch: bool = _faults(
        False,
        "with --resume: restart the epoch; data options, images and number of processes may have changed",
        action="store_true",
    )
    checkpoint_every: int | None = _faults(None, "also write a checkpoint every N steps", metavar="N")
    checkpoint_interval: float = _faults(
        30.0, "also write a checkpoint every N minutes; 0: never", metavar="N", within="a number of at least 0"
    )
    keep_checkpoints: int = _faults(2, "keep the last K checkpoints", metavar="K")
    stall_timeout: float = _faults(
        600.0,
        "end with an error after SECONDS without progress; 0: wait for ever",
        metavar="SECONDS",
        within="in [0, 1e6]",
    )
    max_nan_steps: int = _faults(3, "end with an error after N consecutive steps with a non-finite loss")
    tensorboard: bool = _output(False, "also log to TensorBoard")
    log_wandb: bool = _output(False, "also log to Weights & Biases")
    wandb_project: str = _output(
        "dali-saliencymix", "project of Weights & Biases", metavar="NAME", only_with=("log_wandb", True)
    )
    save_images: int = _output(0, "save a picture of N mixed images of the first batch", least=0)
    print_freq: int = _output(10, "steps between updates of the display", "-p", "--print-freq")
    profile_loader: bool = _short(False, "only measure whether the loader is the bottleneck", action="store_true")
    max_steps: int | None = _short(None, "end this run after N steps, then validate", "--max-steps", "--prof")
    training_only: bool = _short(False, "do not validate")
    no_checkpoints: bool = _short(False, "do not save checkpoints", action="store_true")


# Options that --evaluate takes from the checkpoint unless they are given.
AS_TRAINED = (
    *("arch", "dropout", "model_ema", "dataset", "train_crop_size", "mean", "std", "val_resize_size", "val_crop_size"),
)


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of what ``--evaluate`` reports besides top-1 and top-5."""

    report: Path | None = _evaluation(None, "file for the result, instead of evaluation.json", metavar="JSON")
    per_class_csv: bool = _evaluation(False, "write the accuracy of each class to a CSV file", action="store_true")
    fgsm: float | None = _evaluation(
        None,
        f"accuracy under an FGSM attack of size EPSILON, for pixels in [0, 1]; {_EPSILON} if no EPSILON is given",
        nargs="?",
        type=read_epsilon,
        const=read_epsilon(_EPSILON),
        metavar="EPSILON",
    )
    cam: tuple[str, ...] | None = _evaluation(None, "draw class activation maps of these images", metavar="IMAGE")
    cam_class: str | None = _evaluation(None, "class of the maps, instead of the predicted one", metavar="CLASS")


@dataclass(frozen=True)
class TrainingOptions:
    """All options of a training."""

    data: DataOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    run: RunOptions
    evaluation: EvaluationOptions
    # The given options by the names of the flags, as files and checkpoints hold them: paths are strings, and options
    # that a preset decides are None.
    config: dict[str, Any] = field(repr=False)

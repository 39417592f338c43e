"""The options of the training script: from the command line, and from a YAML file that the command line overrides."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from dali_saliencymix.datasets.cifar import SIZE as CIFAR_SIZE
from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.loaders.options import BACKENDS, DATASETS, DataOptions
from dali_saliencymix.options import MODES, PRESET_OPTIONS, MixOptions, add_option, unused_options
from dali_saliencymix.training.models import model_names
from dali_saliencymix.training.options import (
    EvaluationOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    TrainingOptions,
)
from dali_saliencymix.training.robustness import DEFAULT_EPSILON, read_epsilon
from dali_saliencymix.training.schedule import SIZE_AT_EPOCH

Group = TypeVar("Group")

_GROUPS = (DataOptions, ModelOptions, OptimizerOptions, ScheduleOptions, RunOptions, EvaluationOptions)

# The mixing options that there are, and what they are called here.
_MIX_OPTIONS = {"alpha": "mix_alpha", "prob": "mix_prob"} | {name: name for name in ("preset", *PRESET_OPTIONS)}

_RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "a positive number": (lambda value: 0 < value < math.inf, ("lr", "lr_gamma", "clip_grad_norm")),
    "a number of at least 0": (
        lambda value: 0 <= value < math.inf,
        (
            *("weight_decay", "norm_weight_decay", "bias_weight_decay", "lr_warmup_epochs"),
            *("checkpoint_interval", "stall_timeout"),
        ),
    ),
    "in [0, 1]": (lambda value: 0 <= value <= 1, ("hflip_prob", "color_jitter")),
    "in [0, 1)": (lambda value: 0 <= value < 1, ("momentum", "label_smoothing", "dropout")),
    "in (0, 1]": (lambda value: 0 < value <= 1, ("min_crop_area",)),
    "in (0, 1)": (lambda value: 0 < value < 1, ("model_ema_decay",)),
}

_EPILOG = """
A configuration file is YAML with the long names of options as keys, such as "batch-size: 128", and DATA as "data".
What the command line says comes before it. The output folder gets the options of the run as args.yaml, which is such
a file. Several processes: torchrun --nproc_per_node=8 train.py ...; which process is which, and where the main one
listens, is torchrun's business, so there is no --dist-url here.
"""


def parse_arguments(
    arguments: list[str] | None = None, *, prog: str | None = None, validates: bool = True
) -> TrainingOptions:
    """Read the options of the training script, and end it with a message where they make no sense.

    Parameters
    ----------
    arguments : list of str, optional
        The command line; by default that of this process.
    prog : str, optional
        Name of the program in messages; by default that of this process.
    validates : bool
        Whether validation images are needed. If not, DATA may be left out, and may hold the class folders of the
        training images itself.
    """
    parser = make_parser(prog)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=parser.prog)
    config.add_argument("-c", "--config")
    path = config.parse_known_args(arguments)[0].config
    from_file = _read_config(parser, Path(path)) if path is not None else argparse.Namespace()
    mix = getattr(from_file, "mix", None)
    args = parser.parse_args(arguments, from_file)
    if mix not in (None, args.mix):  # a recipe tried with another mode
        for option in _unused(args.mix):
            setattr(args, option, parser.get_default(option))
    _complete(parser, args, validates=validates)
    _check(parser, args)
    return _grouped(parser, args)


def save_config(options: TrainingOptions, path: Path) -> None:
    """Write the options of a run as a file for ``--config``."""
    values, data = dict(options.config), options.data
    del values["config"]
    for name, folder in (("train", data.train_dir), ("val", data.val_dir)):
        if data.data is not None and folder == data.data / name:  # another DATA on the command line means its own
            del values[f"{name}_dir"]
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def make_parser(prog: str | None = None) -> _Parser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s DATA [options]",
        description="Train a ResNet on a folder of images, mixed by SaliencyMix inside DALI.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", type=Path, metavar="YAML", help="file of options, such as configs/*.yaml")

    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="?", type=Path, metavar="DATA", action=_SetIfGiven, help="holds train/, val/")
    data.add_argument("--data-dir", "--data-path", type=Path, dest="data", metavar="DATA", help="the same")
    data.add_argument("--dataset", choices=DATASETS, help="what DATA is: class folders, or CIFAR's archive")
    data.add_argument(
        "--data-backend",
        choices=BACKENDS,
        help="who makes the batches (default: dali-gpu on a GPU, else dali-cpu); synthetic: one batch over and over, "
        "without DATA",
    )
    data.add_argument(
        "--train-dir", type=Path, metavar="FOLDER", help="folder of training images, instead of DATA/train"
    )
    data.add_argument("--val-dir", type=Path, metavar="FOLDER", help="folder of validation images, instead of DATA/val")
    data.add_argument(
        "-b", "--batch-size", type=_positive_int, metavar="N", help="images of each process (GPU) in a step"
    )
    data.add_argument("-j", "--workers", type=_positive_int, metavar="N", help="DALI's CPU threads in each process")
    data.add_argument("--train-list", type=Path, metavar="FILE", help="take only the images whose paths are its lines")
    data.add_argument("--val-list", type=Path, metavar="FILE", help="the same for validation")
    data.add_argument(
        "--train-crop-size",
        type=_positive_int,
        metavar="PIXELS",
        help="size of training images (default: 224, with CIFAR 32)",
    )
    data.add_argument(
        "--progressive-size",
        nargs="+",
        type=_size_at_epoch,
        metavar="SIZE@EPOCH",
        help="size of training images from an epoch on, counted from 0: 128@0 160@6 192@12",
    )
    data.add_argument("--min-crop-area", type=float, metavar="A", help="least area of the random crop, of 1")
    data.add_argument("--hflip-prob", type=float, metavar="P", help="probability of mirroring an image")
    data.add_argument(
        "--color-jitter",
        type=float,
        metavar="X",
        help="brightness, contrast and saturation change by factors in [1 - X, 1 + X]",
    )
    data.add_argument(
        "--crop-padding", type=_whole_number, metavar="N", help="with CIFAR: zeros around an image to crop from"
    )
    data.add_argument("--val-resize-size", type=_positive_int, metavar="PIXELS", help="short side of validation images")
    data.add_argument("--val-crop-size", type=_positive_int, metavar="PIXELS", help="centre crop of validation images")
    data.add_argument("--synthetic-classes", type=_positive_int, metavar="N", help="of synthetic data")
    data.add_argument("--synthetic-steps", type=_positive_int, metavar="N", help="steps of its epochs")

    mix = parser.add_argument_group("mixing")
    mix.add_argument("--mix", choices=(*MODES, "none"), default="saliencymix", help="how to mix")
    add_option(mix, "alpha", "--mix-alpha", "--beta")
    add_option(mix, "prob", "--mix-prob", "--salmix_prob")
    mix.add_argument("--mix-off-epochs", type=_whole_number, metavar="N", help="no mixing in the last N epochs")
    for name in list(_MIX_OPTIONS)[2:]:
        add_option(mix, name)

    model = parser.add_argument_group("model and optimiser")
    model.add_argument("-a", "--arch", "--model", metavar="NAME", help="a ResNet of torchvision, or a model for CIFAR")
    model.add_argument("--dropout", type=float, metavar="P", help="dropout of a model that has it")
    model.add_argument("--epochs", type=_positive_int, metavar="N", help="length of the training")
    model.add_argument(
        "--accumulation-steps",
        type=_positive_int,
        metavar="N",
        help="steps whose gradients make one update of the weights",
    )
    model.add_argument(
        "--lr",
        type=float,
        help="learning rate at the global batch, of all processes and accumulated steps; never scaled by the script: "
        "0.1 for each 256 images is the usual rule",
    )
    model.add_argument("--momentum", type=float, metavar="M", help="momentum of SGD")
    model.add_argument("--nesterov", action=_YES_OR_NO, help="Nesterov momentum")
    model.add_argument(*("--wd", "--weight-decay"), type=float, dest="weight_decay", metavar="WD", help="weight decay")
    model.add_argument("--norm-weight-decay", type=float, metavar="WD", help="that of normalisation layers, often 0")
    model.add_argument("--bias-weight-decay", type=float, metavar="WD", help="that of all biases, often 0")
    model.add_argument("--label-smoothing", type=float, metavar="S", help="smoothing of the mixed labels")
    model.add_argument("--clip-grad-norm", type=float, metavar="NORM", help="largest norm of the gradients")
    model.add_argument("--model-ema", action=_YES_OR_NO, help="keep a moving average of the weights")
    model.add_argument("--model-ema-decay", type=float, metavar="D", help="how much of it stays at each update")
    model.add_argument("--lr-scheduler", choices=("cosine", "step"), help="how the rate falls")
    model.add_argument("--lr-warmup-epochs", type=float, metavar="N", help="epochs of linear warm-up")
    model.add_argument("--lr-milestones", type=float, nargs="+", metavar="EPOCH", help="epochs of the steps")
    model.add_argument("--lr-gamma", type=float, metavar="F", help="factor of each step")

    speed = parser.add_argument_group("speed and precision")
    speed.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute")
    speed.add_argument("--amp", action=_YES_OR_NO, help="compute in 16 bits where that is safe")
    speed.add_argument("--amp-dtype", type=_amp_dtype, choices=("bf16", "fp16"), help="of --amp; fp16 scales the loss")
    speed.add_argument("--channels-last", action=_YES_OR_NO, help="channels-last memory, straight from DALI")
    speed.add_argument("--compile", action=_YES_OR_NO, help="compile the model with torch.compile")
    speed.add_argument(
        "--deterministic", action=_YES_OR_NO, help="deterministic kernels of PyTorch: slower, repeatable"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, metavar="N", help="seed of weights, file order and augmentation")
    run.add_argument("--output-dir", type=Path, metavar="FOLDER", help="folder for checkpoints and log")
    run.add_argument("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: from the output folder's")
    run.add_argument(
        *("-e", "--evaluate", "--test-only"),
        action="store_true",
        help="only validate the checkpoint named by --resume; needs no training images",
    )

    faults = parser.add_argument_group("checkpoints and faults")
    faults.add_argument(
        "--checkpoint-every", type=_positive_int, metavar="STEPS", help="write checkpoints within an epoch too"
    )
    faults.add_argument("--checkpoint-interval", type=float, metavar="MINUTES", help="the same by the clock; 0: never")
    faults.add_argument("--keep-checkpoints", type=_positive_int, metavar="K", help="keep the last K of them")
    faults.add_argument(
        "--restart-epoch",
        action="store_true",
        help="with --resume: begin the epoch anew, with other data options, images or processes than before",
    )
    faults.add_argument(
        "--max-bad-batches",
        type=_whole_number,
        metavar="N",
        help="end with an error after more than N batches with a bad file, which is left out from then on",
    )
    faults.add_argument(
        "--stall-timeout",
        type=float,
        metavar="SECONDS",
        help="end with an error after so long a time without progress; 0: wait for ever",
    )
    faults.add_argument(
        "--max-nan-steps",
        type=_positive_int,
        metavar="N",
        help="end with an error after N steps in a row whose loss is no number",
    )

    output = parser.add_argument_group("displays and files")
    output.add_argument("--tensorboard", action=_YES_OR_NO, help="write for TensorBoard as well")
    output.add_argument("--log-wandb", action=_YES_OR_NO, help="log to Weights & Biases as well")
    output.add_argument("--wandb-project", metavar="NAME", help="project to log to there")
    output.add_argument(
        "--save-images", type=_whole_number, metavar="N", help="draw N images of the first batch, as mixed"
    )
    output.add_argument("-p", "--print-freq", type=_positive_int, metavar="N", help="steps between two displays")

    evaluation = parser.add_argument_group("with --evaluate")
    evaluation.add_argument("--report", type=Path, metavar="JSON", help="file for the result, not evaluation.json")
    evaluation.add_argument("--per-class-csv", action="store_true", help="write the accuracy of each class")
    evaluation.add_argument(
        "--fgsm",
        nargs="?",
        type=read_epsilon,
        const=read_epsilon(DEFAULT_EPSILON),
        metavar="EPSILON",
        help=f"accuracy under attack, by at most EPSILON of 1 in each pixel value; {DEFAULT_EPSILON} if left out",
    )
    evaluation.add_argument("--cam", nargs="+", metavar="IMAGE", help="draw class activation maps of these images")
    evaluation.add_argument("--cam-class", metavar="CLASS", help="of this class, not of the one that is predicted")

    short = parser.add_argument_group("short runs")
    short.add_argument(
        "--profile-loader", action="store_true", help="only measure whether the loader is the bottleneck"
    )
    short.add_argument("--max-steps", "--prof", type=_positive_int, metavar="N", help="end after N steps of this run")
    short.add_argument("--training-only", action=_YES_OR_NO, help="do not validate")
    short.add_argument("--no-checkpoints", action="store_true", help="save no checkpoints")
    defaults = {name: value for group in _GROUPS for name, value in vars(group()).items() if name != "mix"}
    defaults["train_crop_size"] = None  # it follows from the data set
    parser.set_defaults(
        **{name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    )
    return parser


_YES_OR_NO = argparse.BooleanOptionalAction  # --amp and --no-amp: so that a configuration file can be overridden


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of all options before it."""

    reading: Path | None = None  # the configuration file that its arguments come from

    def error(self, message: str) -> NoReturn:
        where = f"{self.reading}: " if self.reading else ""
        self.exit(2, f"{self.prog}: error: {where}{message}\n")


class _SetIfGiven(argparse.Action):
    """Stores a value: an argument that is left out does not take away what another one has set."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that say no more than that an option is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _read_config(parser: _Parser, path: Path) -> argparse.Namespace:
    """Return the options of a file, read and checked as if they stood on the command line."""
    parser.reading = path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(str(error.strerror))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error("must hold options as 'name: value'")
    actions = {"data": None} | {
        name.lstrip("-").replace("-", "_"): action
        for action in parser._actions
        for name in (*action.option_strings, action.dest)
        if action.dest not in ("help", "config", "data") and not _negates(action, name)
    }
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            parser.error(f"{key} is no option")
        arguments += _as_arguments(parser, str(key), value, actions[name])
    options = parser.parse_args(arguments)
    parser.reading = None
    return options


def _as_arguments(parser: _Parser, key: str, value: Any, action: argparse.Action | None) -> list[str]:
    """Return what would say the same on a command line."""
    name = action.option_strings[-1] if action else "--data-dir"
    if value is None:  # not given
        return []
    if action is not None and action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{key} must be true or false, got {value!r}")
        return [option for option in action.option_strings if _negates(action, option) != value][:1]
    if isinstance(value, list):
        if action is None or action.nargs != "+":
            parser.error(f"{key} must be one value, got {value!r}")
        return [name, *map(str, value)] if value else []
    if isinstance(value, dict):
        parser.error(f"{key} must be a value, got {value!r}")
    return [f"{name}={value}"]


def _negates(action: argparse.Action, option: str) -> bool:
    """Return whether this name of an option takes it back."""
    return isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")


def _complete(parser: argparse.ArgumentParser, args: argparse.Namespace, *, validates: bool) -> None:
    """Fill in the folders that follow from DATA."""
    if args.dataset == "folder" and not validates:
        if args.train_dir is None and args.data is not None:
            inside = args.data / "train"
            args.train_dir = inside if inside.is_dir() else args.data
        args.val_dir, args.val_list = args.train_dir, None  # a data set has both; these are not looked at
        return
    if args.data_backend == "synthetic":
        return
    folders = {"train_dir": "train", "val_dir": "val"}
    if args.dataset != "folder":
        for option in (*folders, "train_list", "val_list"):
            if getattr(args, option) is not None:
                parser.error(f"--{option.replace('_', '-')} is for folders of images, not for --dataset {args.dataset}")
        if args.data is None and validates:
            parser.error("DATA is needed")
        return
    for option, name in folders.items():
        if getattr(args, option) is None:
            if args.data is None:
                parser.error(f"DATA is needed, or --{name}-dir")
            setattr(args, option, args.data / name)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the script where options do not fit each other, or are out of range."""
    for option in _unused(args.mix):
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} does nothing with --mix {args.mix}: leave it out")
    if args.evaluate and not args.resume:
        parser.error("--evaluate needs --resume, the checkpoint to validate")
    if args.restart_epoch and not args.resume:
        parser.error("--restart-epoch needs --resume, the checkpoint to go on from")
    for option in () if args.evaluate else ("report", "per_class_csv", "fgsm", "cam", "cam_class"):
        value = getattr(args, option)
        if value is not None and value is not False:  # 0 is a value
            parser.error(f"--{option.replace('_', '-')} needs --evaluate")
    if args.report is not None and args.report.exists():
        parser.error(f"--report: {args.report}: exists already")
    for file in args.cam or ():
        if why := why_unusable(file):
            parser.error(f"--cam: {file}: {why}")
    if args.cam_class is not None and not args.cam:
        parser.error("--cam-class needs --cam, the images to draw")
    if args.data_backend == "synthetic" and (args.fgsm is not None or args.cam):
        parser.error("--fgsm and --cam need real images, not --data-backend synthetic")
    if args.resume and args.resume != "auto" and not Path(args.resume).is_file():
        parser.error(f"--resume: {args.resume}: no such file")
    for rule, (right, options) in _RANGES.items():
        for option in options:
            value = getattr(args, option)
            if value is not None and not right(value):
                parser.error(f"--{option.replace('_', '-')} must be {rule}, got {value}")
    if args.val_crop_size > args.val_resize_size:
        parser.error(
            f"--val-crop-size must be at most --val-resize-size {args.val_resize_size}, got {args.val_crop_size}"
        )
    if args.lr_warmup_epochs >= args.epochs:
        parser.error(f"--lr-warmup-epochs must be below --epochs {args.epochs}, got {args.lr_warmup_epochs:g}")
    if args.mix_off_epochs > args.epochs:
        parser.error(f"--mix-off-epochs must be at most --epochs {args.epochs}, got {args.mix_off_epochs}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    starts = [int(change.partition("@")[2]) for change in args.progressive_size]
    if starts != sorted(set(starts)):
        parser.error(f"--progressive-size must name later and later epochs, got {' '.join(args.progressive_size)}")
    if args.arch not in model_names():
        parser.error(f"--arch must be one of {', '.join(model_names())}, got {args.arch!r}")


def _unused(mix: str) -> list[str]:
    """Return the options that a mode has no use for."""
    unused = [_MIX_OPTIONS[name] for name in unused_options(mix) if name in _MIX_OPTIONS]
    return [*unused, "mix_off_epochs"] if mix == "none" else unused


def _grouped(parser: argparse.ArgumentParser, args: argparse.Namespace) -> TrainingOptions:
    """Return the options in their groups."""
    if args.train_crop_size is None:
        args.train_crop_size = DataOptions.train_crop_size if args.dataset == "folder" else CIFAR_SIZE
    return TrainingOptions(
        data=_group(DataOptions, args, mix=_mix_options(parser, args)),
        model=_group(ModelOptions, args),
        optimizer=_group(OptimizerOptions, args),
        schedule=_group(ScheduleOptions, args),
        run=_group(RunOptions, args),
        evaluation=_group(EvaluationOptions, args),
        config={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    )


def _group(group: type[Group], args: argparse.Namespace, **given: Any) -> Group:
    names = [field.name for field in fields(group) if field.name not in given]  # type: ignore[arg-type]
    values = {name: getattr(args, name) for name in names}
    return group(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}, **given
    )


def _mix_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> MixOptions | None:
    if args.mix == "none":
        return None
    given = {name: getattr(args, option) for name, option in _MIX_OPTIONS.items()}
    try:
        return MixOptions(modes={args.mix: 1.0}, **given)
    except ValueError as error:  # choices are checked by now: of alpha or prob
        parser.error(f"--mix-{error}")


def _positive_int(text: str) -> int:
    """Read a positive integer."""
    if not text.strip().isdecimal() or int(text) < 1:
        msg = f"must be a whole number of at least 1, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _whole_number(text: str) -> int:
    """Read an integer that is not negative."""
    if not text.strip().isdecimal():
        msg = f"must be a whole number of at least 0, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _size_at_epoch(text: str) -> str:
    """Check a size and the epoch that it begins at. The text stays: it is what files and checkpoints hold."""
    if not SIZE_AT_EPOCH.fullmatch(text):
        msg = f"must be SIZE@EPOCH, such as 160@6, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return text


def _amp_dtype(text: str) -> str:
    """Take timm's and PyTorch's names too."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(text, text)

"""Parse the options of the training script from the command line, and from a YAML file that it overrides."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dali_saliencymix._errors import add_traceback, line_of, printable
from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.loaders.options import DataOptions, defaults_of, flags_of
from dali_saliencymix.measure.results import replace_file
from dali_saliencymix.options import (
    MODES,
    PRESET_OPTIONS,
    HelpFormatter,
    MixOptions,
    add_option,
    unused_options,
    whole_number,
)
from dali_saliencymix.training.options import (
    AS_TRAINED,
    EvaluationOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    TrainingOptions,
)

_GROUPS: dict[str, Any] = {  # the fields of TrainingOptions
    "data": DataOptions,
    "model": ModelOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "run": RunOptions,
    "evaluation": EvaluationOptions,
}
_DECLARED: list[Field[Any]] = [each for group in _GROUPS.values() for each in fields(group) if each.metadata]
_TITLES = (
    *("data", "mixing", "model and optimiser", "speed and precision", "run", "checkpoints and fault tolerance"),
    *("logs and outputs", "with --evaluate", "short runs"),
)

# Mixing options by their names in `MixOptions`, with their names on the command line.
_MIX_OPTIONS = {"alpha": "mix_alpha", "prob": "mix_prob"}
_MIX_OPTIONS |= {name: name for name in ("preset", *PRESET_OPTIONS, "label_weight")}

_RANGES: dict[str, Callable[[float], bool]] = {
    "a positive number": lambda value: 0 < value < math.inf,
    "a number of at least 0": lambda value: 0 <= value < math.inf,
    "in [0, 1e6]": lambda value: 0 <= value <= 1e6,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in [0, 30]": lambda value: 0 <= value <= 30,
}

_EPILOG = """
A configuration file is YAML with the long names of options as keys, such as "batch-size: 128", and DATA as "data".
The command line overrides it. Each run saves its options to args.yaml in the output folder, which is such a file.
Several processes: torchrun --nproc_per_node=8 train.py ...; torchrun sets ranks and the address of the main process,
so there is no --dist-url.
"""


def parse_arguments(
    arguments: list[str] | None = None, *, prog: str | None = None, validates: bool = True
) -> TrainingOptions:
    """Parse the options of the training script, and exit with a message if they are invalid.

    Parameters
    ----------
    arguments : list of str, optional
        The command line; by default that of this process.
    prog : str, optional
        Name of the program in messages; by default that of this process.
    validates : bool
        Whether validation images are needed. If not, DATA is optional, and may directly hold the class folders of the
        training images.
    """
    parser = make_parser(prog)
    args = _parse(parser, arguments)
    if args.evaluate and args.resume:
        args = _parse_as_trained(parser, arguments, args)
    _complete(parser, args, validates=validates)
    _check(parser, args)
    return _grouped(parser, args)


def _parse(parser: _Parser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, after the file that it names with ``--config``."""
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=parser.prog)
    config.add_argument("-c", "--config")
    path = config.parse_known_args(arguments)[0].config
    from_file = argparse.Namespace()
    if path is not None:
        parser.reading = Path(path)
        from_file = _read_options(parser, _pairs(parser, parser.reading))
    # If the command line makes options of the file useless, drop these: a recipe with --mix none is then valid.
    args = parser.parse_args(arguments, argparse.Namespace(**vars(from_file)))
    follow = {**_without_use(args), **dict.fromkeys(defaults_of(args.dataset), "dataset")}
    for option, choice in follow.items():
        if choice in from_file and getattr(from_file, choice) != getattr(args, choice):
            setattr(from_file, option, parser.get_default(option))
    return parser.parse_args(arguments, from_file)


def _parse_as_trained(parser: _Parser, arguments: list[str] | None, args: argparse.Namespace) -> argparse.Namespace:
    """Parse the command line again, with the `AS_TRAINED` options of the checkpoint to validate as defaults."""
    from dali_saliencymix.training import checkpoints  # imports PyTorch

    try:
        path = checkpoints.find_checkpoint(args.resume, args.output_dir)
        if path is None:
            parser.error(f"--resume auto: {args.output_dir / checkpoints.LAST}: no such checkpoint")
        saved = checkpoints.load_checkpoint(path, ("model", "config"), verify=False)["config"]
        if not isinstance(saved.get("arch"), str):
            parser.error(f"--resume: {path}: does not name its model")
    except (OSError, ValueError) as error:
        parser.error(f"--resume: {line_of(error, expected=True)}")
    parser.reading = path
    trained = _read_options(parser, [(name, saved[name]) for name in AS_TRAINED if name in saved])
    parser.set_defaults(output_dir=path.parent, **{name: getattr(trained, name) for name in AS_TRAINED})
    args = _parse(parser, arguments)
    args.resume = str(path)  # the meaning of "auto" may change while this runs
    return args


def save_config(options: TrainingOptions, path: Path) -> None:
    """Write the options of a run to a file for ``--config``; an OSError names the file."""
    values, data = dict(options.config), options.data
    del values["config"]
    for name, folder in (("train", data.train_dir), ("val", data.val_dir)):
        if data.data is not None and folder == data.data / name:  # a default: another DATA has its own
            del values[f"{name}_dir"]
    replace_file(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def make_parser(prog: str | None = None) -> _Parser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s DATA [options]",
        description="Train a classification model on an image folder, with SaliencyMix in DALI.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", type=Path, metavar="YAML", help="configuration file, such as configs/*.yaml")
    add_traceback(parser)
    groups = {title: parser.add_argument_group(title) for title in _TITLES}
    data, mixing = groups["data"], groups["mixing"]
    data.add_argument(
        "data", nargs="?", type=Path, metavar="DATA", action=_SetIfGiven, help="folder with train/ and val/"
    )
    data.add_argument("--data-dir", "--data-path", type=Path, dest="data", metavar="DATA", help="another name for DATA")
    mixing.add_argument("--mix", choices=(*MODES, "none"), default="saliencymix", help="mixing mode")
    add_option(mixing, "alpha", "--mix-alpha", "--beta")
    add_option(mixing, "prob", "--mix-prob", "--salmix_prob")
    for name in list(_MIX_OPTIONS)[2:]:
        add_option(mixing, name)
    for declared in _DECLARED:
        _add_declared(groups[declared.metadata["group"]], declared)
    parser.set_defaults(**dict.fromkeys(defaults_of(DataOptions.dataset)))  # None: the default depends on the data set
    return parser


def _add_declared(group: argparse._ArgumentGroup, declared: Field[Any]) -> None:
    """Add the option that a field declares, with the type of its annotation."""
    own = ("flags", "group", "least", "within", "only_with")
    about = {key: value for key, value in declared.metadata.items() if key not in own}
    kind = str(declared.type).removesuffix(" | None")
    if kind == "bool":  # --amp and --no-amp, to override a configuration file
        about.setdefault("action", argparse.BooleanOptionalAction)
    else:
        if kind.startswith("tuple"):
            about.setdefault("nargs", "+")
        least = declared.metadata.get("least", 1)
        readers = {"int": whole_number(least), "float": float, "tuple[float, ...]": float, "Path": Path}
        about.setdefault("type", readers.get(kind, str))
        metavar = {"int": "N", "Path": "FOLDER"}.get(kind)
        if metavar and "choices" not in about:
            about.setdefault("metavar", metavar)
    default = list(declared.default) if isinstance(declared.default, tuple) else declared.default
    group.add_argument(*flags_of(declared), dest=declared.name, default=default, **about)


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, without the usage."""

    reading: Path | None = None  # the file from which the arguments come

    def error(self, message: str) -> NoReturn:
        where = f"{self.reading}: " if self.reading else ""
        if message.startswith("unrecognized arguments: --"):
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            message += nearest(message.split()[2].lstrip("-").partition("=")[0], known, "--")
        self.exit(2, printable(f"{self.prog}: error: {where}{message}") + "\n")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown name: the most similar known names, if there are any."""
    names = difflib.get_close_matches(name.replace("_", "-"), known)
    return f"; nearest: {', '.join(prefix + name for name in names)}" if names else ""


class _SetIfGiven(argparse.Action):
    """Stores a value, if there is one: a missing argument does not override the value of another one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def _read_options(parser: _Parser, pairs: list[tuple[str, Any]]) -> argparse.Namespace:
    """Return the options of the file that the parser is reading, checked like those of the command line."""
    actions = {
        name.lstrip("-").replace("-", "_"): action
        for action in parser._actions
        for name in (*action.option_strings, action.dest)
        if action.option_strings and action.dest not in ("help", "config", "traceback") and not _negates(action, name)
        if action.dest != "data" or name == "data"
    }
    arguments: list[str] = []
    given: dict[str, str] = {}
    for key, value in pairs:
        action = actions.get(key.replace("-", "_"))
        if action is None:
            parser.error(f"unknown option {key}{nearest(key, (name.replace('_', '-') for name in actions))}")
        if action.dest in given:
            parser.error(f"{key} is given twice, first as {given[action.dest]}")
        given[action.dest] = key
        arguments += _as_arguments(parser, key, value, action)
    options = parser.parse_args(arguments)
    parser.reading = None
    return options


def _pairs(parser: _Parser, path: Path) -> list[tuple[str, Any]]:
    """Return the entries of a YAML file, as pairs, since a dictionary would hide duplicate keys."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        pairs = loader.construct_pairs(root, deep=True) if isinstance(root, yaml.MappingNode) else None
    except OSError as error:
        parser.error(str(error.strerror))
    except (RecursionError, TypeError, ValueError, yaml.YAMLError) as error:  # the first two for odd keys and nesting
        parser.error(f"not YAML: {' '.join(str(error).split())}")
    if pairs is None:
        parser.error("must hold options as 'name: value'")
    return [(str(key), value) for key, value in pairs]


def _as_arguments(parser: _Parser, key: str, value: Any, action: argparse.Action) -> list[str]:
    """Return the command-line arguments that are equivalent to an entry of a file."""
    name = action.option_strings[-1]
    if value is None:  # not given
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{key} must be true or false, got {value!r}")
        return [option for option in action.option_strings if _negates(action, option) != value][:1]
    if isinstance(value, list):
        if action.nargs in (None, "?"):
            parser.error(f"{key} must be one value, got {value!r}")
        texts = [str(part) for part in value]
        if isinstance(action.nargs, int) and len(texts) != action.nargs:
            parser.error(f"{key} must be {action.nargs} values, got {value!r}")
        if any(re.match(r"-[^\d.]", text) for text in texts):  # another option, not a value of this one
            parser.error(f"{key} must hold values, got {value!r}")
        return [name, *texts] if texts else []
    if isinstance(value, dict):
        parser.error(f"{key} must be a value, got {value!r}")
    return [f"{name}={value}"]


def _negates(action: argparse.Action, option: str) -> bool:
    """Return whether this is the ``--no-`` form of an option."""
    return isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")


def _complete(parser: _Parser, args: argparse.Namespace, *, validates: bool) -> None:
    """Set the folders that follow from DATA."""
    if args.dataset == "folder" and not validates:
        if args.train_dir is None and args.data is not None:
            inside = args.data / "train"
            args.train_dir = inside if inside.is_dir() else args.data
        args.val_dir, args.val_list = args.train_dir, None  # required by the data set, but not used
        return
    if args.data_backend == "synthetic":
        return
    folders = {"val_dir": "val"} if args.evaluate else {"train_dir": "train", "val_dir": "val"}
    if args.dataset != "folder":
        for option in ("train_dir", "val_dir", "train_list", "val_list"):
            if getattr(args, option) is not None:
                parser.error(f"{_flag(option)} is for folders of images, not for --dataset {args.dataset}")
        if args.data is None and validates:
            parser.error("DATA is needed")
        return
    for option, name in folders.items():
        if getattr(args, option) is None:
            if args.data is None:
                parser.error(f"DATA is needed, or {_flag(option)}")
            setattr(args, option, args.data / name)
    if args.evaluate:  # the data set requires a training folder, but it is not used
        args.train_dir, args.train_list = args.val_dir, None


def _check(parser: _Parser, args: argparse.Namespace) -> None:
    """Exit with a message if options contradict each other or are out of range."""
    for option, choice in _without_use(args).items():
        if getattr(args, option) != parser.get_default(option):
            given = getattr(args, choice)
            with_it = f"with {_flag(choice)} {given}" if given else f"without {_flag(choice)}"
            parser.error(f"{_flag(option)} does nothing {with_it}: leave it out")
    if args.evaluate and not args.resume and not args.pretrained:
        parser.error("--evaluate needs --resume, the checkpoint to validate, or --pretrained, the weights")
    if args.restart_epoch and not args.resume:
        parser.error("--restart-epoch needs --resume, the checkpoint to resume from")
    for declared in () if args.evaluate else fields(EvaluationOptions):
        value = getattr(args, declared.name)
        if value is not None and value is not False:  # 0 is a value
            parser.error(f"{_flag(declared.name)} needs --evaluate")
    if args.report is not None and args.report.exists():
        parser.error(f"--report: {args.report}: already exists")
    for file in args.cam or ():
        if why := why_unusable(file):
            parser.error(f"--cam: {file}: {why}")
    if args.cam_class is not None and not args.cam:
        parser.error("--cam-class needs --cam, the images to draw")
    if args.data_backend == "synthetic" and (args.fgsm is not None or args.cam):
        parser.error("--fgsm and --cam need real images, not --data-backend synthetic")
    for option, file in (("--resume", args.resume), ("--pretrained", None if args.resume else args.pretrained)):
        if file and file != "auto" and not Path(file).is_file():
            what = "is a folder, not a file" if Path(file).is_dir() else "no such file"
            parser.error(f"{option}: {file}: {what}")
    for declared in _DECLARED:
        rule, value = declared.metadata.get("within"), getattr(args, declared.name)
        for number in value if isinstance(value, list) else [value]:
            if rule and number is not None and not _RANGES[rule](number):
                parser.error(f"{_flag(declared.name)} must be {rule}, got {number}")
    if args.val_crop_size > args.val_resize_size:
        parser.error(
            f"--val-crop-size must be at most --val-resize-size {args.val_resize_size}, got {args.val_crop_size}"
        )
    if args.lr_warmup_epochs >= args.epochs:
        parser.error(f"--lr-warmup-epochs must be below --epochs {args.epochs}, got {args.lr_warmup_epochs:g}")
    if args.mix_off_epochs > args.epochs:
        parser.error(f"--mix-off-epochs must be at most --epochs {args.epochs}, got {args.mix_off_epochs}")
    starts = [int(change.partition("@")[2]) for change in args.progressive_size]
    if starts != sorted(set(starts)):
        parser.error(f"--progressive-size must have increasing epochs, got {' '.join(args.progressive_size)}")

    from dali_saliencymix.training.models import unknown_model  # last, as torchvision takes seconds to import

    if wrong := unknown_model(args.arch):
        parser.error(f"--arch {wrong}")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _without_use(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that have no effect given the other ones, each with the option that is the reason."""
    useless = {_MIX_OPTIONS[name]: "mix" for name in unused_options(args.mix) if name in _MIX_OPTIONS}
    for declared in _DECLARED:
        needs = declared.metadata.get("only_with", [])
        for choice, *values in needs if isinstance(needs, list) else [needs]:
            if getattr(args, choice) not in values:
                useless.setdefault(declared.name, choice)
    return useless


def _grouped(parser: _Parser, args: argparse.Namespace) -> TrainingOptions:
    """Return the options in their groups."""
    for name, value in defaults_of(args.dataset).items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    del args.traceback  # not an option of the run
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    values["mix"] = _mix_options(parser, args)
    groups = {
        name: group(**{each.name: values[each.name] for each in fields(group)}) for name, group in _GROUPS.items()
    }
    return TrainingOptions(**groups, config=config)


def _mix_options(parser: _Parser, args: argparse.Namespace) -> MixOptions | None:
    if args.mix == "none":
        return None
    given = {name: getattr(args, option) for name, option in _MIX_OPTIONS.items()}
    try:
        return MixOptions(modes={args.mix: 1.0}, **given)
    except ValueError as error:  # about alpha or prob, as choices are already checked
        parser.error(f"--mix-{error}")

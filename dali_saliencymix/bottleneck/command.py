"""``python -m dali_saliencymix bottleneck`` and ``compare``."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dali_saliencymix._errors import EXPECTED, add_traceback, flush_stdout, line_of, write_error
from dali_saliencymix.bottleneck.diagnose import CACHES, ROUNDS, measure_source
from dali_saliencymix.bottleneck.display import comparison_text, report_text
from dali_saliencymix.bottleneck.page import save_page
from dali_saliencymix.bottleneck.report import Report, compare, load_report, save_report
from dali_saliencymix.bottleneck.sources import (
    OF_PIPELINES,
    Settings,
    Source,
    data_flags,
    load_function,
    loader_source,
    pipeline_source,
)
from dali_saliencymix.bottleneck.tune import tunable
from dali_saliencymix.datasets.image_folder import list_files
from dali_saliencymix.measure.figures import LEAST_ROUNDS
from dali_saliencymix.measure.results import check_replaceable, replace_file
from dali_saliencymix.measure.windows import MeasurementError, in_one_line
from dali_saliencymix.options import whole_number
from dali_saliencymix.packages import MissingPackageError, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix.loaders.processes import Processes
    from dali_saliencymix.training.options import TrainingOptions

_MOST_TO_DECODE = 10_000  # files; decoding them to find a damaged one takes about a minute
STALLED = 3  # exit status of --fail-above-stall

_EPILOG = """
DATA is measured with the loader and the training step of train.py, with the same options: -a, -b, -j, --dataset, --mix,
--saliency, --mix-prob, --train-crop-size, --amp, --channels-last, --device, ... "python train.py --help" lists them.
Image folders that DALI reads are split into stages. With --pipeline, the options -b, -j, --prefetch and
--hw-decoder-load set the arguments batch_size, num_threads, prefetch_queue_depth and hw_decoder_load of the function.

Several processes: torchrun --nproc_per_node=2 -m dali_saliencymix bottleneck ...

exit status: 0; 1 for an error; 2 for wrong options; 3 if the lower end of the stall's range is above
--fail-above-stall.
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options] [options of train.py] (DATA | --pipeline M:F | --loader M:F)",
        description="Find out whether the loader or the training step is the bottleneck, and what to do about it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--pipeline", metavar="MODULE:FUNCTION", help="function that returns a new DALI pipeline, instead of DATA")
    option("--loader", metavar="MODULE:FUNCTION", help="function that returns an iterable of batches, instead of DATA")
    option(
        "--step",
        metavar="MODULE:FUNCTION",
        help="training step: step(batch), or a function without arguments that returns it (default: train a network "
        "of train.py, -a)",
    )
    option("--no-step", action="store_true", help="measure only the loader")
    option("--files", nargs="+", type=Path, help="files or folders that the loader of --pipeline or --loader reads")
    option("--images", type=whole_number(1), default=2048, help="images of DATA to read in each process (%(default)s)")
    option("--cache", choices=CACHES, default="auto", help="whether training finds its files in memory; auto: by size")
    option("--seconds", type=float, default=100.0, help="approximate duration of the measurement (%(default)g)")
    option(
        "--rounds",
        type=whole_number(LEAST_ROUNDS, 10_000),
        default=ROUNDS,
        help="windows for each figure (%(default)s)",
    )
    option("--no-storage", action="store_true", help="do not measure storage, which drops files from the page cache")
    option("--no-what-ifs", action="store_true", help="do not measure other settings of the loader")
    option(
        "--tune",
        type=Path,
        metavar="YAML",
        help="search for a faster setting of the loader and write it to this file: options for train.py --config, or "
        "the arguments of the --pipeline function by name",
    )
    option("-o", "--output", type=Path, metavar="JSON", help="write the report to this file")
    option("--html", type=Path, help="write the report as an HTML page")
    option("--fail-above-stall", type=float, metavar="PERCENT", help="exit with status 3 if the stall is above this")
    add_traceback(parser)
    return parser


def run_bottleneck(arguments: list[str], prog: str) -> int:
    """Run ``bottleneck``; return the exit status."""
    parser = _parser(prog)
    own, rest = parser.parse_known_args(arguments)
    try:
        require("torch", "torchvision", "nvidia.dali", "PIL", "tqdm", "yaml")
    except MissingPackageError as error:
        write_error(error, prog, expected=True, with_traceback=own.traceback)
        return 1
    from dali_saliencymix.training import distributed

    try:
        status = _run(parser, own, rest, arguments)
        flush_stdout()
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except Exception as error:
        return distributed.fail(error, prog=prog, with_traceback=own.traceback)
    finally:
        distributed.stop_processes()
    return status


def _run(parser: argparse.ArgumentParser, own: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    """Check the options, measure and show; return the exit status."""
    from dali_saliencymix.training import distributed
    from dali_saliencymix.training.arguments import parse_arguments

    training = parse_arguments(rest, prog=parser.prog, validates=False)  # DATA is an option of train.py
    has_data = training.data.data is not None or training.data.train_dir is not None
    if sum((has_data, own.pipeline is not None, own.loader is not None)) != 1:
        parser.error("give one of DATA, --pipeline and --loader")
    if own.fail_above_stall is not None and (own.no_step or math.isnan(own.fail_above_stall)):
        needs = "needs a training step: leave out --no-step" if own.no_step else "must be a number of percent, got nan"
        parser.error(f"--fail-above-stall {needs}")
    if not 0 < own.seconds < math.inf:
        parser.error(f"--seconds must be a positive number, got {own.seconds}")
    if own.tune and own.loader:
        parser.error("--tune needs DATA or --pipeline: the settings of --loader are not known")
    given = {name: getattr(training.data, option) for name, option in OF_PIPELINES.items() if _is_given(rest, option)}
    for name in given:
        if own.loader and name != "batch_size":
            parser.error(f"{data_flags(OF_PIPELINES[name])[-1]} does nothing with --loader: leave it out")
    if own.files and has_data:
        parser.error("--files needs --pipeline or --loader: the files of DATA are known")
    if not own.step and not own.no_step:
        from dali_saliencymix.training.models import choose_kernels

        choose_kernels(deterministic=training.model.deterministic)
    processes = distributed.start_processes(training.data.device)
    report = _measured_by_all(own, training, given, processes)
    if (change := report["change"]) and change["options"]:
        change["command"] = changed_command(parser.prog, arguments, change["options"])
    return _show(report, own) if processes.is_main else 0


def profile_training(training: TrainingOptions, processes: Processes) -> None:
    """Measure the loader and the step of a training with these options of ``train.py``, and write the report.

    The main process writes the report to stdout and to ``loader_report.json`` in the output folder.
    """
    report = _measured_by_all(_parser("train.py").parse_args([]), training, {}, processes)
    if processes.is_main:
        sys.stdout.write(report_text(report) + "\n")
        save_report(report, training.run.output_dir / "loader_report.json")


def _measured_by_all(
    own: argparse.Namespace, training: TrainingOptions, given: Settings, processes: Processes
) -> Report:
    """Measure; the first process that fails raises an error with its rank and the reason.

    `given` holds the arguments of the --pipeline function that the command line sets.
    """
    from dali_saliencymix.training import distributed

    try:
        if processes.is_main:
            for path in filter(None, (own.tune, own.output, own.html)):
                check_replaceable(path)  # fails before minutes of measuring
        return _measured(own, training, given, processes)
    except EXPECTED as error:
        text = line_of(error, expected=True)
        if processes.world_size > 1:
            if not distributed.announce_failure():
                raise distributed.OtherProcessError from error
            text = f"process {processes.rank}: {text}"
        raise MeasurementError(text) from error


def run_compare(before: Path, after: Path) -> int:
    """Run ``compare``; return the exit status."""
    sys.stdout.write(comparison_text(compare(load_report(before), load_report(after))) + "\n")
    return 0


def _measured(own: argparse.Namespace, training: TrainingOptions, given: Settings, processes: Processes) -> Report:
    from dali_saliencymix.bottleneck import training as of_train_py
    from dali_saliencymix.training.run_log import warn

    files = _listed(own.files)
    if own.pipeline:
        source = pipeline_source(load_function(own.pipeline, "--pipeline"), given, files=files)
    elif own.loader:
        source = loader_source(load_function(own.loader, "--loader"), batch_size=given.get("batch_size"), files=files)
    else:
        source = of_train_py.training_source(training, processes, images=own.images)
    if own.tune:
        tunable(source)  # checked here, so that its error is not attributed to a damaged file
    step = None
    if own.step:
        step = step_of(load_function(own.step, "--step"))
    elif not own.no_step:
        step = of_train_py.TrainingStep(
            training.model,
            training.optimizer,
            processes,
            num_classes=max(source.conditions.get("classes", 1000), 2),
            image_size=training.data.train_crop_size,
        )
    for line in source.conditions.get("notes", ()):
        warn(line)
    source.conditions["step"] = "not measured" if step is None else own.step or training.model.arch
    try:
        return measure_source(
            source,
            step,
            device=processes.device.type,
            seconds=own.seconds,
            rounds=own.rounds,
            cache=own.cache,
            with_storage=not own.no_storage,
            with_what_ifs=not own.no_what_ifs,
            with_tuning=own.tune is not None,
            notify=warn,
        )
    except MeasurementError as error:
        if not (text := _named_bad_file(source)):
            raise
        msg = f"{text}; {error}"
        raise MeasurementError(msg) from error


def _named_bad_file(source: Source) -> str | None:
    """Return the first damaged file and what is wrong with it: DALI's errors often do not name the file."""
    from dali_saliencymix.datasets.damage import find_unusable

    if source.define is None or len(source.files or ()) > _MOST_TO_DECODE:
        return None
    return next((f"{file}: {why}" for file, why in find_unusable(source.files or ()).items()), None)


def step_of(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a user's function as the step, or the step that it returns if it needs no argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return function
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(value.default is value.empty and value.kind not in optional for value in parameters):
        return function
    with in_one_line("the training step cannot be created"):
        step = function()
    if not callable(step):
        msg = (
            f"--step must be step(batch), or a function without arguments that returns it, got a {type(step).__name__}"
        )
        raise MeasurementError(msg)
    return step


def _is_given(rest: list[str], option: str) -> bool:
    """Return whether a command line sets a field of `DataOptions`."""
    flags = data_flags(option)
    return any(word.partition("=")[0] in flags or word[:2] in flags for word in rest)


def changed_command(prog: str, arguments: list[str], changed: dict[str, Any]) -> str:
    """Return a command line with changed options, named by fields of `DataOptions`, and without ``--tune``.

    Examples
    --------
    >>> changed_command("tool", ["DATA", "-j", "1", "--tune=best.yaml"], {"workers": 2})
    'tool DATA -j 2'
    """
    words = list(arguments)
    for name in ("--tune", *(flag for option in changed for flag in data_flags(option))):
        for place in reversed([place for place, word in enumerate(words) if word == name]):
            del words[place : place + 2]
        short = len(name) == 2
        words = [word for word in words if not (word.startswith(name) and (short or word.startswith(f"{name}=")))]
    end = words.index("--") if "--" in words else len(words)  # only positional arguments follow "--"
    words[end:end] = [word for option, value in changed.items() for word in (data_flags(option)[0], str(value))]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # set by torchrun; its options for several machines are unknown
        alone = os.environ.get("WORLD_SIZE", processes) == processes
        program = prog.removeprefix("python ") if prog.startswith("python ") else f"--no-python {prog}"
        prog = f"torchrun {f'--nproc_per_node={processes}' if alone else '...'} {program}"
    return f"{prog} {shlex.join(words)}"


def _listed(paths: list[Path] | None) -> list[str] | None:
    for path in paths or ():
        if not path.exists():
            msg = f"--files: {path}: no such file or folder"
            raise MeasurementError(msg)
    found = sorted(file for path in paths or () for file in (list_files(path) if path.is_dir() else [str(path)]))
    return None if paths is None else found


def _show(report: Report, own: argparse.Namespace) -> int:
    """Print and save the report; return the exit status."""
    if own.tune:
        report["tune"]["file"] = str(own.tune)
    sys.stdout.write(report_text(report) + "\n")
    if own.tune:
        import yaml

        replace_file(own.tune, yaml.safe_dump(report["tune"]["settings"], sort_keys=False))
    if own.output:
        save_report(report, own.output)
    if own.html:
        save_page(report, own.html)
    if own.fail_above_stall is None:
        return 0
    stall = report["stall"]
    if stall is None:
        msg = "--fail-above-stall needs the stall, which was not measured"
        raise MeasurementError(msg)
    if 100 * stall["low"] > own.fail_above_stall:
        sys.stderr.write(
            f"stall {100 * stall['median']:.0f} % ({100 * stall['low']:.0f} to {100 * stall['high']:.0f}) is above "
            f"{own.fail_above_stall:g} %\n"
        )
        return STALLED
    return 0

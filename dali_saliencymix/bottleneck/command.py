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

_MOST_TO_DECODE = 10_000  # files, to find one that a pipeline fails at: a minute
STALLED = 3  # exit status of --fail-above-stall

_EPILOG = """
DATA is measured with the loader and the training step of train.py. All of its options that shape a batch or a step are
taken: -a, -b, -j, --dataset, --mix, --saliency, --mix-prob, --train-crop-size, --amp, --channels-last, --device, ...
"python train.py --help" lists them. Folders of images that DALI reads are cut into stages. With --pipeline, -b, -j,
--prefetch and --hw-decoder-load set batch_size, num_threads, prefetch_queue_depth and hw_decoder_load where given.

Several processes: torchrun --nproc_per_node=2 -m dali_saliencymix bottleneck ...

exit status: 0; 1 for an error; 3 if the stall is above --fail-above-stall, also by the lower end of its range.
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options] [options of train.py] (DATA | --pipeline M:F | --loader M:F)",
        description="Say whether the loader or the training step is the bottleneck, and what to do about it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--pipeline", metavar="MODULE:FUNCTION", help="makes a DALI pipeline, in place of DATA")
    option("--loader", metavar="MODULE:FUNCTION", help="makes any iterable of batches, in place of DATA")
    option(
        "--step",
        metavar="MODULE:FUNCTION",
        help="the training step, step(batch); or a function without arguments that returns it. By default a network "
        "of train.py (-a)",
    )
    option("--no-step", action="store_true", help="measure the loader alone")
    option("--files", nargs="+", type=Path, help="files or folders that --pipeline or --loader reads")
    option(
        "--images", type=whole_number(1), default=2048, help="images of DATA to read, for each process (%(default)s)"
    )
    option("--cache", choices=CACHES, default="auto", help="will the training find its files in memory?")
    option("--seconds", type=float, default=100.0, help="time for everything, about (%(default)g)")
    option(
        "--rounds", type=whole_number(LEAST_ROUNDS, 10_000), default=ROUNDS, help="windows of each figure (%(default)s)"
    )
    option("--no-storage", action="store_true", help="do not drop files from memory to read them again")
    option("--no-what-ifs", action="store_true", help="do not measure other settings")
    option(
        "--tune",
        type=Path,
        metavar="YAML",
        help="search for a faster setting of the loader and write it: a file for train.py --config, or the arguments "
        "of --pipeline by name",
    )
    option("-o", "--output", type=Path, metavar="JSON", help="report to write")
    option("--html", type=Path, help="page to write")
    option("--fail-above-stall", type=float, metavar="PERCENT", help="end with status 3 above this stall")
    add_traceback(parser)
    return parser


def run_bottleneck(arguments: list[str], prog: str) -> int:
    """Run ``bottleneck``; return the exit status."""
    own, rest = _parser(prog).parse_known_args(arguments)
    try:
        require("torch", "torchvision", "nvidia.dali", "PIL", "tqdm", "yaml")
    except MissingPackageError as error:
        write_error(error, prog, expected=True, with_traceback=own.traceback)
        return 1
    from dali_saliencymix.training import distributed

    try:
        status = _run(own, rest, prog, arguments)
        flush_stdout()
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except Exception as error:
        return distributed.fail(error, prog=prog, with_traceback=own.traceback)
    finally:
        distributed.stop_processes()
    return status


def _run(own: argparse.Namespace, rest: list[str], prog: str, arguments: list[str]) -> int:
    """Check the options, measure and show; return the exit status."""
    from dali_saliencymix.training import distributed
    from dali_saliencymix.training.arguments import parse_arguments

    parser = _parser(prog)
    training = parse_arguments(rest, prog=prog, validates=False)  # DATA is one of its options
    has_data = training.data.data is not None or training.data.train_dir is not None
    if sum((has_data, own.pipeline is not None, own.loader is not None)) != 1:
        parser.error("give one of DATA, --pipeline and --loader")
    if own.fail_above_stall is not None and (own.no_step or math.isnan(own.fail_above_stall)):
        needs = "needs a training step: leave out --no-step" if own.no_step else "must be a number of percent, got nan"
        parser.error(f"--fail-above-stall {needs}")
    if not 0 < own.seconds < math.inf:
        parser.error(f"--seconds must be a positive number, got {own.seconds}")
    if own.tune and own.loader:
        parser.error("--tune is for DATA and --pipeline: --loader names no settings that could be changed")
    for option in OF_PIPELINES.values():
        if own.loader and option != "batch_size" and _is_given(rest, option):
            parser.error(f"{data_flags(option)[-1]} does nothing with --loader: leave it out")
    if own.files and has_data:
        parser.error("--files is for --pipeline and --loader: the files of DATA are known")
    if not own.step and not own.no_step:
        from dali_saliencymix.training.models import choose_kernels

        choose_kernels(deterministic=training.model.deterministic)
    processes = distributed.start_processes(training.data.device)
    report = _measured_by_all(own, training, rest, processes)
    if (change := report["change"]) and change["options"]:
        change["command"] = changed_command(prog, arguments, change["options"])
    return _show(report, own) if processes.is_main else 0


def profile_training(training: TrainingOptions, processes: Processes) -> None:
    """Measure the loader and the step of a training with these options of ``train.py``, and say what holds it back.

    The main process writes the report to stdout and to ``loader_report.json`` in the output folder.
    """
    report = _measured_by_all(_parser("train.py").parse_args([]), training, [], processes)
    if processes.is_main:
        sys.stdout.write(report_text(report) + "\n")
        save_report(report, training.run.output_dir / "loader_report.json")


def _measured_by_all(
    own: argparse.Namespace, training: TrainingOptions, rest: list[str], processes: Processes
) -> Report:
    """Measure; where that fails, the first process that does so says why, and which one it is."""
    from dali_saliencymix.training import distributed

    try:
        if processes.is_main:
            for path in filter(None, (own.tune, own.output, own.html)):
                check_replaceable(path)  # now, not after minutes of measuring
        return _measured(own, training, rest, processes)
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


def _measured(own: argparse.Namespace, training: TrainingOptions, rest: list[str], processes: Processes) -> Report:
    def notify(line: str) -> None:
        if processes.is_main:
            sys.stderr.write(f"{line}\n")

    from dali_saliencymix.bottleneck import training as of_train_py

    given = {name: getattr(training.data, option) for name, option in OF_PIPELINES.items() if _is_given(rest, option)}
    files = _listed(own.files)
    source: Source
    if not own.pipeline and not own.loader:
        source = of_train_py.training_source(training, processes, images=own.images)
    elif own.pipeline:
        source = pipeline_source(load_function(own.pipeline, "--pipeline"), given, files=files)
    else:
        assert own.loader
        source = loader_source(load_function(own.loader, "--loader"), batch_size=given.get("batch_size"), files=files)
    if own.tune:
        tunable(source)  # else an error, for which no file is to blame
    step = None
    if own.step:
        step = step_of(load_function(own.step, "--step"))
    elif not own.no_step:
        classes = max(int(source.conditions.get("classes", 1000)), 2)
        made_for: dict[str, int] = {"num_classes": classes, "image_size": training.data.train_crop_size}
        step = of_train_py.TrainingStep(training.model, training.optimizer, processes, **made_for)
    for line in source.conditions.get("notes", ()):
        notify(line)
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
            notify=notify,
        )
    except MeasurementError as error:
        if not (text := _named_bad_file(source)):
            raise
        msg = f"{text}; {error}"
        raise MeasurementError(msg) from error


def _named_bad_file(source: Source) -> str | None:
    """Return the first file that a pipeline fails at, and why: DALI's own errors often name none."""
    from dali_saliencymix.datasets.damage import find_unusable

    if source.define is None or len(source.files or ()) > _MOST_TO_DECODE:
        return None
    return next((f"{file}: {why}" for file, why in find_unusable(source.files or ()).items()), None)


def step_of(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return the step that a user's function is, or makes if it needs no argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a built-in
        return function
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(value.default is value.empty and value.kind not in optional for value in parameters):
        return function
    with in_one_line("the training step cannot be made"):
        step = function()
    if not callable(step):
        msg = (
            f"--step must be step(batch), or a function without arguments that returns it, got a {type(step).__name__}"
        )
        raise MeasurementError(msg)
    return step


def _is_given(rest: list[str], option: str) -> bool:
    """Return whether the option of a field of `DataOptions` stands on a command line."""
    flags = data_flags(option)
    return any(word.partition("=")[0] in flags or word[:2] in flags for word in rest)


def changed_command(prog: str, arguments: list[str], changed: dict[str, Any]) -> str:
    """Return the command line with other values of options, which are fields of `DataOptions`, and without ``--tune``.

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
    end = words.index("--") if "--" in words else len(words)  # no option stands behind that
    words[end:end] = [word for option, value in changed.items() for word in (data_flags(option)[0], str(value))]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # of torchrun, whose options for several machines are not known
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
    """Write the report to where it is wanted; return the exit status."""
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
        msg = "the stall was not measured, so --fail-above-stall cannot be answered"
        raise MeasurementError(msg)
    if 100 * stall["low"] > own.fail_above_stall:
        sys.stderr.write(
            f"stall {100 * stall['median']:.0f} % ({100 * stall['low']:.0f} to {100 * stall['high']:.0f}) is above "
            f"{own.fail_above_stall:g} %\n"
        )
        return STALLED
    return 0

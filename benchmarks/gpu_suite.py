"""Everything that a GPU host is wanted for, in one command of bounded time: tests, and what is measured on a GPU.

    python -m benchmarks.gpu_suite OUT --data DATA

It needs no network and installs nothing. Each stage is a program of its own with a share of the time; it writes its
results to OUT as it goes, so that whatever ends the suite early takes little along. A stage that fails does not stop
the others. What optional packages a host lacks is said, and what depends on them is left out. OUT holds at most eight
files: suite.log, tests.xml, summary.md, and a JSON file for each benchmark.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

from benchmarks import machine, measure

_GRACE = 12  # seconds that a stage may take longer than it was told, to end the round and to write


class Stage(NamedTuple):
    """A program and the seconds that it gets."""

    name: str
    seconds: float
    command: list[str]


def stages(out: Path, data: Path, source: Path | None, left: Callable[[], float], *, dry: bool) -> Iterator[Stage]:
    """Give the stages in order, the last one with what is left; `dry` makes all small, for a machine without a GPU."""

    def module(name: str, seconds: float, *options: str | int) -> list[str]:
        line = ["-m", f"benchmarks.{name}", *options, "-o", out / f"{name.removeprefix('bench_')}.json"]
        return [*map(str, line), "--seconds", str(seconds)]

    images = ["-m", "benchmarks.data", str(data), "--images", "40" if dry else "4000"]
    yield Stage("images", 40, [*images, *(["--from", str(source)] if source else [])])
    yield Stage("tests", 125, test_command(out))
    if dry:
        small = ("--rounds", 1, "--crop-size", 32)
        loader = (data, *small, "-j", 1, "-b", 8)
        yield Stage(
            "ops", 20, module("bench_ops", 15, "--rounds", 1, "--sizes", 32, "-b", 4, "--detectors", "fine_grained")
        )
        yield Stage("pipeline", 40, module("bench_pipeline", 15, *loader, "--batches", 1))
        training = ("-a", "resnet18", "--steps", 1, "--detectors", "fine_grained")
        yield Stage("train", 60, module("bench_train", 15, *loader, *training))
        yield Stage("scale", 30, module("bench_scale", 15, *loader, "--axes", "threads", "batch", "--batch", 1, 2))
        return
    loader = (data, "-j", machine.cores())
    yield Stage("ops", 110, module("bench_ops", 100, "-b", 128, 512, 32, 1, "--cpu-up-to", 128, "--rounds", 7))
    yield Stage("pipeline", 125, module("bench_pipeline", 110, *loader, "-b", 128, "--rounds", 7, "--batches", 16))
    yield Stage("train", 85, module("bench_train", 75, *loader, "-b", 256, "--rounds", 7, "--steps", 15))
    axes = ("batch", "size", "detector_size", "threads", "hw_decoder_load")
    seconds = max(20.0, left() - 2 * _GRACE)
    yield Stage("scale", seconds, module("bench_scale", seconds - 10, *loader, "--rounds", 7, "--axes", *axes))


def test_command(out: Path) -> list[str]:
    """Return the command that runs the GPU tests, those files left out that need a package this host lacks.

    Plugins are not loaded on their own account, since a host has others than the ones the tests know; the options of
    pyproject.toml that need a plugin are overridden. Warnings are shown and fail no test: the versions are not ours.
    """
    line = ["-m", "pytest", "-m", "gpu", "-v", "-ra", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    line += ["-W", "default", "--continue-on-collection-errors", f"--junitxml={out / 'tests.xml'}"]
    if installed("pytest_timeout"):
        line += ["-p", "pytest_timeout", "--timeout=90"]
    if installed("xdist"):  # the tests are many and small, and wait for compilers more than for the GPU
        line += ["-p", "xdist", "-n", str(min(8, machine.cores()))]
    return [*line, *(f"--ignore={path}" for path in files_with_missing_imports()), "tests"]


def files_with_missing_imports() -> dict[str, str]:
    """Return the test files that import, at their top, a package that is not there, with its name."""
    found = {}
    for path in sorted((measure.ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (name.partition(".")[0] for name in names):
                if not (measure.ROOT / "tests" / f"{name}.py").exists() and not installed(name):
                    found[f"tests/{path.name}"] = name
    return found


def installed(name: str) -> bool:
    """Tell whether a package is there."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def run_stage(stage: Stage, seconds: float, log: IO[str]) -> str:
    """Run a stage for at most `seconds`, its output on the screen and in the log; return how it ended."""
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(measure.ROOT), os.environ.get("PYTHONPATH")])),
    }
    tee(log, f"\n==== {stage.name}: {' '.join(stage.command)}\n")
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *stage.command],
        cwd=measure.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its workers end with it
    )
    # Its output is copied in a thread of its own, or a silent stage could not be ended.
    copying = threading.Thread(target=lambda: [tee(log, line) for line in process.stdout], daemon=True)
    copying.start()
    try:
        status = process.wait(seconds)
        ended = "ended" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        ended = "was ended when its time was over"
    finally:
        end_group(process)
    copying.join(5)
    if not copying.is_alive():
        process.stdout.close()
    line = f"{stage.name}: {ended} after {time.monotonic() - start:.0f} s of {seconds:.0f} s"
    tee(log, line + "\n")
    return line


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process and what it started, gently first: interrupted, pytest still writes its report."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(4)
        except subprocess.TimeoutExpired:
            continue


def tee(log: IO[str], text: str) -> None:
    """Write to stdout and to the log."""
    for stream in (sys.stdout, log):
        stream.write(text)
        stream.flush()


def tests_summary(path: Path) -> str:
    """Return the number of tests by outcome, and the names of those that failed."""
    if not path.exists():
        return "tests: no tests.xml; suite.log shows how far they came"
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = ", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    return "\n".join([f"tests: {counts}", *(f"  {case.get('classname')}::{case.get('name')}" for case in bad)])


def summary(out: Path, ended: list[str]) -> str:
    """Return the figures of all results as text."""
    lines = ["# Summary", "", *ended, "", tests_summary(out / "tests.xml")]
    lines += [f"not run: {path}: {name} is not installed" for path, name in files_with_missing_imports().items()]
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        lines += ["", f"## {path.name}: {result['conditions']['device']}"]
        for name, figure in measure.figures(result):
            low, high = figure["q1"], figure["q3"]
            lines.append(f"{' / '.join(name)}: {figure['median']:g} ({low:g} to {high:g}), {figure['rounds']} rounds")
        lines += [f"not measured: {name}: {reason}" for name, reason in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("--data", type=Path, metavar="DATA", help="photographs in class folders to make images from")
    parser.add_argument("--minutes", type=float, default=9, help="time for all (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="default: all; images are made in any case")
    parser.add_argument("--dry", action="store_true", help="everything small, and on the CPU where there is no GPU")
    options = parser.parse_args()
    if not options.dry and not machine.has_gpu():
        msg = "there must be a GPU that CuPy sees, or --dry"
        raise ValueError(msg)
    if options.data and not options.data.is_dir():
        msg = f"{options.data}: no such folder"
        raise ValueError(msg)
    # Started in the background this program would ignore interrupts, and so would the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes - _GRACE
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    ended: list[str] = []
    with tempfile.TemporaryDirectory() as folder, open(out / "suite.log", "w", encoding="utf-8") as log:
        data = Path(folder, "images")
        source = options.data.absolute() if options.data else None
        for stage in stages(out, data, source, lambda: end - time.monotonic(), dry=options.dry):
            if options.stages and stage.name not in [*options.stages, "images"]:
                continue
            left = end - time.monotonic()
            if left < 5:
                ended.append(f"{stage.name}: no time left")
                continue
            ended.append(run_stage(stage, min(stage.seconds + _GRACE, left), log))
            (out / "summary.md").write_text(summary(out, ended))
        log.write(summary(out, ended))
    sys.stdout.write("\n" + summary(out, ended))
    if failed := [line for line in ended if ": ended" not in line]:
        msg = "; ".join(failed)
        raise RuntimeError(msg)


if __name__ == "__main__":
    measure.run(main)

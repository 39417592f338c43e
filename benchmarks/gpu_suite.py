"""Everything that a GPU host is wanted for, in one command of bounded time: tests, and what is measured on a GPU.

    python -m benchmarks.gpu_suite OUT --data DATA
    python -m benchmarks.gpu_suite OUT --data DATA --continue EARLIER

It needs no network and installs nothing. Each stage is a program of its own with a share of the time; it writes its
results to OUT as it goes, so that whatever ends the suite early takes little along. What matters most comes first. The
first stage is a smoke test, without which nothing else begins; behind it a stage that fails does not stop the others.
What optional packages a host lacks is said, and what depends on them is left out.

With --continue the suite takes what an earlier one left in EARLIER, by default OUT itself, and runs only what is
missing: stages that did not end well, in them the tests that have not passed and the variants without a result.

OUT holds suite.log, suite.json (the stages of each run, with its device and date), tests.jsonl (each test's outcome),
summary.md, and a JSON file for each benchmark and device.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks import machine, measure, outcomes, sanitize, smoke

_GRACE = 12  # seconds that a stage may take longer than it was told, to end the round and to write

# What all else rests on first, trainings last.
_FIRST_TESTS = ("cuda", "dali_python_operator", "fn", "gpu", "pytorch", "loaders_dali")
_LAST_TESTS = ("accelerate", "gpu_training")

_OUTCOMES = "tests.jsonl"
_STAGES = ("smoke", "tests", "sanitize", "ops", "images", "pipeline", "train", "scale")


class Stage(NamedTuple):
    """A program, the seconds that it gets, where it writes its result if it is a benchmark, and what is no failure."""

    name: str
    seconds: float
    command: list[str]
    result: Path | None = None
    fine: tuple[int, ...] = (0,)


def stages(out: Path, data: Path, source: Path | None, *, device: str, dry: bool) -> list[Stage]:
    """Return the stages in order; `dry` makes all small, for a machine without a GPU."""

    def benchmark(name: str, seconds: float, *options: str | float | Path) -> Stage:
        file = out / f"{name}-{_slug(device)}.json"
        line = ["-m", f"benchmarks.bench_{name}", *options, "--continue", "-o", file]
        return Stage(name, seconds, [*map(str, line)], file)

    images = ["-m", "benchmarks.data", str(data), "--images", "40" if dry else "4000"]
    checks = [
        Stage("smoke", 120 if dry else 90, ["-m", "benchmarks.smoke", *(["--dry"] if dry else [])]),
        Stage("tests", 240, test_command(out), fine=(0, 5)),  # 5: no test is left to run
        Stage("sanitize", 60, ["-m", "benchmarks.sanitize", "-o", str(out / "sanitize.json")]),
    ]
    photographs = Stage("images", 40, [*images, *(["--from", str(source)] if source else [])])
    if dry:
        small = ("--rounds", 1, "--crop-size", 32)
        loader = (data, *small, "-j", 1, "-b", 8)
        training = ("-a", "resnet18", "--steps", 1, "--detectors", "fine_grained")
        variants = ("--variants", "none", "none, again", "torch", "saliencymix fine_grained", "after: cutmix")
        return [
            *checks[:2],  # the sanitizer is for GPUs
            benchmark("ops", 120, "--rounds", 1, "--sizes", 32, "-b", 4, "--detectors", "fine_grained"),
            photographs,
            benchmark("pipeline", 120, *loader, "--batches", 1, *variants),
            benchmark("train", 120, *loader, *training),
            benchmark("scale", 120, *loader, "--axes", "threads", "batch", "--batch", 1, 2),
        ]
    loader = (data, "-j", machine.cores())
    axes = ("hw_decoder_load", "threads", "batch", "size", "detector_size")
    return [
        *checks,
        benchmark("ops", 80, "--rounds", 7),
        photographs,
        benchmark("pipeline", 150, *loader, "-b", 128, "--rounds", 7, "--batches", 16),
        benchmark("train", 150, *loader, "-b", 256, "--rounds", 5, "--steps", 10),
        benchmark("scale", 60, *loader, "--rounds", 5, "--axes", *axes),
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def test_command(out: Path) -> list[str]:
    """Return the command that runs the GPU tests that have not passed yet, those left out that lack a package.

    Plugins are not loaded on their own account, since a host has others than the ones the tests know; the options of
    pyproject.toml that need a plugin are overridden. Warnings are shown and fail no test: the versions are not ours.
    """
    line = [*smoke.PYTEST, "-m", "gpu", "--continue-on-collection-errors"]
    line += ["-p", "benchmarks.outcomes", "--outcomes", str(out / _OUTCOMES)]
    if machine.installed("pytest_timeout"):
        line += ["-p", "pytest_timeout", "--timeout=90"]
    if machine.installed("xdist"):  # the tests are many and small, and wait for compilers more than for the GPU
        line += ["-p", "xdist", "-n", str(min(12, machine.cores()))]
    lacking = files_with_missing_imports()
    return [*line, *(name for name in test_files() if name not in lacking)]


def test_files() -> list[str]:
    """Return the test files that hold tests for a GPU, in the order of their importance."""
    found = {}
    for path in sorted((measure.ROOT / "tests").glob("test_*.py")):
        if "mark.gpu" in path.read_text() or _uses_the_fixture_of_libraries(path):
            found[path.stem.removeprefix("test_")] = f"tests/{path.name}"
    named = {*_FIRST_TESTS, *_LAST_TESTS}
    order = [*_FIRST_TESTS, *(name for name in found if name not in named), *_LAST_TESTS]
    return [found[name] for name in order if name in found]


def _uses_the_fixture_of_libraries(path: Path) -> bool:
    """Tell whether a test asks for `xp` of tests/conftest.py, which is CuPy on a GPU."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return any(argument.arg in ("xp", "put", "fetch") for function in functions for argument in function.args.args)


def files_with_missing_imports() -> dict[str, str]:
    """Return the test files that cannot be imported for want of a package, with its name."""
    found = {}
    for path in sorted((measure.ROOT / "tests").glob("test_*.py")):
        if name := missing_import(path):
            found[f"tests/{path.name}"] = name
    return found


def missing_import(path: Path) -> str | None:
    """Return a package that importing a file of this repository would miss."""
    seen, left = set(), [path]
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imports(file):
            files = first_party_files(name, measure.ROOT)
            package = name.partition(".")[0]
            if files is None and not machine.installed(package):
                return package
            left += files or []
    return None


@functools.cache
def imports(file: Path) -> list[str]:
    """Return the names that a file imports whoever imports it: not inside of functions, or where it can do without."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@functools.cache
def first_party_files(name: str, root: Path) -> list[Path] | None:
    """Return the files of the repository in `root` that importing a module runs; None if it is not of it."""
    parts = name.split(".")
    for folder in (root, root / "tests"):
        if (folder / parts[0]).is_dir() or (folder / f"{parts[0]}.py").is_file():
            places = [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
            files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
            return [file for file in files if file.is_file()]
    return None


def run_stage(stage: Stage, seconds: float, log: IO[str]) -> dict[str, Any]:
    """Run a stage for at most `seconds`, its output on the screen and in the log; return how it ended."""
    command = [*stage.command, "--seconds", f"{max(1, seconds - _GRACE):.0f}"] if stage.result else stage.command
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(measure.ROOT), os.environ.get("PYTHONPATH")])),
    }
    tee(log, f"\n==== {stage.name}: {' '.join(command)}\n")
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
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
        ended = "ended" if status in stage.fine else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        status, ended = None, "was ended when its time was over"
    finally:
        end_group(process)
    copying.join(5)
    if not copying.is_alive():
        process.stdout.close()
    spent = time.monotonic() - start
    tee(log, f"{stage.name}: {ended} after {spent:.0f} s of {seconds:.0f} s\n")
    return {"ended": ended, "well": status in stage.fine, "seconds": round(spent)}


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process and what it started, gently first: interrupted, pytest still says what failed."""
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


def only_packages_are_missing(out: Path) -> bool:
    """Tell whether all that went wrong with the tests is that packages are not there."""
    bad = [found["why"] for found in outcomes.read(out / _OUTCOMES).values() if found["outcome"] == "failed"]
    missing = [re.search(r"No module named '(\w+)", why) for why in bad]
    return bool(bad) and all(match and not machine.installed(match[1]) for match in missing)


def is_done(stage: Stage, runs: list[dict[str, Any]], this_run: dict[str, Any]) -> bool:
    """Tell whether a stage has nothing left to do."""
    if stage.result:
        return stage.result.exists() and bool(json.loads(stage.result.read_text()).get("complete"))
    if stage.name == "images":  # they are deleted with each run
        return False
    # A smoke test is for a machine, whatever another one has shown.
    valid = [run for run in runs if stage.name != "smoke" or run["machine"] == this_run["machine"]]
    return any(run["stages"].get(stage.name, {}).get("well") for run in valid)


def tests_summary(out: Path) -> str:
    """Return the number of tests by outcome over all runs, and the names of those that failed."""
    counts, bad = outcomes.counted(out / _OUTCOMES)
    return "\n".join(
        [f"tests: {', '.join(f'{count} {name}' for name, count in counts.items())}", *[f"  {test}" for test in bad]]
    )


def tests_result(out: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of tests by outcome, and in which runs they were."""
    counts, bad = outcomes.counted(out / _OUTCOMES)
    of_tests = [run for run in runs if "tests" in run["stages"]]
    shown = [{name: run[name] for name in run if name not in ("stages", "machine")} for run in of_tests]
    return {"benchmark": "tests", "counts": counts, "failed": bad, "runs": shown}


def summary(out: Path, runs: list[dict[str, Any]]) -> str:
    """Return how the stages of all runs ended, and the figures of all results, as text."""
    lines = ["# Summary"]
    for run in runs:
        lines += ["", f"{run['date']}, {run['device']}, commit {run['commit']}:"]
        lines += [f"- {name}: {found['ended']}, {found['seconds']} s" for name, found in run["stages"].items()]
    lines += ["", tests_summary(out)]
    lines += [f"not run: {path}: {name} is not installed" for path, name in files_with_missing_imports().items()]
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        if "conditions" not in result:
            continue
        lines += ["", f"## {path.name}: {result['conditions']['device']}"]
        if result["benchmark"] == "sanitize":
            lines += ["", sanitize.table(result)]
        for name, figure in measure.figures(result):
            low, high = figure["q1"], figure["q3"]
            share = f", {figure['share_of_copy_rate']:.1%} of a copy" if "share_of_copy_rate" in figure else ""
            shown = f"{figure['median']:g} ({low:g} to {high:g}), {figure['rounds']} rounds{share}"
            lines.append(f"{' / '.join(name)}: {shown}")
        lines += [f"not measured: {name}: {reason}" for name, reason in result.get("not_measured", {}).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("--data", type=Path, metavar="DATA", help="photographs in class folders to make images from")
    parser.add_argument("--minutes", type=float, default=9, help="time for all (default: %(default)s)")
    only = f"some of {', '.join(_STAGES)}; default: all. Images are made where they are used"
    parser.add_argument("--stages", nargs="+", choices=_STAGES, metavar="NAME", help=only)
    earlier = "run only what is missing of what an earlier run left in EARLIER, or in OUT"
    parser.add_argument("--continue", nargs="?", const="", dest="earlier", metavar="EARLIER", help=earlier)
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
    runs = earlier_runs(out, options.earlier)
    run = this_run()
    with tempfile.TemporaryDirectory() as folder, open(out / "suite.log", "a", encoding="utf-8") as log:
        data = Path(folder, "images")
        source = options.data.absolute() if options.data else None
        wanted = [
            stage
            for stage in stages(out, data, source, device=run["device"], dry=options.dry)
            if (not options.stages or stage.name in [*options.stages, "images"]) and not is_done(stage, runs, run)
        ]
        if not {"pipeline", "train", "scale"} & {stage.name for stage in wanted}:
            wanted = [stage for stage in wanted if stage.name != "images"]
        if wanted:
            runs.append(run)
            measure.write({"runs": runs}, out / "suite.json")
        for stage in wanted:
            left = end - time.monotonic()
            if left < 2 * _GRACE:
                run["stages"][stage.name] = {"ended": "no time was left", "well": False, "seconds": 0}
                continue
            ended = run_stage(stage, min(stage.seconds + _GRACE, left), log)
            if stage.name == "tests" and not ended["well"] and only_packages_are_missing(out):
                ended |= {"ended": "ended, but for tests that lack a package", "well": True}
            run["stages"][stage.name] = ended
            measure.write({"runs": runs}, out / "suite.json")
            if stage.name == "tests":
                measure.write(tests_result(out, runs), out / f"tests-{_slug(run['device'])}.json")
            (out / "summary.md").write_text(summary(out, runs))
            if stage.name == "smoke" and not ended["well"]:
                break
        tee(log, "\n" + summary(out, runs))
    if failed := [f"{name}: {found['ended']}" for name, found in run["stages"].items() if not found["well"]]:
        msg = "; ".join(failed)
        raise RuntimeError(msg)


def earlier_runs(out: Path, earlier: str | None) -> list[dict[str, Any]]:
    """Return the runs to continue, none unless `earlier` is given, and bring their files to `out`."""
    source = Path(earlier).absolute() if earlier else out
    if earlier is None:
        if (out / "suite.json").exists():
            msg = f"OUT must hold no earlier run, or --continue be given, got {out}"
            raise ValueError(msg)
    elif not (source / "suite.json").is_file():
        msg = f"--continue must name a folder with the suite.json of an earlier run, got {source}"
        raise ValueError(msg)
    out.mkdir(parents=True, exist_ok=True)
    if earlier is None:
        return []
    if source != out:
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
    return json.loads((out / "suite.json").read_text())["runs"]


def this_run() -> dict[str, Any]:
    """Return what is known of this run before it begins."""
    conditions = machine.identity(gpu=machine.has_gpu())
    return {**conditions, "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "stages": {}}


if __name__ == "__main__":
    measure.run(main)

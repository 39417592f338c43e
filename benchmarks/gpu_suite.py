"""Run all tests and benchmarks that need a GPU, in one command of bounded time.

    python -m benchmarks.gpu_suite OUT --data DATA
    python -m benchmarks.gpu_suite OUT --data DATA --continue EARLIER

The suite needs no network and installs nothing. Each stage is a separate program with a share of the time. It writes
its results to OUT as it runs, so that little is lost if the suite is stopped early. The most important stages run
first. The first stage is a smoke test: if it fails, no other stage runs. If any other stage fails, the next ones still
run. Tests and variants that need a package that is not installed are left out, and the summary names them.

With --continue, the suite takes the results of an earlier run from EARLIER, by default OUT itself, and runs only what
is missing: stages that failed, and in them the tests that have not passed and the variants without a result.

OUT holds suite.log, suite.json (the stages of each run, with its device and date), tests.jsonl (the outcome of each
test), summary.md, a JSON file for each benchmark and device, and a report of the bottleneck tool for each of three
jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Container
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from benchmarks import machine, outcomes, program, sanitize
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.results import read_json, write_json
from dali_saliencymix.packages import is_installed

_GRACE = 12  # extra seconds for a stage to finish its round and to write
_PATIENCE = 4  # seconds after each signal that ends a stage

# First the tests that everything else depends on, last the tests that train.
_FIRST_TESTS = ("cuda", "dali_python_operator", "fn", "gpu", "pytorch", "loaders")
_LAST_TESTS = ("accelerate", "gpu_training")

_OUTCOMES = "tests.jsonl"

_JOB = "bottleneck --train-dir DATA -b 256 --amp --channels-last"
_SMALL_JOB = "bottleneck --train-dir DATA -b 8 -a resnet18 -j 1 --train-crop-size 32"
_SMALL_JOB += " --no-what-ifs --no-storage --seconds 5"

# For each stage: time limit in seconds, module, options, options of the dry run. The stage "tests" has the options of
# `test_command`. The three jobs of the bottleneck tool have a loader that is too slow for its step, one about as fast,
# and one that is much faster.
_STAGES = {
    "smoke": (90, "benchmarks.smoke", "", "--dry"),
    "tests": (240, "pytest", "", ""),
    "sanitize": (60, "benchmarks.sanitize", "", ""),
    "ops": (80, "benchmarks.bench_ops", "--rounds 7", "--rounds 1 --sizes 32 -b 4 --detectors fine_grained"),
    "images": (40, "benchmarks.data", "DATA --images 4000", "DATA --images 40"),
    "pipeline": (
        150,
        "benchmarks.bench_pipeline",
        "DATA -j CORES -b 128 --rounds 7 --batches 16",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 --batches 1"
        " --variants none 'none, again' torch 'saliencymix fine_grained' 'after: cutmix'",
    ),
    "starved": (150, "dali_saliencymix", f"{_JOB} -a resnet50 -j 2 --hw-decoder-load 0 --seconds 60", _SMALL_JOB),
    "balanced": (110, "dali_saliencymix", f"{_JOB} -a resnet18 -j HALF --seconds 45", _SMALL_JOB),
    "heavy": (
        75,
        "dali_saliencymix",
        f"{_JOB} -a resnet101 -j HALF --no-what-ifs --no-storage --seconds 30",
        _SMALL_JOB,
    ),
    "train": (
        150,
        "benchmarks.bench_train",
        "DATA -j HALF -b 256 --rounds 5 --steps 10",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 -a resnet18 --steps 1 --detectors fine_grained",
    ),
    "scale": (
        60,
        "benchmarks.bench_scale",
        "DATA -j CORES --rounds 5 --axes hw_decoder_load threads batch size detector_size",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 --axes threads batch --batch 1 2",
    ),
}
_USE_IMAGES = set(list(_STAGES)[list(_STAGES).index("images") + 1 :])

Run = dict[str, Any]  # date, device, commit, and how each stage ended


class Stage(NamedTuple):
    """A program, its time limit in seconds, and the file of its result if it is a benchmark."""

    name: str
    seconds: float
    command: list[str]
    result: Path | None = None


def stages(out: Path, data: Path, source: Path | None, *, device: str, dry: bool) -> list[Stage]:
    """Return the stages in order; with `dry` all are small, for a machine without a GPU."""
    # A virtual core may be half a core, and training needs some: loaders for training get half of the virtual cores.
    words = {"DATA": str(data), "CORES": str(cores()), "HALF": str(max(cores() // 2, 1))}
    made = []
    for name, (seconds, module, full, small) in _STAGES.items():
        if dry and name == "sanitize":  # needs a GPU
            continue
        command = ["-m", module, *(words.get(word, word) for word in shlex.split(small if dry else full))]
        stage = Stage(name, max(seconds, 120) if dry else seconds, command)
        if name == "tests":
            stage = stage._replace(command=test_command(out))
        elif name == "sanitize":
            command += ["-o", str(out / "sanitize.json")]
        elif module == "dali_saliencymix":
            command += ["-o", str(out / f"bottleneck-{name}.json")]
        elif name == "images" and source:
            command += ["--from", str(source)]
        elif module.startswith("benchmarks.bench_"):
            stage = stage._replace(result=out / f"{name}-{_slug(device)}.json")
            command += ["--continue", "-o", str(stage.result)]
        made.append(stage)
    return made


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def test_command(out: Path) -> list[str]:
    """Return the command that runs the GPU tests that have not passed yet."""
    line = [*outcomes.PYTEST, "-m", "gpu", "--continue-on-collection-errors"]
    line += ["-p", "benchmarks.outcomes", "--outcomes", str(out / _OUTCOMES), *outcomes.timeout(90)]
    if is_installed("xdist"):  # many small tests, which wait for compilers more than for the GPU
        line += ["-p", "xdist", "-n", str(min(12, cores()))]
    return [*line, *test_files()]


def test_files() -> list[str]:
    """Return the files with tests for a GPU, the most important first."""
    # These tests have the mark, or use a fixture of tests/conftest.py that also runs with CuPy.
    for_gpu = re.compile(r"mark\.gpu|^ *def \w+\([^)]*\b(xp|put|fetch)\b", re.MULTILINE)
    paths = sorted((program.ROOT / "tests").glob("test_*.py"))
    found = [path.stem.removeprefix("test_") for path in paths if for_gpu.search(path.read_text())]
    others = [name for name in found if name not in _FIRST_TESTS + _LAST_TESTS]
    return [f"tests/test_{name}.py" for name in (*_FIRST_TESTS, *others, *_LAST_TESTS) if name in found]


def run_stage(stage: Stage, seconds: float, log: IO[str]) -> dict[str, Any]:
    """Run a stage for at most `seconds`, with its output in the log, which is line-buffered; return how it ended."""
    command = [*stage.command, "--seconds", f"{max(1, seconds - _GRACE):.0f}"] if stage.result else stage.command
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(program.ROOT), os.environ.get("PYTHONPATH")])),
    }
    log.write(f"\n==== {stage.name}: {' '.join(command)}\n")
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=program.ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its workers can be ended with it
    )
    well = False
    try:
        status = process.wait(seconds)
        well = status == 0 or (stage.name == "tests" and status == pytest.ExitCode.NO_TESTS_COLLECTED)
        ended = "ended" if well else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        ended = "was ended at its time limit"
    finally:
        end_group(process)
    spent = time.monotonic() - start
    log.write(f"{stage.name}: {ended} after {spent:.0f} s of {seconds:.0f} s\n")
    return {"ended": ended, "well": well, "seconds": round(spent)}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, first with SIGINT, after which pytest still reports failures."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)


def only_packages_are_missing(out: Path) -> bool:
    """Tell whether missing packages are the only reason why tests failed."""
    counts, failed, lacking = outcomes.counted(out / _OUTCOMES)
    return bool(lacking) and not failed and "not run" not in counts


def is_done(stage: Stage, runs: list[Run], this_run: Run) -> bool:
    """Tell whether a stage has nothing left to do."""
    if stage.result:
        return stage.result.exists() and bool(read_json(stage.result).get("complete"))
    if stage.name == "images":  # deleted at the end of each run
        return False
    # The smoke test has to pass on each machine.
    valid = [run for run in runs if stage.name != "smoke" or run["machine"] == this_run["machine"]]
    return any(run["stages"].get(stage.name, {}).get("well") for run in valid)


def tests_summary(out: Path) -> str:
    """Return the number of tests by outcome over all runs and the names of those that failed or could not run."""
    counts, failed, lacking = outcomes.counted(out / _OUTCOMES)
    lines = [f"tests: {', '.join(f'{count} {name}' for name, count in counts.items())}"]
    lines += [f"  {test}" for test in failed]
    return "\n".join([*lines, *(f"not run: {test}: {name} is not installed" for test, name in lacking.items())])


def tests_result(out: Path, runs: list[Run]) -> dict[str, Any]:
    """Return the number of tests by outcome, and the runs in which they ran."""
    counts, failed, _ = outcomes.counted(out / _OUTCOMES)
    of_tests = [run for run in runs if "tests" in run["stages"]]
    shown = [{name: run[name] for name in run if name not in ("stages", "machine")} for run in of_tests]
    return {"benchmark": "tests", "counts": counts, "failed": failed, "runs": shown}


def summary(out: Path, runs: list[Run]) -> str:
    """Return the summary as Markdown: how the stages of all runs ended, and the figures of all results."""
    lines = ["# Summary"]
    for run in runs:
        lines += ["", f"{run['date']}, {run['device']}, commit {run['commit']}:"]
        lines += [f"- {name}: {found['ended']}, {found['seconds']} s" for name, found in run["stages"].items()]
    lines += ["", tests_summary(out)]
    for path in sorted(out.glob("*.json")):
        result = read_json(path)
        if "verdict" in result:
            lines += ["", f"## {path.name}: {result['verdict']['name']}"]
            continue
        if "conditions" not in result:
            continue
        lines += ["", f"## {path.name}: {result['conditions']['device']}"]
        if result["benchmark"] == "sanitize":
            lines += ["", sanitize.table(result)]
        lines += program.lines_of(result)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("--data", type=Path, metavar="DATA", help="photographs in class folders to make images from")
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the suite (default: %(default)s)")
    only = f"some of {', '.join(_STAGES)} (default: all); images is added if another stage needs it"
    parser.add_argument("--stages", nargs="+", choices=list(_STAGES), default=_STAGES, metavar="NAME", help=only)
    earlier = "run only what is missing in the results of an earlier run in EARLIER (default: OUT)"
    parser.add_argument("--continue", nargs="?", const="", dest="earlier", metavar="EARLIER", help=earlier)
    parser.add_argument("--dry", action="store_true", help="run small stages, on the CPU if there is no GPU")
    options = parser.parse_args()
    machine.check_gpu(or_dry=options.dry)
    if options.data and not options.data.is_dir():
        msg = f"{options.data}: no such folder"
        raise ValueError(msg)
    # A shell starts background jobs with SIGINT ignored, and the stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes - _GRACE
    out = options.out.absolute()
    runs, run = earlier_runs(out, options.earlier), this_run()
    # Ctrl-C does not end tee before the stage has written its last lines.
    tee = subprocess.Popen(["tee", "-ia", str(out / "suite.log")], stdin=subprocess.PIPE, text=True, bufsize=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = options.data.absolute() if options.data else None
            every = stages(out, Path(folder, "images"), source, device=run["device"], dry=options.dry)
            run_stages(what_is_missing(every, options.stages, runs, run), out, runs, run, end, tee.stdin)
        tee.stdin.write("\n" + summary(out, runs))
    finally:
        tee.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that a stage has left behind holds the pipe
            tee.wait(5)
    if failed := [f"{name}: {found['ended']}" for name, found in run["stages"].items() if not found["well"]]:
        raise RuntimeError("; ".join(failed))


def what_is_missing(every: list[Stage], names: Container[str], runs: list[Run], run: Run) -> list[Stage]:
    """Return the stages of these names that have something left to do, with `images` if one of them uses it."""
    missing = {stage.name for stage in every if stage.name in names and not is_done(stage, runs, run)}
    missing = missing | {"images"} if missing & _USE_IMAGES else missing - {"images"}
    return [stage for stage in every if stage.name in missing]


def run_stages(wanted: list[Stage], out: Path, runs: list[Run], run: Run, end: float, log: IO[str]) -> None:
    """Run stages until the time `end`, and write the state and the summary after each of them."""
    if wanted:
        runs.append(run)
        write_json(out / "suite.json", {"runs": runs})
    for stage in wanted:
        left = end - time.monotonic()
        if left < 2 * _GRACE:
            run["stages"][stage.name] = {"ended": "not run, no time was left", "well": False, "seconds": 0}
            continue
        ended = run_stage(stage, min(stage.seconds + _GRACE, left), log)
        if stage.name == "tests" and not ended["well"] and only_packages_are_missing(out):
            ended |= {"ended": "ended, except tests that lack a package", "well": True}
        run["stages"][stage.name] = ended
        write_json(out / "suite.json", {"runs": runs})
        if stage.name == "tests":
            write_json(out / f"tests-{_slug(run['device'])}.json", tests_result(out, runs))
        (out / "summary.md").write_text(summary(out, runs))
        if stage.name == "smoke" and not ended["well"]:
            break


def earlier_runs(out: Path, earlier: str | None) -> list[Run]:
    """Return the runs to continue, none if `earlier` is None, and copy their files to `out`."""
    source = Path(earlier).absolute() if earlier else out
    there = (source / "suite.json").is_file()
    if earlier is None and there:
        msg = f"OUT must hold no earlier run unless --continue is given, got {out}"
        raise ValueError(msg)
    if earlier is not None and not there:
        msg = f"--continue must name a folder with the suite.json of an earlier run, got {source}"
        raise ValueError(msg)
    out.mkdir(parents=True, exist_ok=True)
    if source != out:
        shutil.copytree(source, out, dirs_exist_ok=True)
    return read_json(out / "suite.json")["runs"] if there else []


def this_run() -> Run:
    """Return the record of this run, without any stage."""
    known = machine.identity(machine.surroundings(gpu=machine.has_gpu()))
    return {**known, "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "stages": {}}


if __name__ == "__main__":
    program.run(main)

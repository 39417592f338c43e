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

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks import machine, outcomes, program, sanitize
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.results import read_json, write_json

_GRACE = 12  # extra seconds for a stage to finish its round and to write

# First the tests that everything else depends on, last the tests that train.
_FIRST_TESTS = ("cuda", "dali_python_operator", "fn", "gpu", "pytorch", "loaders_dali")
_LAST_TESTS = ("accelerate", "gpu_training")

_OUTCOMES = "tests.jsonl"
_STAGES = ("smoke", "tests", "sanitize", "ops", "images", "pipeline", "starved", "balanced", "heavy", "train", "scale")
_USE_IMAGES = set(_STAGES[_STAGES.index("images") + 1 :])

Run = dict[str, Any]  # date, device, commit, and how each stage ended


class Stage(NamedTuple):
    """A program, its time limit in seconds, the file of its result if it is a benchmark, and statuses that pass."""

    name: str
    seconds: float
    command: list[str]
    result: Path | None = None
    fine: tuple[int, ...] = (0,)


# For each benchmark: time limit in seconds, options of the full run, options of the dry run.
_BENCHMARKS = {
    "ops": (80, "--rounds 7", "--rounds 1 --sizes 32 -b 4 --detectors fine_grained"),
    "pipeline": (
        150,
        "DATA -j CORES -b 128 --rounds 7 --batches 16",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 --batches 1"
        " --variants none 'none, again' torch 'saliencymix fine_grained' 'after: cutmix'",
    ),
    "train": (
        150,
        "DATA -j HALF -b 256 --rounds 5 --steps 10",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 -a resnet18 --steps 1 --detectors fine_grained",
    ),
    "scale": (
        60,
        "DATA -j CORES --rounds 5 --axes hw_decoder_load threads batch size detector_size",
        "DATA -j 1 -b 8 --rounds 1 --crop-size 32 --axes threads batch --batch 1 2",
    ),
}

# For each job of the bottleneck tool: time limit in seconds, --seconds of the tool, and the options of the job. The
# loader is too slow for its step, about as fast, and much faster.
_JOBS = {
    "starved": (150, 60, "-a resnet50 -j 2 --hw-decoder-load 0"),
    "balanced": (110, 45, "-a resnet18 -j HALF"),
    "heavy": (75, 30, "-a resnet101 -j HALF --no-what-ifs --no-storage"),
}
_REPORTS = {f"bottleneck-{name}" for name in _JOBS}


def stages(out: Path, data: Path, source: Path | None, *, device: str, dry: bool) -> list[Stage]:
    """Return the stages in order; with `dry` all are small, for a machine without a GPU."""
    # A virtual core may be half a core, and training needs some: loaders for training get half of the virtual cores.
    words = {"DATA": str(data), "CORES": str(cores()), "HALF": str(max(cores() // 2, 1))}
    benchmarks = {}
    for name, (seconds, full, small) in _BENCHMARKS.items():
        options = [words.get(word, word) for word in shlex.split(small if dry else full)]
        file = out / f"{name}-{_slug(device)}.json"
        line = ["-m", f"benchmarks.bench_{name}", *options, "--continue", "-o", str(file)]
        benchmarks[name] = Stage(name, 120 if dry else seconds, line, file)
    jobs = {}
    for name, (seconds, told, job) in _JOBS.items():
        line = ["-m", "dali_saliencymix", "bottleneck", "--train-dir", str(data)]
        small = "-a resnet18 -b 8 -j 1 --train-crop-size 32 --no-what-ifs --no-storage --seconds 5"
        full = f"{job} -b 256 --amp --channels-last --seconds {told}"
        line += [words.get(word, word) for word in shlex.split(small if dry else full)]
        jobs[name] = Stage(name, 120 if dry else seconds, [*line, "-o", str(out / f"bottleneck-{name}.json")])
    images = ["-m", "benchmarks.data", str(data), "--images", "40" if dry else "4000"]
    made = {
        "smoke": Stage("smoke", 120 if dry else 90, ["-m", "benchmarks.smoke", *(["--dry"] if dry else [])]),
        "tests": Stage("tests", 240, test_command(out), fine=(0, 5)),  # 5: no test to run
        "sanitize": Stage("sanitize", 60, ["-m", "benchmarks.sanitize", "-o", str(out / "sanitize.json")]),
        "images": Stage("images", 40, [*images, *(["--from", str(source)] if source else [])]),
        **benchmarks,
        **jobs,
    }
    return [made[name] for name in _STAGES if not (dry and name == "sanitize")]  # needs a GPU


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def test_command(out: Path) -> list[str]:
    """Return the command that runs the GPU tests that have not passed yet.

    Automatic loading of plugins is off, since the host may have other plugins than those that the tests know; the
    options of pyproject.toml that need a plugin are overridden. Warnings are shown and do not fail a test, since the
    versions of the host are not ours.
    """
    from benchmarks import smoke  # imports PyTorch and DALI, which takes seconds

    line = [*smoke.PYTEST, "-m", "gpu", "--continue-on-collection-errors"]
    line += ["-p", "benchmarks.outcomes", "--outcomes", str(out / _OUTCOMES), *smoke.timeout(90)]
    if machine.installed("xdist"):  # many small tests, which wait for compilers more than for the GPU
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
    """Run a stage for at most `seconds`, with its output on stdout and in the log; return how it ended."""
    command = [*stage.command, "--seconds", f"{max(1, seconds - _GRACE):.0f}"] if stage.result else stage.command
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(program.ROOT), os.environ.get("PYTHONPATH")])),
    }
    tee(log, f"\n==== {stage.name}: {' '.join(command)}\n")
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=program.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its workers can be ended with it
    )
    # A thread copies the output, so that a stage without output can be ended too.
    copying = threading.Thread(target=lambda: [tee(log, line) for line in process.stdout], daemon=True)
    copying.start()
    try:
        status = process.wait(seconds)
        ended = "ended" if status in stage.fine else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        status, ended = None, "was ended at its time limit"
    finally:
        end_group(process)
    copying.join(5)
    if not copying.is_alive():
        process.stdout.close()
    spent = time.monotonic() - start
    tee(log, f"{stage.name}: {ended} after {spent:.0f} s of {seconds:.0f} s\n")
    return {"ended": ended, "well": status in stage.fine, "seconds": round(spent)}


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process and its children, first with SIGINT, after which pytest still reports failures."""
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
        if path.stem in _REPORTS:
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
    """Run all stages."""
    parser = program.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("--data", type=Path, metavar="DATA", help="photographs in class folders to make images from")
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the suite (default: %(default)s)")
    only = f"some of {', '.join(_STAGES)} (default: all); images is added if another stage needs it"
    parser.add_argument("--stages", nargs="+", choices=_STAGES, default=_STAGES, metavar="NAME", help=only)
    earlier = "run only what is missing in the results of an earlier run in EARLIER (default: OUT)"
    parser.add_argument("--continue", nargs="?", const="", dest="earlier", metavar="EARLIER", help=earlier)
    parser.add_argument("--dry", action="store_true", help="run small stages, on the CPU if there is no GPU")
    options = parser.parse_args()
    if not options.dry and not machine.has_gpu():
        msg = "there must be a GPU that CuPy sees, or --dry"
        raise ValueError(msg)
    if options.data and not options.data.is_dir():
        msg = f"{options.data}: no such folder"
        raise ValueError(msg)
    # A shell starts background jobs with SIGINT ignored, and the stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes - _GRACE
    out = options.out.absolute()
    runs, run = earlier_runs(out, options.earlier), this_run()
    with tempfile.TemporaryDirectory() as folder, open(out / "suite.log", "a", encoding="utf-8") as log:
        source = options.data.absolute() if options.data else None
        every = stages(out, Path(folder, "images"), source, device=run["device"], dry=options.dry)
        left_to_do = {stage.name for stage in every if stage.name in options.stages and not is_done(stage, runs, run)}
        left_to_do = left_to_do | {"images"} if left_to_do & _USE_IMAGES else left_to_do - {"images"}
        wanted = [stage for stage in every if stage.name in left_to_do]
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
        tee(log, "\n" + summary(out, runs))
    if failed := [f"{name}: {found['ended']}" for name, found in run["stages"].items() if not found["well"]]:
        raise RuntimeError("; ".join(failed))


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
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
    return read_json(out / "suite.json")["runs"] if there else []


def this_run() -> Run:
    """Return the record of this run, without any stage."""
    known = machine.identity(machine.surroundings(gpu=machine.has_gpu()))
    return {**known, "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "stages": {}}


if __name__ == "__main__":
    program.run(main)

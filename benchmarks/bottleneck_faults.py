"""Test whether the bottleneck tool finds injected faults; the result is a confusion table of its verdicts.

    python -m benchmarks.bottleneck_faults --runs 10 -o benchmarks/results/NAME.json

The pipelines are real DALI pipelines on the CPU, over JPEG files made here. A fault is a sleep at one place, long
enough to be the true bottleneck: in the reading, after the resize, in the saliency detector, or in the training step. A
step that sleeps stands for one on an accelerator, which the CPU waits for. The faults are interleaved, so background
load affects all equally. A verdict is right, undecided, or wrong.

In addition to the live runs, the recorded rounds in `RECORDED` are judged again, one row for each run. They come from
machines that were busy with other work, and the right verdict is known.

The second part compares the predicted rate, that of the slowest of step, loader and storage, with the measured one over
small grids: with the files in memory, and with files that have to be fetched from storage. Slow storage is simulated by
a pause for each file whose pages are not in memory; files are dropped from memory as the tool does it.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from PIL import Image

from benchmarks import machine, program
from dali_saliencymix import bottleneck, spectral_residual
from dali_saliencymix import fn as mix_fn
from dali_saliencymix.bottleneck import Figures, RankFigures, Stage, decide
from dali_saliencymix.bottleneck.verdict import OF_A_PART
from dali_saliencymix.measure import page_cache

RECORDED = Path(__file__).with_name("recorded_rounds.json")
BATCH = 8
SLOW, FAST = 0.03, 0.001  # seconds a batch

_lock = threading.Lock()


def make_files(folder: str | Path, *, count: int = 32, size: int = 160) -> list[str]:
    """Write JPEG files of a smooth pattern with some noise, as costly to decode as photographs; return their paths."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((size, size))
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (size, size, 3))
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
        path = Path(folder, f"{number:03d}.jpg")
        path.write_bytes(stream.getvalue())
        files.append(str(path))
    return files


class Reader:
    """Batches of encoded files and labels from slow storage; with `cold`, only files not in memory are slow."""

    def __init__(self, files: list[str], seconds: float, *, cold: bool = False) -> None:
        self._files, self._seconds, self._cold = files, seconds, cold

    def __call__(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the batch with this number; after the last file follows the first one."""
        chosen = [self._files[(number * BATCH + i) % len(self._files)] for i in range(BATCH)]
        absent = sum(1 - (page_cache.resident_share([file]) or 0) for file in chosen) / BATCH if self._cold else 1
        time.sleep(self._seconds * absent)
        return [np.fromfile(file, np.uint8) for file in chosen], [np.zeros(1, np.int32)] * BATCH


@do_not_convert
def pause(images: Any, seconds: float, held: bool = False) -> Any:
    """Delay each batch of images by `seconds`, under a common lock if `held`."""

    def wait(samples: list[np.ndarray]) -> list[np.ndarray]:
        with _lock if held else threading.Lock():
            time.sleep(seconds)
        return samples

    return fn.python_function(images, function=wait, batch_processing=True, output_layouts=["HWC"])


def slow_detector(images: np.ndarray, seconds: float) -> np.ndarray:
    time.sleep(seconds)
    return spectral_residual(images)


@pipeline_def(batch_size=BATCH, num_threads=2, device_id=None, seed=1, py_num_workers=1, py_start_method="fork")
def pipeline(
    files: list[str],
    read: float = 0.0,
    fetch: float = 0.0,
    prep: float = 0.0,
    detect: float = 0.0,
    held: bool = False,
    mixed: bool = True,
    size: int = 64,
) -> tuple[Any, ...]:
    """Read, decode, resize, mix and normalise; `read`, `fetch`, `prep` and `detect` are delays in seconds a batch."""
    if read > 0:
        encoded, labels = fn.external_source(source=Reader(files, read), num_outputs=2)
    elif fetch > 0:
        encoded, labels = fn.external_source(source=Reader(files, fetch, cold=True), num_outputs=2, parallel=True)
    else:
        encoded, labels = fn.readers.file(files=files, labels=[0] * len(files), random_shuffle=True, name="reader")
    images = fn.resize(fn.decoders.image(encoded), size=(size, size))
    if prep > 0:
        images = pause(images, prep, held)
    lam = labels
    if mixed:
        detector = functools.partial(slow_detector, seconds=detect) if detect > 0 else "spectral_residual"
        images, labels, _, lam = mix_fn.saliencymix(images, labels, saliency=detector)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW")
    return images, labels, lam


def step_of(seconds: float, *, held: bool = False) -> Callable[[Any], None]:
    """Return a training step that takes `seconds` and leaves the CPU idle."""

    def step(batch: Any) -> None:
        with _lock if held else threading.Lock():
            time.sleep(seconds)

    return step


class PausedLoader:
    """Fifty batches, each after a pause."""

    def __init__(self, pause: Callable[[], float]) -> None:
        self._pause = pause

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(50):
            time.sleep(self._pause())
            yield np.zeros((BATCH, 3, 8, 8), np.float32)


class RankLoader(PausedLoader):
    """A loader that is slow in the process of rank 1."""

    def __init__(self) -> None:
        super().__init__(lambda: SLOW if os.environ.get("RANK") == "1" else FAST)


def rank_step(batch: Any) -> None:
    """Train, and wait for the other processes as an all-reduce does."""
    import torch

    time.sleep(FAST)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# The right verdict for each fault.
EXPECTED = {
    "slow read": "DISK-BOUND",
    "slow operator": "CPU-PREP-BOUND",
    "expensive detector": "MIX-BOUND",
    "tiny model": "DECODE-BOUND",
    "huge model": "COMPUTE-BOUND",
    "common lock": "CONTENTION",
    "slow rank": "STRAGGLER",
    "noisy machine": "INCONCLUSIVE",
}
# Options of the pipeline, and seconds of a step; with "held", both need the same lock.
_IN_A_PIPELINE: dict[str, tuple[dict[str, Any], float]] = {
    "slow read": ({"read": SLOW, "mixed": False}, FAST),
    "slow operator": ({"prep": SLOW, "mixed": False}, FAST),
    "expensive detector": ({"detect": SLOW}, FAST),
    "tiny model": ({"mixed": False, "size": 32}, FAST / 4),
    "huge model": ({"mixed": False}, 6 * SLOW),
    "common lock": ({"prep": SLOW, "held": True, "mixed": False}, SLOW),
}


def diagnosed(fault: str, folder: Path, run: int, seconds: float) -> dict[str, Any]:
    """Return the report of a fault."""
    if fault == "slow rank":
        return diagnosed_ranks(folder / "ranks.json", seconds)
    quick: dict[str, Any] = {"seconds": seconds, "what_ifs": False, "storage": False}
    if fault == "noisy machine":  # loader and step are equally fast on average and vary a lot
        pauses, steps = (np.random.default_rng(seed) for seed in (run, run + 1000))
        loader = PausedLoader(lambda: 0.01 * pauses.lognormal(0, 1.2))
        return bottleneck.diagnose(loader, lambda batch: time.sleep(0.09 * steps.lognormal(0, 1.2)), **quick)
    files = files_of(folder, 900 if fault == "tiny model" else 160)  # large if decoding has to be the bottleneck
    options, seconds_of_step = _IN_A_PIPELINE[fault]
    if fault == "slow read":
        quick |= {"storage": True, "files": files}
    step = step_of(seconds_of_step, held=options.get("held", False))
    return bottleneck.diagnose(functools.partial(pipeline, files, **options), step, **quick)


def diagnosed_ranks(output: Path, seconds: float) -> dict[str, Any]:
    """Return the report of two processes, one of which has a slow loader."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dali_saliencymix", "bottleneck", "--loader", "benchmarks.bottleneck_faults:RankLoader"]
    command += ["--step", "benchmarks.bottleneck_faults:rank_step", "--seconds", str(seconds), "--device", "cpu"]
    command += ["--no-what-ifs", "--no-storage", "-o", str(output)]
    program.python(*command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return bottleneck.load_report(output)


def files_of(folder: Path, size: int, count: int = 32) -> list[str]:
    """Return files of a size; make them if they do not exist."""
    place = folder / f"{size}-{count}"
    if not place.exists():
        place.mkdir()
        make_files(place, size=size, count=count)
    return sorted(str(path) for path in place.iterdir())


def prediction_grid(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield predictions and measurements for loaders and steps from fast to slow."""
    for loader, step in itertools.product((0.0, 0.02, SLOW), (FAST, 0.02, SLOW)):
        define = functools.partial(pipeline, files_of(folder, 160), prep=loader, mixed=False)
        report = bottleneck.diagnose(define, step_of(step), seconds=seconds, what_ifs=False, storage=False)
        error = report["prediction"]["end_to_end_takes_longer_by"]
        total = report["stages_sum"]["ratio"]
        yield {"loader_pause_s": loader, "step_s": step, "takes_longer_by": error, "stages_sum_ratio": total}


def storage_grid(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield predictions and measurements with files from storage, for loaders and steps from fast to slow."""
    files = files_of(folder, 160, count=96)
    for fetch, prep, step in itertools.product((0.02, 0.06), (0.0, 0.04), (FAST, 0.03)):
        define = functools.partial(pipeline, files, fetch=fetch, prep=prep, mixed=False)
        report = bottleneck.diagnose(
            define, step_of(step), seconds=seconds, what_ifs=False, storage=True, files=files, cache="cold"
        )
        rates = {key: report["rates"][key]["ms_per_batch"] for key in ("step", "loader", "storage")}
        missing = [key for key, rate in rates.items() if rate is None]
        if missing:
            msg = f"{missing[0]} was not measured: {report['storage']}"
            raise RuntimeError(msg)
        predicted = max(rate["median"] for rate in rates.values())
        longer = [pass_from_storage(define, files, step_of(step)) / predicted - 1 for _ in range(5)]
        row = {"fetch_pause_s": fetch, "prep_pause_s": prep, "step_s": step, "predicted_ms": predicted}
        yield {**row, "takes_longer_by": spread(longer), "verdict": report["verdict"]["name"]}


def pass_from_storage(define: Callable[[], Any], files: list[str], step: Callable[[Any], None]) -> float:
    """Return the milliseconds per batch of loader and step together, on files that were dropped from memory."""
    built = define()
    built.build()
    why = page_cache.why_not_dropped(files)
    if why:
        raise RuntimeError(why)
    step(built.run())  # not timed: nothing overlaps with the first batch
    count = len(files) // BATCH - 1
    start = time.perf_counter()
    for _ in range(count):
        step(built.run())
    return 1000 * (time.perf_counter() - start) / count


def recorded() -> dict[str, tuple[Figures, str]]:
    """Return the figures of each recorded run and the right verdict, by name."""
    found = {}
    for case in json.loads(RECORDED.read_text())["cases"]:
        given = case["figures"]
        series = {name: tuple(given[name]) for name in ("step_ms", "loader_ms", "end_ms", "waits")}
        stages = tuple(Stage(each["name"], each["category"], tuple(each["ms"])) for each in given.get("stages", ()))
        ranks = tuple(RankFigures(tuple(each["step_ms"]), tuple(each["loader_ms"])) for each in given.get("ranks", ()))
        found[case["name"]] = Figures(**series, stages=stages or None, ranks=ranks), case["expected"]
    return found


def outcome(verdict: str, expected: str) -> str:
    """Return "right", "undecided" or "wrong".

    INCONCLUSIVE is undecided, and so is LOADER-BOUND if the right verdict names a part of the loader.
    """
    if verdict == expected:
        return "right"
    undecided = verdict == "INCONCLUSIVE" or (verdict == "LOADER-BOUND" and expected in OF_A_PART)
    return "undecided" if undecided else "wrong"


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum of values."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def main() -> None:
    parser = program.parser(__doc__, "output")
    parser.add_argument("--runs", type=program.positive, default=10, help="runs of each fault")
    parser.add_argument("--seconds", type=program.positive_number, default=3.0, help="time for each run of the tool")
    parser.add_argument("--faults", nargs="+", choices=list(EXPECTED), default=list(EXPECTED))
    parser.add_argument("--no-grid", action="store_true", help="leave out the grid of predictions")
    options = parser.parse_args()
    table: dict[str, collections.Counter[str]] = {fault: collections.Counter() for fault in options.faults}
    whys: dict[str, list[str]] = {fault: [] for fault in options.faults}
    result: dict[str, Any] = {"benchmark": "bottleneck_faults", "conditions": machine.conditions(options)}
    result |= {"expected": EXPECTED, "verdicts": table, "not_as_expected": whys}
    judged = {name: (expected, decide(figures).name) for name, (figures, expected) in recorded().items()}
    result["recorded"] = {name: {"expected": expected, "verdict": found} for name, (expected, found) in judged.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for run, fault in itertools.product(range(options.runs), options.faults):
            report = diagnosed(fault, folder, run, options.seconds)
            name = report["verdict"]["name"]
            table[fault][name] += 1
            if name != EXPECTED[fault]:
                whys[fault].append(f"{name}: {report['verdict']['why']}")
            program.say(f"run {run + 1} {fault}: {name}, {report['conditions']['seconds_taken']} s")
            program.write(result, options.output)
        grids = {} if options.no_grid else {"grid": prediction_grid, "storage_grid": storage_grid}
        for grid, rows in grids.items():
            result[grid] = []
            for row in rows(folder, options.seconds * (2 if grid == "storage_grid" else 1)):
                result[grid].append(row)
                program.say(str(row))
                program.write(result, options.output)
            error = "storage_prediction_error" if grid == "storage_grid" else "prediction_error"
            result[error] = spread([row["takes_longer_by"]["median"] for row in result[grid]])
    program.write(result, options.output)
    rows = []
    of_names: dict[str, tuple[str, Mapping[str, int]]] = {name: (EXPECTED[name], table[name]) for name in table}
    of_names |= {f"recorded: {name}": (expected, {found: 1}) for name, (expected, found) in judged.items()}
    for name, (expected, verdicts) in of_names.items():
        counts: collections.Counter[str] = collections.Counter()
        for verdict, count in verdicts.items():
            counts[outcome(verdict, expected)] += count
        rows.append([name, expected, *(counts[kind] for kind in ("right", "undecided", "wrong"))])
    errors = {name: result.get(name) for name in ("prediction_error", "storage_prediction_error")}
    shown = program.markdown_table(["fault", "expected", "right", "undecided", "wrong"], rows)
    sys.stdout.write(f"{shown}\n\n{json.dumps(errors)}\n")


if __name__ == "__main__":
    program.run(main)

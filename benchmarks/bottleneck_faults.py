"""Does the bottleneck tool find faults that were put in on purpose? A confusion table of its verdicts.

    python -m benchmarks.bottleneck_faults --runs 10 -o benchmarks/results/NAME.json

The pipelines are real DALI pipelines on the CPU, over JPEG files made here; a fault is a sleep at one place, long
enough to be the truth: in the reading, behind the resize, in the saliency detector, in the training step. A step that
sleeps stands for one on an accelerator, which the CPU waits for. Faults take turns, so that what else the machine does
hits all of them alike. A verdict is right, INCONCLUSIVE, or wrong.

The second part compares the predicted rate, that of the slowest of step, loader and storage, with the measured one over
small grids: with the files in memory, and with files that have to be fetched. Storage is made slow by a pause for each
file whose pages are not in memory; files are dropped from it as the tool does.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from PIL import Image

from benchmarks import machine, measure
from dali_saliencymix import bottleneck, spectral_residual
from dali_saliencymix import fn as mix_fn
from dali_saliencymix.measure import page_cache

BATCH = 8
SLOW, FAST = 0.03, 0.001  # seconds a batch

_lock = threading.Lock()


def make_files(folder: str | Path, *, count: int = 32, size: int = 160) -> list[str]:
    """Write JPEG files of a smooth pattern with some noise, which decode as photographs do; return their paths."""
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


class ThrottledReader:
    """Batches of encoded files and labels, read with a pause before each batch: storage that answers slowly."""

    def __init__(self, files: list[str], seconds: float) -> None:
        self._files, self._seconds, self._next = files, seconds, 0

    def __call__(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the next batch."""
        time.sleep(self._seconds)
        self._next += 1
        return read_batch(self._files, self._next - 1)


class ColdReader:
    """The same for a process that reads ahead, with pauses only for files that are not in memory."""

    def __init__(self, files: list[str], seconds: float) -> None:
        self._files, self._seconds = files, seconds

    def __call__(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the batch with this number."""
        chosen = files_of_batch(self._files, number)
        time.sleep(self._seconds * sum(1 - (page_cache.resident_share([file]) or 0) for file in chosen) / BATCH)
        return read_batch(self._files, number)


def files_of_batch(files: list[str], number: int) -> list[str]:
    """Return the files of a batch, in order, from the beginning again after the last."""
    return [files[(number * BATCH + i) % len(files)] for i in range(BATCH)]


def read_batch(files: list[str], number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Read the files of a batch; return their bytes, and labels."""
    return [np.fromfile(file, np.uint8) for file in files_of_batch(files, number)], [np.zeros(1, np.int32)] * BATCH


@do_not_convert
def pause(images: Any, seconds: float, held: bool = False) -> Any:
    """Return images as they are, a while later for each batch."""

    def wait(samples: list[np.ndarray]) -> list[np.ndarray]:
        with _lock if held else threading.Lock():
            time.sleep(seconds)
        return samples

    return fn.python_function(images, function=wait, batch_processing=True, output_layouts=["HWC"])


def slow_detector(images: np.ndarray, seconds: float) -> np.ndarray:
    """Look for saliency, a while later."""
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
    """Read, decode, resize, mix, normalise, with pauses at these places."""
    if read > 0:
        encoded, labels = fn.external_source(source=ThrottledReader(files, read), num_outputs=2)
    elif fetch > 0:
        encoded, labels = fn.external_source(source=ColdReader(files, fetch), num_outputs=2, parallel=True)
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
    """Return a training step that takes so long and leaves the CPU alone meanwhile."""

    def step(batch: Any) -> None:
        with _lock if held else threading.Lock():
            time.sleep(seconds)

    return step


class NoisyLoader:
    """Batches about as fast as the step, give or take a lot: what a machine with other users looks like."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(50):
            time.sleep(0.01 * self._rng.lognormal(0, 1.2))
            yield np.zeros((BATCH, 3, 8, 8), np.float32)


def noisy_step(seed: int) -> Callable[[Any], None]:
    """Return a step that at times is ten times slower than at others."""
    rng = np.random.default_rng(seed + 1000)
    return lambda batch: time.sleep(0.09 * rng.lognormal(0, 1.2))


def diagnosed(files: list[str], fault: str, seed: int = 0, seconds: float = 3.0) -> dict[str, Any]:
    """Return the report of a fault."""
    quick: dict[str, Any] = {"seconds": seconds, "what_ifs": False, "storage": False}
    if fault == "noisy machine":
        return bottleneck.diagnose(NoisyLoader(seed), noisy_step(seed), **quick)
    options, seconds_of_step, held = {
        "slow read": ({"read": SLOW, "mixed": False}, FAST, False),
        "slow operator": ({"prep": SLOW, "mixed": False}, FAST, False),
        "expensive detector": ({"detect": SLOW}, FAST, False),
        "tiny model": ({"mixed": False, "size": 32}, FAST / 4, False),
        "huge model": ({"mixed": False}, 6 * SLOW, False),
        "common lock": ({"prep": SLOW, "held": True, "mixed": False}, SLOW, True),
    }[fault]
    if fault == "slow read":
        quick |= {"storage": True, "files": files}
    define = functools.partial(pipeline, files, **options)
    return bottleneck.diagnose(define, step_of(seconds_of_step, held=held), **quick)


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


class RankLoader:
    """Batches that come slowly in the process of rank 1, if there is one."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(50):
            time.sleep(SLOW if os.environ.get("RANK") == "1" else FAST)
            yield np.zeros((BATCH, 3, 8, 8), np.float32)


def rank_step(batch: Any) -> None:
    """Train, and wait for the other processes as an exchange of gradients does."""
    import torch

    time.sleep(FAST)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def diagnosed_ranks(output: Path, seconds: float) -> dict[str, Any]:
    """Return the report of two processes of which one has a slow loader."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dali_saliencymix", "bottleneck", "--loader", "benchmarks.bottleneck_faults:RankLoader"]
    command += ["--step", "benchmarks.bottleneck_faults:rank_step", "--seconds", str(seconds), "--device", "cpu"]
    command += ["--no-what-ifs", "--no-storage", "-o", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1], env=environment)
    return bottleneck.load_report(output)


def files_of(fault: str, folder: Path) -> list[str]:
    """Return the files that a fault is tried on: large ones where decoding shall be the dearest part."""
    size = 900 if fault == "tiny model" else 160
    place = folder / str(size)
    if not place.exists():
        place.mkdir()
        make_files(place, size=size)
    return sorted(str(path) for path in place.iterdir())


def prediction_grid(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Compare prediction and measurement for loaders and steps from fast to slow."""
    rows = []
    for loader, step in ((a, b) for a in (0.0, 0.02, SLOW) for b in (FAST, 0.02, SLOW)):
        define = functools.partial(pipeline, files_of("", folder), prep=loader, mixed=False)
        report = bottleneck.diagnose(define, step_of(step), seconds=seconds, what_ifs=False, storage=False)
        error = report["prediction"]["end_to_end_takes_longer_by"]
        total = report["stages_sum"]["ratio"]
        rows.append({"loader_pause_s": loader, "step_s": step, "takes_longer_by": error, "stages_sum_ratio": total})
    return rows


def storage_grid(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Compare prediction and measurement where files come from storage, with loaders and steps from fast to slow."""
    files = make_files(_made(folder / "storage"), count=96)
    rows = []
    for fetch, prep, step in ((a, b, c) for a in (0.02, 0.06) for b in (0.0, 0.04) for c in (FAST, 0.03)):
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
        passes = [pass_from_storage(define, files, step_of(step)) for _ in range(5)]
        longer = sorted(taken / predicted - 1 for taken in passes)
        figures = {"median": statistics.median(longer), "least": longer[0], "largest": longer[-1]}
        row = {"fetch_pause_s": fetch, "prep_pause_s": prep, "step_s": step, "predicted_ms": predicted}
        rows.append({**row, "takes_longer_by": figures, "verdict": report["verdict"]["name"]})
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def pass_from_storage(define: Callable[[], Any], files: list[str], step: Callable[[Any], None]) -> float:
    """Return the ms that a batch takes, loader and step together, over files that were dropped from memory."""
    built = define()
    built.build()
    why = page_cache.why_not_dropped(files)
    if why:
        raise RuntimeError(why)
    step(built.run())  # while the first batch is made, nothing overlaps yet
    count = len(files) // BATCH - 1
    start = time.perf_counter()
    for _ in range(count):
        step(built.run())
    return 1000 * (time.perf_counter() - start) / count


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """Run all faults in turns, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=measure.positive, default=10, help="runs of each fault")
    parser.add_argument("--seconds", type=measure.positive_number, default=3.0, help="time asked for each run")
    parser.add_argument("--faults", nargs="+", choices=list(EXPECTED), default=list(EXPECTED))
    parser.add_argument("--no-grid", action="store_true", help="leave out the grid of predictions")
    parser.add_argument(
        "-o", "--output", type=measure.output_file, metavar="JSON", help="file, written anew after each run"
    )
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "bottleneck_faults", "conditions": machine.conditions(args, gpu=False)}
    table: dict[str, dict[str, int]] = {fault: {} for fault in args.faults}
    whys: dict[str, list[str]] = {fault: [] for fault in args.faults}
    result |= {"expected": EXPECTED, "verdicts": table, "not_as_expected": whys}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for run in range(args.runs):
            for fault in args.faults:
                if fault == "slow rank":
                    report = diagnosed_ranks(folder / "ranks.json", args.seconds)
                else:
                    report = diagnosed(files_of(fault, folder), fault, run, args.seconds)
                name = report["verdict"]["name"]
                table[fault][name] = table[fault].get(name, 0) + 1
                if name != EXPECTED[fault]:
                    whys[fault].append(f"{name}: {report['verdict']['why']}")
                taken = report["conditions"]["seconds_taken"]
                sys.stderr.write(f"run {run + 1} {fault}: {name}, {taken} s\n")
                measure.write(result, args.output)
        grid = [] if args.no_grid else prediction_grid(folder, args.seconds)
        cold = [] if args.no_grid else storage_grid(folder, 2 * args.seconds)
    result |= {"grid": grid, "storage_grid": cold}
    for name, rows in (("prediction_error", grid), ("storage_prediction_error", cold)):
        longer = sorted(row["takes_longer_by"]["median"] for row in rows)
        if longer:
            result[name] = {"median": statistics.median(longer), "least": longer[0], "largest": longer[-1]}
    lines = ["| fault | expected | right | INCONCLUSIVE | wrong |", "|---|---|---|---|---|"]
    for fault, verdicts in table.items():
        right = verdicts.get(EXPECTED[fault], 0)
        undecided = 0 if EXPECTED[fault] == "INCONCLUSIVE" else verdicts.get("INCONCLUSIVE", 0)
        wrong = sum(verdicts.values()) - right - undecided
        lines.append(f"| {fault} | {EXPECTED[fault]} | {right} | {undecided} | {wrong} |")
    errors = {name: result.get(name) for name in ("prediction_error", "storage_prediction_error")}
    sys.stdout.write("\n".join([*lines, "", json.dumps(errors)]) + "\n")
    measure.write(result, args.output)


if __name__ == "__main__":
    measure.run(main)

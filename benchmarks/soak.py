"""Do memory and open files of a training stay flat? train.py for an hour on a small set, watched from outside.

    python -m benchmarks.soak --minutes 60 -o benchmarks/results/NAME.json

The set is made here. Its epochs are short, so that an hour holds as many epochs, validations, checkpoints and lines
of the log as days of training do. What the process holds is read from /proc every few seconds. The trend is the median
of the slopes between all pairs of readings (Theil-Sen) once the first part of the run is over, which fills caches and
pools.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.stats import theilslopes

from benchmarks import machine, measure

SETTLING = 0.15  # of the run, whose readings do not count
TRAINING = (
    *("-a", "resnet18", "-b", "16", "-j", "1", "--epochs", "1000000", "--lr", "0.01"),
    *("--model-ema", "--tensorboard", "-p", "1000"),
)
SIZES = ("--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32")


def main() -> None:
    """Run and write the result."""
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--minutes", type=measure.positive_number, default=60.0, help="length of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--every", type=measure.positive_number, default=10.0, help="seconds between readings (default: %(default)s)"
    )
    options = parser.parse_args()
    if 60 * options.minutes < 10 * options.every:
        msg = f"--every must be at most a tenth of the run, {6 * options.minutes:g} s, got {options.every:g}"
        raise ValueError(msg)
    gpu = machine.wants_gpu(options)
    result: dict[str, Any] = {"benchmark": "soak", "conditions": machine.conditions(options, gpu=gpu)}
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "data"), Path(folder, "run")
        make = [sys.executable, "-m", "dali_saliencymix", "sample-data", str(data), "--train", "100", "--val", "8"]
        subprocess.run(make, check=True)
        command = [sys.executable, "train.py", str(data), *TRAINING, *SIZES, "--output-dir", str(output)]
        command += ["--device", "cuda" if gpu else "cpu"]
        result["training"] = " ".join(["python", "train.py", "DATA", *command[3:]]).replace(str(output), "RUN")
        words = Path(folder, "words")
        with open(words, "wb") as stream:
            training = subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.DEVNULL, stderr=stream)
            try:
                readings = watch(training, words, 60 * options.minutes, options.every)
            finally:
                training.send_signal(signal.SIGTERM)
                result["exit_status"] = training.wait(120)
        result["last_words"] = last_line(words).replace(str(output), "RUN")
        result["epochs"] = len(epochs_of(output / "log.jsonl"))
        result["checkpoint_bytes"] = sum(file.stat().st_size for file in output.glob("*.pt"))
    result |= summary(readings)
    measure.write(result, options.output)
    shown = {key: value for key, value in result.items() if key not in {"readings", "conditions"}}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")


def watch(
    training: subprocess.Popen[bytes], words: Path, seconds: float, every: float
) -> list[tuple[float, float, int]]:
    """Return what the process holds from time to time: seconds since the start, resident MB, open files."""
    readings = []
    start = time.monotonic()
    for _ in measure.progress(range(max(int(seconds / every), 1)), unit="reading"):
        time.sleep(every)
        if training.poll() is not None:
            msg = f"the training ended by itself, with status {training.returncode}: {last_line(words)}"
            raise RuntimeError(msg)
        resident = machine.resident_mb(training.pid)
        files = len(os.listdir(f"/proc/{training.pid}/fd"))
        readings.append((time.monotonic() - start, resident, files))
    return readings


def last_line(words: Path) -> str:
    """Return the last line of a text file, or nothing."""
    lines = words.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""


def summary(readings: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Return trend and range of what was read after the settling."""
    settled = [reading for reading in readings if reading[0] > SETTLING * readings[-1][0]]
    hours = [seconds / 3600 for seconds, _, _ in settled]
    resident, files = [reading[1] for reading in settled], [reading[2] for reading in settled]
    trend = theilslopes(resident, hours)
    part = max(len(settled) // 10, 1)
    return {
        "readings_that_count": len(settled),
        "resident_mb": measure.figure(resident, 5),
        "resident_mb_first_tenth": statistics.median(resident[:part]),
        "resident_mb_last_tenth": statistics.median(resident[-part:]),
        "resident_mb_per_hour": {"median": trend[0], "low": trend[2], "high": trend[3], "confidence": 0.95},
        "open_files": {"first": files[0], "last": files[-1], "least": min(files), "most": max(files)},
        "readings": [(round(seconds), round(mb, 1), count) for seconds, mb, count in readings],
    }


def epochs_of(log: Path) -> list[dict[str, Any]]:
    """Return the epochs that a training has logged."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == "epoch"]


if __name__ == "__main__":
    measure.run(main)

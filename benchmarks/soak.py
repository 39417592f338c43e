"""Run train.py for an hour on a small data set, and check whether its memory and open files stay constant.

    python -m benchmarks.soak --minutes 60 -o benchmarks/results/NAME.json

The script makes the data set. Its epochs are short, so that an hour has as many epochs, validations, checkpoints and
log lines as days of training. Memory and open files of the process are read from /proc every few seconds. The trend is
the median of the slopes between all pairs of readings (Theil-Sen), without the first part of the run, which fills
caches and pools.
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

from benchmarks import machine, program
from dali_saliencymix.measure.figures import figure

SETTLING = 0.15  # share of the run at its start whose readings do not count
TRAINING = (
    *("-a", "resnet18", "-b", "16", "-j", "1", "--epochs", "1000000", "--lr", "0.01"),
    *("--model-ema", "--tensorboard", "-p", "1000"),
    *("--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32"),
)


def main() -> None:
    parser = program.parser(__doc__, "output", "device")
    length, every = (f"{what} (default: %(default)s)" for what in ("length of the run", "seconds between readings"))
    parser.add_argument("--minutes", type=program.positive_number, default=60.0, help=length)
    parser.add_argument("--every", type=program.positive_number, default=10.0, help=every)
    options = parser.parse_args()
    if 60 * options.minutes < 10 * options.every:
        msg = f"--every must be at most a tenth of the run, {6 * options.minutes:g} s, got {options.every:g}"
        raise ValueError(msg)
    result: dict[str, Any] = {"benchmark": "soak", "conditions": machine.conditions(options)}
    with tempfile.TemporaryDirectory() as folder:
        data, output, words = (Path(folder, name) for name in ("data", "run", "words"))
        program.python("-m", "dali_saliencymix", "sample-data", data, "--train", 100, "--val", 8, check=True)
        device = "cuda" if machine.wants_gpu(options) else "cpu"
        line = ["train.py", str(data), *TRAINING, "--output-dir", str(output), "--device", device]
        result["training"] = " ".join(["python", *line]).replace(str(data), "DATA").replace(str(output), "RUN")
        with open(words, "wb") as stream:
            command = [sys.executable, *line]
            training = subprocess.Popen(command, cwd=program.ROOT, stdout=subprocess.DEVNULL, stderr=stream)
            try:
                readings = watch(training, words, 60 * options.minutes, options.every)
            finally:
                training.send_signal(signal.SIGTERM)
                result["exit_status"] = training.wait(120)
        result["last_words"] = last_line(words).replace(str(output), "RUN")
        result["epochs"] = len(program.logged(output, "epoch"))
        result["checkpoint_bytes"] = sum(file.stat().st_size for file in output.glob("*.pt"))
    result |= summary(readings)
    program.write(result, options.output)
    shown = {key: value for key, value in result.items() if key not in {"readings", "conditions"}}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")


def watch(
    training: subprocess.Popen[bytes], words: Path, seconds: float, every: float
) -> list[tuple[float, float, int]]:
    """Return readings at regular intervals: seconds since the start, resident MB, open files."""
    readings = []
    start = time.monotonic()
    for _ in program.progress(range(max(int(seconds / every), 1)), unit="reading"):
        time.sleep(every)
        if training.poll() is not None:
            msg = f"train.py ended early, with status {training.returncode}: {last_line(words)}"
            raise RuntimeError(msg)
        files = len(os.listdir(f"/proc/{training.pid}/fd"))
        readings.append((time.monotonic() - start, machine.resident_mb(training.pid), files))
    return readings


def last_line(words: Path) -> str:
    """Return the last line of a text file, or an empty string."""
    return next(reversed(words.read_text(encoding="utf-8", errors="replace").splitlines()), "")


def summary(readings: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Return the trend and range of the readings that count."""
    settled = [reading for reading in readings if reading[0] > SETTLING * readings[-1][0]]
    seconds, resident, files = zip(*settled, strict=True)
    trend = theilslopes(resident, [passed / 3600 for passed in seconds])
    part = max(len(settled) // 10, 1)
    return {
        "readings_that_count": len(settled),
        "resident_mb": figure(resident, 5),
        "resident_mb_first_tenth": statistics.median(resident[:part]),
        "resident_mb_last_tenth": statistics.median(resident[-part:]),
        "resident_mb_per_hour": {"median": trend[0], "low": trend[2], "high": trend[3], "confidence": 0.95},
        "open_files": {"first": files[0], "last": files[-1], "least": min(files), "most": max(files)},
        "readings": [(round(seconds), round(mb, 1), count) for seconds, mb, count in readings],
    }


if __name__ == "__main__":
    program.run(main)

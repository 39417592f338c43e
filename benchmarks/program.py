"""Code that the scripts of this folder share: options, one-line errors, writing and printing of results."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dali_saliencymix import DETECTORS
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.figures import bounds, figures
from dali_saliencymix.measure.results import shortened, write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# ---- options ---------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        msg = f"must be a positive integer, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def at_least_two(text: str) -> int:
    if (number := positive(text)) < 2:
        msg = f"must be at least 2, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def positive_number(text: str) -> float:
    return _number_in(text, "above 0", lambda number: number > 0)


def share(text: str) -> float:
    return _number_in(text, "from 0 to 1", lambda number: 0 <= number <= 1)


def _number_in(text: str, rule: str, holds: Callable[[float], bool]) -> float:
    with contextlib.suppress(ValueError):
        if holds(number := float(text)):
            return number
    msg = f"must be a number {rule}, got {text!r}"
    raise argparse.ArgumentTypeError(msg)


def output_file(text: str) -> Path:
    """Parse the path of a file, and check before the run that it can be written."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        msg = f"must be a file that can be written, got {text!r}: {type(error).__name__}"
        raise argparse.ArgumentTypeError(msg) from error


_TIME = "time limit: after the first round that counts, start no round that would probably end later"
_LACKING = "measure only what the file of -o lacks, on the same device and with the same options, and add it"
_THREADS = "DALI threads, or worker processes of PyTorch (default: %(default)s, all cores)"
_OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "output": (("-o", "--output"), {"type": output_file, "metavar": "JSON", "help": "file, written after each round"}),
    "device": (
        ("--device",),
        {"choices": ["auto", "cpu", "gpu"], "default": "auto", "help": "default: auto, a GPU if there is one"},
    ),
    "rounds": (("--rounds",), {"type": positive, "default": 9, "help": "rounds that count (default: %(default)s)"}),
    "seconds": (("--seconds",), {"type": positive_number, "default": math.inf, "help": _TIME}),
    "go_on": (("--continue",), {"dest": "go_on", "action": "store_true", "help": _LACKING}),
    "data": (("data",), {"nargs": "?", "type": Path, "metavar": "DATA", "help": "folder of class folders"}),
    "batch_size": (("-b", "--batch-size"), {"type": positive, "help": "images in a batch"}),
    "workers": (("-j", "--workers"), {"type": positive, "default": cores(), "help": _THREADS}),
    "crop_size": (("--crop-size",), {"type": positive, "help": "height and width"}),
    "hw_decoder_load": (
        ("--hw-decoder-load",),
        {"type": share, "default": 0.65, "help": "share of images for the GPU's JPEG engine"},
    ),
    "detectors": (("--detectors",), {"nargs": "+", "choices": list(DETECTORS), "default": list(DETECTORS)}),
}
ROUNDS = ("output", "device", "rounds", "seconds", "go_on")  # options of scripts that measure variants in rounds


def parser(description: str, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the named common options; `defaults` replaces their defaults."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    for name in names:
        flags, options = _OPTIONS[name]
        action = made.add_argument(*flags, **options)
        if name in defaults:
            action.default = defaults[name]
            action.help = f"{action.help or ''} (default: {action.default})".strip()
    return made


# ---- running ---------------------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Run a script; an error becomes one line and exit status 1.

    Python's garbage collector runs between groups of variants only. It destroys unused DALI pipelines, which can
    deadlock in a thread in which DALI calls a Python operator: see `tests/conftest.py`.
    """
    gc.disable()
    try:
        main()
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {shortened(str(error)) or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root, and return the completed process with its output."""
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=ROOT, **{"capture_output": True, "text": True, "check": False, **options})


def logged(run: Path, event: str) -> list[dict[str, Any]]:
    """Return the lines of one event in the log of the training run in the folder `run`."""
    log = run / "log.jsonl"
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else [])
    return [line for line in lines if line["event"] == event]


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


progress = functools.partial(tqdm, disable=None)  # a progress bar, on a terminal only


def write(result: Mapping[str, Any], output: Path | None) -> None:
    """Write a result if a file is given."""
    if output is not None:
        write_json(output, result)


def show(result: Mapping[str, Any]) -> None:
    """Write the figures of a result to stdout; raise RuntimeError if there is none."""
    sys.stdout.write("\n".join([*lines_of(result), ""]))
    if not any(figures(result)):
        msg = "nothing could be measured"
        raise RuntimeError(msg)


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Return the figures of a result, one a line, and what was not measured."""
    lines = []
    for path, found in figures(result):
        low, high = bounds(found)
        share = f", {found['share_of_copy_rate']:.1%} of a copy" if "share_of_copy_rate" in found else ""
        text = f"{found['median']:g} ({low:g} to {high:g}), {found.get('rounds')} rounds{share}"
        lines.append(f"{' / '.join(path)}: {text}")
    return lines + [f"not measured: {name}: {why}" for name, why in result.get("not_measured", {}).items()]


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])

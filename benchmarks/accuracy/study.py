"""Manage the file of a study: append a line of JSON when a run ends, and find the runs that are missing."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import program
from dali_saliencymix._json import finite
from dali_saliencymix.measure.figures import differing

Pair = tuple[str, int]
_NAMES = {"arm", "seed", "settings", "device", "top1_last", "top1_best", "ece", "fgsm_top1", "seconds"}


@dataclass(frozen=True)
class Settings:
    """The settings of all runs of a study; two runs of one arm and seed differ in rounding and time only.

    Attributes
    ----------
    network, width
        See `benchmarks.accuracy.networks`; a ResNet-18 has no width.
    epochs, images, batch_size : int
        `images` is the number of training images.
    lr, weight_decay : float
        `lr` is the maximum learning rate, which is reached linearly after 20 % of the steps and falls linearly to 0.
    prob : float
        Probability that an image, or a batch, is mixed.
    augment : bool
        Whether images are cropped and flipped.
    precision : {"bf16", "fp32"}
        Precision of the forward and backward passes; weights are float32.
    evaluate_every : int
        Epochs between evaluations; the last epoch is always evaluated.
    max_steps : int or None
        Maximum number of steps in an epoch; None for all.
    test_images : int or None
        Number of test images, from the first one on; None for all.
    """

    network: str
    width: int | None
    epochs: int
    images: int
    batch_size: int
    lr: float
    weight_decay: float
    prob: float
    augment: bool
    precision: str
    evaluate_every: int
    max_steps: int | None = None
    test_images: int | None = None


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file; skip lines that are not JSON, which a killed process may leave behind."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line:
            continue
        try:
            run = json.loads(line)
        except ValueError:
            program.say(f"{path}: line {number} is incomplete and is skipped")
            continue
        if not isinstance(run, dict) or not run.keys() >= _NAMES:
            msg = f"{path}: line {number} is not a run"
            raise ValueError(msg)
        runs.append(run)
    return runs


class Study:
    """The runs in a file, which is created with the first run."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, asdict(settings)
        self.runs = read_runs(path) if path.exists() else []
        for run in self.runs:
            for name, (was, is_now) in differing(run["settings"], self._settings).items():
                msg = f"--output: the runs of {path} have {name} {was!r}, this call has {is_now!r}"
                raise ValueError(msg)

    def missing(self, arms: Sequence[str], seeds: int, part: tuple[int, int] = (1, 1)) -> list[Pair]:
        """Return the pairs of arm and seed without a run, seed by seed.

        If the study is interrupted, the numbers of runs of two arms differ by at most one. `part` is (i, n) for the
        i-th of n processes that share the work; each pair belongs to one process, so the arms are as even as the
        processes.
        """
        first, step = part
        pairs = [(arm, seed) for seed, arm in itertools.product(range(seeds), arms)]
        done = {(run["arm"], run["seed"]) for run in self.runs}
        return [pair for pair in pairs[first - 1 :: step] if pair not in done]

    def add(self, pair: Pair, found: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Append a run to the file in one write, and return it."""
        arm, seed = pair
        run = {"arm": arm, "seed": seed, "settings": self._settings, **found, **conditions}
        line = json.dumps(finite(run), allow_nan=False) + "\n"
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(line if whole else "\n" + line)  # one system call, since other processes append too
            stream.flush()
            os.fsync(stream.fileno())
        self.runs.append(run)
        return run

    def seconds_of_run(self, device: str) -> float:
        """Return the median time in seconds of the runs on a device, or 0 if there are none."""
        found = [run["seconds"] for run in self.runs if run["device"] == device]
        return statistics.median(found) if found else 0.0

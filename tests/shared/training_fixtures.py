"""Fixtures for tests of training: a small data set, and `train.py` run in this process or as a program.

A test module gets the fixtures with ``pytest_plugins = ["shared.training_fixtures"]``, and imports the rest by name.
That import happens before pytest can rewrite the assertions of this file, so rewriting is disabled: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from shared import tiny_model  # noqa: F401 (the network of `TINY`)
from shared.programs import run_program, torchrun  # noqa: F401 (tests import `torchrun` from here, too)

TRAIN_PER_CLASS, VAL_PER_CLASS, CLASS_COUNT = 6, 3, 8
TINY_FOR_CIFAR = (
    "--device",
    "cpu",
    "-a",
    "tiny_resnet",
    "--epochs",
    "2",
    "--lr",
    "0.01",
    "-b",
    "8",
    "-j",
    "1",
    "-p",
    "4",
)
TINY = (*TINY_FOR_CIFAR, "--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32")


@dataclass
class Ended:
    """The exit status and output of a run of `train.py`."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the line of an error; fail if there is not exactly one line, or a traceback."""
        errors = [line for line in self.err.splitlines() if "error:" in line]
        assert len(errors) == 1, self.err
        assert "Traceback" not in self.err
        return errors[0]


def read_log(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """The sample data set with seed 0, made by another process. Tests must not change it."""
    root = tmp_path_factory.mktemp("data") / "sample"
    counts = ("--train", str(TRAIN_PER_CLASS), "--val", str(VAL_PER_CLASS))
    run_program("-m", "dali_saliencymix", "sample-data", root, *counts)
    return root


@pytest.fixture(scope="session")
def full_run(data_folder, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The output folder and the result of an uninterrupted run of 2 epochs. Tests must not change it."""
    output_dir = tmp_path_factory.mktemp("full") / "made" / "by" / "the run"
    return output_dir, run_program("train.py", data_folder, *TINY, "--device", "auto", "--output-dir", output_dir)


@pytest.fixture
def own_data(data_folder, tmp_path) -> Path:
    """A copy of the data set that tests may change."""
    return shutil.copytree(data_folder, tmp_path / "own_data")


@pytest.fixture
def train_here(monkeypatch, capfd):
    """Return a function that runs `train.py` in this process, on one thread."""
    import train

    yield from script_here(train, monkeypatch, capfd)


def script_here(script: ModuleType, monkeypatch, capfd) -> Iterator[Callable[..., Ended]]:
    """Yield a function that runs a script in this process, on one thread like the program."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            status = script.main()
        except SystemExit as ended:
            status = ended.code
        return Ended(status, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)

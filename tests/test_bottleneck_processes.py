"""An error in one of several processes ends the measurement in all of them; with two real processes."""

from __future__ import annotations

import json

import pytest
from shared.training_fixtures import TINY, torchrun

pytest_plugins = ["shared.training_fixtures"]

WORKER = """
import os, sys
import torch
import train
from dali_saliencymix import __main__ as package
from dali_saliencymix.bottleneck import training
from dali_saliencymix.bottleneck.sources import loader_source

def at_call(number, error):
    calls = [0]
    def count():
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == number:
            raise error
    return count

class Loader:
    taken = staticmethod(at_call(60, OSError("the disk is gone")))
    def __iter__(self):
        for _ in range(20):
            self.taken()
            yield torch.zeros(4, 3, 32, 32)

class Step:
    taken = staticmethod(at_call(60, RuntimeError("no memory\\nis left")))
    def __init__(self, options, optimizer, processes, **of_model):
        pass
    def __call__(self, batch):
        self.taken()

if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    if case == "command":
        sys.exit(package.main(arguments))
    training.TrainingStep = Step
    training.training_source = lambda *_, **__: loader_source([torch.zeros(4, 3, 32, 32)] * 20)
    sys.argv = ["train.py", *arguments]
    sys.exit(train.main())
"""

STORAGE_WORKER = """
import json, os, sys
import numpy as np
from dali_saliencymix.bottleneck import storage
from dali_saliencymix.bottleneck.sources import loader_source
from dali_saliencymix.measure import page_cache
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.measure.windows import MeasurementError, Meter
from dali_saliencymix.training.distributed import start_processes, stop_processes

start_processes("cpu")
page_cache.why_not_dropped = page_cache.resident_share = lambda files: None  # whatever this file system does
opened = [0]

class Loader:
    def __iter__(self):
        opened[0] += 1
        if os.environ["RANK"] == "1" and opened[0] == 3:
            raise OSError("the disk is gone")
        yield from [np.zeros((4, 2))] * 20

try:
    storage.measure_storage(loader_source(Loader(), files=[__file__]), images=4, loader_ms=1.0, read_cut=None,
                            seconds=0.1, meter=Meter())
except MeasurementError as error:
    seen = gather([str(error), opened[0]])
if os.environ["RANK"] == "0":
    open(sys.argv[1], "w").write(json.dumps(seen))
stop_processes()
"""


def errors_in(text: str, prog: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{prog}: error:")]


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "failing_worker.py"
    path.write_text(WORKER)
    return path


def test_a_loader_that_fails_on_one_process_ends_the_others_in_their_step(worker):
    """The other process waits for gradients at that time, and has no error of its own to report."""
    prog = "python -m dali_saliencymix bottleneck"
    command = ("command", "bottleneck", "--loader", f"{worker.stem}:Loader", "-a", "tiny_resnet", "--device", "cpu")
    ended = torchrun(worker, *command, "--seconds", "1", "--rounds", "5", check=False)
    assert ended.returncode == 1
    said = "error: process 1: the loader failed: OSError: the disk is gone"
    assert errors_in(ended.stderr, prog) == [f"{prog}: {said}"], ended.stderr
    assert "gloo/transport" not in ended.stderr  # PyTorch's message about a closed connection


def test_a_step_that_fails_on_one_process_ends_profile_loader_everywhere(worker, data_folder, tmp_path):
    ended = torchrun(worker, "train.py", data_folder, *TINY, "--profile-loader", "--output-dir", tmp_path, check=False)
    assert ended.returncode == 1
    said = "train.py: error: process 1: the training step failed: RuntimeError: no memory is left"
    assert errors_in(ended.stderr, "train.py") == [said], ended.stderr
    assert "gloo/transport" not in ended.stderr


def test_storage_that_fails_on_one_process_is_not_measured_on_any(tmp_path):
    """They continue together with the next measurement, and their messages are not mixed up."""
    (tmp_path / "worker.py").write_text(STORAGE_WORKER)
    torchrun(tmp_path / "worker.py", tmp_path / "seen.json")
    seen = ["the loader failed: OSError: the disk is gone", 3]
    assert json.loads((tmp_path / "seen.json").read_text()) == [seen, seen]

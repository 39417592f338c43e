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

TOGETHER = """
import json, os, sys, time
import numpy as np
from dali_saliencymix.bottleneck import storage, tune
from dali_saliencymix.bottleneck.sources import Source, loader_source
from dali_saliencymix.measure import page_cache
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.measure.windows import MeasurementError, Meter
from dali_saliencymix.training.distributed import start_processes, stop_processes

start_processes("cpu")
rank = int(os.environ["RANK"])
now = [0.0]  # a clock that only sleeping moves, in each process its own
time.perf_counter = lambda: now[0]
time.sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)
page_cache.why_not_dropped = page_cache.resident_share = lambda files: None  # whatever this file system does
opened = [0]

class Failing:
    def __iter__(self):
        opened[0] += 1
        if rank == 1 and opened[0] == 3:
            raise OSError("the disk is gone")
        yield from [np.zeros((4, 2))] * 20

class Paced:
    def __init__(self, threads):
        # More than two threads help process 0 alone.
        self.seconds = 0.01 / (threads if rank == 0 else min(threads, 2))
    def __iter__(self):
        for _ in range(50):
            time.sleep(self.seconds)
            yield np.zeros((4, 2))

try:
    storage.measure_storage(loader_source(Failing(), files=[__file__]), images=4, loader_ms=1.0, read_cut=None,
                            seconds=0.1, meter=Meter())
except MeasurementError as error:
    seen = [str(error), opened[0]]
tune.cores = lambda: 16
source = Source("loader", {"num_threads": 1}, lambda changed: Paced(changed.get("num_threads", 1)))
found = tune.tune(source, step=None, loader=(1.0,) * 5, seconds=100.0, meter=Meter())
tuned = [found["best"], [(row["now"], row["then"]) for row in found["trials"]]]
results = gather({"storage": seen, "tune": tuned})
if rank == 0:
    open(sys.argv[1], "w").write(json.dumps(results))
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


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes measured: storage, which fails on one of them, and then other settings."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "worker.py").write_text(TOGETHER)
    torchrun(folder / "worker.py", folder / "results.json")
    return json.loads((folder / "results.json").read_text())


def test_storage_that_fails_on_one_process_is_not_measured_on_any(results):
    """They continue together with the next measurement, and their messages are not mixed up."""
    assert [each["storage"] for each in results] == [["the loader failed: OSError: the disk is gone", 3]] * 2


def test_processes_try_the_same_settings_and_the_slowest_counts(results):
    first, second = (each["tune"] for each in results)
    assert first == second
    assert first[0] == {"num_threads": 2}

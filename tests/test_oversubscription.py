"""The bottleneck tool, and train.py at its start, report more threads than cores."""

from __future__ import annotations

import json
import os

import pytest
from shared.programs import run_program
from shared.training_fixtures import TINY, torchrun

from dali_saliencymix.measure import environment

pytest_plugins = ["shared.training_fixtures"]

TAKE = "more than one per core does not help and slows the steps down"
OMP = "; OMP_NUM_THREADS sets those of PyTorch"
# (processes, threads of each loader, what they are, PyTorch's threads; None: the step runs on a GPU), on one core.
ON_ONE_CORE = {
    (1, 1, "DALI threads", 1): None,
    (1, None, "DALI threads", 1): None,
    (1, 1, "DALI threads", None): None,
    (1, 0, "worker processes", 1): None,
    (1, 2, "DALI threads", None): f"2 DALI threads share 1 core: {TAKE}",
    (1, 1, "DALI threads", 3): f"1 DALI thread and 3 PyTorch threads share 1 core: {TAKE}{OMP}",
    (1, None, "DALI threads", 2): f"2 PyTorch threads share 1 core: {TAKE}{OMP}",
    (1, 1, "worker processes", 2): f"1 worker process and 2 PyTorch threads share 1 core: {TAKE}{OMP}",
    (2, 8, "DALI threads", 1): f"2 processes with 8 DALI threads and 1 PyTorch thread each share 1 core: {TAKE}",
    (2, 1, "worker processes", None): f"2 processes with 1 worker process each share 1 core: {TAKE}",
}


def test_threads_of_all_local_processes_are_compared_with_the_cores_that_may_be_used():
    script = f"""
import json, os, torch
from dali_saliencymix.measure.environment import oversubscription
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
for processes, loader, called, of_step in {list(ON_ONE_CORE)}:
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    torch.set_num_threads(of_step or 4)
    print(json.dumps(oversubscription(loader, called, computes=of_step is not None)))
"""
    said = [json.loads(line) for line in run_program("-c", script).stdout.splitlines()]
    assert dict(zip(ON_ONE_CORE, said, strict=True)) == ON_ONE_CORE


def test_the_training_script_says_it_once(data_folder, tmp_path):
    if len(os.sched_getaffinity(0)) not in range(2, 64):
        pytest.skip("needs 2 to 63 cores")
    options = ("--epochs", "1", "--max-steps", "1", "--training-only", "-j", "64")
    ended = torchrun("train.py", data_folder, *TINY, *options, "--output-dir", tmp_path / "run")
    (said,) = (line for line in ended.stderr.splitlines() if "share" in line)
    assert said.startswith("warning: 2 processes with 64 DALI threads and 1 PyTorch thread each share ")


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "800000 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_container_may_use_as_many_cores_as_its_quota_has_time_for(files, count, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert environment.cores() == count
    said = environment.oversubscription(4, computes=False)
    assert said == (None if count == 4 else f"4 DALI threads share {count} core{'s' * (count > 1)}: {TAKE}")

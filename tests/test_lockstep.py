"""Processes learn of an error in the loader of another process before their next step; with two real processes."""

from __future__ import annotations

import json

import pytest
from shared.programs import torchrun

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training.lockstep import Lockstep, Preempted
from dali_saliencymix.training.options import RunOptions

pytest_plugins = ["shared.training_fixtures"]

WORKER = """
import json, os, sys
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.training.distributed import fail, start_processes, stop_processes
from dali_saliencymix.training.lockstep import Lockstep
from dali_saliencymix.training.options import RunOptions

def batches(count, error=None):
    yield from range(count)
    if error:
        raise error

processes = start_processes("cpu")
main, seen = processes.is_main, {}
for case, loader in {
    "equal": batches(3), "main ends first": batches(2 if main else 3), "main ends last": batches(3 if main else 2),
    "one fails": batches(2, None if main else ValueError("no bread")),
}.items():
    got = []
    try:
        for batch in Lockstep(processes, RunOptions()).batches(loader):
            got.append(batch)
    except Exception as error:
        got.append(f"{type(error).__name__}: {error}")
    seen[case] = gather(got)
if main:
    open(sys.argv[1], "w").write(json.dumps(seen))
stop_processes()
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lockstep")
    (folder / "worker.py").write_text(WORKER)
    torchrun(folder / "worker.py", folder / "seen.json")
    return json.loads((folder / "seen.json").read_text())


def test_equal_loaders_give_all_of_their_batches(seen):
    assert seen["equal"] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("case", ["main ends first", "main ends last"])
def test_a_loader_that_ends_early_on_one_process_is_an_error_in_both(seen, case):
    said = "OtherProcessError: 1 of 2 processes have no batches left, but the others do"
    assert seen[case] == [[0, 1, said], [0, 1, said]]


def test_a_loader_that_fails_on_one_process_stops_the_other_before_its_step(seen):
    assert seen["one fails"] == [[0, 1, "OtherProcessError: "], [0, 1, "ValueError: no bread"]]


def test_a_checkpoint_is_due_by_steps_and_by_the_clock(monkeypatch):
    import time

    import torch

    one = Processes(0, 0, 1, torch.device("cpu"))
    lockstep = Lockstep(one, RunOptions(checkpoint_every=3))
    due = []
    for step in range(2, 13, 2):  # an update after every other step
        if lockstep.checkpoint_is_due(step):
            due.append(step)
            lockstep.writing(step)
    assert due == [4, 6, 10, 12]
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    by_clock = Lockstep(one, RunOptions(checkpoint_interval=2))  # minutes
    batches = by_clock.batches([1, 2, 3])
    for now[0], is_due in ((219.0, False), (220.0, True)):
        next(batches)
        assert by_clock.checkpoint_is_due(1) is is_due
    by_clock.writing(1)
    assert not by_clock.checkpoint_is_due(2)


def test_a_signal_counts_from_the_next_batch_on_and_handlers_are_put_back():
    import os
    import signal

    import torch

    before = signal.getsignal(signal.SIGUSR1)
    with Lockstep(Processes(0, 0, 1, torch.device("cpu")), RunOptions(stall_timeout=0.0)) as lockstep:
        batches = lockstep.batches(range(5))
        next(batches)
        os.kill(os.getpid(), signal.SIGUSR1)
        lockstep.stop_if_asked()
        next(batches)
        assert lockstep.checkpoint_is_due(2)
        with pytest.raises(Preempted, match="SIGUSR1"):
            lockstep.stop_if_asked()
    assert signal.getsignal(signal.SIGUSR1) == before

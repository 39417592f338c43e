"""The monitor in the trainers of PyTorch Lightning and transformers: real training with a simulated clock."""

from __future__ import annotations

import json

import pytest
from shared.callback_worker import ACCUMULATED, EPOCHS, STEPS
from shared.programs import REPOSITORY, run_program, torchrun

from dali_saliencymix.callbacks import lightning_callback, transformers_callback

SLOW_LOADER, SLOW_STEP = {"loader": 3, "step": 1, "batch_size": 8}, {"loader": 1, "step": 19}


def trained(package: str, *scenarios: dict) -> list[dict]:
    """Return the results of training runs with these seconds per loader batch and per step."""
    pytest.importorskip("transformers" if package == "transformers" else "lightning")
    worker = REPOSITORY / "tests" / "shared" / "callback_worker.py"
    return json.loads(run_program(worker, package, json.dumps(scenarios)).stdout.splitlines()[-1])


def check_what_is_said(starved: dict, fed: dict) -> None:
    warning, summary = starved["said"]
    assert warning.startswith("warning: the training waits for its data: ")
    assert "the loader is too slow" in summary
    assert "python -m dali_saliencymix bottleneck" in summary
    (summary,) = fed["said"]
    assert summary.startswith("data wait 5% of the time (")
    assert summary.endswith("the loader keeps up")


@pytest.mark.slow
def test_in_lightning_a_step_is_a_batch_and_what_is_between_steps_does_not_count():
    starved, fed = trained("lightning", SLOW_LOADER, SLOW_STEP)
    check_what_is_said(starved, fed)
    assert (starved["share"], starved["step_ms"]) == (pytest.approx(0.75), pytest.approx(4000))
    assert (fed["share"], fed["step_ms"]) == (pytest.approx(0.05), pytest.approx(20_000))
    assert starved["steps"] == fed["steps"] == STEPS * EPOCHS
    assert starved["logged"][0]["data/wait_share"] == pytest.approx(0.75)
    assert starved["logged"][0]["data/images_per_second"] == pytest.approx(8 / 4)
    assert "data/images_per_second" not in fed["logged"][0]  # without a batch size
    assert starved["left"] == []  # no hook of the profiler is left


@pytest.mark.slow
def test_in_transformers_a_step_is_an_update_and_what_is_between_steps_does_not_count():
    starved, fed = trained("transformers", SLOW_LOADER, {"loader": 1, "step": 17.4})
    check_what_is_said(starved, fed)
    # Its loader prefetches one batch: after the first group of an epoch, groups wait for 3, 3, 3 and 2 batches.
    waited, used = (3 * ACCUMULATED + 2) / 4, ACCUMULATED
    assert starved["share"] == pytest.approx(3 * waited / (3 * waited + used))
    assert starved["step_ms"] == pytest.approx(1000 * (3 * waited + used))
    assert fed["share"] == pytest.approx(waited / (waited + 17.4 * used))
    assert starved["steps"] == STEPS * EPOCHS / ACCUMULATED
    for each in (starved, fed):
        assert each["logged"][0]["data/wait_share"] == pytest.approx(each["share"])
    assert starved["logged"][0]["data/images_per_second"] == pytest.approx(8000 / starved["step_ms"])
    images = 4 * ACCUMULATED  # from the arguments, if no batch size is given
    assert fed["logged"][0]["data/images_per_second"] == pytest.approx(1000 * images / fed["step_ms"])


@pytest.mark.parametrize("make", [lightning_callback, transformers_callback])
def test_options_are_checked_when_a_callback_is_made(make):
    with pytest.raises(ValueError, match="window must be an integer of at least 2, got 1"):
        make(window=1)


@pytest.mark.slow
def test_of_several_processes_the_main_one_names_the_one_that_waited_longest():
    script = """
import os, torch.distributed as dist
from dali_saliencymix.callbacks import _Hooks
dist.init_process_group("gloo")
rank = dist.get_rank()
hooks = _Hooks({"patience": 0.5, "say": print})
hooks._begin(is_main=rank == 0)
for _ in range(9):
    hooks.monitor.record(waited=0.8 * rank, total=1.0)
hooks._end(rank, together=True)
dist.destroy_process_group()
"""
    (line,) = (line for line in torchrun("-c", script).stdout.splitlines() if "data wait" in line)
    assert line.startswith("process 1 of 2: data wait 80% of the time (800.0 of 1000.0 ms per step")

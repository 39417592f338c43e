"""Two processes on this machine, started by ``torchrun``: shards, gradients, whole runs of train.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from shared.distributed_worker import EPOCHS, TRAINING, VALIDATION
from shared.programs import real_torchrun, torchrun
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

from dali_saliencymix.training.checkpoints import BEST, LAST, load_checkpoint
from dali_saliencymix.training.distributed import start_processes

pytest_plugins = ["shared.training_fixtures"]

BATCH = 5  # divides none of the image counts
TWO = (*TINY, "-b", str(BATCH), "-p", "2")
STEPS = TRAIN_PER_CLASS * CLASS_COUNT // 2 // BATCH
VAL_IMAGES = VAL_PER_CLASS * CLASS_COUNT - 1

# Runs train.py, and keeps the files that a run killed in the second epoch would leave behind.
COPIED = """
import shutil, sys
import train
from shared import tiny_model
from dali_saliencymix.training import checkpoints
save = checkpoints.save_progress
def save_and_copy(checkpoint, output_dir, **options):
    save(checkpoint, output_dir, **options)
    if (checkpoint["epoch"], checkpoint["step"]) == (1, 0):
        shutil.copytree(output_dir, output_dir.with_name("killed"))
checkpoints.save_progress = save_and_copy
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def odd_data(data_folder, tmp_path_factory) -> Path:
    """The data set with an odd number of validation images."""
    root = shutil.copytree(data_folder, tmp_path_factory.mktemp("odd") / "data")
    next((root / "val" / "red_square").iterdir()).unlink()
    return root


@pytest.fixture(scope="module")
def report(odd_data, tmp_path_factory) -> dict:
    """The record of `distributed_worker.py`."""
    output = tmp_path_factory.mktemp("worker") / "report.json"
    torchrun(Path(__file__).parent.joinpath("shared", "distributed_worker.py"), odd_data, output, *TWO)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def full_run(odd_data, tmp_path_factory):
    """The output folder and the completed process of two epochs in two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "copied.py").write_text(COPIED)
    return folder / "run", torchrun(folder / "copied.py", odd_data, *TWO, "--output-dir", folder / "run")


def flat(batches: list[list[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


@pytest.mark.parametrize(("count", "batch_size"), TRAINING)
def test_no_image_is_trained_on_twice_in_an_epoch_and_all_processes_take_as_many_steps(report, count, batch_size):
    first, second = report["training"][f"{count} {batch_size}"]
    seen = []
    for epoch in range(EPOCHS):
        steps = count // 2 // batch_size
        assert [len(batch) for batch in first[epoch]] == [batch_size] * steps
        assert [len(batch) for batch in second[epoch]] == [batch_size] * steps
        images = flat(first[epoch]) + flat(second[epoch])
        assert len(set(images)) == len(images)
        assert set(images) <= set(range(count))
        seen.append(images)
    assert len({tuple(images) for images in seen}) == EPOCHS  # another order in each epoch
    assert all(images != sorted(images) for images in seen)


def test_where_the_batches_come_out_even_every_image_is_seen_once_in_each_epoch(report):
    (count, batch_size), *_ = TRAINING
    first, second = report["training"][f"{count} {batch_size}"]
    for epoch in range(EPOCHS):
        assert sorted(flat(first[epoch]) + flat(second[epoch])) == list(range(count))


def test_images_change_between_the_processes_from_epoch_to_epoch(report):
    first, _ = report["training"]["47 5"]
    assert len({frozenset(flat(batches)) for batches in first}) == EPOCHS


@pytest.mark.parametrize(("count", "batch_size"), VALIDATION)
def test_every_image_is_validated_once_in_each_epoch(report, count, batch_size):
    first, second = report["validation"][f"{count} {batch_size}"]
    for epoch in range(EPOCHS):
        assert Counter(flat(first[epoch]) + flat(second[epoch])) == Counter(range(count))
        assert abs(len(flat(first[epoch])) - len(flat(second[epoch]))) <= 1


def test_the_gradients_of_a_mixed_step_are_the_mean_over_the_processes(report):
    step = report["step"]
    assert step["same"]
    assert step["off_the_mean"] < 1e-5
    assert step["between_processes"] > 0.1  # the gradients of the two processes differ


def test_each_process_draws_its_own_mix(report):
    first, second = report["step"]["lam"]
    assert first != second
    assert min(first + second) < 1


def test_each_process_has_a_dropout_of_its_own(report):
    first, second = report["epoch"]["dropped"]
    assert first != second
    assert min(len(first), len(second)) > 10


def test_all_processes_begin_with_the_same_weights_and_end_with_the_same_model_and_figures(report):
    first, second = report["epoch"]["begin"]
    assert first == second
    (first, second) = report["epoch"]["both"]
    assert first == second
    assert first[2]["images"] == VAL_IMAGES


def test_a_run_counts_all_images_once_and_only_the_main_process_writes(full_run):
    output_dir, ended = full_run
    written = {"args.yaml", BEST, LAST, "log.jsonl", "report.json", "summary.csv"}
    assert {path.name for path in output_dir.iterdir() if not path.name.startswith("checkpoint_e")} == written
    start, *epochs = read_log(output_dir)
    assert start["config"]["world_size"] == 2
    assert [line["epoch"] for line in epochs] == [1, 2]
    for line in epochs:
        assert line["val"]["images"] == VAL_IMAGES
        assert line["train"]["images"] == 2 * STEPS * BATCH
    shown = ended.stdout.splitlines()
    assert sum(line.startswith("epoch 1/2") for line in shown) == 1
    told = f"global batch {2 * BATCH} ({BATCH} per process, 2 processes), {STEPS} steps per epoch"
    assert any(told in line for line in shown)
    assert ended.stderr.count("epoch 1/2") == STEPS // 2


def test_one_process_finds_the_figures_of_two(full_run, odd_data, tmp_path, train_here):
    output_dir, _ = full_run
    ended = train_here(odd_data, *TINY, "--evaluate", "--resume", output_dir / LAST, "--output-dir", tmp_path)
    val = read_log(output_dir)[-1]["val"]
    assert ended.status == 0
    figures = f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} %, loss {val['loss']:.3f} on {VAL_IMAGES} "
    assert figures in ended.out


def test_a_killed_run_goes_on_in_two_processes_and_in_no_other_number(full_run, odd_data, train_here):
    killed = full_run[0].with_name("killed")
    options = (odd_data, *TWO, "--output-dir", killed, "--resume", "auto")
    refused = train_here(*options)
    assert refused.status == 1
    assert "world_size was 2, is now 1" in refused.error

    assert load_checkpoint(killed / LAST)["epoch"] == 1
    torchrun("train.py", *options)
    whole, resumed = (load_checkpoint(output_dir / LAST) for output_dir in (full_run[0], killed))
    assert whole["epoch"] == resumed["epoch"] == 2
    for name, weights in whole["model"].items():
        assert torch.equal(weights, resumed["model"][name]), name
    assert read_log(killed)[-1]["val"] == read_log(full_run[0])[-1]["val"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_process_without_a_gpu_beside_one_with_a_gpu_is_refused(monkeypatch, device):
    """They would deadlock, one with NCCL and the other with Gloo."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with pytest.raises(ValueError, match="process 1"):
        start_processes(device)


# Trains; the second process is killed in its third step, unless torchrun has restarted it.
KILLED_ONCE = """
import os, signal, sys
import train
print("restarts at most:", os.environ["TORCHELASTIC_MAX_RESTARTS"], flush=True)
from shared import tiny_model
real, steps = train.train_on, []
def killed_once(*args, **options):
    steps.append(1)
    if len(steps) == 3 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
train.train_on = killed_once
sys.exit(train.main())
"""


def test_torchrun_starts_a_run_again_or_is_told_what_it_needs_for_that(odd_data, tmp_path, monkeypatch):
    options = ("--epochs", "1", "--training-only", "--checkpoint-every", "2", "--resume", "auto")
    options = (odd_data, *TWO, *options, "--output-dir", tmp_path / "run")
    with monkeypatch.context() as environment:
        environment.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
        environment.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
        ended = torchrun("train.py", *options, check=False)
    needed = "torchrun --max-restarts 1 needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert ended.returncode == 1
    assert ended.stderr.count(f"train.py: error: {needed}") == 1
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    ended = real_torchrun("--max-restarts=1", tmp_path / "killed.py", *options)
    assert ended.stdout.count("restarts at most: 1\n") == 4  # two processes, twice
    killed = "train.py: error: another process of the run exited without an error message (killed?)"
    assert [line for line in ended.stderr.splitlines() if line.startswith("train.py: ")] == [killed]
    *begun, epoch = read_log(tmp_path / "run")
    assert [(entry["event"], entry["total_steps"]) for entry in begun] == [("start", 0), ("resume", 2)]
    assert epoch["train"]["images"] == 2 * STEPS * BATCH


def test_a_broken_file_in_one_shard_ends_the_whole_run_and_is_named(odd_data, tmp_path):
    own = shutil.copytree(odd_data, tmp_path / "data")
    broken = own / "train" / "blue_star" / "00000.jpg"
    broken.write_bytes(b"")
    options = ("--epochs", "1", "--max-bad-batches", "0", "--output-dir", tmp_path / "run")
    ended = torchrun("train.py", own, *TWO, *options, check=False)
    assert ended.returncode != 0
    assert ended.stderr.count(f"train.py: error: {broken}: empty: zero bytes") == 1
    assert not list(tmp_path.rglob("*.pt"))

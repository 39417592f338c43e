"""Stopping and resuming train.py: bit-identically, only with the same data, and without overwriting another run."""

from __future__ import annotations

import shutil

import pytest
import torch
import torchvision
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

import train
from dali_saliencymix.loaders import folder
from dali_saliencymix.training import metrics
from dali_saliencymix.training.checkpoints import BEST, LAST, load_checkpoint, save_checkpoint

pytest_plugins = ["shared.training_fixtures"]

STEPS = TRAIN_PER_CLASS * CLASS_COUNT // 8


@pytest.fixture
def half_run(full_run, data_folder, tmp_path, train_here, monkeypatch):
    """The output folder of the same run, interrupted with Ctrl-C in the second epoch."""
    real, calls = metrics.mixed_cross_entropy, []

    def interrupted(*batch):
        calls.append(batch)
        if len(calls) == STEPS + 2:
            raise KeyboardInterrupt
        return real(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "mixed_cross_entropy", interrupted)
        ended = train_here(data_folder, *TINY, "--output-dir", tmp_path / "half")
    assert ended.status == 130
    assert "interrupted; --resume auto resumes from" in ended.err
    assert "Traceback" not in ended.err
    return tmp_path / "half"


def test_a_run_that_was_interrupted_ends_with_the_same_bits(full_run, half_run, data_folder, train_here):
    assert [line["event"] for line in read_log(half_run)] == ["start", "epoch"]
    assert load_checkpoint(half_run / LAST)["epoch"] == 1
    ended = train_here(data_folder, *TINY, "--output-dir", half_run, "--resume", "auto")
    assert ended.status == 0
    assert ended.out.splitlines()[0] == f"resumed from {half_run / LAST} at epoch 2, step 0"
    whole, resumed = (load_checkpoint(output_dir / LAST) for output_dir in (full_run[0], half_run))
    assert whole["epoch"] == resumed["epoch"] == 2
    assert whole["model"].keys() == resumed["model"].keys()
    for name, weights in whole["model"].items():
        assert torch.equal(weights, resumed["model"][name]), name
    for one, other in zip(*(part["optimizer"]["state"].values() for part in (whole, resumed)), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    _, *expected = read_log(full_run[0])
    log = read_log(half_run)
    assert [line["event"] for line in log] == ["start", "epoch", "resume", "epoch"]
    for line, other in zip(expected, (log[1], log[3]), strict=True):
        assert line["val"] == other["val"]
        for name in ("loss", "mixed_top1", "images", "lr"):
            assert line["train"][name] == other["train"][name]
        assert line["best_top1"] == other["best_top1"]


@pytest.mark.slow
def test_another_network_and_optimiser_end_with_the_same_bits_and_resume_with_no_other_optimiser(
    data_folder, tmp_path, train_here
):
    """MNASNet has dropout, and does not load weights without the version that PyTorch stores with them."""
    options = (data_folder, *TINY, "-a", "mnasnet0_5", "--epochs", "1", "--training-only", "-b", "12")
    adamw = ("--opt", "adamw", "--lr", "0.001", "--model-ema", "--model-ema-decay", "0.5")
    assert train_here(*options, *adamw, "--output-dir", tmp_path / "whole").status == 0
    resumed = ("--output-dir", tmp_path / "parts", "--resume", "auto")
    assert train_here(*options, *adamw, *resumed, "--max-steps", "2").status == 0
    ended = train_here(*options, "--lr", "0.001", *resumed)
    assert ended.status == 1
    assert f"{tmp_path / 'parts' / LAST}: holds the state of adamw; give --opt adamw" in ended.error
    assert train_here(*options, *adamw, *resumed).status == 0
    whole, parts = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "parts"))
    for part in ("model", "model_ema"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    for one, other in zip(*(each["optimizer"]["state"].values() for each in (whole, parts)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    evaluated = (*options, *resumed, "--evaluate")
    assert train_here(*evaluated).status == 0  # with any optimiser
    picture = next((data_folder / "val").rglob("*.jpg"))
    ended = train_here(*evaluated, "--cam", picture)
    assert "class activation maps need a network that ends in a global average pooling" in ended.error
    assert "top-1" not in ended.out  # no validation ran


@pytest.mark.slow
def test_resuming_takes_more_threads_but_no_other_batches(full_run, half_run, data_folder, own_data, train_here):
    more = own_data / "train" / "red_square" / "more.jpg"
    shutil.copy(own_data / "train" / "red_square" / "00000.jpg", more)
    before = (half_run / LAST).read_bytes()
    for options, told in (
        (("-b", "6"), "batch_size was 8, is now 6"),
        (("--seed", "1"), "seed was 0, is now 1"),
        (("--std", "1", "1", "1"), "std was [0.229, 0.224, 0.225], is now [1.0, 1.0, 1.0]"),
        (("--mix", "none"), "mix was saliencymix, is now none"),
        (("--mix-prob", "0.5"), "mix_prob was 1.0, is now 0.5"),
        (("--train-crop-size", "40"), "train_crop_size was 32, is now 40"),
        (("--mix", "none", "-b", "6"), "batch_size was 8, is now 6; mix was saliencymix, is now none; --restart-epoch"),
        (("-a", "resnet34"), "holds a tiny_resnet: --arch must be tiny_resnet, got 'resnet34'"),
        (("--train-dir", own_data / "train"), "train_images was 48, is now 49"),
    ):
        ended = train_here(data_folder, *TINY, "--output-dir", half_run, "--resume", "auto", *options)
        assert ended.status == 1
        assert told in ended.error
    assert (half_run / LAST).read_bytes() == before
    assert len(read_log(half_run)) == 2
    best = (half_run / BEST).read_bytes()
    saved = load_checkpoint(half_run / LAST)
    # A checkpoint that is older than these options:
    for name in ("auto_augment", "ra_magnitude", "random_erase", "mean", "std"):
        del saved["config"][name]
    save_checkpoint({**saved, "best_top1": 99.0}, half_run / LAST)
    ended = train_here(data_folder, *TINY, "--output-dir", half_run, "--resume", "auto", "-j", "2")
    assert ended.status == 0
    assert read_log(half_run)[-1]["val"] == read_log(full_run[0])[-1]["val"]
    assert read_log(half_run)[-1]["best_top1"] == 99  # the best of all epochs, not of those after resuming
    assert (half_run / BEST).read_bytes() == best


def test_other_options_of_the_training_count_and_are_named(half_run, data_folder, train_here):
    options = (data_folder, *TINY, "--output-dir", half_run, "--resume", "auto", "--max-steps", "1", "-p", "1")
    ended = train_here(*options, "--lr", "0.02", "--accumulation-steps", "2", "--data-backend", "dali-cpu")
    assert ended.status == 0
    (line,) = (line for line in ended.err.splitlines() if "warning" in line)
    changed = "accumulation_steps was 1, is now 2; lr was 0.01, is now 0.02"
    assert line.startswith(f"warning: {half_run / LAST}: options differ from the checkpoint, and the new values ")
    assert line.endswith(f" apply: {changed}")
    assert load_checkpoint(half_run / LAST)["config"]["lr"] == 0.02
    assert read_log(half_run)[-1]["train"]["lr"] == pytest.approx(0.02 / 2)  # half-way through the cosine
    assert "warning" not in train_here(*options, "--lr", "0.02", "--accumulation-steps", "2").err


def test_an_update_is_the_mean_over_its_batches_where_other_groups_are_resumed(
    data_folder, tmp_path, train_here, monkeypatch
):
    options = (data_folder, *TINY, "--epochs", "1", "--training-only", "--output-dir", tmp_path, "--resume", "auto")
    assert train_here(*options, "--max-steps", "1").status == 0
    batches = []
    real = train.train_on
    monkeypatch.setattr(train, "train_on", lambda *of, **how: (batches.append(how["batches"]), real(*of, **how))[1])
    assert train_here(*options, "--accumulation-steps", "2").status == 0
    assert batches == [1, 2, 2, 2, 2]


def test_an_epoch_can_begin_anew_with_other_data(half_run, data_folder, train_here, monkeypatch):
    make, seeds = folder.training_loader, []
    monkeypatch.setattr(
        folder, "training_loader", lambda *args, **options: (seeds.append(options["seed"]), make(*args, **options))[1]
    )
    options = (data_folder, *TINY, "--output-dir", half_run, "-b", "6", "--mix", "none", "--resume", "auto")
    ended = train_here(*options, "--restart-epoch", "--max-steps", "3")
    assert ended.status == 0
    assert (
        "epoch 2 starts again with other data: batch_size was 8, is now 6; mix was saliencymix, is now none"
        in ended.err
    )
    saved = load_checkpoint(half_run / LAST)
    assert (saved["epoch"], saved["step"], saved["restarts"]) == (1, 3, 1)
    assert train_here(*options).status == 0  # from then on it resumes like any other run
    (*_, line) = (line for line in read_log(half_run) if line["event"] == "epoch")
    assert (line["epoch"], line["train"]["images"]) == (2, 48)
    assert seeds == [1_000_003] * 2  # not 0, whose order the interrupted epoch had


def test_a_part_of_an_epoch_is_validated_and_never_the_best(data_folder, tmp_path, train_here):
    options = (data_folder, *TINY, "--epochs", "1", "--output-dir", tmp_path / "run")
    ended = train_here(*options, "--max-steps", "3")
    assert ended.status == 0
    assert "--max-steps 3: stopped after step 3 of epoch 1, validating" in ended.err.splitlines()
    line = read_log(tmp_path / "run")[-1]
    assert (line["step"], line["val"]["images"], line["best_top1"]) == (3, VAL_PER_CLASS * CLASS_COUNT, None)
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 3
    assert not (tmp_path / "run" / BEST).exists()
    assert train_here(*options, "--resume", "auto").status == 0
    assert load_checkpoint(tmp_path / "run" / BEST)["epoch"] == 1


def test_a_finished_run_goes_on_to_more_epochs(data_folder, tmp_path, train_here):
    options = (data_folder, *TINY, "--mix", "cutmix", "--output-dir", tmp_path / "run", "--resume", "auto")
    assert train_here(*options, "--epochs", "1").status == 0
    ended = train_here(*options, "--epochs", "2", "--model-ema", "--norm-weight-decay", "0")
    assert ended.status == 0
    assert f"{tmp_path / 'run' / LAST}: has no EMA of the weights; the EMA starts from its weights" in ended.err
    lines = [line for line in read_log(tmp_path / "run") if line["event"] == "epoch"]
    assert [(line["epoch"], line["train"]["images"]) for line in lines] == [(1, 48), (2, 48)]


def test_a_run_is_not_overwritten_and_a_finished_one_stays_as_it_is(full_run, data_folder, tmp_path, train_here):
    output_dir = shutil.copytree(full_run[0], tmp_path / "run")
    before = (output_dir / LAST).read_bytes()
    ended = train_here(data_folder, *TINY, "--output-dir", output_dir)
    assert ended.status == 1
    assert "--resume auto or another --output-dir" in ended.error
    assert str(output_dir / LAST) in ended.error
    ended = train_here(data_folder, *TINY, "--output-dir", output_dir, "--resume", "auto")
    assert ended.status == 0
    assert " % of 2 epochs, in" in ended.out
    assert (output_dir / LAST).read_bytes() == before


def test_going_on_from_another_runs_checkpoint_does_not_overwrite_a_run(full_run, half_run, data_folder, train_here):
    before = (half_run / LAST).read_bytes()
    resume = ("--resume", full_run[0] / LAST, "--output-dir", half_run, "--epochs", "3")
    ended = train_here(data_folder, *TINY, *resume)
    assert ended.status == 1
    assert str(half_run / LAST) in ended.error
    assert (half_run / LAST).read_bytes() == before


def test_resume_auto_starts_from_scratch_without_a_checkpoint(data_folder, tmp_path, train_here):
    ended = train_here(data_folder, *TINY, "--epochs", "1", "--resume", "auto", "--output-dir", tmp_path / "new")
    assert ended.status == 0
    assert "starting from scratch" in ended.out
    assert read_log(tmp_path / "new")[0]["event"] == "start"


def test_a_checkpoint_that_is_none_of_this_project_ends_with_one_line(data_folder, tmp_path, train_here):
    files = {"garbage.pt": b"not a checkpoint", "empty.pt": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    save_checkpoint({"model": torchvision.models.resnet18(num_classes=8).state_dict()}, tmp_path / "weights_only.pt")
    for name in (*files, "weights_only.pt"):
        options = ("--resume", tmp_path / name, "--output-dir", tmp_path / "run")
        ended = train_here(data_folder, *TINY, *options)
        assert ended.status == 1
        assert str(tmp_path / name) in ended.error


def test_other_classes_are_refused_by_name(half_run, own_data, train_here):
    for split in ("train", "val"):
        (own_data / split / "red_square").rename(own_data / split / "red_cube")
    ended = train_here(own_data, *TINY, "--output-dir", half_run, "--resume", "auto")
    assert ended.status == 1
    assert (
        f"its classes are not those of {own_data / 'train'}: it has 'red_square' where the data have 'red_cube'"
        in ended.error
    )

"""Whole runs of train.py on the CPU: what they show, log and save, and that each option reaches the batches."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import time

import pytest
import torch
import torchvision
from training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

import train
from dali_saliencymix.bottleneck import Monitor, command
from dali_saliencymix.image_folder import list_image_folder
from dali_saliencymix.sample_data import CLASSES
from dali_saliencymix.training import metrics
from dali_saliencymix.training.arguments import parse_arguments
from dali_saliencymix.training.checkpoints import BEST, LAST, load_checkpoint
from dali_saliencymix.training.distributed import Processes
from pipelines.loader import Loader, validation_loader
from train import Trainer

pytest_plugins = ["training_fixtures"]

TRAIN_IMAGES, VAL_IMAGES = TRAIN_PER_CLASS * CLASS_COUNT, VAL_PER_CLASS * CLASS_COUNT
STEPS = TRAIN_IMAGES // 8


@pytest.fixture
def seen(monkeypatch):
    """Collect all batches that loaders give, and the logits that the loss gets."""
    batches, logits = [], []
    real_iter, real_loss = Loader.__iter__, metrics.mixed_cross_entropy

    def recorded(loader):
        for batch in real_iter(loader):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(Loader, "__iter__", recorded)
    monkeypatch.setattr(metrics, "mixed_cross_entropy", lambda *batch: (logits.append(batch[0]), real_loss(*batch))[1])
    return batches, logits


def test_a_run_on_the_cpu_says_so_and_shows_how_it_goes(full_run):
    output_dir, ended = full_run
    assert "no CUDA GPU found: everything runs on the CPU" in ended.stderr.splitlines()
    assert "warning" not in ended.stderr.lower()
    assert re.search(rf"resnet18, 8 classes, {TRAIN_IMAGES} images, global batch 8, {STEPS} steps", ended.stdout)
    assert "mix saliencymix (alpha 1, prob 1)" in ended.stdout
    assert [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]
    progress = re.findall(
        r"epoch (\d)/2 \[(\d)/6\]  loss \d\.\d+  images_s \d+  data_wait \d+%  eta 0:00:\d\d", ended.stderr
    )
    assert progress == [("1", "4"), ("1", "6"), ("2", "4"), ("2", "6")]
    assert ended.stdout.splitlines()[-1].endswith(str(output_dir))


def test_the_log_begins_with_what_the_result_depends_on_and_has_a_line_for_each_epoch(full_run, data_folder):
    start, *epochs = read_log(full_run[0])
    assert start["event"] == "start"
    config = start["config"]
    expected = {"arch": "resnet18", "batch_size": 8, "lr": 0.01, "seed": 0, "mix": "saliencymix", "box": None}
    expected |= {"world_size": 1, "train_dir": str(data_folder / "train"), "preset": "default"}
    assert expected.items() <= config.items()
    assert {"python", "torch", "torchvision", "numpy"} < set(start["versions"])
    assert start["device"] == "CPU, 1 threads"
    assert [(line["event"], line["epoch"]) for line in epochs] == [("epoch", 1), ("epoch", 2)]
    for line in epochs:
        assert line["train"]["images"] == TRAIN_IMAGES
        assert line["val"]["images"] == VAL_IMAGES
        assert all(math.isfinite(value) for part in ("train", "val") for value in line[part].values())
        assert 0 <= line["val"]["top1"] <= line["val"]["top5"] <= 100
        assert 0 <= line["train"]["data_wait_share"] <= 1
    assert epochs[1]["best_top1"] == max(line["val"]["top1"] for line in epochs)
    assert epochs[1]["train"]["lr"] == pytest.approx(0.005 * (1 + math.cos(math.pi * (1 + 5 / 6) / 2)))


def test_checkpoints_hold_plain_weights_that_torchvision_loads(full_run):
    output_dir, _ = full_run
    assert sorted(path.name for path in output_dir.iterdir()) == ["args.yaml", BEST, LAST, "log.jsonl"]
    _, *epochs = read_log(output_dir)
    best = max(epochs, key=lambda line: line["val"]["top1"])["epoch"]
    for name, epoch in ((LAST, 2), (BEST, best)):
        checkpoint = torch.load(output_dir / name, weights_only=True)
        model = torchvision.models.resnet18(num_classes=CLASS_COUNT)
        model.load_state_dict(checkpoint["model"], strict=True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert checkpoint["epoch"] == epoch
        assert checkpoint["classes"] == sorted(CLASSES)
        assert checkpoint["model"]["bn1.num_batches_tracked"] == epoch * STEPS


def test_torchvisions_model_with_the_saved_weights_has_the_logged_figures(full_run, data_folder):
    output_dir, _ = full_run
    model = torchvision.models.resnet18(num_classes=CLASS_COUNT).eval()
    model.load_state_dict(torch.load(output_dir / LAST, weights_only=True)["model"])
    options = {"batch_size": VAL_IMAGES, "num_threads": 1, "resize_size": 32, "crop_size": 32}
    ((images, labels),) = validation_loader(
        list_image_folder(data_folder / "val"), device=torch.device("cpu"), **options
    )
    with torch.no_grad():
        logits = model(images)
    val = read_log(output_dir)[-1]["val"]
    assert val["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert val["top1"] == pytest.approx(100 * (ranks == 0).float().mean().item())
    assert val["top5"] == pytest.approx(100 * (ranks < 5).float().mean().item())


def test_evaluating_a_checkpoint_gives_the_figures_of_the_log_and_writes_nothing(full_run, data_folder, train_here):
    output_dir, _ = full_run
    before = {path: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    _, *epochs = read_log(output_dir)
    best = max(epochs, key=lambda line: line["val"]["top1"])
    for resume, line in (("auto", epochs[-1]), (output_dir / BEST, best)):
        ended = train_here(data_folder, *TINY, "--output-dir", output_dir, "--resume", resume, "--evaluate", "-b", "5")
        val = line["val"]
        expected = f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} % of {VAL_IMAGES} validation images\n"
        assert (ended.status, ended.out) == (0, expected)
    assert {path: path.stat().st_mtime_ns for path in output_dir.iterdir()} == before


def test_evaluating_keeps_the_labels_of_training_where_validation_lacks_classes(full_run, own_data, train_here, seen):
    for name in sorted(CLASSES)[:-2]:
        shutil.rmtree(own_data / "val" / name)
    assert train_here(own_data, *TINY, "--output-dir", full_run[0], "--resume", "auto", "--evaluate").status == 0
    labels = torch.cat([labels for _, labels in seen[0]])
    assert labels.tolist() == [CLASS_COUNT - 2] * VAL_PER_CLASS + [CLASS_COUNT - 1] * VAL_PER_CLASS


def test_there_is_a_best_checkpoint_even_where_nothing_was_right(data_folder, tmp_path, train_here, monkeypatch):
    monkeypatch.setattr(metrics, "correct_in_top", lambda logits, labels, top: torch.zeros(()))
    assert train_here(data_folder, *TINY, "--epochs", "1", "--output-dir", tmp_path / "run").status == 0
    assert read_log(tmp_path / "run")[-1]["val"]["top1"] == 0
    assert load_checkpoint(tmp_path / "run" / BEST)["epoch"] == 1


def test_a_log_of_an_earlier_attempt_does_not_hide_the_configuration(data_folder, tmp_path, train_here):
    options = ("--epochs", "1", "--output-dir", tmp_path / "run")
    assert train_here(data_folder, *TINY, *options, "--lr", "1e10").status == 1
    assert train_here(data_folder, *TINY, *options, "--lr", "0.02").status == 0
    assert read_log(tmp_path / "run")[0]["config"]["lr"] == 0.02


def test_without_mixing_all_labels_are_pure(data_folder, tmp_path, train_here, seen):
    options = ("--epochs", "1", "--mix", "none", "--amp", "--channels-last", "--output-dir", tmp_path / "run")
    ended = train_here(data_folder, *TINY, *options)
    assert ended.status == 0
    assert "mix none" in ended.out
    batches, logits = seen
    assert len(logits) == STEPS
    assert {part.dtype for part in logits} == {torch.bfloat16}
    for images, labels, source_labels, lam in batches[:STEPS]:
        assert (lam == 1).all()
        assert torch.equal(labels, source_labels)
        assert images.shape == (8, 3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert load_checkpoint(tmp_path / "run" / LAST)["model"]["conv1.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        ("--mix", "saliencymix", "--saliency", "fine_grained", "--mix-prob", "0.5"),
        ("--mix", "saliencymix", "--box", "clip", "--per-batch"),
        ("--mix", "saliencymix", "--preset", "paper", "--destination", "random"),
        ("--mix", "cutmix", "--mix-alpha", "0.5"),
        ("--mix", "mixup", "--mix-alpha", "0.2"),
    ],
    ids=" ".join,
)
def test_ways_to_mix_reach_the_batches(data_folder, tmp_path, train_here, seen, options):
    ended = train_here(data_folder, *TINY, "--epochs", "1", *options, "--output-dir", tmp_path / "run")
    assert ended.status == 0
    lam = torch.stack([batch[3] for batch in seen[0][:STEPS]])
    assert ((lam >= 0) & (lam <= 1)).all()
    assert len(lam.unique()) >= 4
    if "--mix-prob" in options:
        assert 0.25 < (lam == 1).float().mean() < 0.75
    elif "--per-batch" in options:
        assert (lam == lam[:, :1]).all()
    else:
        assert (lam < 1).float().mean() > 0.8
        assert not (lam == lam[:, :1]).all(1).any()
    assert read_log(tmp_path / "run")[1]["train"]["images"] == TRAIN_IMAGES


def test_a_loader_that_starves_the_training_is_named_once(data_folder, tmp_path, train_here, monkeypatch):
    whole = Loader.__iter__

    def slow(loader):
        for batch in whole(loader):
            time.sleep(1.0)  # against steps of some 50 ms
            yield batch

    monkeypatch.setattr(Loader, "__iter__", slow)
    monkeypatch.setattr(train, "Monitor", functools.partial(Monitor, window=4, patience=2.0))
    ended = train_here(data_folder, *TINY, "--epochs", "1", "--output-dir", tmp_path / "run")
    assert ended.status == 0
    (warning,) = [line for line in ended.err.splitlines() if "warning" in line]
    assert "the training waits for its data" in warning
    assert "python -m dali_saliencymix bottleneck" in warning


def test_profile_loader_measures_the_run_as_it_would_be_and_trains_nothing(
    data_folder, tmp_path, train_here, monkeypatch
):
    measured = []

    def measure(source, step, **options):
        measured.append((source.settings["batch_size"], source.conditions["step"], options["device"]))
        return {"verdict": "made up"}

    monkeypatch.setattr(command, "measure_source", measure)
    monkeypatch.setattr(command, "report_text", lambda report: f"report: {report['verdict']}")
    monkeypatch.setattr(command, "save_report", lambda report, path: path.write_text(json.dumps(report)))
    ended = train_here(data_folder, *TINY, "--profile-loader", "--output-dir", tmp_path / "run")
    assert ended.status == 0
    assert "report: made up" in ended.out
    assert json.loads((tmp_path / "run" / "loader_report.json").read_text()) == {"verdict": "made up"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["loader_report.json"]
    assert measured == [(8, "resnet18", "cpu")]


def test_options_reach_the_optimizer_and_the_learning_rate(data_folder):
    options = "--lr 0.4 --momentum 0.8 --wd 5e-5 --epochs 10 --lr-warmup-epochs 2 --lr-scheduler step"
    args = parse_arguments(
        [str(data_folder), *TINY, *options.split(), "--lr-milestones", "8", "4", "--lr-gamma", "0.5"]
    )
    trainer = Trainer(args, Processes(0, 0, 1, torch.device("cpu")))
    expected = {"momentum": 0.8, "weight_decay": 5e-5, "nesterov": True}
    (group,) = trainer.updater.optimizer.param_groups
    assert expected.items() <= group.items()
    rates = {1: 0.2, 2: 0.4, 4: 0.2, 8.5: 0.1}
    assert {epoch: trainer.set_learning_rate(epoch) for epoch in rates} == rates
    assert group["lr"] == 0.1
    args.nesterov = False
    assert not Trainer(args, Processes(0, 0, 1, torch.device("cpu"))).updater.optimizer.param_groups[0]["nesterov"]

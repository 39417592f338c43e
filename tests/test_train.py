"""Whole runs of train.py on the CPU: what they print, log and save, and that each option affects the batches."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from shared.programs import torchrun
from shared.tiny_model import tiny_resnet
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

import train
from dali_saliencymix.bottleneck import Monitor, command
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import CLASSES
from dali_saliencymix.loaders.dali import Loader
from dali_saliencymix.loaders.imagenet import validation_loader
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import evaluation, metrics
from dali_saliencymix.training.arguments import parse_arguments
from dali_saliencymix.training.checkpoints import BEST, LAST, load_checkpoint
from dali_saliencymix.training.models import choose_kernels
from train import Trainer

pytest_plugins = ["shared.training_fixtures"]

TRAIN_IMAGES, VAL_IMAGES = TRAIN_PER_CLASS * CLASS_COUNT, VAL_PER_CLASS * CLASS_COUNT
STEPS = TRAIN_IMAGES // 8


@pytest.fixture
def seen(monkeypatch):
    """Record all batches of the loaders, and the logits that the loss gets."""
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
    assert f"tiny_resnet, fp32, contiguous  |  global batch 8 (8 per process, 1 process), {STEPS} steps" in ended.stdout
    assert "mix saliencymix, alpha 1, prob 1\n" in ended.stdout
    assert f"8 classes, {TRAIN_IMAGES} images, {VAL_IMAGES} for validation" in ended.stdout
    assert [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]
    progress = re.findall(
        r"epoch (\d)/2 \[(\d)/6\]  loss \d\.\d+ \((\d\.\d+)\)  lr (\S+)  images_s \d+  data_wait \d+%  eta 0:00:\d\d",
        ended.stderr,
    )
    assert [line[:2] for line in progress] == [("1", "4"), ("1", "6"), ("2", "4"), ("2", "6")]
    for epoch, line in zip(read_log(output_dir)[1:], progress[1::2], strict=True):
        assert [float(value) for value in line[2:]] == [
            pytest.approx(epoch["train"]["loss"], abs=6e-4),
            pytest.approx(epoch["train"]["lr"], rel=5e-3),
        ]
    assert ended.stdout.splitlines()[-1].endswith(str(output_dir))


def test_the_log_begins_with_what_the_result_depends_on_and_has_a_line_for_each_epoch(full_run, data_folder):
    start, *epochs = read_log(full_run[0])
    assert start["event"] == "start"
    config = start["config"]
    expected = {"arch": "tiny_resnet", "batch_size": 8, "lr": 0.01, "seed": 0, "mix": "saliencymix", "box": None}
    expected |= {"world_size": 1, "train_dir": str(data_folder / "train"), "preset": "default"}
    assert expected.items() <= config.items()
    assert {"python", "torch", "torchvision", "numpy"} < set(start["versions"])
    assert start["device"] == "CPU, 1 thread"
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
    assert {"args.yaml", BEST, LAST, "log.jsonl"} <= {path.name for path in output_dir.iterdir()}
    _, *epochs = read_log(output_dir)
    best = max(epochs, key=lambda line: line["val"]["top1"])["epoch"]
    for name, epoch in ((LAST, 2), (BEST, best)):
        checkpoint = torch.load(output_dir / name, weights_only=True)
        model = tiny_resnet(num_classes=CLASS_COUNT)
        model.load_state_dict(checkpoint["model"], strict=True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert checkpoint["epoch"] == epoch
        assert checkpoint["classes"] == sorted(CLASSES)
        assert checkpoint["model"]["bn1.num_batches_tracked"] == epoch * STEPS


def test_torchvisions_model_with_the_saved_weights_has_the_logged_figures(full_run, data_folder):
    output_dir, _ = full_run
    model = tiny_resnet(num_classes=CLASS_COUNT).eval()
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


def test_evaluating_a_checkpoint_gives_the_figures_of_the_log_and_leaves_the_run_as_it_was(
    full_run, data_folder, tmp_path, train_here
):
    output_dir, _ = full_run
    before = {path: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    _, *epochs = read_log(output_dir)
    best = max(epochs, key=lambda line: line["val"]["top1"])
    for resume, line in (("auto", epochs[-1]), (output_dir / BEST, best)):
        report = tmp_path / f"{line['epoch']} of {resume == 'auto'}.json"
        options = ("--output-dir", output_dir, "--resume", resume, "--evaluate", "-b", "5", "--report", report)
        ended = train_here(data_folder, *TINY, *options)
        val = line["val"]
        path = output_dir / LAST if resume == "auto" else resume
        expected = f"{path}: tiny_resnet, fp32, 8 classes, after {line['epoch']} epochs and 0 steps\n"
        expected += f"{data_folder / 'val'}: {VAL_IMAGES} images by dali-cpu, resized to 32 and cropped to 32 pixels, "
        expected += "mean 0.485 0.456 0.406, std 0.229 0.224 0.225\n"
        expected += f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} %, loss {val['loss']:.3f} on {VAL_IMAGES} "
        expected += "validation images\n"
        assert (ended.status, ended.out) == (0, f"{expected}result: {report}\n")
    assert {path: path.stat().st_mtime_ns for path in output_dir.iterdir()} == before


def test_evaluating_keeps_the_labels_of_training_where_validation_lacks_classes(full_run, own_data, train_here, seen):
    for name in sorted(CLASSES)[:-2]:
        shutil.rmtree(own_data / "val" / name)
    report = own_data / "report.json"
    options = ("--output-dir", full_run[0], "--resume", "auto", "--evaluate", "--report", report)
    assert train_here(own_data, *TINY, *options).status == 0
    labels = torch.cat([labels for _, labels in seen[0]])
    assert labels.tolist() == [CLASS_COUNT - 2] * VAL_PER_CLASS + [CLASS_COUNT - 1] * VAL_PER_CLASS


def test_the_best_checkpoint_has_the_highest_top1_even_if_it_is_0(data_folder, tmp_path, train_here, monkeypatch):
    evaluate, top1 = evaluation.evaluate, iter([0.0, 40.0, 20.0])
    with_top1 = lambda *args, **options: {**evaluate(*args, **options), "top1": next(top1)}  # noqa: E731
    monkeypatch.setattr(evaluation, "evaluate", with_top1)
    assert train_here(data_folder, *TINY, "--epochs", "3", "--output-dir", tmp_path / "run").status == 0
    assert [line["best_top1"] for line in read_log(tmp_path / "run") if line["event"] == "epoch"] == [0, 40, 40]
    assert load_checkpoint(tmp_path / "run" / BEST)["epoch"] == 2


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
def test_modes_reach_the_batches(data_folder, tmp_path, train_here, seen, options):
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
    whole, now = Loader.__iter__, [0.0]

    def slow(loader):
        for batch in whole(loader):
            now[0] += 1.0  # steps take no time
            yield batch

    monkeypatch.setattr(Loader, "__iter__", slow)
    monkeypatch.setattr(train, "Monitor", functools.partial(Monitor, window=4, patience=2.0, clock=lambda: now[0]))
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
    ended = train_here(data_folder, *TINY, "--profile-loader", "--output-dir", tmp_path / "run")
    assert ended.status == 0
    assert "report: made up" in ended.out
    assert json.loads((tmp_path / "run" / "loader_report.json").read_text()) == {"verdict": "made up"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["loader_report.json"]
    assert measured == [(8, "tiny_resnet", "cpu")]


def test_options_reach_the_optimizer_and_the_learning_rate(data_folder):
    options = "--lr 0.4 --momentum 0.8 --wd 5e-5 --epochs 10 --lr-warmup-epochs 2 --lr-scheduler step"
    args = parse_arguments(
        [str(data_folder), *TINY, *options.split(), "--lr-milestones", "8", "4", "--lr-gamma", "0.5"]
    )
    trainer = Trainer(args, Processes(0, 0, 1, torch.device("cpu")))
    expected = {"momentum": 0.8, "weight_decay": 5e-5, "nesterov": True}
    groups = trainer.updater.optimizer.param_groups
    assert all(expected.items() <= group.items() for group in groups)
    rates = {1: 0.2, 2: 0.4, 4: 0.2, 8.5: 0.1}
    assert {epoch: trainer.set_learning_rate(epoch) for epoch in rates} == rates
    assert {group["lr"] for group in groups} == {0.1}
    args = replace(args, optimizer=replace(args.optimizer, nesterov=False))
    assert not Trainer(args, Processes(0, 0, 1, torch.device("cpu"))).updater.optimizer.param_groups[0]["nesterov"]


def test_the_output_folder_has_the_options_of_the_run_as_a_configuration_file(full_run, data_folder):
    output_dir, _ = full_run
    args = parse_arguments([str(data_folder), *TINY, "--device", "auto", "--output-dir", str(output_dir)])
    again = parse_arguments(["--config", str(output_dir / "args.yaml")])
    assert replace(again, config=again.config | {"config": None}) == args


def test_the_last_line_says_how_long_it_took(full_run):
    assert re.fullmatch(r"best .* % of 2 epochs, in 0:\d\d:\d\d: .*", full_run[1].stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def single_images(data_folder, tmp_path_factory):
    """24 training images, each in its own class, so that the label identifies the image."""
    root = tmp_path_factory.mktemp("single")
    files = list_image_folder(data_folder / "train").files[:24]
    for number, file in enumerate(files):
        for split in ("train", "val") if number < 4 else ("train",):
            folder = root / split / f"{number:02d}"
            folder.mkdir(parents=True)
            shutil.copy(file, folder)
    return root


PHASES = (
    *("--epochs", "4", "-b", "4", "--progressive-size", "40@1", "48@2", "--mix-off-epochs", "1"),
    *("--accumulation-steps", "4", "--model-ema", "--model-ema-decay", "0.8", "--clip-grad-norm", "5"),
    *("--label-smoothing", "0.1", "--norm-weight-decay", "0"),
)


@pytest.fixture(scope="module")
def phases_run(single_images, tmp_path_factory):
    """The output folder of a run in four phases, and the batches of its four epochs of six steps."""
    output_dir = tmp_path_factory.mktemp("phases") / "run"
    batches, real_iter = [], Loader.__iter__

    def recorded(loader):
        for batch in real_iter(loader):
            batches.append(batch)
            yield batch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__iter__", recorded)
        torch.set_num_threads(1)  # like `train_here`, since sums differ with more threads
        args = parse_arguments([str(single_images), *TINY, *PHASES, "--output-dir", str(output_dir)])
        train.run(args, Processes(0, 0, 1, torch.device("cpu")))
    torch.set_num_threads(threads)
    training = [batch for batch in batches if len(batch) == 4]
    return output_dir, [training[6 * epoch : 6 * epoch + 6] for epoch in range(4)]


def test_sizes_change_and_mixing_ends_at_their_epochs_and_every_epoch_has_every_image_once(phases_run):
    _, epochs = phases_run
    for batches, size, mixed in zip(epochs, (32, 40, 48, 48), (True, True, True, False), strict=True):
        assert {tuple(batch[0].shape) for batch in batches} == {(4, 3, size, size)}
        assert sorted(torch.cat([batch[1] for batch in batches]).tolist()) == list(range(24))
        assert all((batch[3] == 1).all() for batch in batches) is not mixed
    orders = [tuple(torch.cat([batch[1] for batch in batches]).tolist()) for batches in epochs]
    assert len(set(orders)) == 4


def test_a_run_that_is_stopped_anywhere_between_two_updates_ends_with_the_same_bits(
    phases_run, single_images, tmp_path, train_here
):
    """After the first group of four steps; at an epoch's end, where a phase ends; within the second epoch; ..."""
    options = (single_images, *TINY, *PHASES, "--output-dir", tmp_path / "run", "--resume", "auto")
    for steps, epoch, step in ((3, 0, 4), (1, 1, 0), (2, 1, 4), (8, 3, 0), (5, 4, 0)):
        ended = train_here(*options, "--max-steps", steps)
        assert ended.status == 0, ended.err
        saved = load_checkpoint(tmp_path / "run" / LAST)
        assert (saved["epoch"], saved["step"]) == (epoch, step)
        assert ("stopped after step" in ended.out) == (step > 0)
    whole = load_checkpoint(phases_run[0] / LAST)
    for entry in ("model", "model_ema"):
        assert whole[entry].keys() == saved[entry].keys()
        for name, weights in whole[entry].items():
            assert torch.equal(weights, saved[entry][name]), name
    assert saved["ema_updates"] == whole["ema_updates"] == 8  # groups of four steps and of two in each epoch
    lines = [line for line in read_log(tmp_path / "run") if line["event"] == "epoch" and line["step"] == 0]
    for line, other in zip(lines, read_log(phases_run[0])[1:], strict=True):
        assert {key: line[key] for key in ("epoch", "val", "val_ema")} == {
            key: other[key] for key in ("epoch", "val", "val_ema")
        }
        for name in ("loss", "mixed_top1", "images"):
            assert line["train"][name] == other["train"][name], name


def test_another_length_is_refused_where_it_would_move_the_end_of_mixing(phases_run, single_images, train_here):
    options = (*TINY, *PHASES, "--output-dir", phases_run[0], "--resume", "auto", "--epochs", "5")
    ended = train_here(single_images, *options)
    assert ended.status == 1
    assert "epochs was 4, is now 5" in ended.error


def test_the_banner_counts_accumulated_steps_in_the_global_batch(single_images, tmp_path, train_here):
    options = ("--max-steps", "1", "--training-only", "--no-checkpoints", "--output-dir", tmp_path / "run")
    ended = train_here(single_images, *TINY, *PHASES, *options)
    assert "global batch 16 (4 per process, 1 process, 4 steps per update), 6 steps per epoch, 4 epochs" in ended.out


def test_the_ema_is_validated_and_saved_beside_the_model(phases_run, single_images, tmp_path, train_here):
    output_dir, _ = phases_run
    _, *epochs = read_log(output_dir)
    last = epochs[-1]
    assert last["val_ema"] != last["val"]
    assert last["best_top1"] == max(line["val_ema"]["top1"] for line in epochs)
    saved = load_checkpoint(output_dir / LAST)
    model = tiny_resnet(num_classes=24)
    model.load_state_dict(saved["model_ema"], strict=True)
    assert any(not torch.equal(saved["model"][name], saved["model_ema"][name]) for name in saved["model"])
    report = tmp_path / "report.json"
    options = ("--output-dir", output_dir, "--resume", "auto", "--evaluate", "--report", report)
    ended = train_here(single_images, *TINY, *PHASES, *options)
    lines = ended.out.splitlines()[2:]
    for part, line in zip(("val", "val_ema"), lines[:2], strict=True):
        assert f"top-1 {last[part]['top1']:.2f} %" in line
        assert json.loads(report.read_text())[part] == pytest.approx(last[part], rel=1e-4)
    assert lines[1].startswith("EMA: ")


def test_a_short_run_trains_only_and_saves_nothing(data_folder, tmp_path, train_here):
    options = ("--prof", "3", "--training-only", "--no-checkpoints", "--output-dir", tmp_path / "run")
    ended = train_here(data_folder, *TINY, *options)
    assert ended.status == 0
    assert "epoch 1/2, stopped after step 3  train loss" in ended.out
    assert ended.out.splitlines()[-1].startswith("no whole epoch validated after 0 epochs")
    assert not list((tmp_path / "run").glob("*.pt"))
    (line,) = (line for line in read_log(tmp_path / "run") if line["event"] == "epoch")
    assert (line["epoch"], line["step"], line["val"], line["best_top1"]) == (0, 3, None, None)
    assert line["train"]["images"] == 24


def test_evaluating_needs_no_training_images(full_run, own_data, tmp_path, train_here):
    shutil.rmtree(own_data / "train")
    options = ("--output-dir", full_run[0], "--resume", "auto", "--test-only", "--report", tmp_path / "report.json")
    ended = train_here(own_data, *TINY, *options, "--norm-weight-decay", "0")  # not relevant here
    assert ended.status == 0
    assert f"top-1 {read_log(full_run[0])[-1]['val']['top1']:.2f} %" in ended.out


def test_a_training_that_diverges_ends_before_the_last_good_checkpoint_is_overwritten(
    full_run, data_folder, tmp_path, train_here
):
    output_dir = shutil.copytree(full_run[0], tmp_path / "run")
    before = (output_dir / LAST).read_bytes()
    options = (*TINY, "--output-dir", output_dir, "--resume", "auto", "--epochs", "9", "--lr", "1e10")
    for more, told in (
        ((), "the loss became nan in epoch 3, step 2; a smaller --lr may help"),
        (("--max-nan-steps", "100"), "some weights or running statistics are not finite after epoch 3"),
    ):
        ended = train_here(data_folder, *options, *more)
        assert ended.status == 1
        assert told in ended.error
        assert f"{output_dir / LAST} is from before" in ended.error
        assert (output_dir / LAST).read_bytes() == before


def test_float16_survives_steps_without_a_loss_that_the_scaler_leaves_out(
    data_folder, tmp_path, train_here, seen, monkeypatch
):
    _, logits = seen
    real = metrics.mixed_cross_entropy
    monkeypatch.setattr(
        metrics, "mixed_cross_entropy", lambda *batch: real(*batch) * (math.inf if len(logits) in (3, 4) else 1)
    )
    options = ("-b", "2", "--max-steps", "5", "--training-only", "--amp", "--amp-dtype", "fp16", "-p", "1")
    for limit, status in (("3", 0), ("2", 1)):
        logits.clear()
        ended = train_here(data_folder, *TINY, *options, "--max-nan-steps", limit, "--output-dir", tmp_path / limit)
        assert ended.status == status, ended.err
    assert {part.dtype for part in logits} == {torch.float16}
    assert "the loss became inf in epoch 1, step 3" in ended.error


def test_a_compiled_model_is_saved_under_the_names_of_the_plain_one(data_folder, tmp_path, train_here, monkeypatch):
    """Use the tracing of torch.compile without Inductor, which takes a minute."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend=backend))
    options = ("--compile", "--max-steps", "2", "--training-only", "--output-dir", tmp_path / "run")
    ended = train_here(data_folder, *TINY, *options)
    assert ended.status == 0, ended.err
    assert compiled
    tiny_resnet(num_classes=CLASS_COUNT).load_state_dict(load_checkpoint(tmp_path / "run" / LAST)["model"], strict=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_fast_or_deterministic(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    try:
        choose_kernels(deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_synthetic_data_needs_no_folder(tmp_path, train_here):
    options = ("--data-backend", "synthetic", "--synthetic-steps", "2", "--synthetic-classes", "4", "--epochs", "1")
    ended = train_here(*TINY, *options, "--output-dir", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert "global batch 8 (8 per process, 1 process), 2 steps per epoch" in ended.out
    assert "4 classes, 16 images, 16 for validation  |  data backend synthetic" in ended.out


# Counts the all-reduces in an epoch of accumulated steps, and compares the weights afterwards.
ACCUMULATED = """
import json, sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import train
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.training import distributed
from dali_saliencymix.training.arguments import parse_arguments
processes = distributed.start_processes("cpu")
trainer = train.Trainer(parse_arguments(sys.argv[2:]), processes)
exchanged = []
def counted(group, bucket):
    exchanged.append(bucket.is_last())
    return allreduce_hook(group, bucket)
trainer.network.register_comm_hook(None, counted)
trainer.train_epoch()
weights = sum(parameter.double().sum().item() for parameter in trainer.model.parameters())
gathered = gather([sum(exchanged), weights])
if processes.is_main:
    open(sys.argv[1], "w").write(json.dumps(gathered))
distributed.stop_processes()
"""


def test_gradients_are_all_reduced_once_per_update(data_folder, tmp_path):
    (tmp_path / "accumulated.py").write_text(ACCUMULATED)
    options = ("-b", "8", "--accumulation-steps", "2")  # three steps: a group of two and one of one
    torchrun(tmp_path / "accumulated.py", tmp_path / "result.json", data_folder, *TINY, *options)
    first, second = json.loads((tmp_path / "result.json").read_text())
    assert first == second
    assert first[0] == 2

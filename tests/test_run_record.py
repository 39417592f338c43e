"""The records of a run in addition to its checkpoints: table, TensorBoard, Weights & Biases, report, pictures."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from shared.programs import run_program
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

from dali_saliencymix.measure.environment import counted, environment
from dali_saliencymix.measure.results import replace_file
from dali_saliencymix.training import report as run_report
from dali_saliencymix.training.lockstep import Preempted
from dali_saliencymix.training.run_log import COLUMNS, RunLog, read_table
from dali_saliencymix.training.samples import save_samples

pytest_plugins = ["shared.training_fixtures"]

FACTS = {"config": {"lr": 0.1}, "environment": {"device": "a device"}, "global_batch": 8}
TRAIN = {"loss": 2.0, "mixed_top1": 10.0, "images": 48, "images_per_second": 24.0, "data_wait_share": 0.5}
TRAIN |= {"lr": 0.1, "seconds": 2.0}


def val(top1: float) -> dict[str, float]:
    return {"loss": 1.5, "top1": top1, "top5": 90.0, "images": 24}


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def epochs(record: RunLog, *top1: float, first: int = 1) -> None:
    for epoch, value in enumerate(top1, start=first):
        record.write_epoch(epoch, 0, 6 * epoch, train=TRAIN, val=val(value), val_seconds=0.5, gpu_peak_mib=7.5)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in tags}


def test_each_epoch_is_a_line_of_the_log_and_a_row_of_the_table(tmp_path):
    with RunLog(tmp_path, FACTS) as record:
        epochs(record, 40.0, 60.0, 50.0)
    start, *lines = read_log(tmp_path)
    assert (start["event"], start["config"], start["device"]) == ("start", {"lr": 0.1}, "a device")
    assert [(line["epoch"], line["step"], line["total_steps"]) for line in lines] == [(1, 0, 6), (2, 0, 12), (3, 0, 18)]
    assert lines[1]["val"] == val(60.0)
    rows = table(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["epoch"], row["val_top1"]) for row in rows] == [("1", "40.0"), ("2", "60.0"), ("3", "50.0")]
    assert rows[0]["train_mixed_top1"] == "10.0"
    assert rows[0]["gpu_peak_mib"] == "7.5"
    assert rows[0]["val_ema_top1"] == ""


def test_the_report_has_the_best_and_the_last_epoch_and_where_the_time_went(tmp_path):
    with RunLog(tmp_path, FACTS) as record:
        epochs(record, 40.0, 60.0, 50.0)
    found = report(tmp_path)
    assert (found["schema"], found["version"]) == ("dali-saliencymix/training", 1)
    assert (found["status"], found["error"], found["global_batch"]) == ("done", None, 8)
    assert (found["best"]["epoch"], found["best"]["val_top1"]) == (2, 60.0)
    assert (found["last"]["epoch"], found["last"]["val_top1"]) == (3, 50.0)
    assert (found["epochs_done"], found["epochs_done_by_this_run"]) == (3, 3)
    assert (found["seconds"]["training"], found["seconds"]["validation"]) == (6.0, 1.5)
    assert found["seconds"]["all_epochs"] == 7.5
    assert (found["images_per_second"], found["data_wait_share"]) == (24.0, 0.5)
    assert "waited for data for 50% of its time" in found["bottleneck_hint"]
    assert "bottleneck finds the cause" in found["bottleneck_hint"]
    assert found["lost_records"] == {}


def test_the_best_epoch_is_that_of_the_ema_if_there_is_one(tmp_path):
    with RunLog(tmp_path, FACTS) as record:
        for epoch, (plain, average) in enumerate([(50.0, 20.0), (40.0, 30.0)], start=1):
            record.write_epoch(epoch, 0, epoch, train=TRAIN, val=val(plain), val_ema=val(average), val_seconds=1.0)
    assert report(tmp_path)["best"]["val_ema_top1"] == 30.0


def test_a_resumed_run_replaces_the_rows_of_epochs_done_again_and_adds_to_the_log(tmp_path):
    with RunLog(tmp_path, FACTS) as record:
        epochs(record, 40.0, 60.0, 50.0)
    with RunLog(tmp_path, FACTS, epoch=1, step=6, resumed=True) as record:
        assert [row["epoch"] for row in table(tmp_path)] == ["1"]
        epochs(record, 55.0, first=2)
    assert [(row["epoch"], row["val_top1"]) for row in table(tmp_path)] == [("1", "40.0"), ("2", "55.0")]
    events = ["start", "epoch", "epoch", "epoch", "resume", "epoch"]
    assert [line["event"] for line in read_log(tmp_path)] == events
    found = report(tmp_path)
    assert (found["epochs_done"], found["epochs_done_by_this_run"]) == (2, 1)
    assert found["best"]["val_top1"] == 55.0
    assert found["seconds"]["training"] == 2.0
    assert found["seconds"]["all_epochs"] == 5.0


def test_a_run_that_is_not_resumed_replaces_all_files(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, FACTS, tensorboard=True) as record:
            epochs(record, 40.0)
    assert len(read_log(tmp_path)) == 2
    assert len(table(tmp_path)) == 1
    assert scalars(tmp_path)["val/top1"] == [(6, 40.0)]


def test_an_epoch_that_the_run_ends_within_is_in_log_and_report_but_no_row(tmp_path):
    with RunLog(tmp_path, FACTS) as record:
        epochs(record, 40.0)
        record.write_epoch(1, 3, 9, train=TRAIN)
        record.status = "stopped"
    assert len(table(tmp_path)) == 1
    assert read_log(tmp_path)[-1]["step"] == 3
    found = report(tmp_path)
    assert (found["status"], found["last"]["step"], found["epochs_done"]) == ("stopped", 3, 1)
    assert found["best"]["val_top1"] == 40.0


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (Preempted("SIGTERM"), "preempted", None),
        (ValueError("the loss\nbecame nan"), "failed", "the loss became nan"),
    ],
)
def test_a_run_that_was_ended_leaves_a_report_that_says_how(tmp_path, error, status, words):
    record = RunLog(tmp_path, FACTS)
    epochs(record, 40.0)
    with pytest.raises(type(error)), record:
        raise error
    found = report(tmp_path)
    assert (found["status"], found["error"], found["epochs_done"]) == (status, words, 1)


def test_no_file_has_a_number_that_json_does_not_know(tmp_path):
    with RunLog(tmp_path, FACTS, tensorboard=True) as record:
        figures = val(math.nan) | {"loss": math.inf}
        record.write_epoch(1, 0, 6, train=TRAIN, val=figures, val_seconds=1.0, best_top1=-math.inf)
    for text in (*(tmp_path / "log.jsonl").read_text().splitlines(), (tmp_path / "report.json").read_text()):
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    line = read_log(tmp_path)[-1]
    assert (line["val"]["loss"], line["val"]["top1"], line["val"]["top5"], line["best_top1"]) == (None, None, 90, None)
    (row,) = table(tmp_path)
    assert (row["val_loss"], row["val_top1"], row["val_top5"]) == ("", "", "90.0")
    assert report(tmp_path)["best"] is None
    assert "val/loss" not in scalars(tmp_path)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, {}, tensorboard=True, wandb_project="p") as record:
        epochs(record, 40.0)
        record.write_step(3, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_steps_and_epochs_over_the_steps_of_the_run(tmp_path):
    with RunLog(tmp_path, FACTS, tensorboard=True) as record:
        record.write_step(3, loss=2.5, lr=0.1)
        epochs(record, 40.0, 60.0)
    with RunLog(tmp_path, FACTS, epoch=1, step=6, resumed=True, tensorboard=True) as record:
        epochs(record, 55.0, first=2)
    found = scalars(tmp_path)
    assert found["train/step_loss"] == [(3, 2.5)]
    assert found["val/top1"] == [(6, 40.0), (12, 55.0)]  # without the epoch that was done again
    assert found["epoch"] == [(6, 1.0), (12, 2.0)]
    assert found["train/mixed_top1"] == [(6, 10.0), (12, 10.0)]


@pytest.mark.parametrize(
    ("option", "module"), [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "p"}, "wandb")]
)
def test_a_logger_that_is_not_installed_is_named_with_the_extra(tmp_path, monkeypatch, option, module):
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", module))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(ImportError, match=rf"pip install '\.\[{module}\]'"):
        RunLog(tmp_path, FACTS, **option)


# TensorBoard writes in a separate thread, which ends with a traceback; the record gets the error at the next write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_and_counted_and_does_not_end_the_run(tmp_path, capsys):
    """A limit on the size of files simulates a full disk: further writes fail."""
    others = set(threading.enumerate())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, FACTS, tensorboard=True) as record:
        epochs(record, 40.0)
        before = (tmp_path / "summary.csv").read_text()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            epochs(record, 60.0, 61.0, first=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert record.lost["log.jsonl"] == record.lost["summary.csv"] == 2
        epochs(record, 50.0, first=4)
    for thread in set(threading.enumerate()) - others:
        thread.join(60)  # else its traceback would appear in the next test
    told = capsys.readouterr().err
    assert told.count("warning: log.jsonl: cannot be written, training continues without it") == 2
    assert "File too large" in told
    assert told.count("warning: tensorboard is disabled for the rest of this run") == 1
    assert report(tmp_path)["lost_records"]["log.jsonl"] == 2
    *_, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(last)["epoch"] == 4  # on a new line after the incomplete line that the full disk left
    assert before in (tmp_path / "summary.csv").read_text()
    assert [row["epoch"] for row in table(tmp_path)] == ["1", "2", "3", "4"]  # each epoch rewrites the table


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "new \udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_of_another_version_keeps_the_figures_that_both_know(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,val_top1,forgotten\n1,40.0,x\n2,50.0,y\n")
    assert read_table(tmp_path / "summary.csv", 1) == [{"epoch": 1, "val_top1": 40.0}]
    with RunLog(tmp_path, FACTS, epoch=1, resumed=True):
        assert [(row["epoch"], row["val_top1"]) for row in table(tmp_path)] == [("1", "40.0")]
    (tmp_path / "summary.csv").write_text("epoch,val_top1\n1,high\n")
    with pytest.raises(ValueError, match=r"summary\.csv: not the table of a run"):
        read_table(tmp_path / "summary.csv", 1)


def test_pictures_show_the_pixels_before_the_normalisation(tmp_path):
    pixels = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], dtype=torch.float32)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    flat = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
    images = flat[:, :, None, None].expand(4, 3, 40, 40).to(torch.float16)
    labels = torch.tensor([0, 1, 0, 1])
    given = (images, labels, labels.flip(0), torch.tensor([0.25, 1.0, 0.5, 0.0]))
    save_samples(tmp_path / "samples.png", *given, classes=["cat", "dog"], mean=mean, std=std, count=3)
    with Image.open(tmp_path / "samples.png") as sheet:
        colours = [colour for _, colour in sorted(sheet.getcolors(1 << 20), reverse=True)[:4]]
    close = [
        any(max(abs(a - b) for a, b in zip(colour, want, strict=True)) <= 1 for colour in colours)
        for want in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128))
    ]
    assert close == [True, True, True, True, False]  # the first three are on white, the fourth is not


def test_a_gpu_is_asked_for_its_jpeg_engine_and_a_cpu_is_not():
    assert run_report.has_hardware_decoder(torch.device("cpu")) is None
    assert run_report.gpu_memory(torch.device("cpu")) == {}


def test_the_environment_names_processor_and_state_of_the_code():
    found = environment("cpu", "tensorboard")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert any(name.startswith("nvidia-dali-cuda") for name in found["versions"])
    assert "tensorboard" in found["versions"]
    assert found["device"] == f"CPU, {counted(torch.get_num_threads(), 'threads')}"
    assert found["cuda"] is None
    assert 1 <= found["cores"] <= len(os.sched_getaffinity(0))  # a container may have a quota
    if "COMMIT" not in os.environ and (Path(__file__).parents[1] / ".git").exists():
        assert len(found["git_commit"].rstrip("+")) == 40
    json.dumps(found)


def test_train_writes_table_tensorboard_pictures_and_report_and_goes_on_with_them(data_folder, tmp_path, train_here):
    options = (*TINY, "--output-dir", tmp_path, "--tensorboard", "--save-images", "6", "--resume", "auto")
    first = train_here(data_folder, *options, "--epochs", "2", "--max-steps", "6")
    assert first.status == 0, first.err
    assert report(tmp_path)["status"] == "stopped"
    assert train_here(data_folder, *options, "--epochs", "2").status == 0
    rows = table(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0]["train_images"] == str(TRAIN_PER_CLASS * CLASS_COUNT)
    found = report(tmp_path)
    assert (found["status"], found["epochs_done"], found["epochs_done_by_this_run"]) == ("done", 2, 1)
    assert found["data"]["val_images"] == VAL_PER_CLASS * CLASS_COUNT
    assert found["best"]["val_top1"] == max(float(row["val_top1"]) for row in rows)
    assert found["last"]["train_loss"] == float(rows[1]["train_loss"])
    assert [step for step, _ in scalars(tmp_path)["val/top1"]] == [6, 12]
    assert [step for step, _ in scalars(tmp_path)["train/step_loss"]] == [4, 6, 10, 12]
    for epoch in (0, 1):
        with Image.open(tmp_path / f"samples_epoch{epoch:03d}.jpg") as sheet:
            assert sheet.width > 3 * 4 * 32  # three columns, of pixels enlarged by four
    assert "eta 0:" in first.out or "stopped" in first.out


def test_weights_and_biases_continues_its_run_with_the_training(data_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = (*TINY, "--output-dir", tmp_path, "--log-wandb", "--epochs", "2", "--resume", "auto")
    for more in (("--max-steps", "6"), ()):
        run_program("train.py", data_folder, *options, *more)
    identity = (tmp_path / "wandb_run_id.txt").read_text().strip()
    runs = sorted(path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir())
    assert len(runs) == 2
    for run in runs:
        assert run.name.endswith(identity)
        assert (run / f"run-{identity}.wandb").stat().st_size > 0
    assert report(tmp_path)["lost_records"] == {}

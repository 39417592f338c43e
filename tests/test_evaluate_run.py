"""`train.py --evaluate` as a program with all its reports, in one process and in two."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from shared.cifar_files import write_cifar
from shared.programs import torchrun
from shared.training_fixtures import CLASS_COUNT, TINY, TINY_FOR_CIFAR, VAL_PER_CLASS, read_log

from dali_saliencymix.datasets.sample_data import CLASSES
from dali_saliencymix.training.checkpoints import BEST, LAST

pytest_plugins = ["shared.training_fixtures"]

VAL_IMAGES = VAL_PER_CLASS * CLASS_COUNT


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def only_validation(data_folder, tmp_path) -> Path:
    """A data set without training images; the last class is missing and the first one has one image."""
    root = tmp_path / "data"
    shutil.copytree(data_folder / "val", root / "val")
    shutil.rmtree(root / "val" / CLASSES[-1])
    for image in sorted((root / "val" / CLASSES[0]).iterdir())[1:]:
        image.unlink()
    return root


def test_all_reports_agree_with_the_log_of_the_training_and_nothing_is_overwritten(
    full_run, data_folder, tmp_path, train_here
):
    output_dir, _ = full_run
    pictures = sorted((data_folder / "val" / "red_square").iterdir())[:2]
    asked = ("--per-class-csv", "--fgsm", "--cam", *pictures)
    options = (*TINY, "--output-dir", tmp_path, "--resume", output_dir / LAST, "--evaluate", "-b", "5", *asked)
    ended = train_here(data_folder, *options)
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "evaluation.json").read_text())
    val = read_log(output_dir)[-1]["val"]
    assert report["val"] == pytest.approx(val, rel=1e-5)
    assert report["checkpoint"] == str(output_dir / LAST)

    lines = table(tmp_path / "per_class.csv")
    assert [line["class"] for line in lines] == list(CLASSES)
    assert {line["images"] for line in lines} == {str(VAL_PER_CLASS)}
    for column in ("top1", "top5"):
        assert sum(float(line[column]) for line in lines) / CLASS_COUNT == pytest.approx(val[column], abs=0.01)
    assert sum(line["most_frequent_wrong_answer"] != "" for line in lines) > 0
    assert report["per_class_csv"] == str(tmp_path / "per_class.csv")

    attacked = report["fgsm"]
    assert attacked["epsilon"] == 8 / 255
    assert attacked["clean_top1"] == pytest.approx(val["top1"])
    assert attacked["attacked_top1"] < attacked["clean_top1"]
    assert attacked["images"] == VAL_IMAGES
    assert f"top-1 {attacked['attacked_top1']:.2f} % attacked, {attacked['clean_top1']:.2f} % clean" in ended.out
    assert report["cam"] == [str(tmp_path / "cam" / f"{picture.stem}.png") for picture in pictures]
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(first) == 4

    assert train_here(data_folder, *options, "--fgsm", "0", "--cam-class", "green_disc").status == 0
    assert {path: path.read_bytes() for path in first} == first
    added = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path not in first}
    cams = {f"cam/{picture.stem}-2.png" for picture in pictures}
    assert added == {"evaluation-2.json", "per_class-2.csv", *cams}
    again = json.loads((tmp_path / "evaluation-2.json").read_text())
    assert again["fgsm"]["attacked_top1"] == again["fgsm"]["clean_top1"] == attacked["clean_top1"]
    assert (tmp_path / "per_class-2.csv").read_bytes() == first[tmp_path / "per_class.csv"]


def test_a_checkpoint_alone_gives_the_result_of_its_training(full_run, data_folder, tmp_path, train_here):
    """The predictions would differ at the default sizes, so the sizes must come from the checkpoint."""
    output_dir, _ = full_run
    alone = shutil.copy(output_dir / LAST, tmp_path)
    val = read_log(output_dir)[-1]["val"]
    options = (data_folder, "--device", "cpu", "-j", "1", "--evaluate", "--resume", alone)
    ended = train_here(*options)
    assert ended.status == 0, ended.err
    assert "differ from its training" not in ended.err
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["val"] == pytest.approx(val, rel=1e-5)
    assert (report["arch"], report["epoch"], report["resize_size"], report["crop_size"]) == ("tiny_resnet", 2, 32, 32)

    ended = train_here(*options, "--val-crop-size", "24", "--val-resize-size", "48")
    other = json.loads((tmp_path / "evaluation-2.json").read_text())
    assert other["val"]["loss"] != pytest.approx(val["loss"], rel=1e-3)
    line = (
        f"{data_folder / 'val'}: {VAL_IMAGES} images by dali-cpu, resized to 48 and cropped to 24 pixels, mean 0.485 "
    )
    assert line in ended.out
    (line,) = (line for line in ended.err.splitlines() if "differ" in line)
    sizes = "val_resize_size was 32, is now 48; val_crop_size was 32, is now 24"
    assert line == f"{alone}: options differ from its training: {sizes}"


def test_a_checkpoint_of_cifar_knows_its_data_set_and_normalisation(tmp_path, train_here):
    folder, output_dir = write_cifar(tmp_path, "cifar10", train=40, test=15), tmp_path / "run"
    options = ("--dataset", "cifar10", "--mean", "0.5", "0.4", "0.3", "--epochs", "1", "--output-dir", output_dir)
    assert train_here(folder, *TINY_FOR_CIFAR, *options).status == 0
    val = read_log(output_dir)[-1]["val"]
    evaluating = (folder, "--device", "cpu", "--evaluate", "--resume", output_dir / LAST)
    ended = train_here(*evaluating)
    assert ended.status == 0, ended.err
    assert (
        f"{folder}: 15 images by dali-cpu, 32 pixels, not resized, mean 0.5 0.4 0.3, std 0.247 0.244 0.262\n"
        in ended.out
    )
    assert json.loads((output_dir / "evaluation.json").read_text())["val"] == pytest.approx(val, rel=1e-5)
    assert (
        "--train-crop-size must be 32 with --dataset cifar10, got 64"
        in train_here(*evaluating, "--train-crop-size", "64").error
    )


def test_two_processes_count_exactly_what_one_counts(full_run, only_validation, tmp_path, train_here):
    """With 19 images the processes get 9 and 10, so one of them has an empty second batch."""
    output_dir, _ = full_run
    asked = ("--evaluate", "--resume", output_dir / BEST, "--per-class-csv", "--fgsm", "4/255", "--val-crop-size", "30")
    assert train_here(only_validation, *TINY, *asked, "--output-dir", tmp_path / "one", "-b", "4").status == 0
    ended = torchrun("train.py", only_validation, *TINY, *asked, "--output-dir", tmp_path / "two", "-b", "9")
    what = "options differ from its training: val_crop_size was 32, is now 30"
    assert ended.stderr.count(f"{output_dir / BEST}: {what}") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    images = (CLASS_COUNT - 2) * VAL_PER_CLASS + 1
    for part in ("val", "fgsm"):
        assert one[part]["images"] == two[part]["images"] == images
        for name, value in one[part].items():
            assert two[part][name] == (pytest.approx(value, rel=1e-4) if name == "loss" else value)
    assert (tmp_path / "one" / "per_class.csv").read_bytes() == (tmp_path / "two" / "per_class.csv").read_bytes()
    lines = table(tmp_path / "two" / "per_class.csv")
    counts = Counter({line["class"]: int(line["images"]) for line in lines})
    assert counts.total() == images
    assert (counts[CLASSES[0]], counts[CLASSES[-1]]) == (1, 0)
    assert lines[-1]["top1"] == lines[-1]["top5"] == lines[-1]["its_count"] == ""


def test_what_evaluating_cannot_do_is_said_in_one_line(full_run, data_folder, tmp_path, train_here):
    checkpoint = full_run[0] / LAST
    existing = tmp_path / "report.json"
    existing.touch()
    picture = next((data_folder / "val" / "red_square").iterdir())
    evaluating = ("--evaluate", "--resume", checkpoint)
    for options, status, message in (
        (("--fgsm",), 2, "--fgsm needs --evaluate"),
        (("--fgsm", "0"), 2, "--fgsm needs --evaluate"),
        (("--per-class-csv",), 2, "--per-class-csv needs --evaluate"),
        (("--cam", existing), 2, "--cam needs --evaluate"),
        ((*evaluating, "--fgsm", "8"), 2, "must be a number or a fraction in [0, 1], such as 8/255, got 8"),
        ((*evaluating, "--report", existing), 2, f"--report: {existing}: already exists"),
        ((*evaluating, "--cam", tmp_path / "no.jpg"), 2, f"--cam: {tmp_path / 'no.jpg'}: unreadable: No such file"),
        ((*evaluating, "--cam-class", "red_square"), 2, "--cam-class needs --cam"),
        ((*evaluating, "--cam", existing), 2, f"--cam: {existing}: empty: zero bytes"),
        ((*evaluating, "--cam", picture, "--cam-class", "dog"), 1, "must be one of the 8 classes"),
        (
            (*evaluating, "--output-dir", existing / "in"),
            1,
            f"{existing / 'in'}: Not a directory; choose another --output-dir",
        ),
        ((*evaluating, "--model-ema"), 1, f"{checkpoint}: has no EMA of the weights"),
    ):
        ended = train_here(data_folder, *TINY, "--output-dir", tmp_path / "out", *options)
        assert ended.status == status
        assert message in ended.error
        assert "top-1" not in ended.out
    assert not list(tmp_path.rglob("evaluation.json"))

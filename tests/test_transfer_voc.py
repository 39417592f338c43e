"""Faster R-CNN from the backbone of a classifier: its weights, and whole runs on a small set in VOC's format."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
import torchvision
from shared.programs import run_program
from shared.training_fixtures import script_here
from shared.voc_fixtures import SETS, make_voc
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import transfer_voc
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from dali_saliencymix.training.checkpoints import LAST, load_checkpoint, save_checkpoint
from dali_saliencymix.training.folder_lock import FolderLock
from dali_saliencymix.training.voc import CLASSES, VocImages, training_target

pytest_plugins = ["shared.voc_fixtures"]

SMALL = {"trainable_layers": 5, "min_size": 64, "max_size": 80}
# Fewer regions: all of them pass through fully connected layers of 14 million weights.
FEW = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 40, "rpn_pre_nms_top_n_train": 80}
FEW_TESTED = {"rpn_post_nms_top_n_test": 40, "rpn_pre_nms_top_n_test": 80}
few_regions = functools.partial(transfer_voc.build_detector, **FEW, **FEW_TESTED)
TINY = (
    *("--device", "cpu", "-j", "0", "-b", "2", "--iterations", "4", "--lr-milestones", "3", "-p", "1"),
    *("--min-size", "64", "--max-size", "80"),
)


def classifier_of(arch: str, seed: int = 0) -> dict:
    """Return the parts of a classifier's checkpoint that transfer_voc.py reads, with non-initial statistics."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, num_classes=8)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return {"model": model.state_dict(), "config": {"arch": arch}}


@pytest.fixture(scope="module")
def resnet18() -> dict:
    return classifier_of("resnet18")


@pytest.fixture(scope="module")
def checkpoint(resnet18, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "checkpoint_best.pt"
    save_checkpoint(resnet18, path)
    return path


# Runs transfer_voc.py with `few_regions`.
SCRIPT = """
import sys
import transfer_voc
from test_transfer_voc import few_regions
transfer_voc.build_detector = few_regions
sys.exit(transfer_voc.main())
"""


@pytest.fixture(scope="module")
def whole_run(voc, checkpoint, tmp_path_factory):
    """The output folder and the result of an uninterrupted run. Tests must not change it."""
    output_dir = tmp_path_factory.mktemp("whole") / "made" / "by the run"
    options = ("--checkpoint", checkpoint, *TINY, "--output-dir", output_dir)
    return output_dir, run_program("-c", SCRIPT, voc, *options)


@pytest.fixture
def transfer_here(monkeypatch, capfd):
    """Return a function that runs the script with `few_regions` in this process, on one thread like the program."""
    monkeypatch.setattr(transfer_voc, "build_detector", few_regions)
    yield from script_here(transfer_voc, monkeypatch, capfd)


def test_the_detector_is_torchvisions_own(tmp_path):
    """The tensors, anchors and sizes equal those of torchvision's Faster R-CNN with frozen normalisation."""
    model, taken = transfer_voc.build_detector(
        classifier_of("resnet50"), tmp_path, trainable_layers=3, min_size=800, max_size=1333
    )
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21)
    expected = {name: value.shape for name, value in theirs.state_dict().items() if "num_batches" not in name}
    assert {name: value.shape for name, value in model.state_dict().items()} == expected
    assert taken == sum(name.startswith("backbone.body.") for name in expected)
    assert str(model.transform) == str(theirs.transform)
    assert (tuple(model.transform.image_mean), tuple(model.transform.image_std)) == (IMAGENET_MEAN, IMAGENET_STD)
    assert model.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    parameters = model.backbone.body.named_parameters()
    assert {name.split(".")[0] for name, value in parameters if value.requires_grad} == {"layer2", "layer3", "layer4"}


def test_the_backbone_gives_the_features_of_the_classifier(resnet18, tmp_path):
    model, taken = transfer_voc.build_detector(resnet18, tmp_path, **SMALL)
    assert taken == 100  # 20 convolutions, and 20 normalisations of four tensors each
    classifier = torchvision.models.resnet18(num_classes=8)
    classifier.load_state_dict(resnet18["model"])
    seen = []
    classifier.eval().layer4.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        classifier(images)
        features = model.backbone.body(images)["3"]
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-5)
    assert features.std() > 0.01


def without(name):
    return lambda weights: weights.pop(name)


WRONG_WEIGHTS = {
    "one is missing": (without("layer3.0.conv1.weight"), "1 tensors .* first is 'layer3.0.conv1.weight'"),
    "one is left over": (
        lambda weights: weights.update({"module.conv1.weight": torch.zeros(1)}),
        "1 tensors .* first is 'module.conv1.weight'",
    ),
    "one has another shape": (
        lambda weights: weights.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
        "1 tensors .* first is 'conv1.weight'",
    ),
    "running mean missing": (without("bn1.running_mean"), "1 tensors .* first is 'bn1.running_mean'"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_are_taken_over_exactly_or_not_at_all(case, resnet18, tmp_path):
    spoil, message = WRONG_WEIGHTS[case]
    weights = dict(resnet18["model"])
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        transfer_voc.build_detector({**resnet18, "model": weights}, tmp_path, **SMALL)


def test_weights_of_another_network_are_refused(resnet18, tmp_path):
    for arch in ("resnet50", "cifar_resnet18", "vgg11"):
        with pytest.raises(ValueError, match="tensors are missing" if arch == "resnet50" else f"got '{arch}'"):
            transfer_voc.build_detector({**resnet18, "config": {"arch": arch}}, tmp_path, **SMALL)


def test_steps_on_a_batch_lower_its_loss(resnet18, voc, tmp_path):
    torch.manual_seed(1)
    model, _ = transfer_voc.build_detector(resnet18, tmp_path, **SMALL, **FEW)
    images = VocImages(voc, ["2007:trainval"])
    shown = [images[number, False] for number in (0, 1)]
    targets = [training_target(objects, torch.device("cpu")) for _, objects in shown]
    assert len(targets[1]["boxes"]) == 1  # the other object in this image is difficult
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9)
    losses = []
    model.train()
    for _ in range(6):
        torch.manual_seed(2)  # draws the same regions if the proposals are equal
        loss = sum(model([image for image, _ in shown], targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_run_reports_what_it_took_and_ends_with_the_precision_of_each_class(whole_run, voc):
    output_dir, ended = whole_run
    assert sorted(path.name for path in output_dir.iterdir()) == [LAST, "log.jsonl", "voc.json"]
    assert "all 100 tensors of its backbone loaded from" in ended.stdout
    start, *lines, test = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert start["event"] == "start"
    assert start["config"]["arch"] == "resnet18"
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([4e-3, 4e-3, 4e-3, 4e-4])
    parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-4)
    report = json.loads((output_dir / "voc.json").read_text())
    assert report["images"] == SETS["2007", "test"]
    assert list(report["classes"]) == list(CLASSES)
    objects = VocImages(voc, ["2007:test"]).objects
    for label, name in enumerate(CLASSES, 1):
        count = sum(int(((each.labels == label) & ~each.difficult).sum()) for each in objects)
        assert report["classes"][name]["objects"] == count
        assert (report["classes"][name]["area"] is None) == (count == 0)
    there = [each for each in report["classes"].values() if each["objects"]]
    assert report["classes_with_objects"] == len(there) > 1
    for form in ("eleven_point", "area"):
        assert report[f"map_{form}"] == pytest.approx(sum(each[form] for each in there) / len(there))
        assert test[f"map_{form}"] == report[f"map_{form}"]


def test_a_run_that_was_cut_short_goes_on_to_the_same_weights(whole_run, voc, checkpoint, tmp_path, transfer_here):
    options = (voc, "--checkpoint", checkpoint, *TINY, "--output-dir", tmp_path / "run")
    assert transfer_here(*options, "--iterations", "2").status == 0
    assert load_checkpoint(tmp_path / "run" / LAST)["iteration"] == 2

    with FolderLock(tmp_path / "run"):
        refused = transfer_here(*options, "--resume", "auto")
    assert refused.status == 1
    assert refused.error.startswith(f"transfer_voc.py: error: {tmp_path / 'run'}: another run writes there, process ")
    refused = transfer_here(*options)
    assert refused.status == 1
    assert "would be overwritten; give --resume auto" in refused.error
    refused = transfer_here(*options, "--resume", "auto", "--lr", "0.1")
    assert "lr was 0.004, is now 0.1" in refused.error

    assert transfer_here(*options, "--resume", "auto").status == 0
    whole, resumed = (load_checkpoint(folder / LAST) for folder in (whole_run[0], tmp_path / "run"))
    assert whole["iteration"] == resumed["iteration"] == 4
    for name, weights in whole["model"].items():
        assert torch.equal(weights, resumed["model"][name]), name
    assert (tmp_path / "run" / "voc.json").read_text() == (whole_run[0] / "voc.json").read_text()
    assert not torch.equal(
        whole["model"]["backbone.body.layer4.0.conv1.weight"],
        load_checkpoint(checkpoint)["model"]["layer4.0.conv1.weight"],
    )


def no_set(voc) -> str:
    shutil.rmtree(voc / "VOCdevkit" / "VOC2012")
    return "no VOC image set '2012:trainval' there"


def no_image(voc) -> str:
    file = voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "test_000002.jpg"
    file.unlink()
    return f"{file}: no such image"


def broken_image(voc) -> str:
    for file in (voc / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("trainval*"):
        file.write_text("no image")
    return "cannot be decoded"


@pytest.mark.parametrize(("spoil", "workers"), [(no_set, 0), (no_image, 0), (broken_image, 0), (broken_image, 1)])
def test_bad_data_ends_with_one_line(spoil, workers, checkpoint, tmp_path, transfer_here):
    data = make_voc(tmp_path / "voc")
    message = spoil(data)
    options = ("--checkpoint", checkpoint, *TINY, "-j", workers, "--output-dir", tmp_path / "run")
    ended = transfer_here(data, *options)
    assert ended.status == 1
    assert message in ended.error
    assert ended.error.startswith("transfer_voc.py: error: ")


def test_options_out_of_range_are_refused(transfer_here, tmp_path):
    for option, value, rule in (
        ("--iterations", "0", "must be a whole number of at least 1, got 0"),
        ("--trainable-layers", "6", "must be a whole number of at most 5, got 6"),
        ("--max-size", "100", "must be at least --min-size 800, got 100"),
    ):
        ended = transfer_here(tmp_path, "--checkpoint", tmp_path / "x.pt", option, value)
        assert ended.status == 2
        assert f"{option}: {rule}" in ended.error or f"{option} {rule}" in ended.error
    missing = ("--checkpoint", tmp_path / "x.pt", "--output-dir", tmp_path / "run")
    assert run_program("transfer_voc.py", tmp_path, *missing, check=False).returncode == 1

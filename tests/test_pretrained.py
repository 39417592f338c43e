"""--pretrained: which files it reads, which weights it takes, which layers stay random, and errors."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import OrderedDict

import pytest
import torch
import torchvision
from shared.training_fixtures import CLASS_COUNT, TINY, VAL_PER_CLASS, read_log
from torch.optim.swa_utils import AveragedModel

from dali_saliencymix.training.checkpoints import BEST, LAST, load_checkpoint
from dali_saliencymix.training.models import make_model
from dali_saliencymix.training.pretrained import load_pretrained

pytest_plugins = ["shared.training_fixtures"]


def trained(name="mnasnet0_5", classes=7, seed=1):
    """A torchvision model whose normalisation statistics are not the initial ones either."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, num_classes=classes)
    for part in model.state_dict().values():
        part.add_(torch.rand(part.shape) if part.is_floating_point() else 5)
    return model


def under_module(state):
    """Return a state dict as DistributedDataParallel has it, including the versions of its modules."""
    moved = OrderedDict((f"module.{name}", value) for name, value in state.items())
    moved._metadata = OrderedDict((f"module.{name}".rstrip("."), about) for name, about in state._metadata.items())
    return moved


def of_reference_script(model, **more):
    """Return a checkpoint as torchvision's references/classification/train.py writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    return {**states, "epoch": 3, "args": argparse.Namespace(model="mnasnet0_5", lr=0.1, opt=["sgd", None]), **more}


FILES = {
    "weights of torchvision": lambda model, _: model.state_dict(),
    "of several processes": lambda model, _: under_module(model.state_dict()),
    "of the reference script": lambda model, _: of_reference_script(model),
    "with its average": lambda model, other: of_reference_script(other, model_ema=AveragedModel(model).state_dict()),
    "of this project": lambda model, other: {"model": other.state_dict(), "model_ema": model.state_dict(), "epoch": 2},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["ZIP", "before PyTorch 1.6"])
@pytest.mark.parametrize("kind", FILES)
def test_the_weights_of_all_kinds_of_files_are_taken_with_the_ema_first(kind, zipped, tmp_path):
    wanted = trained()
    saved = FILES[kind](wanted, trained(seed=2))
    torch.save(saved, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    model = make_model("mnasnet0_5", 7)
    entry = next((name for name in ("model_ema", "model") if name in saved), None)
    loaded = f"loaded its weights of {entry!r}" if entry else "loaded its weights"
    assert load_pretrained(model, tmp_path / "weights.pth", 7)[0] == loaded
    expected = wanted.state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mnasnet0_5", ["classifier.1.weight", "classifier.1.bias"]),
        ("squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
    ],
)
def test_only_the_last_layer_stays_fresh_where_there_are_other_classes(name, head, tmp_path):
    wanted = trained(name)
    torch.save(wanted.state_dict(), tmp_path / "seven.pth")
    model = make_model(name, 5)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    said, _ = load_pretrained(model, tmp_path / "seven.pth", 5)
    heads = ", ".join(head)
    assert said == f"loaded its weights, which are for 7 classes, not 5: {heads} keep initial weights"
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name] if name in head else wanted.state_dict()[name])
    with pytest.raises(ValueError, match=r"seven\.pth: holds weights for 7 classes, but there are 5 classes$"):
        load_pretrained(model, tmp_path / "seven.pth", 5, with_head=True)


def test_auxiliary_classifiers_are_left_out_and_the_rest_answers_as_torchvision_s_own(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(num_classes=7, init_weights=False, transform_input=True)
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pth")
    ours = make_model("googlenet", 7)
    assert load_pretrained(ours, tmp_path / "googlenet.pth", 7) == ("loaded its weights", {})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_the_old_names_of_densenet_s_published_weights_are_known(tmp_path):
    wanted = trained("densenet121")
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): value for name, value in wanted.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    model = make_model("densenet121", 7)
    assert load_pretrained(model, tmp_path / "densenet.pth", 7) == ("loaded its weights", {})
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())


def without(state, name):
    del state[name]
    return state


WRONG = {
    "missing": (lambda state: without(state, "bn1.bias"), "not match the model: bn1.bias is missing$"),
    "unknown": (lambda state: state | {"bn9.bias": torch.zeros(3)}, "not match the model: bn9.bias is unknown$"),
    "misshapen": (
        lambda state: state | {"conv1.weight": torch.zeros(8, 3, 7, 7), "bn1.bias": torch.zeros(8)},
        r"not match the model: conv1.weight is \[8, 3, 7, 7\], not \[64, 3, 7, 7\], and 1 more$",
    ),
    "head of other inputs": (
        lambda state: state | {"fc.weight": torch.zeros(9, 256)},
        r"not match the model: fc.weight is \[9, 256\], not \[7, 512\]$",
    ),
    "head of two numbers of classes": (
        lambda state: state | {"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(8)},
        r"not match the model: fc.weight is \[9, 512\], not \[7, 512\], and 1 more$",
    ),
    "complex": (
        lambda state: state | {"bn1.bias": torch.zeros(64, dtype=torch.complex64)},
        "not match the model: bn1.bias is complex64$",
    ),
    "not a number": (
        lambda state: state | {"bn1.bias": torch.full((64,), torch.nan)},
        "not match the model: bn1.bias is not finite$",
    ),
    "no weights": (lambda _: {"model": {"epoch": 3}}, "must hold a state dict, directly or as"),
    "a tensor": (lambda _: torch.zeros(3), "must hold a state dict, directly or as"),
    "numbers as names": (lambda _: {3: torch.zeros(3)}, "must hold a state dict, directly or as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused_by_name(case, tmp_path):
    make, message = WRONG[case]
    torch.manual_seed(0)
    model = make_model("resnet18", 7)
    torch.save(make(model.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'weights.pth'}: .*{message}"):
        load_pretrained(model, tmp_path / "weights.pth", 7)


def test_a_training_begins_with_the_weights_and_its_checkpoint_counts_from_then_on(
    full_run, data_folder, tmp_path, train_here
):
    weights = shutil.copy(full_run[0] / BEST, tmp_path / "weights.pt")
    options = (*TINY, "--model-ema", "--pretrained", weights, "--output-dir", tmp_path / "run", "--resume", "auto")
    ended = train_here(data_folder, *options, "--lr", "1e-9", "--max-steps", "1", "--training-only")
    assert ended.status == 0
    assert f"no {tmp_path / 'run' / LAST} yet: starting from {weights}" in ended.out
    before, after = load_checkpoint(weights)["model"], load_checkpoint(tmp_path / "run" / LAST)
    for name in ("conv1.weight", "layer4.1.bn2.bias", "fc.weight"):
        for part in ("model", "model_ema"):
            torch.testing.assert_close(after[part][name], before[name], rtol=1e-5, atol=1e-6)
    weights.unlink()
    ended = train_here(data_folder, *options, "--lr", "1e-9", "--max-steps", "1", "--training-only")
    assert ended.status == 0
    assert f"resuming from {tmp_path / 'run' / LAST}: --pretrained is ignored" in ended.err
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 2


def test_weights_are_validated_without_training_images(full_run, own_data, tmp_path, train_here):
    weights = torch.load(full_run[0] / LAST, weights_only=True)["model"]
    torch.save(weights, tmp_path / "weights.pth")
    shutil.rmtree(own_data / "train")
    options = (*TINY, "--evaluate", "--pretrained", tmp_path / "weights.pth", "--output-dir", tmp_path / "out")
    assert train_here(own_data, *options).status == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["val"] == pytest.approx(read_log(full_run[0])[-1]["val"], rel=1e-5)
    assert report["val"]["images"] == VAL_PER_CLASS * CLASS_COUNT
    assert report["checkpoint"] == str(tmp_path / "weights.pth")
    shutil.rmtree(own_data / "val" / "red_square")
    ended = train_here(own_data, *options)
    assert f"{tmp_path / 'weights.pth'}: holds weights for 8 classes, but there are 7 classes" in ended.error


def test_fine_tuning_on_other_classes_says_what_is_fresh(full_run, own_data, tmp_path, train_here):
    for split in ("train", "val"):
        shutil.rmtree(own_data / split / "red_square")
    options = (
        "--pretrained",
        full_run[0] / BEST,
        "--mean",
        "0.5",
        "0.5",
        "0.5",
        "--max-steps",
        "1",
        "--val-crop-size",
        "24",
    )
    options += ("--output-dir", tmp_path / "run")
    ended = train_here(own_data, *TINY, *options)
    assert ended.status == 0
    what = "loaded its weights of 'model', which are for 8 classes, not 7"
    line = f"{what}: fc.weight, fc.bias keep initial weights"
    assert f"{full_run[0] / BEST}: {line}" in ended.err.splitlines()
    mean = "mean was [0.485, 0.456, 0.406], is now [0.5, 0.5, 0.5]"
    assert f"{full_run[0] / BEST}: options differ from its training: {mean}" in ended.err.splitlines()

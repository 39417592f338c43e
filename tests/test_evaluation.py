"""The metrics of a validation, compared with a count image by image in Python, and the files with them."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import nn

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.results import write_json
from dali_saliencymix.training.evaluation import COLUMNS, PerClass, evaluate, unused_path, write_per_class
from dali_saliencymix.training.options import ModelOptions

ALONE = Processes(0, 0, 1, torch.device("cpu"))
PLAIN = ModelOptions()


def network(classes: int) -> nn.Module:
    """Return a network whose output depends on the image and, in training mode, on its batch."""
    torch.manual_seed(classes)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, classes))


def batches(classes: int, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(classes, (size,), generator=generator))
        for size in sizes
    ]


def answers_one_by_one(model: nn.Module, loader) -> list[tuple[int, list[int], float]]:
    """Return label, classes by falling logit and cross-entropy of each image."""
    model.eval()
    found = []
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            logits = model(image[None])[0].double().tolist()
            ranked = sorted(range(len(logits)), key=lambda c: -logits[c])
            loss = math.log(sum(math.exp(logit - logits[label]) for logit in logits))
            found.append((label, ranked, loss))
    return found


@pytest.mark.parametrize("classes", [2, 3, 5, 9])
def test_the_figures_are_those_of_counting_one_by_one(classes):
    loader = batches(classes, [8, 8, 0, 5])  # an empty batch, as in a shard that ends early
    model = network(classes)
    per_class = PerClass(classes, ALONE.device)
    figures = evaluate(model, loader, ALONE, PLAIN, per_class)
    found = answers_one_by_one(model, loader)
    right = [ranked[0] == label for label, ranked, _ in found]
    assert 0 < sum(right) < 21
    assert figures["images"] == len(found) == 21
    assert figures["top1"] == pytest.approx(100 * sum(right) / 21, abs=1e-9)
    assert figures["top5"] == pytest.approx(100 * sum(label in ranked[:5] for label, ranked, _ in found) / 21, abs=1e-9)
    assert figures["loss"] == pytest.approx(sum(loss for *_, loss in found) / 21, rel=1e-5)

    confusion, top5 = per_class.over_processes()
    for label in range(classes):
        for answer in range(classes):
            expected = sum(of == label and ranked[0] == answer for of, ranked, _ in found)
            assert confusion[label, answer] == expected
        assert top5[label] == sum(of == label and label in ranked[:5] for of, ranked, _ in found)


def test_equal_logits_count_alike_in_the_whole_and_in_the_classes():
    """In bfloat16, two logits are often equal; both counts must break the tie in the same way."""
    images = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    loader = [(images, torch.arange(64) % 8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    with torch.no_grad():
        model[1].weight[4:] = model[1].weight[:4]
        model[1].bias[4:] = model[1].bias[:4]
    per_class = PerClass(8, ALONE.device)
    figures = evaluate(model, loader, ALONE, PLAIN, per_class)
    confusion, top5 = per_class.over_processes()
    assert int(confusion.sum()) == figures["images"] == 64
    assert 100 * int(confusion.diagonal().sum()) / 64 == figures["top1"] > 0
    assert 100 * int(top5.sum()) / 64 == figures["top5"]


def test_the_forward_passes_run_in_the_given_precision_and_take_no_gradients():
    seen = []

    class Watched(nn.Module):
        def forward(self, images):
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), self.training))
            return images.flatten(1)[:, :4]

    loader = batches(4, [3, 0])  # an empty batch is not passed through the network
    evaluate(Watched(), loader, ALONE, ModelOptions(amp=True))
    evaluate(Watched(), loader, ALONE, PLAIN)
    assert seen == [(True, False, False), (False, False, False)]


def test_the_file_has_a_line_for_each_class_and_leaves_empty_what_cannot_be_said(tmp_path):
    classes = ["cat, tabby", 'the "dog"', "no image", "élan"]
    confusion = torch.tensor([[2, 1, 0, 0], [0, 0, 3, 3], [0, 0, 0, 0], [0, 0, 0, 7]])
    path = tmp_path / "per_class.csv"
    write_per_class(path, classes, confusion, torch.tensor([3, 2, 0, 7]))
    with open(path, encoding="utf-8", newline="") as stream:
        header, *lines = csv.reader(stream)
    assert tuple(header) == COLUMNS
    assert lines == [
        ["cat, tabby", "3", "66.67", "100.00", 'the "dog"', "1"],
        ['the "dog"', "6", "0.00", "33.33", "no image", "3"],  # the first of two that are equally frequent
        ["no image", "0", "", "", "", ""],
        ["élan", "7", "100.00", "100.00", "", ""],
    ]


def test_a_figure_that_is_no_number_is_null_in_the_report(tmp_path):
    write_json(tmp_path / "report.json", {"val": {"loss": math.nan, "top1": 12.5}, "files": ["a"], "images": 3})
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == {"val": {"loss": None, "top1": 12.5}, "files": ["a"], "images": 3}
    assert "NaN" not in text


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    path = tmp_path / "evaluation.json"
    for name in ("evaluation.json", "evaluation-2.json", "evaluation-3.json"):
        assert unused_path(path).name == name
        unused_path(path).touch()

"""Loss and accuracy of mixed batches, compared with PyTorch's loss on probabilities and with values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dali_saliencymix import soft_labels
from dali_saliencymix.training.metrics import Totals, correct_in_top, mixed_correct, mixed_cross_entropy


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    """Logits of 5 classes, labels, labels of the sources (sometimes equal), and lam from 0 to 1."""
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(size=(40, 5)) * 3, dtype=torch.float64)
    labels, source_labels = (torch.tensor(rng.integers(0, 5, 40)) for _ in range(2))
    lam = torch.tensor(rng.random(40, np.float32))
    lam[:4] = torch.tensor([0.0, 1.0, 0.5, 0.0])
    return logits, labels, source_labels, lam


def test_the_loss_is_the_cross_entropy_against_the_soft_labels(batch):
    logits, labels, source_labels, lam = batch
    targets = soft_labels(labels.numpy(), source_labels.numpy(), lam.numpy(), num_classes=5)
    expected = cross_entropy(logits, torch.from_numpy(targets).double())
    torch.testing.assert_close(mixed_cross_entropy(*batch), expected, rtol=1e-6, atol=0)
    # The loss must differ from that with swapped weights, and from that without weights.
    assert abs(mixed_cross_entropy(logits, labels, source_labels, 1 - lam) - expected) > 0.01
    assert abs(cross_entropy(logits, labels) - expected) > 0.01


def test_the_gradient_is_that_of_the_soft_labels_too(batch):
    logits, labels, source_labels, lam = batch
    targets = soft_labels(labels.numpy(), source_labels.numpy(), lam.numpy(), num_classes=5)
    gradients = []
    for loss in (
        lambda logits: mixed_cross_entropy(logits, labels, source_labels, lam),
        lambda logits: cross_entropy(logits, torch.from_numpy(targets).double()),
    ):
        leaf = logits.clone().requires_grad_()
        loss(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_lam_is_the_weight_of_the_receivers_label(batch):
    logits, labels, source_labels, lam = batch
    alone = mixed_cross_entropy(logits, labels, source_labels, torch.ones_like(lam))
    torch.testing.assert_close(alone, cross_entropy(logits, labels))
    other = mixed_cross_entropy(logits, labels, source_labels, torch.zeros_like(lam))
    torch.testing.assert_close(other, cross_entropy(logits, source_labels))


def test_right_answers_count_by_the_weight_of_the_label_that_they_name():
    answers = torch.eye(4)[[0, 1, 2, 3, 0]]
    labels, source_labels = torch.tensor([0, 0, 0, 3, 1]), torch.tensor([1, 1, 1, 3, 2])
    lam = torch.tensor([0.75, 0.75, 0.75, 0.25, 1.0])
    # Predicted: the label, 0.75; the source's label, 0.25; neither, 0; equal labels, 1; neither, not mixed, 0.
    each = zip(answers.split(1), labels.split(1), source_labels.split(1), lam.split(1), strict=True)
    assert [mixed_correct(*sample).item() for sample in each] == [0.75, 0.25, 0.0, 1.0, 0.0]
    assert mixed_correct(answers, labels, source_labels, lam).item() == 2.0


def test_top_one_and_top_five_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7], [7, 6, 5, 4, 3, 2, 1], [7, 6, 5, 4, 3, 2, 1]])
    labels = torch.tensor([1, 4, 5])
    assert correct_in_top(logits, labels, 1).item() == 1
    assert correct_in_top(logits, labels, 5).item() == 2
    assert correct_in_top(logits, labels, 6).item() == 3


def test_with_fewer_than_five_classes_all_are_in_the_top_five():
    assert correct_in_top(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), 5).item() == 6


def test_totals_keep_small_summands_beside_a_large_sum():
    totals = Totals("loss", "images", device=torch.device("cpu"))
    totals.add(torch.tensor(2.0**30), 8)
    for _ in range(100):
        totals.add(torch.tensor(0.5, requires_grad=True), 1)
    sums = totals.over_processes()
    assert sums == {"loss": 2**30 + 50, "images": 108}
    assert all(type(value) is float for value in sums.values())


def test_totals_go_on_from_their_state():
    device = torch.device("cpu")
    totals = Totals("loss", "images", device=device)
    totals.add(torch.tensor(0.1), 3)
    again = Totals("loss", "images", device=device)
    again.restore(totals.state())
    for either in (totals, again):
        either.add(torch.tensor(1e9), 4)
    assert again.over_processes() == totals.over_processes() == {"loss": pytest.approx(1e9 + 0.1), "images": 7}
    assert again.state() == totals.state()


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_a_smoothed_loss_is_the_cross_entropy_against_the_mixed_labels_smoothed(batch, smoothing):
    logits, labels, source_labels, lam = batch
    arrays = labels.numpy(), source_labels.numpy(), lam.numpy()
    targets = torch.from_numpy(soft_labels(*arrays, num_classes=5, smoothing=smoothing)).double()
    expected = cross_entropy(logits, targets)
    torch.testing.assert_close(mixed_cross_entropy(*batch, smoothing), expected, rtol=1e-6, atol=0)
    assert abs(mixed_cross_entropy(*batch) - expected) > 0.001

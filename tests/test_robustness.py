"""FGSM compared with closed forms: the gradient of a linear network and the worst step for two classes are known."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from dali_saliencymix.training.options import read_epsilon
from dali_saliencymix.training.robustness import attacked_accuracy, fgsm

ALONE = Processes(0, 0, 1, torch.device("cpu"))
NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    return images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def linear(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, classes)).eval()


def convolutional(classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, classes)).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], some of them 0 or 1, and labels of two classes."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (40, 3, 4, 4), generator=generator) / 255
    pixels[0], pixels[1] = 0, 1
    return pixels, torch.randint(2, (40,), generator=generator)


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.3])
def test_a_linear_network_is_attacked_as_the_closed_form_says(batch, epsilon):
    pixels, labels = batch
    model = linear(2)
    attacked, logits = fgsm(model, normalise(pixels), labels, epsilon=epsilon, **NORMALISED)
    # With two classes, the loss falls along w_own - w_other and rises along the opposite, for any image.
    weights = model[1].weight.detach()
    rising = torch.where((labels == 0)[:, None], weights[1] - weights[0], weights[0] - weights[1]).sign()
    expected = (pixels + epsilon * rising.view(-1, 3, 4, 4)).clamp(0, 1)
    torch.testing.assert_close(pixels_of(attacked), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, model(normalise(pixels)))


@pytest.mark.parametrize("epsilon", [0.0, 8 / 255, 1.0])
@pytest.mark.parametrize("make", [linear, convolutional])
def test_no_pixel_moves_further_than_epsilon_or_out_of_range(batch, make, epsilon):
    pixels, labels = batch
    attacked, _ = fgsm(make(5), normalise(pixels), labels, epsilon=epsilon, **NORMALISED)
    moved = pixels_of(attacked)
    assert (moved - pixels).abs().max() <= epsilon + 1e-6
    assert -1e-6 <= moved.min() <= moved.max() <= 1 + 1e-6
    if epsilon == 8 / 255:
        inside = (pixels > epsilon) & (pixels < 1 - epsilon)
        distances = (moved - pixels).abs()[inside]
        # A pixel that affects only dead units has gradient 0, whose sign is 0.
        assert ((distances - epsilon).abs() < 1e-6).float().mean() > (0.99 if make is convolutional else 0.9999)


def test_the_step_raises_the_loss_of_every_image(batch):
    pixels, labels = batch
    model, images = convolutional(), normalise(pixels)
    attacked, logits = fgsm(model, images, labels, epsilon=1 / 255, **NORMALISED)
    before, after = (nn.functional.cross_entropy(each, labels, reduction="none") for each in (logits, model(attacked)))
    assert (after[2:] > before[2:]).all()  # black and white images cannot move in every direction


def test_an_image_is_attacked_alike_in_every_batch_and_the_network_is_left_as_it_was(batch):
    pixels, labels = batch
    model, images = convolutional(), normalise(pixels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together, _ = fgsm(model, images, labels, epsilon=0.1, **NORMALISED)
    alone, _ = fgsm(model, images[7:8], labels[7:8], epsilon=0.1, **NORMALISED)
    torch.testing.assert_close(together[7:8], alone)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_image_that_is_classified_without_doubt_is_attacked_under_autocast_too(batch):
    """In half precision its gradient would be 0, and the image would not change."""
    pixels, _ = batch
    model, images = linear(2), normalise(pixels)
    with torch.no_grad():
        model[1].weight *= 12
    labels = model(images).argmax(dim=1)
    margins = (model(images)[:, 0] - model(images)[:, 1]).abs()
    sure = (margins > 20) & (margins < 80)
    assert sure.sum() > 5
    with torch.autocast("cpu", torch.float16):
        attacked, logits = fgsm(model, images, labels, epsilon=0.02, **NORMALISED)
        leaf = images.clone().requires_grad_()
        nn.functional.cross_entropy(model(leaf), labels, reduction="sum").backward()
    assert (leaf.grad[sure] == 0).all()  # with autocast alone the gradient is 0
    assert logits.dtype == attacked.dtype == torch.float32
    inside = (pixels > 0.02) & (pixels < 0.98)
    moved = (pixels_of(attacked) - pixels).abs()
    assert (moved[sure][inside[sure]] > 0.019).all()


def loader_of(pixels: torch.Tensor, labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = normalise(pixels)
    return [(images[:16], labels[:16]), (images[16:], labels[16:]), (images[:0], labels[:0])]


def test_without_a_step_the_accuracy_is_the_clean_one_and_with_one_it_is_what_the_margins_say(batch):
    pixels, labels = batch
    pixels = 0.3 + 0.4 * pixels  # a step of 0.1 or 0.2 stays in range: nothing is clipped
    model = linear(2)
    logits = model(normalise(pixels)).detach()
    own, other = logits.gather(1, labels[:, None])[:, 0], logits.gather(1, 1 - labels[:, None])[:, 0]
    weights = model[1].weight.detach()
    slopes = (weights[0] - weights[1]).view(3, -1).abs().sum(dim=1) / torch.tensor(IMAGENET_STD)
    for epsilon in (0.0, 0.004, 0.02, 0.2):
        found = attacked_accuracy(model, loader_of(pixels, labels), ALONE, epsilon=epsilon, **NORMALISED)
        still_right = own - other > epsilon * slopes.sum()  # a step reduces the margin by this
        assert found["images"] == len(labels)
        assert found["epsilon"] == epsilon
        assert found["clean_top1"] == pytest.approx(100 * (own > other).double().mean().item())
        assert found["attacked_top1"] == pytest.approx(100 * still_right.double().mean().item())
        if epsilon == 0:
            assert found["attacked_top1"] == found["clean_top1"] > 0
    assert found["attacked_top1"] == 0  # with the largest step, none are right


@pytest.mark.parametrize(("text", "epsilon"), [("8/255", 8 / 255), ("0.03", 0.03), ("0", 0), ("1", 1), ("1e-3", 1e-3)])
def test_epsilon_is_a_number_or_a_fraction(text, epsilon):
    assert read_epsilon(text) == pytest.approx(epsilon, abs=1e-12)


@pytest.mark.parametrize("text", ["8", "-1/255", "8/0", "much", "nan", "inf", ""])
def test_any_other_epsilon_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a number or a fraction in \[0, 1\], such as 8/255"):
        read_epsilon(text)

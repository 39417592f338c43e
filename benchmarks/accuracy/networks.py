"""The networks of the study, and the operations of a forward pass."""

from __future__ import annotations

import torch
from torch import nn

from dali_saliencymix.datasets.cifar import SIZE
from dali_saliencymix.training.models import make_model

NETWORKS = ("resnet9", "resnet18")
WIDTH = 64


class ResNet9(nn.Module):
    """A small residual network for images of 32x32 pixels: eight convolutions and a linear layer.

    `width` is the number of channels of the first convolution; the last ones have eight times as many. The design
    follows the ResNet-9 of the DAWNBench entries for CIFAR-10.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, width),
            _convolution(width, 2 * width),
            nn.MaxPool2d(2),
            _Residual(2 * width),
            _convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _convolution(4 * width, 8 * width),
            nn.MaxPool2d(2),
            _Residual(8 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(8 * width, classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, K) of images (N, 3, 32, 32)."""
        return self.classifier(self.features(images)) / 8  # small initial logits allow a high learning rate


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.branch(features)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def make_network(name: str, width: int, classes: int) -> nn.Module:
    """Return one of `NETWORKS`, initialised with PyTorch's global generator; ``"resnet18"`` ignores `width`."""
    return ResNet9(width, classes) if name == "resnet9" else make_model("cifar_resnet18", classes)


def operations_of(name: str, width: int) -> float:
    """Return the floating-point operations of a forward pass of one image; a multiply-add counts as two.

    PyTorch counts convolutions and linear layers only. A training step takes three times as many operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        make_network(name, width, 10).eval()(torch.zeros(1, 3, SIZE, SIZE))
    return float(counter.get_total_flops())

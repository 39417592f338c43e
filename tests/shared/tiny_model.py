"""Add ``tiny_resnet`` to torchvision's networks: ResNet-18 with 1/8 of its channels, for training in tests.

The weights, momenta and EMA of ResNet-18 are over 100 MB, which each run would compute and write several times.
"""

from __future__ import annotations

from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet


class TinyResNet(ResNet):
    def __init__(self, num_classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes, *args, **options) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **options)


def tiny_resnet(*, weights: None = None, num_classes: int) -> TinyResNet:
    return TinyResNet(num_classes)


tiny_resnet.__module__ = "torchvision.models.tiny"  # torchvision recognises classifiers by their module
register_model()(tiny_resnet)

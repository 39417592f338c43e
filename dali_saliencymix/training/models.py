"""Classifiers by name, and how they compute: on a device, in 16 bits, compiled, in several processes.

There are torchvision's ResNets, and those for images of 32x32 pixels that papers on CIFAR compare.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dali_saliencymix.training.options import ModelOptions

_WIDE = "wrn_28_10"
_CIFAR_RESNETS = {"cifar_resnet18": "resnet18", "cifar_resnet50": "resnet50"}


def model_names() -> list[str]:
    """Return the names that `make_model` knows."""
    from torchvision import models  # here: it takes seconds to import

    return [*_CIFAR_RESNETS, _WIDE, *(name for name in models.list_models(models) if "resne" in name)]


def make_model(name: str, num_classes: int, *, dropout: float | None = None) -> nn.Module:
    """Make a classifier with initial weights, drawn from PyTorch's generator: images (N, 3, H, W) to logits (N, K).

    `name` is a ResNet of torchvision (those with ``resne`` in their names), ``"cifar_resnet18"``, ``"cifar_resnet50"``
    or ``"wrn_28_10"``. `dropout` is that of ``"wrn_28_10"``, by default 0.3 as in the SaliencyMix paper; others have
    none. ValueError if the name is unknown, or `dropout` is out of range or given for a model without it.
    """
    from torchvision import models

    if name not in model_names():
        msg = f"name must be one of {', '.join(model_names())}, got {name!r}"
        raise ValueError(msg)
    if name == _WIDE:
        return WideResNet(28, 10, num_classes, dropout=0.3 if dropout is None else dropout)
    if dropout is not None:
        msg = f"dropout must be left out for {name}, which has none, got {dropout}"
        raise ValueError(msg)
    model: nn.Module = models.get_model(_CIFAR_RESNETS.get(name, name), num_classes=num_classes)
    if name in _CIFAR_RESNETS:  # with a stem that keeps the size of small images: a 3x3 convolution, no pooling
        stem = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1, model.maxpool = stem, nn.Identity()
    return model


class WideResNet(nn.Module):
    """Wide residual network for images of 32x32 pixels (Zagoruyko and Komodakis, BMVC 2016).

    It has `depth` = 6 n + 4 layers with weights, n blocks in each of three groups of 16, 32 and 64 times `width`
    channels. `dropout` is the probability that a value between the convolutions of a block is dropped.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if count < 1 or rest:
            msg = f"depth must be 6 n + 4 with n of at least 1, got {depth}"
            raise ValueError(msg)
        if not 0 <= dropout < 1:
            msg = f"dropout must be in [0, 1), got {dropout}"
            raise ValueError(msg)
        channels = [16, 16 * width, 32 * width, 64 * width]
        blocks = []
        for group in range(3):
            inputs, outputs = channels[group : group + 2]
            blocks.append(_WideBlock(inputs, outputs, 2 if group > 0 else 1, dropout))
            blocks += [_WideBlock(outputs, outputs, 1, dropout) for _ in range(count - 1)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, K) of images (N, 3, H, W)."""
        features = functional.relu(self.bn(self.blocks(self.conv1(images))))
        return self.fc(self.avgpool(features).flatten(1))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        alike = inputs == outputs and stride == 1
        self.shortcut = None if alike else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        active = functional.relu(self.bn1(features))
        # Where the shape changes, the shortcut starts behind the normalisation, which both ways share.
        shortcut = features if self.shortcut is None else self.shortcut(active)
        active = functional.relu(self.bn2(self.conv1(active)))
        return self.conv2(self.dropout(active)) + shortcut


def choose_kernels(*, deterministic: bool) -> None:
    """Have PyTorch take the fastest kernels, or those that always give the same bits; before CUDA starts."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)


def model_on(device: torch.device, options: ModelOptions, num_classes: int) -> nn.Module:
    """Return the model of a run on a device, with fresh weights, in its memory format; see `make_model`."""
    model: Any = make_model(options.arch, num_classes, dropout=options.dropout)
    return model.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)


def as_trained(model: nn.Module, options: ModelOptions, *, distributed: bool) -> nn.Module:
    """Return the model as it is trained: with an all-reduce of the gradients if `distributed`, and compiled if asked.

    It is compiled in place, so that the names of its weights stay as they are.
    """
    network = nn.parallel.DistributedDataParallel(model) if distributed else model
    if options.compile:
        network.compile()
    return network


def autocast(options: ModelOptions, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context for forward passes."""
    dtype = torch.float16 if options.amp_dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=options.amp)


def all_reduce(network: nn.Module, *, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context for the passes of a step, with or without an all-reduce of the gradients at their end."""
    no_sync: Any = getattr(network, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
    return contextlib.nullcontext() if wanted else no_sync()

"""Classifiers by name, and how they compute: on a device, in 16 bits, compiled, in several processes.

There are the classification models of torchvision, and those for images of 32x32 pixels that papers on CIFAR compare.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from dali_saliencymix.measure.results import shortened
from dali_saliencymix.training.options import ModelOptions, TrainingOptions

_WIDE = "wrn_28_10"
_CIFAR_RESNETS = {"cifar_resnet18": "resnet18", "cifar_resnet50": "resnet50"}


def model_names() -> list[str]:
    """Return the names that `make_model` knows."""
    from torchvision import models  # here: it takes seconds to import

    return [*_CIFAR_RESNETS, _WIDE, *models.list_models(models)]


def unknown_model(name: str) -> str | None:
    """Return what is wrong with a name that `make_model` does not know; None for one that it knows."""
    names = model_names()
    if name in names:
        return None
    near = difflib.get_close_matches(name.lower(), names)
    return (
        f"must be {', '.join(_CIFAR_RESNETS)}, {_WIDE} or one of torchvision.models.list_models(torchvision.models), "
        f"got {name!r}" + (f"; the nearest names are {', '.join(near)}" if near else "")
    )


def make_model(name: str, num_classes: int, *, image_size: int = 224, dropout: float | None = None) -> nn.Module:
    """Make a classifier with initial weights, drawn from PyTorch's generator: images (N, 3, H, W) to logits (N, K).

    `name` is a classification model of torchvision, ``"cifar_resnet18"``, ``"cifar_resnet50"`` or ``"wrn_28_10"``.
    `image_size` is H and W for the models that are made for one size, ViT and MaxViT. `dropout` in [0, 1) is the
    probability of all dropout layers, in place of the model's own; ``"wrn_28_10"`` has 0.3, as in the paper.
    GoogLeNet and Inception v3 have no auxiliary classifiers, and change the normalisation of their input, as with
    torchvision's published weights. ValueError if the name is unknown, the model cannot have this image size, or
    `dropout` is out of range or given for a model without dropout layers.
    """
    from torchvision import models

    if wrong := unknown_model(name):
        msg = f"name {wrong}"
        raise ValueError(msg)
    if dropout is not None and not 0 <= dropout < 1:
        msg = f"dropout must be in [0, 1), got {dropout}"
        raise ValueError(msg)
    arguments: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        arguments = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        arguments = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        arguments = {"input_size": (image_size, image_size)}
    model: nn.Module
    try:
        if name == _WIDE:
            model = WideResNet(28, 10, num_classes, dropout=0.3)
        else:
            model = models.get_model(_CIFAR_RESNETS.get(name, name), num_classes=num_classes, **arguments)
    except (AssertionError, ValueError) as error:
        msg = f"image_size (--train-crop-size) must be one that {name} divides into its patches, got {image_size}"
        raise ValueError(msg) from error
    if name in _CIFAR_RESNETS:  # with a stem that keeps the size of small images: a 3x3 convolution, no pooling
        stem = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1, model.maxpool = stem, nn.Identity()
    if dropout is not None:
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        if not layers:
            msg = f"dropout must be left out for {name}, which has none, got {dropout}"
            raise ValueError(msg)
        for layer in layers:
            layer.p = dropout
    return model


def check_image_sizes(model: nn.Module, options: TrainingOptions) -> None:
    """Require a new model to take images of all sizes of a run; ValueError names the options that do not fit.

    Nothing is computed: weights and images are on PyTorch's meta device.
    """
    data, run = options.data, options.run
    sizes = {}
    if not run.evaluate:
        sizes[f"--train-crop-size {data.train_crop_size}"] = data.train_crop_size
        sizes |= {f"--progressive-size {at}": int(at.partition("@")[0]) for at in options.schedule.progressive_size}
    if data.dataset == "folder" and (run.evaluate or not run.training_only):
        sizes[f"--val-crop-size {data.val_crop_size}"] = data.val_crop_size
    weights = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    for given, size in sizes.items():
        try:
            with torch.device("meta"), torch.no_grad():
                functional_call(model, weights, torch.zeros(1, 3, size, size))
        except NotImplementedError:  # an operation that PyTorch cannot check in this way
            continue
        except (AssertionError, RuntimeError) as error:
            made = "" if size == data.train_crop_size else f" of --train-crop-size {data.train_crop_size}"
            msg = f"{given}: the {options.model.arch}{made} cannot take images of this size: {shortened(str(error))}"
            raise ValueError(msg) from error
    model.train()


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


def model_on(device: torch.device, options: ModelOptions, num_classes: int, *, image_size: int) -> nn.Module:
    """Return the model of a run on a device, with fresh weights, in its memory format; see `make_model`."""
    model: Any = make_model(options.arch, num_classes, image_size=image_size, dropout=options.dropout)
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

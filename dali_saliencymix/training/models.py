"""Create classification models by name, and set up devices, mixed precision, compilation and data parallelism.

The models are those of torchvision, and those for 32x32 images that papers on CIFAR compare.
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
    """Return the names of all models that `make_model` can create."""
    from torchvision import models  # takes seconds to import

    return [*_CIFAR_RESNETS, _WIDE, *models.list_models(models)]


def unknown_model(name: str) -> str | None:
    """Return the end of an error message for an unknown model name; None for a known one."""
    names = model_names()
    if name in names:
        return None
    near = difflib.get_close_matches(name.lower(), names)
    return (
        f"must be {', '.join(_CIFAR_RESNETS)}, {_WIDE} or one of torchvision.models.list_models(torchvision.models), "
        f"got {name!r}" + (f"; nearest: {', '.join(near)}" if near else "")
    )


def make_model(name: str, num_classes: int, *, image_size: int = 224, dropout: float | None = None) -> nn.Module:
    """Create a classifier with randomly initialised weights, which maps images (N, 3, H, W) to logits (N, K).

    `name` is a classification model of torchvision, ``"cifar_resnet18"``, ``"cifar_resnet50"`` or ``"wrn_28_10"``.
    `image_size` is H and W for the models with a fixed input size, ViT and MaxViT. `dropout` in [0, 1) replaces the
    probability of all dropout layers; the default of ``"wrn_28_10"`` is 0.3, as in the paper. GoogLeNet and Inception
    v3 have no auxiliary classifiers, and renormalise their input, as with torchvision's published weights.

    The weights are drawn from PyTorch's default generator. ValueError if the name is unknown, the model does not
    support the image size, or `dropout` is out of range or given for a model without dropout layers.
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
        msg = f"image_size (--train-crop-size) must be one that {name} can divide into patches, got {image_size}"
        raise ValueError(msg) from error
    if name in _CIFAR_RESNETS:  # replace the stem by a 3x3 convolution without pooling, for small images
        stem = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1, model.maxpool = stem, nn.Identity()
    if dropout is not None:
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        if not layers:
            msg = f"dropout must be left out for {name}, which has no dropout layers, got {dropout}"
            raise ValueError(msg)
        for layer in layers:
            layer.p = dropout
    return model


def check_image_sizes(model: nn.Module, options: TrainingOptions) -> None:
    """Require that a new model accepts images of all sizes of a run; ValueError names the option that does not fit.

    The check runs on PyTorch's meta device, without computing anything.
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
        except NotImplementedError:  # an operation without support for the meta device
            continue
        except (AssertionError, RuntimeError) as error:
            made = "" if size == data.train_crop_size else f" made for --train-crop-size {data.train_crop_size}"
            msg = f"{given}: {options.model.arch}{made} does not accept images of this size: {shortened(str(error))}"
            raise ValueError(msg) from error
    model.train()


class WideResNet(nn.Module):
    """Wide residual network for images of 32x32 pixels (Zagoruyko and Komodakis, BMVC 2016).

    `depth` = 6 n + 4 is the number of layers with weights, for n blocks in each of three groups. The groups have 16, 32
    and 64 times `width` channels. `dropout` is the dropout probability between the convolutions of a block.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if count < 1 or rest:
            msg = f"depth must be 6 n + 4 with n at least 1, got {depth}"
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
        # If the shape changes, the shortcut starts after the normalisation, which both branches share.
        shortcut = features if self.shortcut is None else self.shortcut(active)
        active = functional.relu(self.bn2(self.conv1(active)))
        return self.conv2(self.dropout(active)) + shortcut


def choose_kernels(*, deterministic: bool) -> None:
    """Let PyTorch use the fastest or deterministic kernels; call it before CUDA starts."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)


def model_on(device: torch.device, options: ModelOptions, num_classes: int, *, image_size: int) -> nn.Module:
    """Create the model of a run on a device, with its memory format and new weights; see `make_model`."""
    model: Any = make_model(options.arch, num_classes, image_size=image_size, dropout=options.dropout)
    return model.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)


def as_trained(model: nn.Module, options: ModelOptions, *, distributed: bool) -> nn.Module:
    """Wrap a model for training: with ``DistributedDataParallel`` if `distributed`, and compiled if requested.

    Compilation is in place, so that the names of the weights do not change.
    """
    network = nn.parallel.DistributedDataParallel(model) if distributed else model
    if options.compile:
        network.compile()
    return network


def autocast(options: ModelOptions, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context for forward passes."""
    dtype = torch.float16 if options.amp_dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=options.amp)


def all_reduce(network: nn.Module, *, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a forward and backward pass with or without an all-reduce of the gradients."""
    no_sync: Any = getattr(network, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
    return contextlib.nullcontext() if wanted else no_sync()

"""Load pretrained weights from a file of torchvision, of its reference scripts or of this project."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dali_saliencymix.training.checkpoints import read_tensors, taken_from

# Names of DenseNet layers in torchvision's files: "denselayer1.norm.1" is "denselayer1.norm1".
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet and Inception v3 are created without these


def load_pretrained(
    model: nn.Module, path: str | Path, num_classes: int, *, with_head: bool = False
) -> tuple[str, dict[str, Any]]:
    """Load the weights of a file into a model with `num_classes` classes.

    Returns a description of what was loaded, and the options of the training that wrote the file; {} if the file does
    not hold them.

    The file holds a state dict, or a dictionary with a state dict as "model_ema" or otherwise "model". Names may begin
    with ``module.``. If the number of classes differs, the parameters whose first dimension is that number keep their
    present weights; with `with_head`, this is an error. FileNotFoundError if the file is missing; ValueError if it
    holds no weights, or a name is missing or unknown, or a shape or type does not match.
    """
    with taken_from(path):
        weights, entry, config = _read_weights(path)
        head = _load(model, weights, path, num_classes, with_head=with_head)
        return f"loaded its weights{f' of {entry!r}' if entry else ''}{head}", config


def _load(
    model: nn.Module, weights: dict[str, torch.Tensor], path: str | Path, num_classes: int, *, with_head: bool
) -> str:
    own = model.state_dict()
    for name in [name for name in weights if name.startswith(_AUXILIARY) and name not in own]:
        del weights[name]
    shapes = {name: (weights[name].shape, own[name].shape) for name in own if name in weights}
    shapes = {name: (there, here) for name, (there, here) in shapes.items() if there != here}
    classes = {there[0] for there, here in shapes.values() if there and here == (num_classes, *there[1:])}
    wrong = [
        f"{name} is {list(there)}, not {list(here)}"
        for name, (there, here) in shapes.items()
        if not there or here != (num_classes, *there[1:]) or len(classes) > 1
    ]
    wrong += [
        f"{name} is {str(weights[name].dtype).removeprefix('torch.')}"
        for name in own
        if name in weights and weights[name].is_floating_point() != own[name].is_floating_point()
    ]
    wrong += [f"{name} is not finite" for name in own if name in weights and not weights[name].isfinite().all()]
    for name in shapes:
        del weights[name]  # in place: PyTorch stores the versions of layers as an attribute of the dictionary
    if not wrong:
        found = model.load_state_dict(weights, strict=False)
        wrong += [f"{name} is missing" for name in found.missing_keys if name not in shapes]
        wrong += [f"{name} is unknown" for name in found.unexpected_keys]
    if wrong:
        msg = f"{path}: its weights do not match the model: {wrong[0]}"
        raise ValueError(msg + (f", and {len(wrong) - 1} more" if wrong[1:] else ""))
    if not shapes:
        return ""
    if with_head:
        msg = f"{path}: holds weights for {classes.pop()} classes, but there are {num_classes} classes"
        raise ValueError(msg)
    return f", which are for {classes.pop()} classes, not {num_classes}: {', '.join(shapes)} keep initial weights"


def _read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], str | None, dict[str, Any]]:
    """Return the weights of a file, the name of the entry that holds them or None, and the options of the training."""
    saved = read_tensors(path, argparse.Namespace)  # the type in which torchvision's scripts save their options
    entry = next((entry for entry in ("model_ema", "model") if isinstance(saved, dict) and entry in saved), None)
    weights = saved if entry is None else saved[entry]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        msg = f"{path}: must hold a state dict, directly or as 'model_ema' or 'model'"
        raise ValueError(msg)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    weights.pop("n_averaged", None)  # of PyTorch's `AveragedModel`
    for name in [name for name in weights if _OLD_DENSENET.search(name)]:
        weights[_OLD_DENSENET.sub(r"\1", name)] = weights.pop(name)
    config = saved.get("config") if entry else None
    return weights, entry, config if isinstance(config, dict) else {}

"""Class activation maps (Zhou et al., 2016), which show the image regions that support a class.

A ResNet ends in global average pooling and a linear layer: logit_c = sum_k W_ck mean_yx f_k(y, x) + b_c. Exchanging the
sums, the logit is the mean over positions of the map M_c(y, x) = sum_k W_ck f_k(y, x), plus the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dali_saliencymix._errors import naming
from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.packages import require
from dali_saliencymix.training.evaluation import unused_path


class ActivationMaps(NamedTuple):
    """The map of one class for each image of a batch. The mean of a map plus the bias of its class is the logit."""

    maps: torch.Tensor  # (N, h, w) float32, with the size of the last feature map
    labels: torch.Tensor  # (N,) int64: the class of each map
    probabilities: torch.Tensor  # (N,) float32: the predicted probability of that class


def last_layers(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return ``model.avgpool``, a global average pooling, and ``model.fc``, a linear layer.

    ValueError if the network does not end in these, as torchvision's ResNets do.
    """
    pooling, linear = (getattr(model, name, None) for name in ("avgpool", "fc"))
    if not isinstance(pooling, nn.Module) or not isinstance(linear, nn.Linear):
        msg = (
            "class activation maps need a network that ends in a global average pooling 'avgpool' and a linear layer "
            f"'fc', as torchvision's ResNets do, got {type(model).__name__}"
        )
        raise ValueError(msg)
    return pooling, linear


@torch.no_grad()
def class_activation_maps(model: nn.Module, images: torch.Tensor, *, label: int | None = None) -> ActivationMaps:
    """Compute the map of a class, by default the predicted one, for normalised images (N, C, H, W).

    The network must be in evaluation mode. ValueError if `last_layers` does not accept it.
    """
    pooling, linear = last_layers(model)
    seen: list[torch.Tensor] = []
    hook = pooling.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        # Bypass `__call__`, which may be compiled: a compiled network ignores hooks that are registered later.
        logits = model.forward(images)
    finally:
        hook.remove()
    labels = logits.argmax(dim=1) if label is None else torch.full((len(images),), label, device=images.device)
    maps = torch.einsum("nkyx,nk->nyx", seen[0].float(), linear.weight[labels].float())
    probabilities = logits.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return ActivationMaps(maps, labels, probabilities)


def save_activation_maps(
    model: nn.Module,
    files: Sequence[str | Path],
    folder: Path,
    *,
    classes: Sequence[str],
    resize_size: int,
    crop_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    label: int | None = None,
) -> list[Path]:
    """Draw the input crop of each file, and the map of a class over it; return the paths of the pictures.

    A picture has the name of its image, with a number appended if the name is taken. ImportError if Matplotlib is not
    installed; ValueError if a file cannot be decoded, or if `last_layers` does not accept the network.
    """
    require("matplotlib", by="drawing")
    from matplotlib.figure import Figure

    # All files are decoded before the first picture is written.
    crops = [_centre_crop(file, resize_size, crop_size) for file in files]
    parameter = next(model.parameters())
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for file, pixels in zip(files, crops, strict=True):
        normalised = (pixels / 255.0 - np.array(mean)) / np.array(std)
        image = torch.from_numpy(normalised.transpose(2, 0, 1)[None].astype(np.float32)).to(parameter.device)
        found = class_activation_maps(model, image, label=label)
        title = f"{classes[int(found.labels)]}, {float(found.probabilities):.1%}"
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        plain, overlaid = figure.subplots(1, 2)
        plain.imshow(pixels)
        plain.set_title(Path(file).name, fontsize=8)
        overlaid.imshow(pixels)
        edges = (-0.5, crop_size - 0.5, crop_size - 0.5, -0.5)
        overlaid.imshow(
            found.maps[0].numpy(force=True), cmap="turbo", alpha=0.5, interpolation="bilinear", extent=edges
        )
        overlaid.set_title(title, fontsize=8)
        for axis in (plain, overlaid):
            axis.set(xticks=[], yticks=[])
        picture = unused_path(folder / f"{Path(file).stem}.png")
        with naming(picture):
            figure.savefig(picture, dpi=110)
        pictures.append(picture)
    return pictures


def _centre_crop(file: str | Path, resize_size: int, crop_size: int) -> np.ndarray:
    """Return the validation crop of an image, (crop_size, crop_size, 3) uint8."""
    from dali_saliencymix.loaders.torch import FolderImages  # imports torchvision, which takes seconds

    if why := why_unusable(file):
        msg = f"{file}: {why}"
        raise ValueError(msg)
    folder = ImageFolder(Path(file).parent, [""], [str(file)], [0])
    images, *_ = FolderImages(folder, crop_size, resize_size=resize_size).read(np.zeros(1, np.int64), 0, 0, {}, {})
    return images[0]

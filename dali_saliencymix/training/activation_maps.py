"""Class activation maps (Zhou et al., 2016): which parts of an image speak for a class, as pictures.

A ResNet ends in a mean over positions and one linear layer: logit_c = sum_k W_ck mean_yx f_k(y, x) + b_c. With the sums
exchanged, the logit is the mean over positions of the map M_c(y, x) = sum_k W_ck f_k(y, x), plus the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.training.evaluation import unused_path


class ActivationMaps(NamedTuple):
    """Maps of one class for each image of a batch.

    Attributes
    ----------
    maps : tensor of shape (N, h, w), float32
        Share of each position in the logit: their mean and the bias of the class make the logit. h and w are those of
        the last feature map.
    labels : tensor of shape (N,), int64
        Which classes the maps are of.
    probabilities : tensor of shape (N,), float32
        What the network gives these classes.
    """

    maps: torch.Tensor
    labels: torch.Tensor
    probabilities: torch.Tensor


@torch.no_grad()
def class_activation_maps(model: nn.Module, images: torch.Tensor, *, label: int | None = None) -> ActivationMaps:
    """Return the map of a class for each image.

    Parameters
    ----------
    model : torch.nn.Module
        A network in evaluation mode that ends in ``model.avgpool``, a mean over all positions, and ``model.fc``, a
        linear layer, as torchvision's ResNets do.
    images : tensor of shape (N, C, H, W), float32
        Normalised images.
    label : int, optional
        The class; by default the one that the network takes the image for.

    Raises
    ------
    ValueError
        If the network ends in another way.
    """
    pooling, linear = (getattr(model, name, None) for name in ("avgpool", "fc"))
    if not isinstance(pooling, nn.Module) or not isinstance(linear, nn.Linear):
        msg = (
            "class activation maps need a network that ends in a global average pooling 'avgpool' and a linear layer "
            f"'fc', as torchvision's ResNets do, got {type(model).__name__}"
        )
        raise ValueError(msg)
    seen: list[torch.Tensor] = []
    hook = pooling.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        # Not through the module's own call, which may be compiled: a compiled network runs past hooks set later.
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
    """Write a picture for each image: what the network sees of it, and over it the map of a class.

    Parameters
    ----------
    model, label
        As for `class_activation_maps`; the network computes where its weights are.
    files : sequence of path
        Images to look at.
    folder : Path
        Where the pictures go, each called as its image, with a number where the name is taken.
    classes : sequence of str
        Names of the classes by label.
    resize_size, crop_size : int
        Short side of the images before the centre crop, and size of that, in pixels.
    mean, std : sequence of float
        What the network's images are normalised with, for pixels in [0, 1].

    Returns
    -------
    list of Path
        The pictures.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    ValueError
        If a file cannot be decoded, or the network has no such maps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "pictures need Matplotlib, which is not installed: pip install 'dali-saliencymix[preview]'"
        raise ImportError(msg) from error
    crops = [_centre_crop(file, resize_size, crop_size) for file in files]  # all, before a picture is written
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
        figure.savefig(picture, dpi=110)
        pictures.append(picture)
    return pictures


def _centre_crop(file: str | Path, resize_size: int, crop_size: int) -> np.ndarray:
    """Decode, turn by the EXIF orientation, resize the short side, crop the centre: (crop_size, crop_size, 3) uint8."""
    if why := why_unusable(file):
        msg = f"{file}: {why}"
        raise ValueError(msg)
    from torchvision.transforms.v2.functional import center_crop, resize

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    return np.asarray(center_crop(resize(image, [resize_size]), [crop_size]))

"""Accuracy under the fast gradient sign method (FGSM) of Goodfellow et al., 2015: one white-box step.

Each image becomes x' = clip(x + epsilon * sign(dL/dx), 0, 1), with L the cross-entropy against the true label. The step
is taken and bounded where pixels are in [0, 1]; the network takes them normalised, (x - mean) / std.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import metrics
from dali_saliencymix.training.evaluation import ValidationLoader, sums_over_images


def gradient_signs(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs of the gradient of the loss by normalised images, and the logits, both float32.

    The model is in evaluation mode, in which no image has an influence on another one.

    All of it is computed in float32, whatever autocast says. Only signs of gradients count: in float16 those of well
    classified images underflow to 0 and such an image would not be attacked at all, and bfloat16 has signs wrong where
    terms cancel.
    """
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        leaf = images.detach().float().requires_grad_()
        logits = model(leaf)
        # The sum, not the mean: what happens to an image does not depend on the size of its batch.
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    # The gradient by the pixels is that by the normalised ones divided by `std`, which changes no sign.
    return gradient.sign(), logits.detach()


def moved_along(
    signs: torch.Tensor, images: torch.Tensor, *, epsilon: float, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Return normalised images after a step along `signs`, float32.

    Images are normalised before and after; the pixels behind them are in [0, 1] and not rounded to 8 bits.
    """
    offset, scale = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    pixels = images.detach().float() * scale + offset
    return ((pixels + epsilon * signs).clamp(0, 1) - offset) / scale


def fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epsilon: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch after one step along the sign of the gradient, and the logits before it, both float32."""
    signs, logits = gradient_signs(model, images, labels)
    return moved_along(signs, images, epsilon=epsilon, mean=mean, std=std), logits


def attacked_accuracy(
    model: nn.Module,
    loader: ValidationLoader,
    processes: Processes,
    *,
    epsilon: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, float]:
    """Return the top-1 accuracy before and after the attack on the same images; all processes have to call this.

    The result holds ``"epsilon"``, ``"clean_top1"`` and ``"attacked_top1"`` in percent, and the number of ``"images"``.
    """

    def count(images: torch.Tensor, labels: torch.Tensor) -> Sequence[torch.Tensor]:
        attacked, clean_logits = fgsm(model, images, labels, epsilon=epsilon, mean=mean, std=std)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            attacked_logits = model(attacked)
        return [metrics.correct_in_top(logits, labels, 1) for logits in (clean_logits, attacked_logits)]

    sums = sums_over_images(model, loader, processes, ("clean", "attacked"), count, description="FGSM")
    tops = {f"{name}_top1": 100 * sums[name] / sums["images"] for name in ("clean", "attacked")}
    return {"epsilon": epsilon, **tops, "images": int(sums["images"])}

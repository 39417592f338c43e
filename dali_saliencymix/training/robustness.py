"""Accuracy under the fast gradient sign method (FGSM; Goodfellow et al., 2015), a single-step white-box attack.

Each image becomes x' = clip(x + epsilon * sign(dL/dx), 0, 1), where L is the cross-entropy against the true label. The
step is computed for pixels x in [0, 1]. The network receives normalised images, (x - mean) / std.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import metrics
from dali_saliencymix.training.evaluation import ValidationLoader, sums_over_images


def gradient_signs(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs of the gradients of the loss with respect to normalised images, and the logits, both float32.

    The model must be in evaluation mode, in which images do not affect each other.

    The computation is in float32, regardless of autocast, because the signs of gradients matter. In float16, gradients
    of well classified images underflow to 0, and these images would not be attacked. In bfloat16, signs are wrong where
    terms cancel.
    """
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        leaf = images.detach().float().requires_grad_()
        logits = model(leaf)
        # The sum, not the mean, so that the result for an image does not depend on the batch size.
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    # The gradient with respect to the pixels is this gradient divided by `std`, which does not change signs.
    return gradient.sign(), logits.detach()


def moved_along(
    signs: torch.Tensor, images: torch.Tensor, *, epsilon: float, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Return images after a step of size `epsilon` along `signs`, float32.

    The input and output images are normalised. Their pixels are clipped to [0, 1] and not rounded to 8 bits.
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
    """Return a batch after one step along the signs of the gradient, and its logits before the step, both float32."""
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
    """Return the top-1 accuracy before and after the attack on the same images; call it in all processes.

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

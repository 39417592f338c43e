"""The training step: compute loss and gradients, update the weights, and stop if these are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dali_saliencymix.training import metrics
from dali_saliencymix.training.models import all_reduce, autocast
from dali_saliencymix.training.options import ModelOptions, OptimizerOptions

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Return parameter groups with their own weight decays, for an optimiser of PyTorch.

    ``norm_weight_decay`` applies to weights and biases of normalisation layers, and is ``weight_decay`` by default.
    ``bias_weight_decay`` applies to all biases; by default they have the decay of the weights in their layer. The
    groups do not depend on the values, so the state of an optimiser with other decays can be loaded.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = is_norm, is_bias = isinstance(module, NORMS), name.endswith("bias")
            decay = options.weight_decay
            if is_bias and options.bias_weight_decay is not None:
                decay = options.bias_weight_decay
            elif is_norm and options.norm_weight_decay is not None:
                decay = options.norm_weight_decay
            groups.setdefault(kind, {"params": [], "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


class Updater:
    """Updates an unwrapped model (without ``DistributedDataParallel``) from the gradients of one or more batches.

    With float16, it scales the loss, and skips updates whose gradients overflow. ``ema.module`` is the EMA of the
    weights. It also averages floating-point buffers, that is, the running statistics of batch normalisation: their
    average suits averaged weights better than the statistics of the last step. Integer counters are copied.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions, computation: ModelOptions) -> None:
        self._model = model
        self.options, self.computation = options, computation
        device = next(model.parameters()).device
        groups = parameter_groups(model, options)
        # Fused: one kernel, and the scaler skips a step without synchronising with the GPU.
        common: dict[str, Any] = {"lr": options.lr, "fused": True}
        self.optimizer: torch.optim.Optimizer
        if options.opt == "adamw":
            self.optimizer = torch.optim.AdamW(groups, betas=options.opt_betas, eps=options.opt_eps, **common)
        else:
            nesterov = options.nesterov and options.momentum > 0
            self.optimizer = torch.optim.SGD(groups, momentum=options.momentum, nesterov=nesterov, **common)
        if options.opt == "sgd" and options.momentum:
            # PyTorch 2.10 and 2.11 create these in the first step. If it is skipped, they stay uninitialised.
            for parameter in model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = GradScaler(device.type, enabled=computation.scales_loss)
        self.ema = _ema_of(model, options.model_ema_decay) if options.model_ema else None

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor, batches: int = 1) -> None:
        """Accumulate the gradients of the mean loss of one of `batches` batches of equal size.

        The sum is the gradient of the mean loss over the images of all these batches, as if they were one batch.
        """
        self.scaler.scale(loss / batches).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Update the weights and clear the gradients."""
        if self.options.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self.options.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self._model)

    def is_finite(self) -> bool:
        """Return whether all weights and running statistics are finite; this synchronises with the GPU."""
        # If float16 overflows in the forward pass, the update is skipped, but the inf is already in the running
        # statistics and stays there. Training does not use these, only validation does.
        finite = [part.isfinite().all() for part in self._model.state_dict().values()]
        return bool(torch.stack(finite).all())

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`, which is everything except the weights of the model."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            state |= {"model_ema": self.ema.module.state_dict(), "ema_updates": int(self.ema.n_averaged)}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state. The weights of the model must be loaded first.

        Options of the optimiser, such as the momentum, keep their present values. If the state holds no EMA of the
        weights, the EMA starts from the present weights.
        """
        options = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.restore_average(state)

    def restore_average(self, state: dict[str, Any]) -> None:
        """Restore only the EMA of the weights, which is all that validation needs."""
        if self.ema is not None:
            self.ema.module.load_state_dict(state.get("model_ema", self._model.state_dict()))
            self.ema.n_averaged.fill_(state.get("ema_updates", 0))


def train_on(
    network: nn.Module,
    updater: Updater,
    batch: Sequence[torch.Tensor],
    *,
    batches: int = 1,
    is_last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on ``(images, labels, source_labels, lam)``, one of `batches` per update; return loss and logits.

    With `is_last`, the weights are updated, after an all-reduce of the gradients if there are several processes.
    """
    images, labels, source_labels, lam = batch
    with all_reduce(network, wanted=is_last):
        with autocast(updater.computation, images.device):
            logits = network(images)
            loss = metrics.mixed_cross_entropy(logits, labels, source_labels, lam, updater.options.label_smoothing)
        updater.backward(loss, batches)
    if is_last:
        updater.update()
    return loss.detach(), logits.detach()


def _ema_of(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averaged: Any, current: Any, count: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:  # counters, whose averages would be rounded down at each step
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class DivergenceWatch:
    """Stops a run whose losses or weights are not finite, before a good checkpoint is lost.

    `max_nan_steps` losses in a row that are not finite are an error. They are counted on the device. The error names
    `last`, the checkpoint from which the run would resume.
    """

    def __init__(self, max_nan_steps: int, device: torch.device, last: Path) -> None:
        self._max_nan_steps = max_nan_steps
        self._last = last
        self._in_a_row = torch.zeros((), device=device)

    def count(self, loss: torch.Tensor) -> None:
        """Record the loss of a step, without synchronising with the GPU."""
        self._in_a_row = torch.where(loss.detach().isfinite(), 0, self._in_a_row + 1)

    def check_loss(self, loss: float, epoch: int, step: int) -> None:
        """Raise ValueError if too many losses in a row were not finite; this synchronises with the GPU.

        `loss` is the loss of `step` in `epoch`, both counted from 1.
        """
        count = int(self._in_a_row)
        if count >= self._max_nan_steps:
            msg = f"the loss became {loss} in epoch {epoch}, step {max(step - count + 1, 1)}; {self._advice()}"
            raise ValueError(msg)

    def check_weights(self, updater: Updater, epoch: int, step: int) -> None:
        """Raise ValueError if a weight or running statistic is not finite; this synchronises with the GPU."""
        if not updater.is_finite():
            place = f"epoch {epoch}, step {step}"
            msg = f"some weights or running statistics are not finite after {place}; {self._advice()}"
            raise ValueError(msg)

    def _advice(self) -> str:
        """Return what may help, and whether there is an earlier checkpoint."""
        left = f"{self._last} is from before" if self._last.exists() else "there is no checkpoint yet"
        return f"a smaller --lr may help, or more --lr-warmup-epochs, --clip-grad-norm 1, --amp-dtype bf16; {left}"

"""The training step: loss and gradients of batches, and with them new weights, as long as these are finite."""

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


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups with a weight decay each, for an optimiser of PyTorch.

    `norm_weight_decay` is that of weights and biases of normalisation layers, by default `weight_decay`;
    `bias_weight_decay` that of all biases, by default that of the weights beside them. Which groups there are does not
    depend on these: the state of an optimiser with other decays fits.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = is_norm, is_bias = isinstance(module, NORMS), name.endswith("bias")
            decay = weight_decay
            if is_bias and bias_weight_decay is not None:
                decay = bias_weight_decay
            elif is_norm and norm_weight_decay is not None:
                decay = norm_weight_decay
            groups.setdefault(kind, {"params": [], "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


class Updater:
    """Updates a model, which is not wrapped for several processes, from the gradients of one or more batches.

    `scale_loss` scales the loss, which float16 needs, and leaves an update out if gradients overflow. ``ema.module`` is
    the moving average of the model: of its parameters and of its floating-point buffers, the running statistics of
    batch normalisation, which fit averaged weights better than those of the last step do. Counters are copied.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions, *, scale_loss: bool = False) -> None:
        self._model = model
        self._clip_norm = options.clip_grad_norm
        device = next(model.parameters()).device
        groups = parameter_groups(
            model,
            weight_decay=options.weight_decay,
            norm_weight_decay=options.norm_weight_decay,
            bias_weight_decay=options.bias_weight_decay,
        )
        # Fused: one kernel, and the scaler need not ask a GPU whether to leave a step out.
        common: dict[str, Any] = {"lr": options.lr, "fused": True}
        self.optimizer: torch.optim.Optimizer
        if options.opt == "adamw":
            self.optimizer = torch.optim.AdamW(groups, betas=options.opt_betas, eps=options.opt_eps, **common)
        else:
            nesterov = options.nesterov and options.momentum > 0
            self.optimizer = torch.optim.SGD(groups, momentum=options.momentum, nesterov=nesterov, **common)
        if options.opt == "sgd" and options.momentum:
            # PyTorch 2.10 and 2.11 make these in the first step. If that one is left out they stay uninitialised.
            for parameter in model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = GradScaler(device.type, enabled=scale_loss)
        self.ema = _moving_average(model, options.model_ema_decay) if options.model_ema else None

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor, batches: int = 1) -> None:
        """Add the gradients of a batch's mean loss, one of `batches` batches of one size that make an update.

        They add up to the gradients of the mean over all these images, as if they had come in one batch.
        """
        self.scaler.scale(loss / batches).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Update the weights and forget the gradients."""
        if self._clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self._model)

    def is_finite(self) -> bool:
        """Return whether all weights and running statistics are numbers; this waits for the GPU."""
        # Where float16 overflows in the forward pass, the update is left out. The running mean has the inf by then, and
        # keeps it, though no step of the training looks at it: only a validation does.
        finite = [part.isfinite().all() for part in self._model.state_dict().values()]
        return bool(torch.stack(finite).all())

    def state(self) -> dict[str, Any]:
        """Return all but the weights of the model, for `restore`."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            state |= {"model_ema": self.ema.module.state_dict(), "ema_updates": int(self.ema.n_averaged)}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state; the model's own weights have to be loaded before.

        Options of the optimiser, such as the momentum, stay those that it was made with. Without a moving average in
        the state, it starts from the present weights.
        """
        options = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.restore_average(state)

    def restore_average(self, state: dict[str, Any]) -> None:
        """Take over the moving average alone, which is all that a validation needs."""
        if self.ema is not None:
            self.ema.module.load_state_dict(state.get("model_ema", self._model.state_dict()))
            self.ema.n_averaged.fill_(state.get("ema_updates", 0))


def train_on(
    network: nn.Module,
    updater: Updater,
    batch: Sequence[torch.Tensor],
    model: ModelOptions,
    *,
    label_smoothing: float = 0.0,
    batches: int = 1,
    is_last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on ``(images, labels, source_labels, lam)``, one of `batches` that make an update; return loss and logits.

    The last of them updates the weights, after an all-reduce of the gradients where there are several processes.
    """
    images, labels, source_labels, lam = batch
    with all_reduce(network, wanted=is_last):
        with autocast(model, images.device):
            logits = network(images)
            loss = metrics.mixed_cross_entropy(logits, labels, source_labels, lam, label_smoothing)
        updater.backward(loss, batches)
    if is_last:
        updater.update()
    return loss.detach(), logits.detach()


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averaged: Any, current: Any, count: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:  # counters, whose average would be rounded down at each step
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class DivergenceWatch:
    """Ends a run whose losses or weights are not finite, before a good checkpoint is lost.

    Such losses are counted on the device: `max_nan_steps` in a row are too many. An error names `last`, the checkpoint
    that a run would resume from.
    """

    def __init__(self, max_nan_steps: int, device: torch.device, last: Path) -> None:
        self._max_nan_steps = max_nan_steps
        self._last = last
        self._in_a_row = torch.zeros((), device=device)

    def count(self, loss: torch.Tensor) -> None:
        """Take note of the loss of a step, without waiting for the GPU."""
        self._in_a_row = torch.where(loss.detach().isfinite(), 0, self._in_a_row + 1)

    def check_loss(self, loss: float, epoch: int, step: int) -> None:
        """Raise ValueError if too many losses in a row were not finite; this waits for the GPU.

        `loss` is that of `step` of `epoch`, both counted from 1.
        """
        count = int(self._in_a_row)
        if count >= self._max_nan_steps:
            msg = f"the loss became {loss} in epoch {epoch}, step {max(step - count + 1, 1)}; {self._advice()}"
            raise ValueError(msg)

    def check_weights(self, updater: Updater, epoch: int, step: int) -> None:
        """Raise ValueError if a weight or a running statistic is not finite; this waits for the GPU."""
        if not updater.is_finite():
            place = f"epoch {epoch}, step {step}"
            msg = f"some weights or running statistics are not finite after {place}; {self._advice()}"
            raise ValueError(msg)

    def _advice(self) -> str:
        """Say what may help, and what is left of the training."""
        left = f"{self._last} is from before" if self._last.exists() else "there is no checkpoint yet"
        return f"a smaller --lr may help, more --lr-warmup-epochs, --clip-grad-norm 1, or --amp-dtype bf16; {left}"

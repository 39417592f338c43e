"""From the gradients of batches to new weights: parameter groups, loss scaling, clipping, update, moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dali_saliencymix.training.options import OptimizerOptions

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups by weight decay.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    weight_decay : float
        Of everything that the others are not for.
    norm_weight_decay : float, optional
        Of weights and biases of normalisation layers; by default `weight_decay`.
    bias_weight_decay : float, optional
        Of all biases, those of normalisation layers too; by default they are treated as the weights beside them.

    Returns
    -------
    list of dict
        For an optimiser of PyTorch; groups without a parameter are left out.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay = weight_decay
            if name == "bias" and bias_weight_decay is not None:
                decay = bias_weight_decay
            elif isinstance(module, NORMS) and norm_weight_decay is not None:
                decay = norm_weight_decay
            groups.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


class Updater:
    """Updates a model from the gradients of one or more batches.

    Parameters
    ----------
    model : torch.nn.Module
        The network, on its device; not wrapped for several processes.
    options : OptimizerOptions
        How to update it.
    scale_loss : bool
        Whether to scale the loss, which float16 needs.

    Attributes
    ----------
    optimizer : torch.optim.SGD
    scaler : torch.amp.GradScaler
        Switched off without `scale_loss`. Where gradients overflow it leaves the update out.
    ema : AveragedModel or None
        Moving average of the model, ``ema.module``: of its parameters and of its floating-point buffers, the running
        statistics of batch normalisation, which fit averaged weights better than those of the last step do. Counters
        are copied.
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
        self.optimizer = torch.optim.SGD(
            groups,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov and options.momentum > 0,
            fused=True,  # one kernel, and the scaler need not ask a GPU whether to leave a step out
        )
        if options.momentum:
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
        """Return whether all weights are numbers; this waits for the GPU."""
        finite = [parameter.isfinite().all() for parameter in self._model.parameters()]
        return bool(torch.stack(finite).all())

    def state(self) -> dict[str, Any]:
        """Return all but the weights of the model, for `restore`."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            state |= {"model_ema": self.ema.module.state_dict(), "ema_updates": int(self.ema.n_averaged)}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the model's own weights have to be loaded before.

        Options of the optimiser, such as the momentum, stay those that it was made with. A state without a moving
        average, where there is to be one now, begins it anew.
        """
        options = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and "model_ema" in state:
            self.ema.module.load_state_dict(state["model_ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averaged: Any, current: Any, count: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:  # counters, whose average would be rounded down at each step
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)

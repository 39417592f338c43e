"""The built-in training step: the network, the loss and the update of ``train.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.windows import MeasurementError
from dali_saliencymix.training.models import all_reduce, as_trained, model_on
from dali_saliencymix.training.optimisation import Updater, train_on
from dali_saliencymix.training.options import ModelOptions, OptimizerOptions


class TrainingStep:
    """The training step of a network of ``train.py``, on batches from anywhere.

    A batch from elsewhere is brought to the device, which then is part of the step. The learning rate is 0: the weights
    stay as they are, so that thousands of steps on one batch end in no overflow, while all that a step computes is
    computed. ``batches_per_update`` is that of ``--accumulation-steps``.
    """

    def __init__(
        self, options: ModelOptions, optimizer: OptimizerOptions, processes: Processes, *, num_classes: int
    ) -> None:
        self._options, self._device = options, processes.device
        self._label_smoothing = optimizer.label_smoothing
        try:
            model = model_on(processes.device, options, num_classes)
        except ValueError as error:
            msg = f"arch: {error}"
            raise MeasurementError(msg) from error
        self._updater = Updater(model, optimizer, scale_loss=options.scales_loss)
        self._updater.set_learning_rate(0.0)
        self.batches_per_update = optimizer.accumulation_steps
        self._batches = 0
        self.network = as_trained(model, options, distributed=processes.world_size > 1)

    def __call__(self, batch: Any) -> None:
        """Train on a batch: its first four-dimensional floating tensor, with its labels where they are ours."""
        tensors = _tensors(batch)
        images = next((part for part in tensors if part.ndim == 4 and part.is_floating_point()), None)
        if images is None:
            got = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for part in tensors)
            msg = (
                "the built-in step needs a batch with images as a floating tensor (N, C, H, W), got "
                f"{got or type(batch).__name__}; give your own with --step module:function"
            )
            raise MeasurementError(msg)
        if images.shape[1] != 3 and images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        images = images.to(self._device, non_blocking=True)
        if not self._options.amp:
            images = images.float()
        if len(tensors) == 4 and all(part.ndim == 1 for part in tensors[1:]):  # of pipelines/: labels twice, and lam
            targets = [part.to(self._device, non_blocking=True) for part in tensors[1:]]
        else:  # which label is right makes no difference to the time
            labels = torch.zeros(len(images), dtype=torch.long, device=self._device)
            targets = [labels, labels, torch.ones(len(images), device=self._device)]
        self._batches += 1
        train_on(
            self.network,
            self._updater,
            (images, *targets),
            self._options,
            label_smoothing=self._label_smoothing,
            batches=self.batches_per_update,
            is_last=self._batches % self.batches_per_update == 0,
        )

    def alone(self, batch: Any) -> None:
        """Train on a batch without the other processes: what this one needs for itself."""
        with all_reduce(self.network, wanted=False):
            self(batch)


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [tensor for part in batch for tensor in _tensors(part)]
    return []

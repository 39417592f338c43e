"""Synthetic data: one batch that repeats, to measure the training speed without the cost of a loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dali_saliencymix.loaders.base import Batches, Data, fingerprint_of
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes


def open_synthetic(options: DataOptions, classes: list[str] | None = None) -> SyntheticData:
    """Return synthetic data with `options.synthetic_classes` classes, or with the given `classes`."""
    images = options.synthetic_steps * options.batch_size
    names = classes or [f"class {number}" for number in range(options.synthetic_classes)]
    fingerprint, scaling = fingerprint_of(options, images, images), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return SyntheticData(names, images, images, Path("synthetic"), fingerprint, *scaling, options.synthetic_steps)


@dataclass(frozen=True)
class SyntheticData(Data):
    """A data set of one constant batch."""

    steps: int

    def train_loader(
        self, options: DataOptions, processes: Processes, *, state: dict[str, int] | None = None
    ) -> Batches:
        """Return the training batches of this process, resumed from `state` if it is given."""
        images, labels = self._batch(options, processes, options.train_crop_size)
        lam = torch.full((options.batch_size,), 1.0 if options.mix is None else 0.5, device=processes.device)
        return _Constant((images, labels, labels.roll(1), lam), self.steps, state)

    def val_loader(self, options: DataOptions, processes: Processes) -> Batches:
        """Return the validation batches of this process."""
        steps = min(self.steps, options.val_steps or self.steps)
        return _Constant(self._batch(options, processes, options.val_crop_size), steps)

    def _batch(self, options: DataOptions, processes: Processes, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(options.seed)
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        images = torch.randn(options.batch_size, 3, size, size, generator=generator)
        labels = torch.randint(len(self.classes), (options.batch_size,), generator=generator)
        return images.to(processes.device, memory_format=memory_format), labels.to(processes.device)


class _Constant(Batches):
    """The same batch at every step of an epoch."""

    def __init__(self, batch: tuple[torch.Tensor, ...], steps: int, state: dict[str, int] | None = None) -> None:
        self._batch, self._length = batch, steps
        self._step = state["step"] if state else 0

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        return self._batch

    def state(self) -> dict[str, int]:
        return {"step": self._step}

"""The loader and the step of ``train.py`` for the bottleneck tool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dali_saliencymix.bottleneck.sources import OF_PIPELINES, Settings, Source, bytes_of
from dali_saliencymix.loaders.base import chosen_backend
from dali_saliencymix.loaders.dali import process_on
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.folder import FolderData, training_arguments
from dali_saliencymix.loaders.imagenet import training_builder
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.windows import MeasurementError, in_one_line
from dali_saliencymix.training.models import all_reduce, as_trained, model_on
from dali_saliencymix.training.optimisation import Updater, train_on
from dali_saliencymix.training.options import ModelOptions, OptimizerOptions, ScheduleOptions, TrainingOptions
from dali_saliencymix.training.schedule import Phase, phase_at

# Settings of the loaders without DALI by data backend, each with the field of `DataOptions` that sets it.
_SETTINGS = {
    "pytorch": {"batch_size": "batch_size", "workers": "workers", "prefetch_factor": "prefetch"},
    "synthetic": {"batch_size": "batch_size"},
}


def training_source(training: TrainingOptions, processes: Processes, *, images: int) -> Source:
    """Return a source for the training batches of ``train.py`` with these options.

    Image folders that DALI reads are split into stages; other backends and CIFAR are measured as a whole. Each process
    reads at most `images` images of a folder, spread evenly over it.
    """
    phase, instead = measured_phase(training.schedule, training.data.train_crop_size)
    options = phase.applied_to(training.data)
    data, backend = open_data(options), chosen_backend(options)
    conditions = {
        "data": str(data.root),
        "images_in_data_set": data.train_images,
        "classes": len(data.classes),
        "options": dict(sorted(training.config.items())),
    }
    files = dataset_bytes = None
    if isinstance(data, FolderData):
        whole = options.batch_size * processes.world_size
        if data.train_images < whole:
            instead.append(
                f"{data.train_images} images are too few for a step: train.py would reject them, here they are repeated"
            )
        chosen = _spread_indices(len(data.train), whole, images * processes.world_size)
        data = replace(data, train=data.train.take(chosen))
        files = sorted(set(data.train.files))
        conditions["images_read"] = len(files)
        read = bytes_of(files)
        dataset_bytes = read and read / len(files) * data.train_images
    if instead:
        conditions["notes"] = instead
    process_on(options, processes)  # raises if the backend needs a GPU and the run has none
    names = _SETTINGS.get(backend, OF_PIPELINES)
    if backend != "dali-gpu" or not isinstance(data, FolderData):  # no JPEG files are decoded on a GPU
        names = {name: option for name, option in names.items() if option != "hw_decoder_load"}

    def with_changes(changed: Settings) -> DataOptions:
        return replace(options, **{names[name]: value for name, value in changed.items()})

    def opened(changed: Settings) -> Iterable[Any]:
        return data.train_loader(with_changes(changed), processes)

    def defined(changed: Settings) -> Any:
        assert isinstance(data, FolderData)
        arguments = training_arguments(with_changes(changed), processes)
        return training_builder(**arguments)(data.train.files, data.train.labels)

    is_split = isinstance(data, FolderData) and backend in ("dali-gpu", "dali-cpu")
    what = "pipeline" if is_split else f"loader, {options.dataset} by {backend}"
    return Source(
        f"training {what}, mix {'none' if options.mix is None else options.mix.mode}",
        settings={name: getattr(options, option) for name, option in names.items()},
        open=opened,
        define=defined if is_split else None,
        files=files,
        dataset_bytes=dataset_bytes,
        ahead=options.prefetch * (options.workers if backend == "pytorch" else 1),
        conditions=conditions,
        options=names,
        is_training=True,
    )


def measured_phase(schedule: ScheduleOptions, crop_size: int) -> tuple[Phase, list[str]]:
    """Return the epochs whose batches are measured, and a note if a training has other epochs.

    These are the epochs with the largest images, and among them the mixed ones.
    """
    begun: dict[Phase, list[int]] = {}
    for epoch in range(schedule.epochs):
        begun.setdefault(phase_at(epoch, schedule, crop_size=crop_size), []).append(epoch + 1)
    chosen = max(begun, key=lambda phase: (phase.crop_size, phase.mixing))
    if len(begun) == 1:
        return chosen, []

    def described(phase: Phase) -> str:
        mixing = "" if not schedule.mix_off_epochs else ", mixed" if phase.mixing else ", not mixed"
        return f"{begun[phase][0]} to {begun[phase][-1]} ({phase.crop_size}x{phase.crop_size} pixels{mixing})"

    others = ", ".join(described(phase) for phase in begun if phase != chosen)
    return chosen, [f"measured with the batches of epochs {described(chosen)}; not measured: epochs {others}"]


def _spread_indices(length: int, whole: int, wanted: int) -> list[int]:
    """Return evenly spread indices of files, a multiple of `whole`; they repeat if there are fewer than `whole`."""
    if length < whole:
        return [index % length for index in range(4 * whole)]
    count = max(min(length, wanted) // whole, 1) * whole
    return [index * length // count for index in range(count)]


class TrainingStep:
    """The training step of a network of ``train.py``, for batches of any loader.

    A batch that is not on the device is copied there as part of the step. The learning rate is 0, so that thousands of
    steps on one batch do not overflow; the step computes everything else as usual. ``batches_per_update`` is the value
    of ``--accumulation-steps``.
    """

    def __init__(
        self,
        options: ModelOptions,
        optimizer: OptimizerOptions,
        processes: Processes,
        *,
        num_classes: int,
        image_size: int = 224,
    ) -> None:
        self._options, self._device = options, processes.device
        with in_one_line("arch", str):
            model = model_on(processes.device, options, num_classes, image_size=image_size)
        self._updater = Updater(model, optimizer, options)
        self._updater.set_learning_rate(0.0)
        self.batches_per_update = optimizer.accumulation_steps
        self._batches = 0
        self.network = as_trained(model, options, distributed=processes.world_size > 1)

    def __call__(self, batch: Any) -> None:
        """Train on the first four-dimensional floating-point tensor of a batch, with the labels of ``train.py``."""
        tensors = _tensors(batch)
        images = next((part for part in tensors if part.ndim == 4 and part.is_floating_point()), None)
        if images is None:
            got = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for part in tensors)
            msg = (
                "the built-in step needs a batch with images as a floating-point tensor (N, C, H, W), got "
                f"{got or type(batch).__name__}; pass your own step with --step module:function"
            )
            raise MeasurementError(msg)
        if images.shape[1] != 3 and images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        images = images.to(self._device, non_blocking=True)
        if not self._options.amp:
            images = images.float()
        if len(tensors) == 4 and all(part.ndim == 1 for part in tensors[1:]):  # labels, source labels, lam
            targets = [part.to(self._device, non_blocking=True) for part in tensors[1:]]
        else:  # the values of the labels do not affect the time
            labels = torch.zeros(len(images), dtype=torch.long, device=self._device)
            targets = [labels, labels, torch.ones(len(images), device=self._device)]
        self._batches += 1
        train_on(
            self.network,
            self._updater,
            (images, *targets),
            batches=self.batches_per_update,
            is_last=self._batches % self.batches_per_update == 0,
        )

    def alone(self, batch: Any) -> None:
        """Train on a batch without all-reduce, so that the time is that of this process alone."""
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

"""The training batches of ``train.py`` as a source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dali_saliencymix.bottleneck.sources import Settings, Source, bytes_of
from dali_saliencymix.training.options import ScheduleOptions
from dali_saliencymix.training.schedule import Phase, phase_at

if TYPE_CHECKING:
    from dali_saliencymix.loaders.base import Data
    from dali_saliencymix.loaders.imagenet import FolderData
    from dali_saliencymix.loaders.options import DataOptions
    from dali_saliencymix.loaders.processes import Processes
    from dali_saliencymix.training.options import TrainingOptions


def training_source(training: TrainingOptions, processes: Processes, *, images: int) -> Source:
    """Return a source for the training batches of ``train.py`` with these options.

    Folders of images that DALI reads are cut into stages; other backends and CIFAR are measured as a whole. Of a folder
    at most `images` are read for each process, spread evenly over it.
    """
    from dali_saliencymix.loaders.base import chosen_backend
    from dali_saliencymix.loaders.data import open_data
    from dali_saliencymix.loaders.imagenet import FolderData

    phase, instead = measured_phase(training.schedule, training.data.train_crop_size)
    options = phase.applied_to(training.data)
    data, backend = open_data(options), chosen_backend(options)
    conditions = {
        "data": str(data.root),
        "images_in_data_set": data.train_images,
        "classes": len(data.classes),
        "options": dict(sorted(training.config.items())),
    }
    files = size = None
    if isinstance(data, FolderData):
        whole = options.batch_size * processes.world_size
        if data.train_images < whole:
            instead.append(
                f"the {data.train_images} images are too few for a step, and train.py refuses them: they are repeated"
            )
        data = _part_of(data, whole, images * processes.world_size)
        files = sorted(set(data.train.files))
        conditions["images_read"] = len(files)
        size = bytes_of(files)
        size = size and size / len(files) * data.train_images
    if instead:
        conditions["notes"] = instead
    about = {"files": files, "dataset_bytes": size, "conditions": conditions}
    if isinstance(data, FolderData) and backend in ("dali-gpu", "dali-cpu"):
        return _dali_source(options, processes, data, about)
    return _whole_source(options, processes, data, backend, about)


def measured_phase(schedule: ScheduleOptions, crop_size: int) -> tuple[Phase, list[str]]:
    """Return the epochs whose batches stand for a training, and what to say of the others where there are others.

    They are those with the largest images, and of these the ones that are mixed.

    Examples
    --------
    >>> schedule = ScheduleOptions(epochs=16, progressive_size=("128@0", "160@6"), mix_off_epochs=2)
    >>> measured_phase(schedule, 224)[0]
    Phase(begin=6, crop_size=160, mixing=True)
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
    return chosen, [f"the batches are those of epochs {described(chosen)}; not measured: epochs {others}"]


def _dali_source(options: DataOptions, processes: Processes, data: FolderData, about: dict[str, Any]) -> Source:
    from dali_saliencymix.loaders.imagenet import training_arguments, training_builder, training_loader

    arguments, folder = training_arguments(options, processes), data.train
    settings: dict[str, Any] = {name: arguments[name] for name in ("batch_size", "num_threads")}
    settings["prefetch_queue_depth"] = 2
    if arguments["process_on"] == "gpu":
        settings["hw_decoder_load"] = 0.65

    def opened(changed: Settings) -> Iterable[Any]:
        now = {**arguments, **settings, **changed}
        return training_loader(folder, max_bad_batches=options.max_bad_batches, **now)

    def defined(changed: Settings) -> Any:
        return training_builder(**{**arguments, **settings, **changed})(folder.files, folder.labels, None)

    return Source(f"training pipeline, mix {_name(options)}", settings, opened, defined, ahead=2, **about)


def _whole_source(
    options: DataOptions, processes: Processes, data: Data, backend: str, about: dict[str, Any]
) -> Source:
    workers = {"pytorch": "workers", "synthetic": None}.get(backend, "num_threads")  # what -j sets
    settings = {"batch_size": options.batch_size, **({workers: options.workers} if workers else {})}

    def opened(changed: Settings) -> Iterable[Any]:
        changed = {"workers" if name == workers else name: value for name, value in changed.items()}
        return data.train_loader(replace(options, **changed), processes)

    name = f"training loader, {options.dataset} by {backend}, mix {_name(options)}"
    ahead = 2 * options.workers if backend == "pytorch" else 2
    return Source(name, settings, opened, ahead=ahead, **about)


def _name(options: DataOptions) -> str | None:
    return "none" if options.mix is None else options.mix.mode


def _part_of(data: FolderData, whole: int, wanted: int) -> FolderData:
    chosen = _spread_indices(len(data.train), whole, wanted)
    return replace(data, train=data.train.take(chosen))


def _spread_indices(length: int, whole: int, wanted: int) -> list[int]:
    """Return indices of files, in number a multiple of `whole`; repeated only where there are fewer files than that."""
    if length < whole:
        return [index % length for index in range(4 * whole)]
    count = max(min(length, wanted) // whole, 1) * whole
    return [index * length // count for index in range(count)]

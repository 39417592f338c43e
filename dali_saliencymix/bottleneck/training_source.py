"""The training batches of ``train.py`` as a source."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dali_saliencymix.bottleneck.errors import BottleneckError
from dali_saliencymix.bottleneck.sources import Settings, Source, bytes_of
from dali_saliencymix.training.schedule import Phase, phase_at

if TYPE_CHECKING:
    from dali_saliencymix.loaders.data import Data, FolderData
    from dali_saliencymix.training.distributed import Processes


def training_source(args: argparse.Namespace, processes: Processes, *, images: int) -> Source:
    """Return a source for the training batches of ``train.py`` with these options.

    Folders of images that DALI reads are cut into stages; other backends and CIFAR are measured as a whole.

    Parameters
    ----------
    args : argparse.Namespace
        Of `dali_saliencymix.training.arguments.parse_arguments`.
    processes : Processes
        Which process this is, and where it computes.
    images : int
        How many images of a folder to read at most, for each process; spread evenly over it.
    """
    from dali_saliencymix.loaders.data import FolderData, chosen_backend, open_data

    phase, instead = measured_phase(args)
    data, backend = open_data(args), chosen_backend(args)
    conditions = {
        "data": str(data.root),
        "images_in_data_set": data.train_images,
        "classes": len(data.classes),
        "options": {name: _plain(value) for name, value in sorted(vars(args).items())},
    }
    if not phase.mixing:
        args = argparse.Namespace(**{**vars(args), "mix": "none"})
    files = size = None
    if isinstance(data, FolderData):
        if data.train_images < args.batch_size * processes.world_size:
            instead.append(
                f"the {data.train_images} images are too few for a step, and train.py refuses them: they are repeated"
            )
        data = _part_of(data, args.batch_size * processes.world_size, images * processes.world_size)
        files = sorted(set(data.train.files))
        conditions["images_read"] = len(files)
        size = bytes_of(files)
        size = size and size / len(files) * data.train_images
    if instead:
        conditions["measured_instead"] = instead
    about = {"files": files, "dataset_bytes": size, "conditions": conditions}
    if backend == "dali-gpu" and processes.device.type != "cuda":
        msg = f"--data-backend dali-gpu needs a run on a GPU, and this one is on {processes.device}; take dali-cpu"
        raise BottleneckError(msg)
    if isinstance(data, FolderData) and backend in ("dali-gpu", "dali-cpu"):
        return _dali_source(args, processes, data, phase.crop_size, on_gpu=backend == "dali-gpu", about=about)
    return _whole_source(args, processes, data, phase.crop_size, backend, about)


def measured_phase(args: argparse.Namespace) -> tuple[Phase, list[str]]:
    """Return the epochs whose batches stand for a training, and what to say of the others where there are others.

    They are those with the largest images, and of these the ones that are mixed.

    Examples
    --------
    >>> options = {"epochs": 16, "train_crop_size": 224, "progressive_size": ["128@0", "160@6"], "mix_off_epochs": 2}
    >>> measured_phase(argparse.Namespace(**options))[0]
    Phase(begin=6, crop_size=160, mixing=True)
    """
    begun: dict[Phase, list[int]] = {}
    for epoch in range(args.epochs):
        phase = phase_at(
            epoch,
            epochs=args.epochs,
            crop_size=args.train_crop_size,
            progressive_size=args.progressive_size,
            mix_off_epochs=args.mix_off_epochs,
        )
        begun.setdefault(phase, []).append(epoch + 1)
    chosen = max(begun, key=lambda phase: (phase.crop_size, phase.mixing))
    if len(begun) == 1:
        return chosen, []

    def described(phase: Phase) -> str:
        mixing = "" if not args.mix_off_epochs else ", mixed" if phase.mixing else ", not mixed"
        return f"{begun[phase][0]} to {begun[phase][-1]} ({phase.crop_size}x{phase.crop_size} pixels{mixing})"

    others = ", ".join(described(phase) for phase in begun if phase != chosen)
    return chosen, [f"the batches are those of epochs {described(chosen)}; not measured: epochs {others}"]


def _dali_source(
    args: argparse.Namespace,
    processes: Processes,
    data: FolderData,
    crop_size: int,
    *,
    on_gpu: bool,
    about: dict[str, Any],
) -> Source:
    from dali_saliencymix.loaders.dali import training_loader
    from dali_saliencymix.loaders.data import dali_augmentation
    from dali_saliencymix.loaders.imagenet import training_pipeline

    device, folder = processes.device, data.train
    settings = {"batch_size": args.batch_size, "num_threads": args.workers, "prefetch_queue_depth": 2}
    if on_gpu:
        settings["hw_decoder_load"] = 0.65
    common = {
        "process_on": "gpu" if on_gpu else "cpu",
        **dali_augmentation(args, crop_size),
        "channels_last": args.channels_last,
    }

    def opened(changed: Settings) -> Iterable[Any]:
        now = {**settings, **changed}
        return training_loader(
            folder,
            prefetch=now.pop("prefetch_queue_depth"),
            device=device,
            seed=args.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            max_bad_batches=args.max_bad_batches,
            **now,
            **common,
        )

    def defined(changed: Settings) -> Any:
        return training_pipeline(
            folder.files,
            folder.labels,
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=(device.index or 0) if device.type == "cuda" else None,
            shard_id=processes.rank,
            num_shards=processes.world_size,
            shuffle_seed=args.seed,
            seed=args.seed + processes.rank,
            **{**settings, **changed},
            **common,
        )

    return Source(f"training pipeline, mix {args.mix}", settings, opened, defined, ahead=2, **about)


def _whole_source(
    args: argparse.Namespace, processes: Processes, data: Data, crop_size: int, backend: str, about: dict[str, Any]
) -> Source:
    workers = {"pytorch": "workers", "synthetic": None}.get(backend, "num_threads")  # what -j sets
    settings = {"batch_size": args.batch_size, **({workers: args.workers} if workers else {})}

    def opened(changed: Settings) -> Iterable[Any]:
        changed = {"workers" if name == workers else name: value for name, value in changed.items()}
        now = argparse.Namespace(**{**vars(args), **changed})
        return data.train_loader(now, processes, crop_size=crop_size)

    name = f"training loader, {args.dataset} by {backend}, mix {args.mix}"
    ahead = 2 * args.workers if backend == "pytorch" else 2
    return Source(name, settings, opened, ahead=ahead, **about)


def _part_of(data: FolderData, whole: int, wanted: int) -> FolderData:
    folder = data.train
    chosen = _spread_indices(len(folder), whole, wanted)
    part = replace(
        folder, files=[folder.files[index] for index in chosen], labels=[folder.labels[index] for index in chosen]
    )
    return replace(data, train=part)


def _spread_indices(length: int, whole: int, wanted: int) -> list[int]:
    """Return indices of files, in number a multiple of `whole`; repeated only where there are fewer files than that."""
    if length < whole:
        return [index % length for index in range(4 * whole)]
    count = max(min(length, wanted) // whole, 1) * whole
    return [index * length // count for index in range(count)]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None), list)) else str(value)

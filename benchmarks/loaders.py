"""The loaders that are compared: endless streams of training batches.

A batch is a tuple whose first tensor is (N, 3, H, W) float32, normalised, on the device of the training. Loaders that
mix do so with every image and alpha 1. All loaders use the same number of CPU threads or worker processes. ``none`` is
the upper limit.

All resize bilinearly with antialiasing. Each library decodes JPEG as it does by default: PIL decodes the whole image
and interpolates the subsampled colours, DALI decodes the window that is kept and does not interpolate them.

========================  =============================================================================================
``none``                  DALI: decode, random crop, resize, flip, normalise
``none, again``           the same, to show the noise: its ratio to ``none`` would be 1 without noise
``cutmix``, ``mixup``     the same with the operator of that name in the graph, with fused flip and normalise, as in
                          ``train.py``
``saliencymix NAME``      the same with our ``saliencymix`` and the detector NAME in the graph
``..., apart``            the operator only mixes; DALI flips and normalises, as for ``none``
``..., samples``          the operator is ``fn.python_function``, which gets lists of samples instead of batches
``..., array``            the operator computes with array operations instead of kernels
``decoder X, T threads``  on a GPU: ``saliencymix`` with T threads, and the share X of the images for the JPEG engine
``after: ...``            DALI without mixing, then the mix on the batch from the iterator, as with NVIDIA's
                          MixUpWrapper. SaliencyMix needs 8-bit images: DALI returns these, and PyTorch normalises after
                          the mix, which counts as part of the cost. CutMix and mixup get DALI's normalised batch
``torch``                 torch DataLoader: PIL, torchvision's RandomResizedCrop, flip, to tensor, Normalize
``torch: cutmix``         the same, with torchvision.transforms.v2.CutMix in the collate function
``torch: opencv``         the same, with OpenCV's fine_grained detector and SaliencyMix image by image on 8-bit images,
                          also in the collate function: there a source is an image of the batch and need not be decoded
                          again
========================  =============================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision.transforms.v2 as transforms
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch.utils import data
from torchvision.datasets.folder import pil_loader

from benchmarks import machine, opencv, program
from dali_saliencymix import DETECTORS, draw_params
from dali_saliencymix._dali import python_operator
from dali_saliencymix._dali.python_operator import to_device
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders import imagenet
from dali_saliencymix.loaders.imagenet import decode_window, read_files, training_loader
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.options import MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from dali_saliencymix.pytorch import SaliencyMix

# The function that has to return False for a loader with this suffix.
_RETURNS_FALSE = {"apart": (imagenet, "pays_in_the_mix"), "samples": (python_operator, "whole_batches_work")}
_OTHER_WAYS = ("apart", "samples", "array")  # suffixes of the variants that differ from the default
_COMPARED = ("spectral_residual", "fine_grained")  # the detectors of this package's default and of the paper
_THREADS, _DECODER_LOADS = (16, 8, 4), (0, 0.3, 0.65, 0.9)
_CUTMIX = MixOptions(modes={"cutmix": 1.0})
PREFETCH = 2  # batches that DALI prefetches, and that each worker of PyTorch's loader prefetches


@dataclass(frozen=True)
class Setting:
    """The options that all loaders of a comparison share."""

    folder: ImageFolder
    batch_size: int
    workers: int
    crop_size: int
    device: torch.device
    num_classes: int = 1000
    hw_decoder_load: float = 0.65


OPTIONS = ("data", "batch_size", "workers", "crop_size", "hw_decoder_load")  # options of scripts that measure loaders


def add_variants(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add the option that selects loaders by name."""
    named = "measure these loaders as one group, with none (default: all, in groups)"
    parser.add_argument("--variants", nargs="+", choices=list(names), metavar="NAME", help=named)


def setting_of(options: argparse.Namespace, folder: ImageFolder, **changes: Any) -> Setting:
    """Return the setting of the command line, with `changes` and with images for at least 20 batches."""
    asked: dict[str, Any] = {name: getattr(options, name) for name in OPTIONS[1:]}
    device = torch.device("cuda", 0) if machine.wants_gpu(options) else torch.device("cpu")
    times = math.ceil(20 * options.batch_size / len(folder))
    repeated = folder.take([*range(len(folder))] * times)
    return Setting(**{"folder": repeated, "device": device, **asked, **changes})


@dataclass(frozen=True)
class Stream:
    """Endless batches, the number that are prefetched (`ahead`), and the number that are produced at a time."""

    batches: Iterator[tuple[torch.Tensor, ...]]
    ahead: int
    at_a_time: int = 1


Maker = Callable[[Setting], Stream]


def images_per_second(
    stream: Stream,
    batches: int,
    *,
    use: Callable[..., object] = lambda *batch: None,
    watch: contextlib.AbstractContextManager[object] | None = None,
) -> float:
    """Pass batches to `use` as fast as they come and return the rate; the context `watch` is active while timing.

    Prefetched batches are used up before the clock starts. Afterwards the function sleeps for as long as it takes to
    prefetch them again, because a loader must not work during another one's turn. The number of batches is rounded up
    to a multiple of `Stream.at_a_time`: of 18 batches from 16 workers, the last two would take as long as the 16
    before.
    """
    batches = -(-batches // stream.at_a_time) * stream.at_a_time
    for _ in range(stream.ahead):
        images, *targets = next(stream.batches)
        use(images, *targets)
    _wait(images)
    with watch or contextlib.nullcontext():
        start = time.perf_counter()
        for _ in range(batches):
            images, *targets = next(stream.batches)
            use(images, *targets)
        _wait(images)
        seconds = time.perf_counter() - start
    time.sleep(seconds * stream.ahead / batches)
    return batches * len(images) / seconds


def _wait(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def say_memory(device: torch.device) -> None:
    """Write to stderr how much memory of a GPU is in use."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        program.say(f"GPU memory in use: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB")


def makers() -> dict[str, Maker]:
    """Return the makers of all loaders by name."""
    of = functools.partial
    made: dict[str, Maker] = {
        "torch": of(torch_loader, collate=data.default_collate),
        "torch: cutmix": of(torch_loader, collate=_cutmix_collate),
        "torch: opencv": of(torch_loader, collate=_opencv_collate, eight_bit=True),
        "none": in_graph,
        "none, again": in_graph,
        **{name: of(in_graph, mix=MixOptions(), **settings) for name, settings in decoder_settings().items()},
        "cutmix": of(in_graph, mix=_CUTMIX),
        "cutmix, apart": of(in_graph, mix=_CUTMIX, way="apart"),
        "mixup": of(in_graph, mix=MixOptions(modes={"mixup": 1.0})),
    }
    for name in DETECTORS:
        made[f"saliencymix {name}"] = of(in_graph, mix=MixOptions(saliency=name))
        made |= {
            f"saliencymix {name}, {way}": of(in_graph, mix=MixOptions(saliency=name), way=way) for way in _OTHER_WAYS
        }
    for name, transform in (("cutmix", transforms.CutMix), ("mixup", transforms.MixUp)):
        made[f"after: {name}"] = of(after_loader, mix=of(_mixer, transform))
    for name in _COMPARED:
        made[f"after: saliencymix {name}"] = of(_after_on_8_bits, mix=of(_mixer, of(SaliencyMix, saliency=name)))
    return made


def ways(detector: str) -> list[str]:
    """Return the names of the SaliencyMix loaders with a detector: the default and its variants."""
    return [f"saliencymix {detector}", *(f"saliencymix {detector}, {way}" for way in _OTHER_WAYS)]


def decoder_settings() -> dict[str, dict[str, Any]]:
    """Return the settings for decoding on a GPU by loader name: threads, and the share of the JPEG engine."""
    return {
        f"decoder {load}, {threads} threads": {"num_threads": threads, "hw_decoder_load": load}
        for threads, load in itertools.product(_THREADS, _DECODER_LOADS)
        if threads <= cores()
    }


def groups(*, gpu: bool) -> list[list[str]]:
    """Return the names of the loaders that are compared by default, in groups, the most important first."""
    of_torch, after = ([name for name in makers() if name.startswith(kind)] for kind in ("torch", "after"))
    detectors = [f"saliencymix {name}" for name in DETECTORS]
    if not gpu:
        apart = [f"saliencymix {name}, apart" for name in _COMPARED]
        return [[*of_torch, "none", "none, again", "cutmix", "cutmix, apart", "mixup", *detectors, *apart, *after]]
    others = [f"saliencymix {name}" for name in DETECTORS if name not in _COMPARED]
    first = ["none", "none, again", *ways("spectral_residual")]
    return [first, ["cutmix", "mixup", *ways("fine_grained")], after, of_torch, others]


# ---- DALI ------------------------------------------------------------------------------------------------------------


def in_graph(
    setting: Setting,
    *,
    mix: MixOptions | None = None,
    way: str | None = None,
    **options: Any,
) -> Stream:
    """Return the stream of the training pipeline; `way` is one of the suffixes in the table above, or None.

    `options` are further options of the loader and override the setting.
    """
    options = {"num_threads": setting.workers, "hw_decoder_load": setting.hw_decoder_load, **options}
    if way == "array":
        mix = replace(mix, algorithm="array")
    replaced = mock.patch.object(*_RETURNS_FALSE[way], return_value=False) if way in _RETURNS_FALSE else None
    with replaced or contextlib.nullcontext():
        loader = training_loader(
            setting.folder,
            batch_size=setting.batch_size,
            device=setting.device,
            crop_size=setting.crop_size,
            mix=mix,
            prefetch=PREFETCH,
            **options,
        )
    return Stream(_endless(loader), PREFETCH + 1)


def _mixer(transform: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    return transform(num_classes=setting.num_classes)


def after_loader(setting: Setting, mix: Callable[[Setting], Callable[..., Any]]) -> Stream:
    """Return the stream of the training pipeline without mixing, followed by ``mix(setting)`` on its batches."""
    mixer = mix(setting)
    stream = in_graph(setting)
    return Stream((mixer(images, labels) for images, labels, *_ in stream.batches), stream.ahead)


def _after_on_8_bits(setting: Setting, mix: Callable[[Setting], Callable[..., Any]]) -> Stream:
    device, device_id = ("gpu", 0) if setting.device.type == "cuda" else ("cpu", None)
    common = {"batch_size": setting.batch_size, "num_threads": setting.workers, "prefetch_queue_depth": PREFETCH}
    asked = (setting.folder, setting.crop_size, device, setting.hw_decoder_load)
    pipeline = _eight_bit_pipeline(*asked, device_id=device_id, seed=0, **common)
    batches = DALIGenericIterator([pipeline], ["images", "labels"], reader_name="reader", auto_reset=True)
    mixer = mix(setting)

    def mixed() -> Iterator[tuple[torch.Tensor, ...]]:
        for (batch,) in _endless(batches):
            images, targets = mixer(batch["images"].permute(0, 3, 1, 2), batch["labels"].flatten())
            yield normalised(images), targets

    return Stream(mixed(), PREFETCH + 1)


@pipeline_def
def _eight_bit_pipeline(folder: ImageFolder, crop_size: int, device: str, hw_decoder_load: float) -> tuple[Any, ...]:
    """Define the training pipeline without normalisation; return images (HWC, uint8) and labels."""
    encoded, label = read_files(folder.files, folder.labels, 0, 1, shuffle_after_epoch=True)
    start, shape = fn.random_crop_generator(
        fn.peek_image_shape(encoded), random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
    )
    images = fn.resize(decode_window(encoded, start, shape, device, hw_decoder_load), size=(crop_size, crop_size))
    return fn.flip(images, horizontal=fn.random.coin_flip()), to_device(device, label)


# ---- PyTorch's DataLoader --------------------------------------------------------------------------------------------

_TO_FLOAT = [
    transforms.ToDtype(torch.float32, scale=True),
    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True),
]


def crop_and_mirror(crop_size: int) -> list[Callable[[Any], Any]]:
    """Return torchvision's random crop and horizontal flip, with their defaults."""
    return [transforms.RandomResizedCrop(crop_size), transforms.RandomHorizontalFlip()]


class Files(data.Dataset):
    """A dataset of ``transform(load(file))`` and the label for each file of a folder."""

    def __init__(self, folder: ImageFolder, load: Callable[[str], Any], transform: Callable[[Any], Any]) -> None:
        self._folder, self._load, self._transform = folder, load, transform

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._load(self._folder.files[index])), self._folder.labels[index]


def torch_loader(
    setting: Setting,
    collate: Callable[..., Any],
    *,
    load: Callable[[str], Any] = pil_loader,
    eight_bit: bool = False,
) -> Stream:
    """Return the stream of a torch DataLoader; `load` decodes a file to a PIL image or a tensor (3, H, W)."""
    if collate is _opencv_collate and (why_not := opencv.why_not()):
        raise ImportError(why_not)
    to_tensor = [transforms.PILToTensor()] if load is pil_loader else []
    steps = [*crop_and_mirror(setting.crop_size), *to_tensor, *([] if eight_bit else _TO_FLOAT)]
    dataset = Files(setting.folder, load, transforms.Compose(steps))
    batches = worker_batches(dataset, setting, collate_fn=collate, pin_memory=setting.device.type == "cuda")
    batches_there = ([part.to(setting.device, non_blocking=True) for part in batch] for batch in batches)
    return Stream(batches_there, PREFETCH * setting.workers, at_a_time=setting.workers)


def worker_batches(dataset: data.Dataset, setting: Setting, **options: Any) -> Iterator[Any]:
    """Return endless batches of a torch DataLoader; `options` are passed on to it."""
    check_shared_memory(setting)
    # A fork of this process might hang, since CUDA and DALI have threads in it. The server imports for all workers.
    multiprocessing.set_forkserver_preload(["benchmarks.peers"])
    loader = data.DataLoader(
        dataset,
        setting.batch_size,
        sampler=data.RandomSampler(dataset, replacement=True, num_samples=10**9),  # one endless epoch
        num_workers=setting.workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="forkserver",
        **options,
    )
    return iter(loader)  # this starts the workers


def check_shared_memory(setting: Setting) -> None:
    """Raise MemoryError if /dev/shm has no room for the batches of the worker processes."""
    free = shutil.disk_usage("/dev/shm").free
    batch = 4 * 3 * setting.batch_size * setting.crop_size**2
    needed = batch * (PREFETCH + 1) * setting.workers
    if free < needed:
        msg = f"/dev/shm must have {needed >> 20} MiB for the batches of {setting.workers} workers"
        msg += f", got {free >> 20} MiB"
        raise MemoryError(msg)


def _cutmix_collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return transforms.CutMix(num_classes=1000)(*data.default_collate(samples))


def _opencv_collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, ...]:
    images, labels = data.default_collate(samples)
    rng = np.random.default_rng(torch.randint(2**62, ()).item())
    source_index, lam = draw_params(rng, len(images))
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    mixed, lam = opencv.saliencymix(channels_last, source_index, lam)
    pixels = torch.from_numpy(mixed).permute(0, 3, 1, 2).contiguous()
    return normalised(pixels), labels, labels[torch.from_numpy(source_index)], torch.from_numpy(lam)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Normalise (N, 3, H, W) uint8 images to float32 with ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(images.device)
    return images.float().sub_(mean).div_(std)


@functools.lru_cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (255 * torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from loader

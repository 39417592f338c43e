"""The ways to load and mix training batches that are compared: endless streams of what a training step takes.

A batch is a tuple whose first tensor is (N, 3, H, W) float32, normalised, on the device where training is. All mix
every image, with alpha 1, and all use the same number of CPU threads or worker processes. ``none`` is the ceiling.

All resize bilinearly with antialiasing. JPEG decoding is as each library does it by default: PIL decodes the whole
image and interpolates its colours, DALI the window that is kept, without interpolating them.

========================  =============================================================================================
``none``                  DALI: decode, random crop, resize, mirror, normalise
``none, again``           the same: how far its ratio to ``none`` is from 1, and how it spreads, is the machine's noise
``cutmix``, ``mixup``     the same with the operator of that name in the graph
``saliencymix NAME``      the same with ``fn.saliencymix`` and the detector NAME in the graph; ``..., array`` is
                          that without kernels, and only measured when asked for
``..., apart``            the operator mixes only, and DALI mirrors and normalises, as it does for ``none``. Otherwise
                          ``cutmix`` and ``saliencymix`` do that along on a CPU, as in ``train.py``
``..., whole batches``    on a GPU: the operator gets a batch as it lies in memory, as it does on a CPU in any case
``after: ...``            DALI, and the mix on the batch that comes out of the iterator, as with NVIDIA's MixUpWrapper.
                          SaliencyMix takes 8-bit images: DALI gives these, and PyTorch normalises them afterwards,
                          which belongs to the cost of that way. CutMix and mixup take DALI's normalised batch
``torch``                 torch DataLoader: PIL, torchvision's RandomResizedCrop, flip, to tensor, Normalize
``torch: cutmix``         the same, with torchvision.transforms.v2.CutMix in the collate function
``torch: opencv``         the same, with OpenCV's fine_grained and SaliencyMix image by image on 8-bit images, in the
                          collate function too: there a source is an image of the batch, which need not be decoded
                          again
========================  =============================================================================================
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as transforms
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image
from torch.utils import data

from benchmarks import opencv
from dali_saliencymix import DETECTORS, draw_params
from dali_saliencymix import fn as mix_fn
from dali_saliencymix._algorithms import on_gpu
from dali_saliencymix.image_folder import ImageFolder
from dali_saliencymix.pytorch import SaliencyMix
from pipelines.imagenet import MEAN, STD
from pipelines.loader import training_loader
from pipelines.reading import decode_window, read_files, to_device

_PREFETCH = 2  # batches that DALI makes in advance, and that each worker of torch's loader does


@dataclass(frozen=True)
class Setting:
    """What all loaders of a comparison have in common."""

    folder: ImageFolder
    batch_size: int
    workers: int
    crop_size: int
    device: torch.device
    num_classes: int = 1000
    hw_decoder_load: float = 0.65


@dataclass(frozen=True)
class Stream:
    """Endless batches, how many of them are made in advance, and how many are made at a time."""

    batches: Iterator[tuple[torch.Tensor, ...]]
    ahead: int
    at_a_time: int = 1


Maker = Callable[[Setting], Stream]


def images_per_second(
    stream: Stream,
    setting: Setting,
    batches: int,
    *,
    use: Callable[..., object] = lambda *batch: None,
    watch: contextlib.AbstractContextManager[object] | None = None,
) -> float:
    """Take batches for `use`, as fast as they come, and return the rate; `watch` is entered for what is timed.

    What was made in advance is used up before, and afterwards as much time is waited as it takes to make it again: a
    loader must not work on during another one's turn. The number of batches is rounded up to a multiple of those that
    are made at a time: of 18 batches from 16 workers the last two would take as long as the 16 before them.
    """
    batches = -(-batches // stream.at_a_time) * stream.at_a_time
    for _ in range(stream.ahead):
        use(*next(stream.batches))
    _wait(setting.device)
    with watch or contextlib.nullcontext():
        start = time.perf_counter()
        for _ in range(batches):
            use(*next(stream.batches))
        _wait(setting.device)
        seconds = time.perf_counter() - start
    time.sleep(seconds * stream.ahead / batches)
    return batches * setting.batch_size / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def makers() -> dict[str, Maker]:
    """Return all ways by name; those with torch's loader first, which fork: DALI and CUDA have no threads yet then."""
    return {
        "torch": functools.partial(_torch, collate=data.default_collate),
        "torch: cutmix": functools.partial(_torch, collate=_cutmix_collate),
        "torch: opencv": functools.partial(_torch, collate=_opencv_collate, eight_bit=True),
        "none": in_graph,
        "none, again": in_graph,
        "cutmix": functools.partial(in_graph, mix=mix_fn.cutmix, mix_normalises=True),
        "cutmix, apart": functools.partial(in_graph, mix=mix_fn.cutmix),
        "mixup": functools.partial(in_graph, mix=mix_fn.mixup),
        **{
            f"saliencymix {name}": functools.partial(in_graph, mix=saliencymix_in_graph(name), mix_normalises=True)
            for name in DETECTORS
        },
        **{
            f"saliencymix {name}, apart": functools.partial(in_graph, mix=saliencymix_in_graph(name))
            for name in ("spectral_residual", "fine_grained")
        },
        **{
            f"saliencymix {name}, array": functools.partial(in_graph, mix=saliencymix_in_graph(name, algorithm="array"))
            for name in DETECTORS
            if "algorithm" in inspect.signature(mix_fn.saliencymix).parameters
        },
        "saliencymix spectral_residual, whole batches": functools.partial(
            in_graph_of_whole_batches, mix=saliencymix_in_graph("spectral_residual")
        ),
        "after: cutmix": functools.partial(_after, mix=transforms.CutMix),
        "after: mixup": functools.partial(_after, mix=transforms.MixUp),
        **{
            f"after: saliencymix {name}": functools.partial(
                _after_on_8_bits, mix=functools.partial(SaliencyMix, saliency=name)
            )
            for name in ("spectral_residual", "fine_grained")
        },
    }


def default_names(*, gpu: bool) -> list[str]:
    """Return the names of the ways that are compared when nothing else is asked for."""
    # On a GPU DALI normalises in any case.
    left_out = ", apart" if gpu else ", whole batches"
    return [name for name in makers() if not name.endswith((", array", left_out))]


def saliencymix_in_graph(detector: str, **options: str) -> Callable[..., Any]:
    """Return the DALI operator with a detector and other options."""
    return functools.partial(mix_fn.saliencymix, saliency=detector, **options)


# ---- DALI ------------------------------------------------------------------------------------------------------------


def in_graph(setting: Setting, *, mix: Callable[..., Any] | None = None, **options: Any) -> Stream:
    """Return the stream of the training pipeline; `options` are further ones of it."""
    loader = training_loader(
        setting.folder,
        batch_size=setting.batch_size,
        num_threads=setting.workers,
        device=setting.device,
        crop_size=setting.crop_size,
        mix=mix,
        prefetch=_PREFETCH,
        hw_decoder_load=setting.hw_decoder_load,
        **options,
    )
    return Stream(_endless(loader), _PREFETCH + 1)


def in_graph_of_whole_batches(setting: Setting, **options: Any) -> Stream:
    """Return what `in_graph` does; mixing operators get whole batches on a GPU too."""
    with on_gpu(whole_batches=True):
        return in_graph(setting, **options)


def _after(setting: Setting, mix: Callable[..., Any]) -> Stream:
    stream, mixer = in_graph(setting), mix(num_classes=setting.num_classes)
    return Stream((mixer(images, labels) for images, labels, *_ in stream.batches), stream.ahead)


def _after_on_8_bits(setting: Setting, mix: Callable[..., Any]) -> Stream:
    pipeline = _eight_bit_pipeline(
        setting.folder,
        setting.crop_size,
        "gpu" if setting.device.type == "cuda" else "cpu",
        setting.hw_decoder_load,
        batch_size=setting.batch_size,
        num_threads=setting.workers,
        device_id=0 if setting.device.type == "cuda" else None,
        prefetch_queue_depth=_PREFETCH,
        seed=0,
    )
    batches = DALIGenericIterator([pipeline], ["images", "labels"], reader_name="reader", auto_reset=True)
    mixer = mix(num_classes=setting.num_classes)

    def mixed() -> Iterator[tuple[torch.Tensor, ...]]:
        for (batch,) in _endless(batches):
            images, targets = mixer(batch["images"].permute(0, 3, 1, 2), batch["labels"].flatten())
            yield _normalised(images), targets

    return Stream(mixed(), _PREFETCH + 1)


@pipeline_def
def _eight_bit_pipeline(folder: ImageFolder, crop_size: int, device: str, hw_decoder_load: float) -> tuple[Any, ...]:
    """Do what the training pipeline does but normalise: images HWC uint8, and labels."""
    encoded, label = read_files(folder.files, folder.labels, 0, 1, shuffle_after_epoch=True)
    start, shape = fn.random_crop_generator(
        fn.peek_image_shape(encoded), random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
    )
    images = fn.resize(decode_window(encoded, start, shape, device, hw_decoder_load), size=(crop_size, crop_size))
    return fn.flip(images, horizontal=fn.random.coin_flip()), to_device(device, label)


# ---- torch's loader --------------------------------------------------------------------------------------------------


class _Photos(data.Dataset):
    """Images of a folder with torchvision's transforms, as tensors: normalised, or of 8 bits."""

    def __init__(self, folder: ImageFolder, crop_size: int, *, eight_bit: bool) -> None:
        self._folder = folder
        last = [] if eight_bit else [transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(MEAN, STD)]
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(crop_size),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                *last,
            ]
        )

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._folder.files[index]) as image:
            return self._transform(image.convert("RGB")), self._folder.labels[index]


def _torch(setting: Setting, collate: Callable[..., Any], *, eight_bit: bool = False) -> Stream:
    if collate is _opencv_collate and (why_not := opencv.why_not()):
        raise ImportError(why_not)
    photos = _Photos(setting.folder, setting.crop_size, eight_bit=eight_bit)
    loader = data.DataLoader(
        photos,
        setting.batch_size,
        sampler=data.RandomSampler(photos, replacement=True, num_samples=10**9),  # one epoch without end
        num_workers=setting.workers,
        prefetch_factor=_PREFETCH,
        pin_memory=setting.device.type == "cuda",
        collate_fn=collate,
    )
    batches = iter(loader)
    batches_there = ([part.to(setting.device, non_blocking=True) for part in batch] for batch in batches)
    return Stream(batches_there, _PREFETCH * setting.workers, at_a_time=setting.workers)


def _cutmix_collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return transforms.CutMix(num_classes=1000)(*data.default_collate(samples))


def _opencv_collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, ...]:
    images, labels = data.default_collate(samples)
    rng = np.random.default_rng(torch.randint(2**62, ()).item())
    source_index, lam = draw_params(rng, len(images))
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    mixed, lam = opencv.saliencymix(channels_last, source_index, lam)
    pixels = torch.from_numpy(mixed).permute(0, 3, 1, 2).contiguous()
    return _normalised(pixels), labels, labels[torch.from_numpy(source_index)], torch.from_numpy(lam)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """Bring (N, 3, H, W) uint8 to float32 of mean 0 and deviation 1."""
    mean, std = _mean_and_std(images.device)
    return images.float().sub_(mean).div_(std)


@functools.lru_cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (255 * torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, std


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Give batches epoch after epoch."""
    while True:
        yield from loader

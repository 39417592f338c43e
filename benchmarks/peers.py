"""Loaders and mixes of other packages, beside those in `benchmarks.loaders`; the extra ``peers`` installs them.

All give what `benchmarks.loaders` says: float32 (N, 3, H, W), normalised, on the device where training is. A crop
covers 8 to 100 % of an image at a ratio from 3/4 to 4/3, is resized bilinearly with antialiasing, and mirrored in half
of all cases. There are as many threads or worker processes as in the rows beside these, and 2 batches are made in
advance, in torch's loader by each worker. What mixes does so with every image and alpha 1.

==============================  =======================================================================================
``torch: torchvision.io``       torch DataLoader, nothing mixed: in the place of PIL, torchvision decodes with
                                libjpeg-turbo, and its transforms work on tensors. TorchCodec's decoders come from
                                these, which every torchvision has up to now
``torch: torchcodec``           the same with TorchCodec, which also turns an image as its EXIF data say. It decodes
                                images since 0.16, which needs PyTorch 2.11 and, as PyPI has it, CUDA 13: with
                                PyTorch 2.10 there is none
``torch: torchvision.io, GPU``  torch DataLoader whose workers only read files, nothing mixed: the main process decodes
``torch: torchcodec, GPU``      whole images with nvJPEG, a batch at a time, then crops, resizes and mirrors them one by
                                one on the GPU, since torchvision has no such transforms for images of several sizes
``spdl``                        SPDL, nothing mixed: threads, in which FFmpeg decodes whole images, then crops, resizes
                                and mirrors in one graph of filters. Where colours are subsampled, crops begin at even
                                pixels. Its stages hold about 8 batches more in advance
``after: timm cutmix``          DALI as in ``none``, and timm's Mixup on its batches: one lam and one box for a whole
                                batch, clipped at the border and lam corrected, and the batch in reverse as partners
``after: kornia cutmix``        the same with kornia's RandomCutMixV2: lam and box by image, never clipped. Labels come
                                as both numbers and lam
``after: mixup saliencymix``    the same with SaliencyMix of the package mixup and its heuristic map, which needs no
                                network: on floats, one lam for a whole batch, boxes clipped and lam corrected by image,
                                in a loop that waits for the GPU for each image. Its targets are right for labels of the
                                shape (N, 1, 1, classes) only, so that is what it gets
==============================  =======================================================================================
"""

from __future__ import annotations

import functools
import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as transforms
from torch.nn.functional import one_hot
from torch.utils import data

from benchmarks import loaders
from dali_saliencymix.measure.results import one_line


def makers() -> dict[str, loaders.Maker]:
    """Return all ways by name.

    A maker raises ImportError with the name of a package that is not installed or does not load. Workers are not
    forked from this process, so that the order does not matter, nor whether DALI or CUDA have begun to work.
    """
    return {
        "torch: torchvision.io": functools.partial(_decoded_in_workers, package="torchvision"),
        "torch: torchcodec": functools.partial(_decoded_in_workers, package="torchcodec"),
        "torch: torchvision.io, GPU": functools.partial(_decoded_on_gpu, package="torchvision"),
        "torch: torchcodec, GPU": functools.partial(_decoded_on_gpu, package="torchcodec"),
        "spdl": _spdl,
        "after: timm cutmix": functools.partial(loaders.after_loader, mix=_timm_cutmix),
        "after: kornia cutmix": functools.partial(loaders.after_loader, mix=_kornia_cutmix),
        "after: mixup saliencymix": functools.partial(loaders.after_loader, mix=_mixup_saliencymix),
    }


def ops_variants(images: np.ndarray, *, gpu: bool) -> dict[str, Callable[[], Any]]:
    """Return calls that mix a batch in memory, named ``step | implementation`` as in `benchmarks.bench_ops`.

    What is mixed is made of `images` (N, H, W, 3) uint8 beforehand: float32 (N, 3, H, W), normalised. So the least that
    a call moves is eight bytes for each of its values. Without the package mixup this is an ImportError.
    """
    device = torch.device("cuda" if gpu else "cpu")
    batch = loaders.normalised(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous())
    no_labels = torch.zeros(len(batch), 1, 1, 1, device=device)  # labels are a step of their own
    mix = _module("mixup").SaliencyMix(alpha=1.0, mode="heuristic")
    return {f"mix saliencymix of mixup | mixup, torch{' on GPU' if gpu else ''}": lambda: mix(batch, no_labels)}


def _module(name: str) -> Any:
    """Import a module of a package, or say in an ImportError what is wrong with the package."""
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except Exception as error:  # a package whose libraries do not fit fails with an error of any type
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            msg = f"{package} is not installed"
        else:
            msg = f"{package} does not load: {one_line(_first_cause(error))}"
        raise ImportError(msg) from error


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that led to another one: the one that names a missing library, not who looked for it."""
    cause = error.__cause__ or error.__context__
    return _first_cause(cause) if cause else error


# ---- torch's loader --------------------------------------------------------------------------------------------------


def _decoders(package: str) -> Any:
    if package == "torchvision":
        return _module("torchvision.io")
    decoders = _module("torchcodec.decoders")
    if not hasattr(decoders, "decode_image"):
        msg = "this torchcodec decodes videos only: images need torchcodec 0.16"
        raise ImportError(msg)
    return decoders


def _decoded(file: str, package: str, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return transform(_decoders(package).decode_image(file, mode="RGB"))


def _encoded(file: str) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(file, np.uint8))


def _one_tensor(samples: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Put files of different lengths into one tensor: each tensor takes a file handle on the way to the loader."""
    files, labels = zip(*samples, strict=True)
    return torch.cat(files), [len(file) for file in files], torch.tensor(labels)


def _decoded_in_workers(setting: loaders.Setting, package: str) -> loaders.Stream:
    _decoders(package)
    transform = transforms.Compose([*loaders.crop_and_mirror(setting.crop_size), *loaders.TO_FLOAT])
    read = functools.partial(_decoded, package=package, transform=transform)
    return loaders.torch_loader(setting, data.default_collate, read=read)


def _decoded_on_gpu(setting: loaders.Setting, package: str) -> loaders.Stream:
    decoders = _decoders(package)
    if setting.device.type != "cuda":
        msg = "decodes on a GPU"
        raise RuntimeError(msg)
    return _decoded_in_this_process(setting, decoders.decode_jpeg)


def _decoded_in_this_process(setting: loaders.Setting, decode: Callable[..., Any]) -> loaders.Stream:
    batches = loaders.worker_batches(loaders.Files(setting.folder, _encoded), setting, collate_fn=_one_tensor)
    cut = transforms.Compose(loaders.crop_and_mirror(setting.crop_size))

    def decoded() -> Iterator[tuple[torch.Tensor, ...]]:
        for encoded, lengths, labels in batches:
            images = decode(list(encoded.split(lengths)), mode="RGB", device=setting.device)
            yield loaders.normalised(torch.stack([cut(image) for image in images])), labels.to(setting.device)

    return loaders.Stream(decoded(), loaders.PREFETCH * setting.workers, at_a_time=setting.workers)


# ---- SPDL ------------------------------------------------------------------------------------------------------------


def _spdl(setting: loaders.Setting) -> loaders.Stream:
    spdl, pipeline = _module("spdl.io"), _module("spdl.pipeline")
    try:
        _module("spdl.io.utils").get_ffmpeg_versions()
    except RuntimeError as error:
        msg = "spdl finds no libraries of FFmpeg 4 or later"
        raise ImportError(msg) from error
    on_gpu = setting.device.type == "cuda"

    def files() -> Iterator[tuple[str, int]]:
        order = list(range(len(setting.folder)))
        while True:
            random.shuffle(order)
            yield from ((setting.folder.files[index], setting.folder.labels[index]) for index in order)

    def decoded(sample: tuple[str, int]) -> tuple[Any, int]:
        file, label = sample
        packets = spdl.demux_image(file)
        crop = "crop={}:{}:{}:{}".format(*_random_crop(packets.width, packets.height))
        resize = f"scale={setting.crop_size}:{setting.crop_size}:flags=bilinear"
        mirror = random.choice(["null", "hflip"])
        graph = f"{crop},{resize},{mirror},format=pix_fmts=rgb24"
        return spdl.decode_packets(packets, filter_desc=graph), label

    def batch_of(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        frames, labels = zip(*samples, strict=True)
        images = spdl.to_torch(spdl.convert_frames(list(frames))).permute(0, 3, 1, 2)
        # On a GPU the pixels are sent as 8 bits, and normalised there.
        if on_gpu:
            return spdl.transfer_tensor_h2d((images, torch.tensor(labels)))
        return loaders.normalised(images), torch.tensor(labels)

    builder = pipeline.PipelineBuilder().add_source(files()).pipe(decoded, concurrency=setting.workers)
    builder = builder.aggregate(setting.batch_size).pipe(batch_of).add_sink(loaders.PREFETCH)
    made = builder.build(num_threads=setting.workers, max_failures=0)
    batches = ((loaders.normalised(images) if on_gpu else images, labels) for images, labels in made)
    # Before the last queue each stage keeps 2 in one of its own and holds what it has no place for: so there are 7 more
    # batches or lists of images, then 2 images and one in each thread. That many were counted, too.
    return loaders.Stream(batches, loaders.PREFETCH + 7 + math.ceil((setting.workers + 2) / setting.batch_size))


def _random_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Return width, height, left and top as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return w, h, random.randint(0, width - w), random.randint(0, height - h)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return w, h, (width - w) // 2, (height - h) // 2


# ---- mixes after DALI ------------------------------------------------------------------------------------------------

_Mix = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


def _timm_cutmix(setting: loaders.Setting) -> _Mix:
    mixup = _module("timm.data").Mixup
    return mixup(mixup_alpha=0, cutmix_alpha=1, prob=1, label_smoothing=0, num_classes=setting.num_classes)


def _kornia_cutmix(setting: loaders.Setting) -> _Mix:
    cutmix = _module("kornia.augmentation").RandomCutMixV2
    return cutmix(p=1, beta=1.0, data_keys=["input", "class"], use_correct_lambda=True)


def _mixup_saliencymix(setting: loaders.Setting) -> _Mix:
    mix = _module("mixup").SaliencyMix(alpha=1.0, mode="heuristic")

    def mixed(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = one_hot(labels, setting.num_classes).float()
        images, targets = mix(images, targets[:, None, None])
        return images, targets[:, 0, 0]

    return mixed

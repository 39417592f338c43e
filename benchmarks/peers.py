"""Loaders and mixes of other packages, compared with those in `benchmarks.loaders`; the extra ``peers`` installs them.

All produce batches as `benchmarks.loaders` describes them: float32 (N, 3, H, W), normalised, on the device of the
training. A crop covers 8 to 100 % of an image at an aspect ratio from 3/4 to 4/3, is resized bilinearly with
antialiasing, and flipped with probability 0.5. Loaders that mix do so with every image and alpha 1. The number of
threads or worker processes is the same as for the other loaders. Two batches are prefetched, in PyTorch's loader by
each worker.

==============================  =======================================================================================
``torch: torchvision.io``       torch DataLoader without mixing: torchvision decodes with libjpeg-turbo instead of PIL,
                                and its transforms work on tensors. TorchCodec's decoders derive from these, which all
                                versions of torchvision up to now have
``torch: torchcodec``           the same with TorchCodec, which also rotates an image according to its EXIF data. It
                                decodes images since 0.16, which needs PyTorch 2.11 and, from PyPI, CUDA 13: there is
                                none for PyTorch 2.10
``torch: torchvision.io, GPU``  torch DataLoader without mixing, whose workers only read files. The main process decodes
``torch: torchcodec, GPU``      whole images with nvJPEG, a batch at a time, then crops, resizes and flips them one by
                                one on the GPU, since torchvision has no such transforms for images of several sizes
``spdl``                        SPDL without mixing: FFmpeg decodes whole images in threads, then crops, resizes and
                                flips in one filter graph. Where colours are subsampled, crops begin at even pixels. Its
                                stages prefetch about 8 more batches
``after: timm cutmix``          DALI as in ``none``, then timm's Mixup on its batches: one lam and one box for the whole
                                batch, clipped at the border with lam corrected; the partners are the batch in reverse
``after: kornia cutmix``        the same with kornia's RandomCutMixV2: lam and box for each image, never clipped. Labels
                                are returned as both class ids and lam
``after: mixup saliencymix``    the same with SaliencyMix of the package mixup and its heuristic map, which needs no
                                network: on floats, one lam for the whole batch, boxes clipped and lam corrected for
                                each image, in a loop that synchronises with the GPU for each image. Its targets are
                                right only for labels of shape (N, 1, 1, classes), so it gets these
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
from torchvision.transforms import RandomResizedCrop

from benchmarks import loaders
from dali_saliencymix.measure.results import one_line


def makers() -> dict[str, loaders.Maker]:
    """Return the makers of all loaders by name.

    A maker raises ImportError with the name of a package that is not installed or does not load. Workers are not
    forked from this process, so makers can be called in any order, also after DALI or CUDA have started.
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

    `images` (N, H, W, 3) uint8 are normalised to float32 (N, 3, H, W) beforehand, so a call moves at least eight bytes
    per value. Raises ImportError if the package mixup is not installed.
    """
    device = torch.device("cuda" if gpu else "cpu")
    batch = loaders.normalised(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous())
    no_labels = torch.zeros(len(batch), 1, 1, 1, device=device)  # labels are a separate step
    mix = _module("mixup").SaliencyMix(alpha=1.0, mode="heuristic")
    return {f"mix saliencymix of mixup | mixup, torch{' on GPU' if gpu else ''}": lambda: mix(batch, no_labels)}


def _module(name: str) -> Any:
    """Import a module of a package; raise ImportError with the reason if the package is missing or broken."""
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except Exception as error:  # a package with incompatible libraries may raise any error
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            msg = f"{package} is not installed"
        else:
            msg = f"{package} does not load: {one_line(_first_cause(error))}"
        raise ImportError(msg) from error


def _first_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: it names the missing library."""
    cause = error.__cause__ or error.__context__
    return _first_cause(cause) if cause else error


# ---- PyTorch's DataLoader --------------------------------------------------------------------------------------------


def _decoders(package: str) -> Any:
    if package == "torchvision":
        return _module("torchvision.io")
    decoders = _module("torchcodec.decoders")
    if not hasattr(decoders, "decode_image"):
        msg = "this torchcodec decodes videos only: images need torchcodec 0.16"
        raise ImportError(msg)
    return decoders


def _one_tensor(samples: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Join files into one tensor, since each tensor that a worker sends takes a file handle."""
    files, labels = zip(*samples, strict=True)
    return torch.cat(files), [len(file) for file in files], torch.tensor(labels)


def _decoded_in_workers(setting: loaders.Setting, package: str) -> loaders.Stream:
    decode = functools.partial(_decoders(package).decode_image, mode="RGB")
    return loaders.torch_loader(setting, data.default_collate, load=decode)


def _decoded_on_gpu(setting: loaders.Setting, package: str) -> loaders.Stream:
    decoders = _decoders(package)
    if setting.device.type != "cuda":
        msg = "decodes on a GPU"
        raise RuntimeError(msg)
    return _decoded_in_this_process(setting, decoders.decode_jpeg)


def _decoded_in_this_process(setting: loaders.Setting, decode: Callable[..., Any]) -> loaders.Stream:
    files = loaders.Files(setting.folder, functools.partial(np.fromfile, dtype=np.uint8), torch.from_numpy)
    batches = loaders.worker_batches(files, setting, collate_fn=_one_tensor)
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
        whole = torch.empty(1, packets.height, packets.width, device="meta")
        top, left, height, width = RandomResizedCrop.get_params(whole, [0.08, 1], [3 / 4, 4 / 3])
        crop = f"crop={width}:{height}:{left}:{top}"
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
    # Before the last queue, each stage has a queue of 2 and holds one more while that is full: 7 more batches or lists
    # of images, then 2 images and one in each thread. Counting at run time gave the same number.
    return loaders.Stream(batches, loaders.PREFETCH + 7 + math.ceil((setting.workers + 2) / setting.batch_size))


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

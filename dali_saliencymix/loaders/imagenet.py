"""Image folders such as ImageNet: from files to decoded, resized, mixed and normalised batches.

Training images are mixed as uint8, after the resize and before the normalisation. DALI draws all random numbers: a
pipeline with the same seed produces the same batches, also when it resumes from a checkpoint.

Both pipelines apply the EXIF orientation of images. torchvision's ``ImageFolder`` does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline, do_not_convert

from dali_saliencymix._checks import check_choice, check_fraction
from dali_saliencymix._dali.mix_nodes import Normalise, mix_nodes
from dali_saliencymix._dali.python_operator import Stage, marked, to_device
from dali_saliencymix._routes import route_of
from dali_saliencymix.datasets.formats import is_looked_at
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders.augmentation import auto_augmented, erased
from dali_saliencymix.loaders.base import check_share
from dali_saliencymix.loaders.dali import Build, Loader, LoaderState, define, device_arguments
from dali_saliencymix.loaders.options import AUTO_AUGMENT
from dali_saliencymix.options import MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD, check_channels, check_scaling, in_grey_levels

# Size of the largest image in ImageNet's training set, so that the decoder allocates its buffers once.
_WIDTH_HINT, _HEIGHT_HINT = 5980, 6430

# The first two bytes of JPEG, PNG and WebP files, as integers.
_BEGINNINGS = [int.from_bytes(two, "little") for two in (b"\xff\xd8", b"\x89P", b"RI")]
_BEYOND = 3  # one past the end of a shape: slicing from there is an error


@pipeline_def(enable_checkpointing=True)
def training_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    crop_size: int = 224,
    min_crop_area: float = 0.08,
    hflip_prob: float = 0.5,
    auto_augment: str = "none",
    ra_magnitude: int = 9,
    color_jitter: float = 0.0,
    mix: MixOptions | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    random_erase: float = 0.0,
    process_on: str | None = None,
    device: str = "cpu",
    fp16: bool = False,
    channels_last: bool = False,
    shard_id: int = 0,
    num_shards: int = 1,
    shuffle_seed: int = 0,
    hw_decoder_load: float = 0.65,
    rare_formats: bool | None = None,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Decode a random crop, resize, augment, jitter colours, mix, flip at random, normalise, erase.

    Parameters
    ----------
    files, labels : sequence
        Paths and labels of all images; each shard reads its part.
    crop_size : int
        Height and width of the outputs.
    min_crop_area : float
        Minimum area of the random crop, as a fraction of the image; the maximum is 1. Aspect ratios are 3/4 to 4/3.
    hflip_prob : float
        Probability of a horizontal flip.
    auto_augment : {"none", "ra", "ta_wide"}
        No policy, RandAugment with two operations, or TrivialAugmentWide, from ``nvidia.dali.auto_aug``, applied after
        the resize. A policy also needs DALI's pipeline argument ``enable_conditionals=True``.
    ra_magnitude : int
        Magnitude of RandAugment, in [0, 30].
    color_jitter : float
        Factors for brightness, contrast and saturation are drawn from [1 - color_jitter, 1 + color_jitter] and applied
        before mixing. In [0, 1].
    mix : MixOptions, optional
        The mixing options. By default images are not mixed: `lam` is 1 and `source_labels` equals `labels`.
    mean, std : sequence of 3 floats
        Mean and standard deviation for the normalisation, for pixels in [0, 1]; `std` is positive.
    random_erase : float
        Probability of random erasing, which sets a rectangle of an image to 0, the mean: see
        `dali_saliencymix.loaders.augmentation`.
    process_on : {"cpu", "gpu"}, optional
        Where images are decoded, resized and mixed; by default `device`.
    device : {"cpu", "gpu"}
        Device of the outputs; must be "gpu" if `process_on` is.
    fp16 : bool
        Whether the images are float16; otherwise they are float32.
    channels_last : bool
        Whether the images are HWC; otherwise they are CHW.
    shard_id, num_shards : int
        The shard to read, and the number of shards. All shards together cover the files once per epoch.
    shuffle_seed : int
        Seed of the file order. It must be the same for all shards, or they overlap.
    hw_decoder_load : float
        Fraction of the images that the GPU's hardware JPEG decoder decodes, if there is one.
    rare_formats : bool, optional
        Whether to accept other contents than JPEG, PNG and WebP in files with an extension in
        `dali_saliencymix.datasets.formats.LOOKED_AT`; by default, whether `files` has such a file. A checkpoint fits
        only a pipeline with the same value.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        Normalised images; labels of shape (1,), int32; `lam`, the weight of `labels`, a float32 scalar.

    Notes
    -----
    The horizontal flip follows the mixing, so a patch is flipped with its image. The mixing operator uses fused flip
    and normalise where that is faster: on a GPU, and on the CPU for float32 if Numba is installed.
    """
    if not 0 < min_crop_area <= 1:
        msg = f"min_crop_area must be in (0, 1], got {min_crop_area}"
        raise ValueError(msg)
    check_choice(auto_augment, "auto_augment", AUTO_AUGMENT)
    if not 0 <= ra_magnitude <= 30:
        msg = f"ra_magnitude must be in [0, 30], got {ra_magnitude}"
        raise ValueError(msg)
    check_fraction(color_jitter, "color_jitter")
    check_fraction(random_erase, "random_erase")
    mean, std = _scaling(mean, std)
    encoded, label = read_files(
        files, labels, shard_id, num_shards, shuffle_after_epoch=True, shuffle_after_epoch_seed=shuffle_seed
    )
    start, shape = fn.random_crop_generator(
        image_shape(encoded, files, rare_formats),
        random_area=[min_crop_area, 1.0],
        random_aspect_ratio=[3 / 4, 4 / 3],
        num_attempts=10,
    )
    images = decode_window(encoded, start, shape, process_on or device, hw_decoder_load)
    images = fn.resize(images, size=(crop_size, crop_size))
    if auto_augment != "none":
        images = auto_augmented(images, auto_augment, ra_magnitude, crop_size, 32 / 224)  # up to 32 pixels of 224
    if color_jitter:
        factors = [fn.random.uniform(range=[1 - color_jitter, 1 + color_jitter]) for _ in range(3)]
        images = fn.color_twist(images, brightness=factors[0], contrast=factors[1], saturation=factors[2])
    mirror = fn.random.coin_flip(probability=hflip_prob)
    layout = "HWC" if channels_last else "CHW"
    normalise = None
    if mix is not None and pays_in_the_mix(process_on or device, device, fp16):
        normalise = Normalise(mean, std, mirror, dtype="float16" if fp16 else "float32", layout=layout)
    images, label, source_label, lam = mixed(images, label, mix, normalise=normalise)
    if normalise is None:
        # Normalise after the copy to the device, since bytes are faster to copy than floats.
        images = _normalised(to_device(device, images), crop_size, (mean, std), fp16, layout, mirror)
    if random_erase:
        images = erased(images, random_erase, crop_size, fp16=fp16)
    return tuple(to_device(device, node) for node in (images, label, source_label, lam))


@pipeline_def(enable_checkpointing=True)
def validation_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    resize_size: int = 256,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    process_on: str | None = None,
    device: str = "cpu",
    fp16: bool = False,
    channels_last: bool = False,
    shard_id: int = 0,
    num_shards: int = 1,
    hw_decoder_load: float = 0.65,
    rare_formats: bool | None = None,
) -> tuple[DataNode, DataNode]:
    """Decode, resize the short side, crop the centre, normalise.

    Parameters
    ----------
    resize_size : int
        Length of the short side before the crop, in pixels.
    crop_size : int
        Height and width of the crop, at most `resize_size`.
    files, labels, mean, std, process_on, device, fp16, channels_last, shard_id, num_shards
        As for `training_pipeline`. The last batch is padded with its last image; the iterator drops the padding.
    hw_decoder_load, rare_formats
        As for `training_pipeline`.

    Returns
    -------
    images, labels : DataNode
        Normalised images; labels of shape (1,), int32.
    """
    if crop_size > resize_size:
        msg = f"crop_size must be at most resize_size, got {crop_size} and {resize_size}"
        raise ValueError(msg)
    scaling = _scaling(mean, std)
    encoded, label = read_files(files, labels, shard_id, num_shards)
    shape = image_shape(encoded, files, rare_formats)[:2]
    images = decode_window(encoded, shape * 0, shape, process_on or device, hw_decoder_load)
    # Size and centre as in torchvision: the long side is rounded down, half a pixel to even. DALI's own rounding
    # differs by one pixel for half of the ImageNet images.
    size = shape * resize_size // math.min(shape[0], shape[1])
    spare = size - crop_size
    start = spare // 2 + (spare & (spare // 2) & 1)
    images = fn.resize(images, size=fn.cast(size, dtype=types.FLOAT))
    # Crop here and not with the normalisation: only the crop is then copied to another device.
    images = fn.slice(images, start=fn.cast(start, dtype=types.INT32), shape=[crop_size, crop_size], axis_names="HW")
    layout = "HWC" if channels_last else "CHW"
    images = _normalised(to_device(device, images), crop_size, scaling, fp16, layout)
    return to_device(device, images), to_device(device, label)


@do_not_convert
def read_files(
    files: Sequence[str], labels: Sequence[int], shard_id: int, num_shards: int, **shuffling: int
) -> tuple[DataNode, DataNode]:
    """Read encoded images and labels, with the reader name and the padding that `Loader` requires."""
    return fn.readers.file(
        files=list(files),
        labels=list(labels),
        shard_id=shard_id,
        num_shards=num_shards,
        pad_last_batch=True,
        name="reader",
        **shuffling,
    )


@do_not_convert
def image_shape(encoded: DataNode, files: Sequence[str], rare_formats: bool | None = None) -> DataNode:
    """Return the shape (rows, columns, channels) of images, from their headers.

    The pipeline fails at contents that are not JPEG, PNG or WebP, unless `rare_formats` accepts them, as described at
    `training_pipeline`: only the headers of these files were checked before.
    """
    # DALI runs CPU operators one after the other. Even on a batch of single numbers, each takes as long as decoding
    # some images. So there should be few of them, and none should copy the files.
    beginning = fn.reinterpret(encoded[:2], dtype=types.UINT16)
    first = fn.lookup_table(
        beginning, keys=_BEGINNINGS, values=[0] * len(_BEGINNINGS), default_value=_BEYOND, dtype=types.INT32
    )
    if rare_formats or (rare_formats is None and any(map(is_looked_at, files))):
        # .jpg, .jpeg and .png end in g, .webp has a b before its last letter; 0xDF maps to upper case.
        name = fn.get_property(encoded, key="source_info")
        unseen = ((name[-1] & 0xDF) == ord("G")) | ((name[-2] & 0xDF) == ord("B"))
        first *= unseen
    shape = fn.peek_image_shape(encoded)
    checked = fn.slice(shape, start=first, shape=[3], axes=[0], out_of_bounds_policy="error")
    return marked(checked, Stage("shapes", small=True))


@do_not_convert
def decode_window(
    encoded: DataNode, start: DataNode, shape: DataNode, device: str, hw_decoder_load: float = 0.65
) -> DataNode:
    """Decode a window of each image, with corner `start` and size `shape`, both (rows, columns).

    Derive the window from the image header (``fn.peek_image_shape``), so that a file that is not an image fails there.
    In DALI 2.4, such a file makes the decoder end the batch while other threads still work on it, which can crash the
    process.
    """
    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        device="mixed" if device == "gpu" else "cpu",
        hw_decoder_load=hw_decoder_load,
        preallocate_width_hint=_WIDTH_HINT,
        preallocate_height_hint=_HEIGHT_HINT,
    )


@do_not_convert
def mixed(
    images: DataNode,
    labels: DataNode,
    mix: MixOptions | None,
    *,
    peaks: DataNode | None = None,
    normalise: Normalise | None = None,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Return images, labels, source labels and `lam`; without `mix` the images are unchanged."""
    if mix is None:
        return images, labels, labels, fn.constant(fdata=[1.0], shape=[], device="cpu")
    images, labels, source_labels, lam = mix_nodes(images, labels, mix, peaks=peaks, normalise=normalise)
    return images, labels, source_labels, lam


def pays_in_the_mix(mixed_on: str, device: str, fp16: bool) -> bool:
    """Return whether fused flip and normalise in the mixing operator beats ``fn.crop_mirror_normalize``."""
    if mixed_on != device:  # bytes are faster to copy than floats
        return False
    return device == "gpu" or (route_of("auto", np) == "numba" and not fp16)


@do_not_convert
def _scaling(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Validate mean and std, and return them in grey levels."""
    check_scaling(mean, std, "float32", "CHW")
    check_channels(3, mean, std)
    return in_grey_levels(mean), in_grey_levels(std)


@do_not_convert
def _normalised(
    images: DataNode,
    size: int,
    scaling: tuple[list[float], list[float]],
    fp16: bool,
    layout: str,
    mirror: DataNode | int = 0,
) -> DataNode:
    mean, std = scaling
    return fn.crop_mirror_normalize(
        images,
        crop=(size, size),
        mirror=mirror,
        mean=mean,
        std=std,
        dtype=types.FLOAT16 if fp16 else types.FLOAT,
        output_layout=layout,
    )


def training_loader(
    folder: ImageFolder,
    *,
    batch_size: int,
    num_threads: int,
    device: torch.device | str,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    max_bad_batches: int = 0,
    state: LoaderState | None = None,
    **options: Any,
) -> Loader:
    """Return a loader of ``(images, labels, source_labels, lam)`` for one process of a training run.

    Parameters
    ----------
    folder : ImageFolder
        The training images.
    batch_size : int
        Images per batch of this process.
    num_threads : int
        CPU threads of the pipeline.
    device : torch.device or str
        Device of the pipeline and of the tensors.
    seed : int
        Seed of the file order; all other random numbers use `seed` + `rank`. It must be the same in all processes.
    rank, world_size : int
        Rank of this process, and number of processes.
    prefetch : int
        Number of batches to prefetch.
    max_bad_batches : int
        Maximum number of bad files that are left out; one more is an error.
    state : LoaderState, optional
        The state to resume from. `folder`, `batch_size`, `seed`, `world_size` and `options` must be as they were for
        the loader that returned it.
    **options
        Arguments of `training_pipeline`: `crop_size`, `mix`, `fp16`, `channels_last`, ...

    Raises
    ------
    ValueError
        If there are not enough images for one batch in each process, or `seed` is negative.
    """
    check_share(len(folder), world_size, batch_size, folder.root, "batch_size")
    if seed < 0:
        msg = f"seed must be at least 0, as DALI replaces a negative seed by a random one, got {seed}"
        raise ValueError(msg)
    options |= {"num_threads": num_threads, "device": device, "prefetch": prefetch}
    build = training_builder(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, **options)
    common = {"channels_last": options.get("channels_last", False), "max_bad_batches": max_bad_batches}
    return Loader(build, folder, drop_last=True, rank=rank, state=state, **common)


def training_builder(*, seed: int = 0, rank: int = 0, **options: Any) -> Build:
    """Return the function that builds the pipeline of `training_loader`, which documents the options."""
    options["enable_conditionals"] = options.get("auto_augment", "none") != "none"
    return _builder(training_pipeline, rank=rank, shuffle_seed=seed, seed=seed + rank, **options)


def _builder(
    pipeline: Callable[..., Pipeline],
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    **options: Any,
) -> Build:
    options |= {"shard_id": rank, "num_shards": world_size, "prefetch_queue_depth": prefetch}
    return functools.partial(define, pipeline, **options, **device_arguments(torch.device(device)))


def validation_loader(folder: ImageFolder, *, world_size: int = 1, max_bad_batches: int = 0, **options: Any) -> Loader:
    """Return a loader of ``(images, labels)`` that yields every image exactly once over all processes.

    Parameters
    ----------
    folder, world_size, max_bad_batches
        As for `training_loader`.
    **options
        `batch_size`, `num_threads`, `device`, `rank` and `prefetch`, as for `training_loader`, and the arguments of
        `validation_pipeline`.

    Raises
    ------
    ValueError
        If there are fewer images than processes.
    """
    if len(folder) < world_size:
        msg = f"{folder.root}: {len(folder)} images are too few for {world_size} processes"
        raise ValueError(msg)
    build = _builder(validation_pipeline, world_size=world_size, **options)
    common = {"channels_last": options.get("channels_last", False), "max_bad_batches": max_bad_batches}
    return Loader(build, folder, drop_last=False, rank=options.get("rank", 0), **common)

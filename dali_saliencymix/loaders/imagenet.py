"""ImageNet-style pipelines: files -> decoded, resized, mixed, normalised batches.

The images of a training batch are mixed as uint8, after the resize and before the normalisation. What is random is
drawn by DALI, so a pipeline with the same seed gives the same batches, and a restored checkpoint goes on with the same.

Both pipelines turn images by their EXIF orientation, which torchvision's ``ImageFolder`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, do_not_convert

from dali_saliencymix._routes import gpu_route, uses_kernel
from dali_saliencymix.fn import Normalise
from dali_saliencymix.loaders.reading import decode_window, read_files, to_device

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_IN_GREY_LEVELS = [255 * mean for mean in MEAN], [255 * std for std in STD]

# What a mixing operator does: (images, labels) -> (images, labels, source_labels, lam).
Mix = Callable[..., tuple[DataNode, DataNode, DataNode, DataNode]]


@pipeline_def(enable_checkpointing=True)
def training_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    crop_size: int = 224,
    min_crop_area: float = 0.08,
    hflip_prob: float = 0.5,
    color_jitter: float = 0.0,
    mix: Mix | None = None,
    mix_normalises: bool = False,
    process_on: str | None = None,
    device: str = "cpu",
    fp16: bool = False,
    channels_last: bool = False,
    shard_id: int = 0,
    num_shards: int = 1,
    shuffle_seed: int = 0,
    hw_decoder_load: float = 0.65,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Decode a random crop, resize, change colours, mix, mirror at random, normalise.

    Parameters
    ----------
    files, labels : sequence
        Paths and labels of all images; each shard takes its share.
    crop_size : int
        Height and width of the images that come out.
    min_crop_area : float
        Least area of the random crop as a share of the image; the largest is 1. Aspect ratios are 3/4 to 4/3.
    hflip_prob : float
        Probability that an image is mirrored.
    color_jitter : float
        Brightness, contrast and saturation are multiplied by factors drawn from [1 - color_jitter, 1 + color_jitter],
        before the mixing. In [0, 1].
    mix : callable, optional
        ``(images, labels) -> (images, labels, source_labels, lam)``, as `dali_saliencymix.fn.saliencymix`, with its
        options bound by ``functools.partial``. By default nothing is mixed: `lam` is 1 and `source_labels` are the
        labels.
    mix_normalises : bool
        Whether `mix` takes `normalise` as well, as ``fn.saliencymix`` and ``fn.cutmix`` do. It then normalises where
        that is the faster way: on the CPU for float32, with Numba installed; on a GPU where
        `dali_saliencymix._routes.gpu_route` says so.
    process_on : {"cpu", "gpu"}, optional
        Where images are decoded, resized and mixed; by default `device`.
    device : {"cpu", "gpu"}
        Where they come out; "gpu" if `process_on` is.
    fp16 : bool
        Images come out as float16, else as float32.
    channels_last : bool
        Images come out as HWC, else as CHW.
    shard_id, num_shards : int
        Which share of the files is read. All shards together cover the files once an epoch.
    shuffle_seed : int
        Seed of the order of the files; the same for all shards, which would overlap otherwise.
    hw_decoder_load : float
        Share of the images for the GPU's JPEG engine, where it has one.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        Normalised images; labels of shape (1,), int32; weights of `labels`, float32 scalars.

    Notes
    -----
    The mirroring comes after the mixing, as part of the normalising operator: a patch is mirrored with its image.
    """
    if not 0 < min_crop_area <= 1:
        msg = f"min_crop_area must be in (0, 1], got {min_crop_area}"
        raise ValueError(msg)
    if not 0 <= color_jitter <= 1:
        msg = f"color_jitter must be in [0, 1], got {color_jitter}"
        raise ValueError(msg)
    encoded, label = read_files(
        files, labels, shard_id, num_shards, shuffle_after_epoch=True, shuffle_after_epoch_seed=shuffle_seed
    )
    start, shape = fn.random_crop_generator(
        fn.peek_image_shape(encoded),
        random_area=[min_crop_area, 1.0],
        random_aspect_ratio=[3 / 4, 4 / 3],
        num_attempts=10,
    )
    images = decode_window(encoded, start, shape, process_on or device, hw_decoder_load)
    images = fn.resize(images, size=(crop_size, crop_size))
    if color_jitter:
        factors = [fn.random.uniform(range=[1 - color_jitter, 1 + color_jitter]) for _ in range(3)]
        images = fn.color_twist(images, brightness=factors[0], contrast=factors[1], saturation=factors[2])
    mirror = fn.random.coin_flip(probability=hflip_prob)
    layout = "HWC" if channels_last else "CHW"
    normalised = mix is not None and mix_normalises and _pays_in_the_mix(process_on or device, device, fp16)
    if mix is None:
        source_label, lam = label, fn.constant(fdata=[1.0], shape=[], device="cpu")
    elif normalised:
        normalise = Normalise(*_IN_GREY_LEVELS, mirror, dtype="float16" if fp16 else "float32", layout=layout)
        images, label, source_label, lam = mix(images, label, normalise=normalise)
    else:
        images, label, source_label, lam = mix(images, label)
    if not normalised:
        # On the way to another device the pixels are still bytes.
        images = _normalised(to_device(device, images), (crop_size, crop_size), fp16, layout, mirror)
    return tuple(to_device(device, node) for node in (images, label, source_label, lam))


@pipeline_def(enable_checkpointing=True)
def validation_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    resize_size: int = 256,
    crop_size: int = 224,
    process_on: str | None = None,
    device: str = "cpu",
    fp16: bool = False,
    channels_last: bool = False,
    shard_id: int = 0,
    num_shards: int = 1,
    hw_decoder_load: float = 0.65,
) -> tuple[DataNode, DataNode]:
    """Decode, resize the short side, crop the centre, normalise.

    Parameters
    ----------
    resize_size : int
        Length of the short side before the crop.
    crop_size : int
        Height and width of the crop, at most `resize_size`.
    files, labels, process_on, device, fp16, channels_last, shard_id, num_shards, hw_decoder_load
        As for `training_pipeline`. The last batch is filled up with its last image, for the iterator to cut off.

    Returns
    -------
    images, labels : DataNode
        Normalised images; labels of shape (1,), int32.
    """
    if crop_size > resize_size:
        msg = f"crop_size must be at most resize_size, got {crop_size} and {resize_size}"
        raise ValueError(msg)
    encoded, label = read_files(files, labels, shard_id, num_shards)
    shape = fn.peek_image_shape(encoded)[:2]
    images = decode_window(encoded, shape * 0, shape, process_on or device, hw_decoder_load)
    images = fn.resize(images, resize_shorter=resize_size)
    # The centre is cut out here, not while normalising, where that would be all on the way to another device.
    images = fn.crop(images, crop=(crop_size, crop_size))
    layout = "HWC" if channels_last else "CHW"
    images = _normalised(to_device(device, images), (crop_size, crop_size), fp16, layout)
    return to_device(device, images), to_device(device, label)


def _pays_in_the_mix(mixed_on: str, device: str, fp16: bool) -> bool:
    """Tell whether the operator that mixes should normalise, in the place of ``fn.crop_mirror_normalize``."""
    if mixed_on != device:  # bytes are the fewer to copy
        return False
    return gpu_route.normalise if device == "gpu" else uses_kernel("auto", np) and not fp16


@do_not_convert
def _normalised(
    images: DataNode, crop: tuple[int, int], fp16: bool, layout: str, mirror: DataNode | int = 0
) -> DataNode:
    mean, std = _IN_GREY_LEVELS
    return fn.crop_mirror_normalize(
        images,
        crop=crop,
        mirror=mirror,
        mean=mean,
        std=std,
        dtype=types.FLOAT16 if fp16 else types.FLOAT,
        output_layout=layout,
    )

"""CIFAR: small images that are zero-padded, randomly cropped, mixed, randomly flipped and normalised.

Saliency detectors respond to the edge of the zero padding, which attracts two or three times as many peaks as its area
accounts for. The peaks are therefore computed before the padding, and shifted with the crop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import DataNode, do_not_convert
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from nvidia.dali.types import BatchInfo

from dali_saliencymix._dali.python_operator import to_device
from dali_saliencymix.datasets.cifar import SIZE, CifarImages, read_cifar
from dali_saliencymix.fn import saliency_peaks
from dali_saliencymix.loaders.augmentation import auto_augmented, erased
from dali_saliencymix.loaders.base import (
    Batches,
    Data,
    LoaderError,
    check_share,
    chosen_backend,
    fingerprint_of,
    validated,
)
from dali_saliencymix.loaders.dali import OUTPUTS, as_documented, define, device_arguments, process_on
from dali_saliencymix.loaders.imagenet import decode_window, mixed, read_files
from dali_saliencymix.loaders.options import DataOptions, defaults_of
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.loaders.torch import PaddedImages, TorchLoader, TrainingBatches, ValidationBatches, policy_of
from dali_saliencymix.options import MixOptions, check_with_peaks
from dali_saliencymix.pixels import in_grey_levels


@pipeline_def(enable_checkpointing=True)
def cifar_training_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    mix: MixOptions | None,
    size: int = SIZE,
    padding: int = 4,
    device: str = "cpu",
    shard_id: int = 0,
    num_shards: int = 1,
    shuffle_seed: int = 0,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Decode, pad, crop at random, mix, flip at random, normalise.

    Parameters
    ----------
    files, labels : sequence
        Paths and labels of all images, of size `size` x `size`; each shard reads its part.
    mix : MixOptions or None
        The mixing options. With None, images are not mixed: `lam` is 1 and `source_labels` equals `labels`.
        SaliencyMix uses the most salient pixels of the unpadded images. With `padding` > 0, `source` and `destination`
        therefore cannot be ``"non_salient"``, and `label_weight` cannot be ``"saliency"``.
    size : int
        Height and width of the input and output images, in pixels.
    padding : int
        Width of the zero border, in pixels.
    device : {"cpu", "gpu"}
        Where images are decoded and processed.
    shard_id, num_shards, shuffle_seed
        As for `dali_saliencymix.loaders.imagenet.training_pipeline`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        Normalised images, CHW, float32; labels of shape (1,), int32; `lam`, the weight of `labels`, a float32 scalar.
    """
    encoded, label = read_files(
        files, labels, shard_id, num_shards, shuffle_after_epoch=True, shuffle_after_epoch_seed=shuffle_seed
    )
    shape = fn.peek_image_shape(encoded)[:2]
    images = decode_window(encoded, shape * 0, shape, device)
    options = DataOptions(mix=mix, crop_padding=padding, **{**defaults_of("cifar10"), "train_crop_size": size})
    return _augmented(images, label, options, device)


@pipeline_def(enable_checkpointing=True)
def _array_pipeline(
    source: Callable[[BatchInfo], Any], options: DataOptions, process_on: str, device: str
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Process images in memory as `cifar_training_pipeline` processes files."""
    images, label = fn.external_source(source=source, num_outputs=2, batch=True, batch_info=True, layout=["HWC", ""])
    images = to_device(process_on, images)
    if options.auto_augment != "none":
        images = auto_augmented(images, options.auto_augment, options.ra_magnitude, SIZE, 1.0)  # up to 32 pixels
    return _augmented(images, label, options, device)


@do_not_convert
def _augmented(
    images: DataNode, label: DataNode, options: DataOptions, device: str
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Pad, crop at random, mix, flip at random, normalise, erase."""
    mix, padding, size = options.mix, options.crop_padding, options.train_crop_size
    offsets = [float(offset) for offset in range(-padding, padding + 1)]
    corner = fn.stack(*(fn.cast(fn.random.uniform(values=offsets), dtype=types.INT32) for _ in range(2)))
    peaks = None
    if mix is not None and _detects_before_padding(mix, padding):
        peaks = _moved(saliency_peaks(images, saliency=mix.saliency), corner, size)
        check_with_peaks(mix, peaks)
    images = fn.slice(
        images,
        corner,
        [size, size],
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    images, label, source_label, lam = mixed(images, label, mix, peaks=peaks)
    images = fn.crop_mirror_normalize(
        to_device(device, images),
        mirror=fn.random.coin_flip(probability=options.hflip_prob),
        mean=in_grey_levels(options.mean),
        std=in_grey_levels(options.std),
        dtype=types.FLOAT,
        output_layout="HWC" if options.channels_last else "CHW",
    )
    if options.random_erase:
        images = erased(images, options.random_erase, size)
    return tuple(to_device(device, node) for node in (images, label, source_label, lam))


def _detects_before_padding(mix: MixOptions, padding: int) -> bool:
    """Return whether saliency has to be computed before the padding, and not by the operator that mixes."""
    return "saliencymix" in mix.modes and padding > 0


def _check_with_padding(mix: MixOptions, padding: int) -> None:
    """Refuse the options that need a saliency map of the padded image."""
    for name, value in (("source", mix.source), ("destination", mix.destination)):
        if value == "non_salient":
            msg = (
                f"--{name} must not be non_salient with --crop-padding {padding}: the least salient pixel could "
                "lie in the padding; use --crop-padding 0"
            )
            raise ValueError(msg)
    if mix.label_weight != "area":
        msg = (
            f"--label-weight must be area with --crop-padding {padding}, got {mix.label_weight}: the saliency maps "
            "would be those of padded images; use --crop-padding 0"
        )
        raise ValueError(msg)


@do_not_convert
def _moved(peaks: DataNode, corner: DataNode, size: int) -> DataNode:
    """Return the peaks in coordinates of the crop; peaks outside it move to its edge, never into the padding."""
    corner = corner.gpu() if peaks.device == "gpu" else corner
    return math.clamp(peaks - corner, 0, size - 1)


class _CifarLoader(Batches):
    """Training batches of images in memory, processed by DALI; an incomplete last batch is dropped."""

    def __init__(
        self, cifar: CifarImages, options: DataOptions, processes: Processes, state: dict[str, Any] | None
    ) -> None:
        batch_size, rank, world_size = options.batch_size, processes.rank, processes.world_size
        self._length = steps = len(cifar) // world_size // batch_size

        # A batch depends on its number only: DALI's checkpoint stores that number and nothing else of the source.
        def source(info: BatchInfo) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
            epoch, step = divmod(info.iteration, steps)
            shard = _order(len(cifar), options.seed, epoch)[rank::world_size]
            indices = shard[step * batch_size : (step + 1) * batch_size]
            return cifar.images[indices], cifar.labels[indices, None]

        pipeline = define(
            _array_pipeline,
            source,
            options,
            process_on(options, processes),
            batch_size=batch_size,
            num_threads=options.workers,
            prefetch_queue_depth=options.prefetch,
            seed=options.seed + rank,
            checkpoint=state["pipeline"] if state else None,
            enable_conditionals=options.auto_augment != "none",
            **device_arguments(processes.device),
        )
        # The source is endless, so epochs are counted here.
        self._dali = DALIGenericIterator([pipeline], list(OUTPUTS), prepare_first_batch=False)
        self._channels_last = options.channels_last
        self._step = state["step"] if state else 0

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        try:
            (batch,) = next(self._dali)
        except RuntimeError as error:
            raise LoaderError(" ".join(str(error).split())) from error
        return as_documented(batch, self._channels_last)

    def state(self) -> dict[str, Any]:
        (pipeline,) = self._dali.checkpoints()
        return {"pipeline": pipeline, "step": self._step}


@functools.lru_cache(maxsize=1)  # all batches of an epoch share one order
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def open_cifar(options: DataOptions, classes: list[str] | None = None) -> CifarData:
    """Read the archive in `options.data`; if `classes` is given, the classes of the archive must be the same."""
    if options.data is None:
        msg = f"data must be given with dataset {options.dataset!r}"
        raise ValueError(msg)
    if options.train_crop_size != SIZE:
        msg = f"--train-crop-size must be {SIZE} with --dataset {options.dataset}, got {options.train_crop_size}"
        raise ValueError(msg)
    train, val = read_cifar(options.data, options.dataset)
    if classes is not None and classes != train.classes:
        msg = f"{options.data}: its classes are not the requested ones, the first of which is {classes[0]!r}"
        raise ValueError(msg)
    counts = len(train), len(val)
    fingerprint = fingerprint_of(options, *counts, train.images.tobytes(), train.labels.tobytes())
    return CifarData(train.classes, *counts, Path(options.data), fingerprint, options.mean, options.std, train, val)


@dataclass(frozen=True)
class CifarData(Data):
    """CIFAR-10 or CIFAR-100, in memory."""

    train: CifarImages
    val: CifarImages

    def train_loader(self, options: DataOptions, processes: Processes, *, state: Any = None) -> Batches:
        """Return the training batches of this process, resumed from `state` if it is given."""
        check_share(len(self.train), processes.world_size, options.batch_size, self.root)
        mix, saliency = options.mix, None
        if mix is not None and _detects_before_padding(mix, options.crop_padding):
            _check_with_padding(mix, options.crop_padding)
            saliency = mix.saliency
        if chosen_backend(options) == "pytorch":
            images = PaddedImages(self.train, options.crop_padding, saliency, policy_of(options))
            batches = TrainingBatches(images, options, processes)
            return TorchLoader(batches, workers=options.workers, state=state)
        return _CifarLoader(self.train, options, processes, state)

    def val_loader(self, options: DataOptions, processes: Processes) -> Batches:
        """Return the validation batches of this process; over all processes, each image of `validated` appears once."""
        chosen = validated(len(self.val), options, processes)
        val = replace(self.val, images=self.val.images[chosen], labels=self.val.labels[chosen])
        # Normalisation is the only work: worker processes would only add overhead.
        return TorchLoader(ValidationBatches(PaddedImages(val), options, processes), workers=0)

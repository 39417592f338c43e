"""CIFAR-style pipeline: small images, padded with zeros, cropped at random, mixed, mirrored, normalised.

The edge of a zero padding is what a saliency detector sees first: it draws two or three times as many peaks as its area
accounts for. So the peaks are found before the padding and move with the crop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import DataNode, do_not_convert
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from nvidia.dali.types import BatchInfo

from dali_saliencymix.datasets.cifar import CifarImages
from dali_saliencymix.fn import saliency_peaks
from dali_saliencymix.loaders.dali import LoaderError, LoaderState
from dali_saliencymix.loaders.reading import decode_window, read_files, to_device

MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)

# What a mixing operator does: (images, labels[, peaks=...]) -> (images, labels, source_labels, lam).
Mix = Callable[..., tuple[DataNode, DataNode, DataNode, DataNode]]


@pipeline_def(enable_checkpointing=True)
def cifar_training_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    mix: Mix | None,
    find_peaks: Callable[[DataNode], DataNode] | None = saliency_peaks,
    size: int = 32,
    padding: int = 4,
    device: str = "cpu",
    shard_id: int = 0,
    num_shards: int = 1,
    shuffle_seed: int = 0,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Decode, pad, crop at random, mix, mirror at random, normalise.

    Parameters
    ----------
    files, labels : sequence
        Paths and labels of all images, which are `size` x `size`; each shard takes its share.
    mix : callable or None
        ``(images, labels, peaks=...) -> (images, labels, source_labels, lam)``, as `dali_saliencymix.fn.saliencymix`
        with its options bound by ``functools.partial``, but for `saliency`, which `find_peaks` decides. With None
        nothing is mixed: `lam` is 1 and `source_labels` are the labels.
    find_peaks : callable or None
        Finds the most salient pixel of the images as they were before the padding. None where `mix` takes no `peaks`:
        for `cutmix`, `mixup` and None.
    size : int
        Height and width of the images, before and after.
    padding : int
        Width of the border of zeros that a crop can reach into.
    device : {"cpu", "gpu"}
        Where images are decoded and processed.
    shard_id, num_shards, shuffle_seed
        As for `dali_saliencymix.loaders.imagenet.training_pipeline`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        Normalised images, CHW float32; labels of shape (1,), int32; weights of `labels`, float32 scalars.
    """
    encoded, label = read_files(
        files, labels, shard_id, num_shards, shuffle_after_epoch=True, shuffle_after_epoch_seed=shuffle_seed
    )
    shape = fn.peek_image_shape(encoded)[:2]
    images = decode_window(encoded, shape * 0, shape, device)
    return _augmented(images, label, mix, find_peaks, size, padding, 0.5, False, device)


@pipeline_def(enable_checkpointing=True)
def cifar_array_pipeline(
    source: Callable[[BatchInfo], tuple[NDArray[np.uint8], NDArray[np.int32]]],
    *,
    mix: Mix | None,
    find_peaks: Callable[[DataNode], DataNode] | None = None,
    size: int = 32,
    padding: int = 4,
    hflip_prob: float = 0.5,
    channels_last: bool = False,
    process_on: str = "cpu",
    device: str = "cpu",
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Do what `cifar_training_pipeline` does to images that are in memory already.

    Parameters
    ----------
    source : callable
        Gives images (N, size, size, 3) uint8 and labels (N, 1) int32 of the batch with a number. That number is all
        that a checkpoint holds of it, so it must depend on nothing else.
    mix, find_peaks, size, padding
        As for `cifar_training_pipeline`.
    hflip_prob : float
        Probability that an image is mirrored.
    channels_last : bool
        Images come out as HWC, else as CHW.
    process_on : {"cpu", "gpu"}
        Where images are processed.
    device : {"cpu", "gpu"}
        Where they come out; "gpu" if `process_on` is.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        As from `cifar_training_pipeline`.
    """
    images, label = fn.external_source(source=source, num_outputs=2, batch=True, batch_info=True, layout=["HWC", ""])
    images = to_device(process_on, images)
    return _augmented(images, label, mix, find_peaks, size, padding, hflip_prob, channels_last, device)


@do_not_convert
def _augmented(
    images: DataNode,
    label: DataNode,
    mix: Mix | None,
    find_peaks: Callable[[DataNode], DataNode] | None,
    size: int,
    padding: int,
    hflip_prob: float,
    channels_last: bool,
    device: str,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Pad, crop at random, mix, mirror at random, normalise."""
    offsets = [float(offset) for offset in range(-padding, padding + 1)]
    corner = fn.stack(*(fn.cast(fn.random.uniform(values=offsets), dtype=types.INT32) for _ in range(2)))
    given = {} if find_peaks is None else {"peaks": _moved(find_peaks(images), corner, size)}
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
    if mix is None:
        source_label, lam = label, fn.constant(fdata=[1.0], shape=[], device="cpu")
    else:
        images, label, source_label, lam = mix(images, label, **given)
    images = fn.crop_mirror_normalize(
        to_device(device, images),
        mirror=fn.random.coin_flip(probability=hflip_prob),
        mean=MEAN,
        std=STD,
        dtype=types.FLOAT,
        output_layout="HWC" if channels_last else "CHW",
    )
    return tuple(to_device(device, node) for node in (images, label, source_label, lam))


@do_not_convert
def _moved(peaks: DataNode, corner: DataNode, size: int) -> DataNode:
    """Return where the peaks are in the crop, at its edge where they were cut off: never in the padding."""
    corner = corner.gpu() if peaks.device == "gpu" else corner
    return math.clamp(peaks - corner, 0, size - 1)


class CifarLoader:
    """Training batches of images in memory, processed by DALI: what `dali_saliencymix.loaders.dali.Loader` is to files.

    Every epoch has an order of its own; the end that fills no batch is left out. A batch is images (N, 3, 32, 32)
    float32, labels and labels of the sources (N,) int64, and weights (N,) float32.

    Parameters
    ----------
    cifar : CifarImages
        The images.
    batch_size : int
        Images in a batch of this process.
    num_threads : int
        DALI's threads.
    device : torch.device
        Where the tensors lie.
    seed : int
        Seed of the order, and with `rank` added of all other draws. Give all processes the same one.
    rank, world_size : int
        Which of how many processes this is.
    state : LoaderState, optional
        To go on from; everything else has to be as it was for its loader.
    **options
        Of `cifar_array_pipeline`.
    """

    def __init__(
        self,
        cifar: CifarImages,
        *,
        batch_size: int,
        num_threads: int,
        device: torch.device,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
        state: LoaderState | None = None,
        **options: Any,
    ) -> None:
        self._length = len(cifar) // world_size // batch_size
        on_gpu = device.type == "cuda"
        pipeline = cifar_array_pipeline(
            _Batches(cifar, batch_size, self._length, seed, rank, world_size),
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if on_gpu else None,
            device="gpu" if on_gpu else "cpu",
            seed=seed + rank,
            checkpoint=state["pipeline"] if state else None,
            channels_last=channels_last,
            **options,
        )
        # The source never ends: epochs are counted here.
        self._iterator = DALIGenericIterator([pipeline], list(_NAMES), prepare_first_batch=False)
        self.bad_files: list[str] = []  # of no file: they are arrays by now
        self._channels_last = channels_last
        self._step = state["step"] if state else 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch: the same for all shards."""
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches that are left of the epoch."""
        while self._step < self._length:
            try:
                (batch,) = next(self._iterator)
            except RuntimeError as error:
                raise LoaderError(" ".join(str(error).split())) from error
            self._step += 1
            images, labels, source_labels, lam = (batch[name] for name in _NAMES)
            images = images.permute(0, 3, 1, 2) if self._channels_last else images
            yield images, labels.flatten().long(), source_labels.flatten().long(), lam
        self._step = 0

    def state(self) -> LoaderState:
        """Return where the loader stands; taken between two batches, it leads to the second one."""
        (pipeline,) = self._iterator.checkpoints()
        return {"pipeline": pipeline, "step": self._step}


_NAMES = ("images", "labels", "source_labels", "lam")


@dataclass(frozen=True)
class _Batches:
    """Makes batches by their number alone, so that DALI's checkpoint, which holds that number, says all of it."""

    cifar: CifarImages
    batch_size: int
    steps: int
    seed: int
    rank: int
    world_size: int

    def __call__(self, info: BatchInfo) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        epoch, step = divmod(info.iteration, self.steps)
        shard = _order(len(self.cifar), self.seed, epoch)[self.rank :: self.world_size]
        indices = shard[step * self.batch_size : (step + 1) * self.batch_size]
        return self.cifar.images[indices], self.cifar.labels[indices, None]


@functools.lru_cache(maxsize=1)  # one order serves all batches of an epoch
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)

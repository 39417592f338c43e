"""DALI pipelines as iterables of PyTorch tensors, one epoch at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_saliencymix.image_folder import ImageFolder, find_unreadable, why_unreadable
from pipelines.imagenet import training_pipeline, validation_pipeline


class LoaderError(RuntimeError):
    """A batch could not be made. The text says why in one line, and names the file where it is known."""


class LoaderState(TypedDict):
    """Where a loader stands: what DALI saves, and how many batches of the epoch it has given."""

    pipeline: bytes
    step: int


class Loader:
    """Batches of a pipeline as tuples of PyTorch tensors.

    Iterating gives one epoch, or what is left of it in a restored state; iterating again gives the next one. The first
    tensor of a batch is images (N, C, H, W), channels-last in memory where the pipeline gives HWC; the others are
    (N,), labels int64 and weights float32. All lie where the pipeline's outputs lie.

    Parameters
    ----------
    pipeline : nvidia.dali.Pipeline
        With a reader named ``"reader"`` that pads its last batch.
    names : sequence of str
        Names of the pipeline's outputs; those that are called labels come out as int64.
    files : sequence of str
        What the pipeline reads, to look for a broken file in.
    drop_last : bool
        If true, every batch is full, no image comes twice in an epoch, and all shards give the same number of batches;
        up to one batch of images of each shard is left out. Otherwise every image comes exactly once, and the last
        batch of a shard may be short, or even empty.
    channels_last : bool
        Whether the pipeline gives images as HWC.
    state : LoaderState, optional
        The state that `pipeline` was restored from.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        names: Sequence[str],
        files: Sequence[str],
        *,
        drop_last: bool,
        channels_last: bool = False,
        state: LoaderState | None = None,
    ) -> None:
        # DALI's own policy for dropping leaves the padded end of a larger shard in the reader, from where it gets into
        # the next epoch: shards overlap then. Reading all of the padded epoch and passing over its end is exact.
        policy = LastBatchPolicy.FILL if drop_last else LastBatchPolicy.PARTIAL
        self._iterator = DALIGenericIterator(
            [pipeline],
            list(names),
            reader_name="reader",
            last_batch_policy=policy,
            auto_reset=True,
            prepare_first_batch=False,
        )
        meta = pipeline.reader_meta("reader")
        smallest_shard = meta["epoch_size"] // meta["number_of_shards"]
        self._length = smallest_shard // pipeline.max_batch_size if drop_last else len(self._iterator)
        self._names = names
        self._files = files
        self._channels_last = channels_last
        self._step = state["step"] if state else 0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch: the same for all shards."""
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches that are left of the epoch."""
        batches = iter(self._iterator)
        while True:
            try:
                (batch,) = next(batches)
            except StopIteration:
                self._step = 0
                return
            except RuntimeError as error:
                raise LoaderError(_explained(str(error), self._files)) from error
            self._step += 1
            if self._step <= self._length:
                yield tuple(self._as_documented(name, batch[name]) for name in self._names)

    def state(self) -> LoaderState:
        """Return where the loader stands; taken between two batches, it leads to the second one."""
        (pipeline,) = self._iterator.checkpoints()
        return {"pipeline": pipeline, "step": self._step}

    def _as_documented(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "images":
            return tensor.permute(0, 3, 1, 2) if self._channels_last else tensor
        return tensor.flatten().long() if "labels" in name else tensor


def training_loader(
    folder: ImageFolder,
    *,
    batch_size: int,
    num_threads: int,
    device: torch.device,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    state: LoaderState | None = None,
    **options: Any,
) -> Loader:
    """Return a loader of ``(images, labels, source_labels, lam)`` for one process of a training run.

    Parameters
    ----------
    folder : ImageFolder
        The training images.
    batch_size : int
        Images in a batch of this process.
    num_threads : int
        Threads of the pipeline on the CPU.
    device : torch.device
        Where the pipeline works and the tensors lie.
    seed : int
        Seed of the file order, and with `rank` added of all other draws. Give all processes the same one.
    rank, world_size : int
        Which of how many processes this is.
    prefetch : int
        Batches that are made in advance.
    state : LoaderState, optional
        To go on from; `folder`, `batch_size`, `seed`, `world_size` and `options` have to be those of its loader.
    **options
        Of `pipelines.imagenet.training_pipeline`: `crop_size`, `mix`, `fp16`, `channels_last`, ...

    Raises
    ------
    ValueError
        If there are not enough images for one batch on each process, or `seed` is negative.
    """
    if len(folder) // world_size < batch_size:
        msg = (
            f"batch_size must be at most {len(folder) // world_size}, the share that each of {world_size} processes "
            f"has of the {len(folder)} images in {folder.root}, got {batch_size}"
        )
        raise ValueError(msg)
    if seed < 0:
        msg = f"seed must not be negative, which DALI takes for a random one, got {seed}"
        raise ValueError(msg)
    pipeline = training_pipeline(
        folder.files,
        folder.labels,
        device=_dali_device(device),
        shard_id=rank,
        num_shards=world_size,
        shuffle_seed=seed,
        seed=seed + rank,
        checkpoint=state["pipeline"] if state else None,
        **_pipeline_arguments(device, batch_size, num_threads, prefetch),
        **options,
    )
    names = ["images", "labels", "source_labels", "lam"]
    channels_last = options.get("channels_last", False)
    return Loader(pipeline, names, folder.files, drop_last=True, channels_last=channels_last, state=state)


def validation_loader(
    folder: ImageFolder,
    *,
    batch_size: int,
    num_threads: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    **options: Any,
) -> Loader:
    """Return a loader of ``(images, labels)`` that gives every image exactly once over all processes.

    Parameters are those of `training_loader`; `options` those of `pipelines.imagenet.validation_pipeline`.

    Raises
    ------
    ValueError
        If there are fewer images than processes.
    """
    if len(folder) < world_size:
        msg = f"{folder.root}: {len(folder)} images are too few for {world_size} processes"
        raise ValueError(msg)
    pipeline = validation_pipeline(
        folder.files,
        folder.labels,
        device=_dali_device(device),
        shard_id=rank,
        num_shards=world_size,
        **_pipeline_arguments(device, batch_size, num_threads, prefetch),
        **options,
    )
    channels_last = options.get("channels_last", False)
    return Loader(pipeline, ["images", "labels"], folder.files, drop_last=False, channels_last=channels_last)


def _dali_device(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else "cpu"


def _pipeline_arguments(device: torch.device, batch_size: int, num_threads: int, prefetch: int) -> dict[str, Any]:
    if device.type == "cuda" and not torch.cuda.is_available():
        msg = f"device must be 'cpu' where no CUDA GPU is found, got {str(device)!r}"
        raise ValueError(msg)
    return {
        "batch_size": batch_size,
        "num_threads": num_threads,
        "device_id": (device.index or 0) if device.type == "cuda" else None,
        "prefetch_queue_depth": prefetch,
    }


def _explained(text: str, files: Sequence[str]) -> str:
    """Turn what DALI says about a failed batch into one line."""
    named = re.search(r"(?:Failed to decode sample #\d+ :|File mapping failed:) (.+)", text)
    if named:
        file = named[1].strip()
        return f"{file}: {why_unreadable(file) or 'cannot be decoded'}"
    if "nvImageCodec failure" in text:
        found = find_unreadable(files)
        if found:
            return "; ".join(f"{file}: {why}" for file, why in found)
        return f"one of {len(files)} images cannot be decoded, and which one could not be found out"
    raised = re.search(r"\b\w*(?:Error|Exception|Interrupt): ((?:.|\n)*?)\n\s*\nAt:", text)
    if raised:
        return " ".join(raised[1].split())
    return " ".join(text.split())

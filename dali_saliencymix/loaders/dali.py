"""DALI pipelines as iterables of PyTorch tensors, one epoch at a time."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_saliencymix.datasets.damage import find_unusable, why_unusable
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders.bad_files import BadFiles, stand_in
from dali_saliencymix.loaders.base import Batches, LoaderError, chosen_backend
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes

OUTPUTS = ("images", "labels", "source_labels", "lam")  # of a training pipeline; the first two of one for validation

# Makes the pipeline that reads these files with these labels, from its beginning or from a checkpoint. Its reader has
# the name "reader" and pads its last batch.
Build = Callable[[Sequence[str], Sequence[int], bytes | None], Pipeline]


class _Place(TypedDict):
    pipeline: bytes
    step: int


class LoaderState(_Place, total=False):
    """Where a loader stands: what DALI saves, batches given in the epoch, and which file stands in for which."""

    replaced: dict[int, int]


class Loader(Batches):
    """Batches of a pipeline as tuples of PyTorch tensors.

    Iterating gives one epoch, or what is left of it in a restored state; iterating again gives the next one. The first
    tensor of a batch is images (N, C, H, W), channels-last in memory where the pipeline gives HWC; the others are
    (N,), labels int64 and weights float32. All are where the pipeline's outputs are.

    A file that cannot be read or decoded is named on stderr and left out from then on: the pipeline is rebuilt from its
    checkpoint before the batch that failed, with the next file in its place. So the number of batches does not change,
    on this shard and on all others, and the other images of the batch are what they would have been. Files that are
    refused by their headers (`dali_saliencymix.datasets.formats`) are left out from the beginning.

    `dali_saliencymix.loaders.imagenet.training_loader` makes one with `drop_last`: every batch is full, no image comes
    twice in an epoch, and up to one batch of images of each shard is left out. That of `validation_loader` gives every
    image exactly once: the last batch of a shard may be short, or even empty, and of a bad file no image comes at all.
    """

    def __init__(
        self,
        build: Build,
        folder: ImageFolder,
        *,
        drop_last: bool,
        channels_last: bool,
        max_bad_batches: int,
        rank: int = 0,
        state: LoaderState | None = None,
    ) -> None:
        self._build, self._folder = build, folder
        self._drop_last, self._channels_last = drop_last, channels_last
        self._step = state["step"] if state else 0
        replaced = state.get("replaced") if state else None
        self._bad = BadFiles(folder, max_bad_batches, replace=drop_last, replaced=replaced, report=rank == 0)
        try:
            self._start(state["pipeline"] if state else None)
        except RuntimeError as error:
            if state is None or isinstance(error, LoaderError):
                raise
            msg = (
                "the state to resume from is not one of this pipeline: another version of this package may have "
                f"written it, and --restart-epoch resumes without it: {' '.join(str(error).split())}"
            )
            raise LoaderError(msg) from error

    def _start(self, checkpoint: bytes | None) -> None:
        files, labels = self._bad.in_place()
        pipeline = self._build(files, labels, checkpoint)
        self._iterator = _iterate(pipeline, self._drop_last)
        meta = pipeline.reader_meta("reader")
        smallest_shard = meta["epoch_size"] // meta["number_of_shards"]
        self._length = smallest_shard // pipeline.max_batch_size if self._drop_last else len(self._iterator)
        self._started_from: bytes | None = checkpoint
        self._gave_none = True

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        while True:
            try:
                batch = self._next()
            except StopIteration:
                self._step = 0
                return
            self._step += 1
            if self._step <= self._length:
                yield self._as_documented(batch)

    def state(self) -> LoaderState:
        """Return where the loader stands; taken between two batches, it leads to the second one."""
        (pipeline,) = self._iterator.checkpoints()
        return {"pipeline": pipeline, "step": self._step, "replaced": dict(self._bad.replaced)}

    @property
    def bad_files(self) -> list[str]:
        """Files that were left out, in the order in which they were found."""
        return self._bad.names

    def _next(self) -> dict[str, torch.Tensor]:
        while True:
            try:
                (batch,) = next(self._iterator)
            except RuntimeError as error:
                self._leave_out_bad_files(str(error))
            else:
                self._gave_none = False
                return batch

    def _leave_out_bad_files(self, text: str) -> None:
        """Build the pipeline again without the files that made the coming batch fail, or raise LoaderError."""
        if not re.search(r"operator `nvidia\.dali\.fn\.(readers|reinterpret|slice|peek_image_shape|decoders)\b", text):
            raise LoaderError(_without_traceback(text))
        # After a failure DALI's own checkpoint is still that of the batch before.
        checkpoint = self._started_from if self._gave_none else self._iterator.checkpoints()[0]
        # A pipeline ends here, in the main thread, and not when Python's collector happens to run in one of DALI's.
        del self._iterator
        gc.collect()
        found = self._find_bad_files(text, checkpoint)
        # What stands in for a file may be bad itself: that one is named then.
        for index, why in {self._bad.replaced.get(index, index): why for index, why in found}.items():
            self._bad.leave_out(index, why)
        self._start(checkpoint)

    def _find_bad_files(self, text: str, checkpoint: bytes | None) -> list[tuple[int, str]]:
        files, _ = self._bad.in_place()
        named = re.search(r"(?:Failed to decode sample #\d+ :|File mapping failed:|Failed to open \S+) *(.+)", text)
        if named and named[1].strip() in files:
            file = named[1].strip()
            why = why_unusable(file) or "cannot be decoded"
            return [(index, why) for index, name in enumerate(files) if name == file]
        indices = self._coming_batch(checkpoint)
        found = find_unusable([files[index] for index in indices])
        if not found:
            # A file that only DALI rejects shows when DALI decodes the images one by one.
            found = {files[index]: "cannot be decoded" for index in indices if not _decodes(files[index])}
        if not found:
            msg = f"one of {len(indices)} images cannot be decoded, and which one could not be found out"
            raise LoaderError(msg)
        return [(index, found[files[index]]) for index in indices if files[index] in found]

    def _coming_batch(self, checkpoint: bytes | None) -> list[int]:
        """Return which files the next batch after `checkpoint` is made of."""
        # The same pipeline over one readable image and with numbers as labels makes that batch without failing.
        count = len(self._folder)
        readable = self._folder.files[stand_in(self._folder, -1, self._bad.replaced)]
        iterator = _iterate(self._build([readable] * count, range(count), checkpoint), self._drop_last)
        labels = next(iterator)[0]["labels"].flatten().tolist()
        del iterator
        gc.collect()
        return sorted(set(labels))

    def _as_documented(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = as_documented(batch, self._channels_last)
        if self._bad.replaced and not self._drop_last:
            of_good_files = batch["labels"].flatten() >= 0
            tensors = tuple(tensor[of_good_files] for tensor in tensors)
        return tensors


def as_documented(batch: dict[str, torch.Tensor], channels_last: bool) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a pipeline as a batch: images (N, C, H, W), labels (N,) int64, weights (N,)."""
    outputs = {name: batch[name] for name in OUTPUTS if name in batch}
    images, *others = (output.flatten().long() if "labels" in name else output for name, output in outputs.items())
    return images.permute(0, 3, 1, 2) if channels_last else images, *others


def _iterate(pipeline: Pipeline, drop_last: bool) -> DALIGenericIterator:
    # DALI's own policy for dropping leaves the padded end of a larger shard in the reader, from where it gets into
    # the next epoch: shards overlap then. Reading all of the padded epoch and passing over its end is exact.
    return DALIGenericIterator(
        [pipeline],
        list(OUTPUTS if drop_last else OUTPUTS[:2]),
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.FILL if drop_last else LastBatchPolicy.PARTIAL,
        auto_reset=True,
        prepare_first_batch=False,
    )


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def _decoding(file: str) -> Any:
    encoded, _ = fn.readers.file(files=[file])
    return fn.decoders.image(encoded), fn.peek_image_shape(encoded)


def _decodes(file: str) -> bool:
    try:
        _decoding(file).run()
    except RuntimeError:
        return False
    return True


def define(definition: Callable[..., Pipeline], *arguments: Any, **options: Any) -> Pipeline:
    """Return a pipeline of a definition, and raise what goes wrong in it as it was raised there."""
    try:
        return definition(*arguments, **options)
    except Exception as error:
        # With conditionals, DALI raises another error, of many lines and maybe of another type.
        if hasattr(error, "ag_error_metadata") and error.__context__ is not None:
            raise error.__context__ from None
        raise


def device_arguments(device: torch.device) -> dict[str, Any]:
    """Return the arguments by which a pipeline definition and DALI know a device, or refuse a GPU that is not there."""
    if device.type != "cuda":
        return {"device": "cpu", "device_id": None}
    if not torch.cuda.is_available():
        msg = f"device must be 'cpu' where no CUDA GPU is found, got {str(device)!r}"
        raise ValueError(msg)
    return {"device": "gpu", "device_id": device.index or 0}


def process_on(options: DataOptions, processes: Processes) -> str:
    """Return where DALI works on the images, "cpu" or "gpu"; refuse a GPU in a run on the CPU."""
    if chosen_backend(options) != "dali-gpu":
        return "cpu"
    if processes.device.type != "cuda":
        msg = f"--data-backend dali-gpu needs a run on a GPU, and this one is on {processes.device}; take dali-cpu"
        raise ValueError(msg)
    return "gpu"


def _without_traceback(text: str) -> str:
    """Turn what DALI says about an error in a Python operator into one line."""
    raised = re.search(r"\b\w*(?:Error|Exception|Interrupt): ((?:.|\n)*?)\n\s*\nAt:", text)
    return " ".join((raised[1] if raised else text).split())

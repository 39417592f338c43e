"""DALI pipelines as iterables of PyTorch tensors, one epoch per iteration."""

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

OUTPUTS = ("images", "labels", "source_labels", "lam")  # of a training pipeline; validation has the first two

# Builds the pipeline that reads these files and labels, from the start or from the keyword `checkpoint`; `rare_formats`
# is a keyword too. Its reader is named "reader" and pads its last batch.
Build = Callable[..., Pipeline]


class LoaderState(TypedDict):
    """State of a loader: DALI's checkpoint, the batches yielded in the epoch, and the replacements of bad files."""

    pipeline: bytes
    step: int
    replaced: dict[int, int]  # absent in old checkpoints


class Loader(Batches):
    """Batches of a pipeline as tuples of PyTorch tensors.

    Each iteration yields one epoch. After a resume, the first iteration yields the rest of the interrupted epoch. So
    does the next iteration if one is left before its last batch.

    The first tensor of a batch holds images (N, C, H, W), channels-last in memory if the pipeline outputs HWC. The
    others have shape (N,): int64 labels, and float32 weights. All tensors are on the device of the pipeline's outputs.

    A file that cannot be read or decoded is reported on stderr and left out from then on. The pipeline is rebuilt from
    its checkpoint before the failed batch, with the next usable file in place of the bad one. The number of batches
    does not change on any shard, and neither do the other images of the batch. Files whose headers are refused
    (`dali_saliencymix.datasets.formats`) are left out from the start.

    `dali_saliencymix.loaders.imagenet.training_loader` sets `drop_last`: every batch is full, no image appears twice in
    an epoch, and each shard leaves out up to one batch of images. `validation_loader` does not: every image appears
    exactly once, the last batch of a shard may be short or empty, and bad files are dropped, not replaced.
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
                "the state to resume from does not fit this pipeline, maybe because another version of this package "
                f"wrote it; --restart-epoch resumes without it: {' '.join(str(error).split())}"
            )
            raise LoaderError(msg) from error

    def _start(self, checkpoint: bytes | None) -> None:
        pipeline = self._pipeline(*self._bad.in_place(), checkpoint)
        # Not `_iterator`: Lightning sets an attribute of this name to None at the end of a training.
        self._dali = _iterate(pipeline, self._drop_last)
        meta = pipeline.reader_meta("reader")
        smallest_shard = meta["epoch_size"] // meta["number_of_shards"]
        self._length = smallest_shard // pipeline.max_batch_size if self._drop_last else len(self._dali)
        self._started_from: bytes | None = checkpoint
        self._gave_none = True

    def _pipeline(self, files: Sequence[str], labels: Sequence[int], checkpoint: bytes | None) -> Pipeline:
        # A checkpoint does not fit a graph with other operators, so these must not depend on `files`.
        return self._build(files, labels, checkpoint=checkpoint, rare_formats=self._bad.rare_formats)

    def _remaining(self) -> Iterator[tuple[torch.Tensor, ...]]:
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
        """Return the state, from which a new loader resumes with the next batch."""
        (pipeline,) = self._dali.checkpoints()
        return {"pipeline": pipeline, "step": self._step, "replaced": dict(self._bad.replaced)}

    @property
    def bad_files(self) -> list[str]:
        """The files that were left out, in the order in which they were found."""
        return self._bad.names

    def _next(self) -> dict[str, torch.Tensor]:
        while True:
            try:
                (batch,) = next(self._dali)
            except RuntimeError as error:
                self._leave_out_bad_files(str(error))
            else:
                self._gave_none = False
                return batch

    def _leave_out_bad_files(self, text: str) -> None:
        """Rebuild the pipeline without the files that made the next batch fail, or raise LoaderError."""
        if not re.search(r"operator `nvidia\.dali\.fn\.(readers|reinterpret|slice|peek_image_shape|decoders)\b", text):
            raise LoaderError(_without_traceback(text))
        # After a failure, DALI's checkpoint is still that of the previous batch.
        checkpoint = self._started_from if self._gave_none else self._dali.checkpoints()[0]
        # Destroy the pipeline here, in the main thread, not whenever Python's collector runs in a thread of DALI.
        del self._dali
        gc.collect()
        found = self._find_bad_files(text, checkpoint)
        # If a replacement is bad itself, leave out and report the replacement.
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
            # Only DALI rejects the file: let DALI decode the images one by one.
            found = {files[index]: "cannot be decoded" for index in indices if not _decodes(files[index])}
        if not found:
            msg = f"one of {len(indices)} images cannot be decoded, but could not be identified"
            raise LoaderError(msg)
        return [(index, found[files[index]]) for index in indices if files[index] in found]

    def _coming_batch(self, checkpoint: bytes | None) -> list[int]:
        """Return the indices of the files in the next batch after `checkpoint`."""
        # The same pipeline, with one readable image for all files and indices as labels, does not fail at that batch.
        count = len(self._folder)
        readable = self._folder.files[stand_in(self._folder, -1, self._bad.replaced)]
        pipeline = self._pipeline([readable] * count, range(count), checkpoint)
        iterator = _iterate(pipeline, self._drop_last)
        labels = next(iterator)[0]["labels"].flatten().tolist()
        del iterator, pipeline
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
    # DALI's DROP policy leaves the padded end of a larger shard in the reader. It leaks into the next epoch, where the
    # shards then overlap. Reading the whole padded epoch and skipping its end is exact.
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
    """Build a pipeline from a definition, and raise errors of the definition unchanged."""
    try:
        return definition(*arguments, **options)
    except Exception as error:
        # With conditionals, DALI wraps the error in one of many lines and maybe of another type.
        if hasattr(error, "ag_error_metadata") and error.__context__ is not None:
            raise error.__context__ from None
        raise


def device_arguments(device: torch.device) -> dict[str, Any]:
    """Return the pipeline arguments `device` and `device_id` for a device; ValueError if the GPU does not exist."""
    if device.type != "cuda":
        return {"device": "cpu", "device_id": None}
    if not torch.cuda.is_available():
        msg = f"device must be 'cpu' if no CUDA GPU is found, got {str(device)!r}"
        raise ValueError(msg)
    return {"device": "gpu", "device_id": device.index or 0}


def process_on(options: DataOptions, processes: Processes) -> str:
    """Return where DALI processes the images, "cpu" or "gpu"; ValueError for dali-gpu in a run on the CPU."""
    if chosen_backend(options) != "dali-gpu":
        return "cpu"
    if processes.device.type != "cuda":
        msg = f"--data-backend dali-gpu needs a run on a GPU, but this one is on {processes.device}; use dali-cpu"
        raise ValueError(msg)
    return "gpu"


def _without_traceback(text: str) -> str:
    """Reduce DALI's message about an error in a Python operator to one line."""
    raised = re.search(r"\b\w*(?:Error|Exception|Interrupt): ((?:.|\n)*?)\n\s*\nAt:", text)
    return " ".join((raised[1] if raised else text).split())

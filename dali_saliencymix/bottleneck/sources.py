"""Sources of batches: a DALI pipeline or any iterable; `training_source` returns the source of ``train.py``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dali_saliencymix._checks import kind_of
from dali_saliencymix.loaders.options import DataOptions, flags_of
from dali_saliencymix.measure.results import one_line
from dali_saliencymix.measure.windows import MeasurementError, in_one_line

Settings = Mapping[str, Any]

# Arguments of a DALI pipeline, each with the field of `DataOptions` that sets it.
OF_PIPELINES = {
    "batch_size": "batch_size",
    "num_threads": "workers",
    "prefetch_queue_depth": "prefetch",
    "hw_decoder_load": "hw_decoder_load",
}


@dataclass
class Source:
    """A source of batches that can be opened repeatedly, also with changed settings."""

    name: str
    settings: dict[str, Any]  # the present settings, which what-ifs can change
    open: Callable[[Settings], Iterable[Any]]  # returns batches
    define: Callable[[Settings], Any] | None = None  # returns a new DALI pipeline, not built
    files: list[str] | None = None  # the files that are read, if known
    dataset_bytes: float | None = None  # size of the whole data set of the training; by default that of the files
    ahead: int = 2  # batches that may be prefetched
    conditions: dict[str, Any] = field(default_factory=dict)  # for the report
    options: dict[str, str] = field(default_factory=dict)  # fields of `DataOptions` by setting
    is_training: bool = False  # whether this is the loader of ``train.py``

    def __post_init__(self) -> None:
        if self.dataset_bytes is None:
            self.dataset_bytes = bytes_of(self.files)

    def in_words(self, settings: Settings) -> str:
        """Return settings as a user writes them: options of ``train.py``, or arguments of the pipeline function."""
        if self.is_training:
            return " ".join(f"{data_flags(self.options[name])[0]} {value}" for name, value in settings.items())
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    def as_file(self, settings: Settings) -> dict[str, Any]:
        """Return settings as they are written to a file: options for ``train.py --config``, or arguments by name."""
        if self.is_training:
            return {data_flags(self.options[name])[-1].removeprefix("--"): value for name, value in settings.items()}
        return dict(settings)

    @property
    def threads(self) -> tuple[int | None, str]:
        """Number of threads or worker processes of the loader, None if unknown; and what they are called."""
        known = {**self.conditions, **self.settings}
        workers = known.get("workers", known.get("num_workers"))
        if workers is not None:
            return workers, "worker processes"
        return known.get("num_threads"), "DALI threads"


def data_flags(option: str) -> tuple[str, ...]:
    """Return the flags of a field of `DataOptions`.

    Examples
    --------
    >>> data_flags("workers")
    ('-j', '--workers')
    """
    return flags_of(DataOptions.__dataclass_fields__[option])


def load_function(name: str, option: str) -> Callable[..., Any]:
    """Return the function named by ``module:function``; errors name `option`."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        msg = f"{option} must be module:function, got {name!r}"
        raise MeasurementError(msg)
    with in_one_line(f"{option}: cannot import {module_name}"):
        found: Any = importlib.import_module(module_name)
    with in_one_line(f"{option}: module {module_name!r} has no {function_name!r}"):
        found = operator.attrgetter(function_name)(found)
    if not callable(found):
        msg = f"{option}: {name} must be a function, got a {type(found).__name__}"
        raise MeasurementError(msg)
    return found


def loader_source(loader: Any, *, batch_size: int | None = None, files: list[str] | None = None) -> Source:
    """Return a source for an iterable of batches, or for a function or class that returns one."""
    is_function = isinstance(loader, type) or (callable(loader) and not hasattr(loader, "__iter__"))
    with in_one_line("the loader cannot be created"):
        made = loader() if is_function else loader
    if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
        msg = f"the loader must be an iterable of batches, got a {type(made).__name__}"
        raise MeasurementError(msg)
    workers = getattr(made, "num_workers", 0)
    ahead = workers * (getattr(made, "prefetch_factor", None) or 2) if isinstance(workers, int) and workers else 2
    name = getattr(loader, "__qualname__", type(made).__name__)
    conditions: dict[str, Any] = {"type": kind_of(made)}
    if workers:
        conditions["num_workers"] = workers
    if batch_size:
        conditions["batch_size"] = batch_size
    return Source(f"loader {name}", {}, lambda settings: made, files=files, ahead=ahead, conditions=conditions)


def pipeline_source(define: Callable[..., Any], settings: Settings, *, files: list[str] | None = None) -> Source:
    """Return a source for a function that returns a new DALI pipeline at each call.

    `settings` holds arguments for the function by name; None is not passed. An argument that the function does not have
    is an error. By default, `files` are those of the pipeline's readers.
    """
    from dali_saliencymix.bottleneck.stages import reader_files

    takes = _accepted(define)
    given = {name: value for name, value in settings.items() if value is not None}
    refused = sorted(given.keys() - takes) if takes is not None else []
    if refused:
        name = getattr(define, "__qualname__", "the function")
        msg = f"{name} takes no {refused[0]}, so it cannot be set: leave the option out, or add the argument"
        raise MeasurementError(msg)

    def defined(changed: Settings) -> Any:
        with in_one_line("the pipeline cannot be created"):
            return define(**{**given, **changed})

    first = defined({})
    if not hasattr(first, "run") or not hasattr(first, "set_outputs"):
        msg = f"the pipeline's function must return a DALI pipeline, got a {type(first).__name__}"
        raise MeasurementError(msg)
    found = {
        "batch_size": first.max_batch_size,
        "num_threads": first.num_threads,
        "prefetch_queue_depth": first.prefetch_queue_depth,
    }
    # The load of the hardware JPEG decoder, if it is given or the function has a default for it.
    share = inspect.signature(define).parameters.get("hw_decoder_load")
    load = given.get("hw_decoder_load", share.default if share else None)
    if isinstance(load, (int, float)):
        found["hw_decoder_load"] = load
    changeable = {name: value for name, value in found.items() if takes is None or name in takes}
    ahead = first.prefetch_queue_depth
    ahead = max(ahead.values()) if isinstance(ahead, dict) else int(ahead)

    if files is None:
        with contextlib.suppress(OSError, ValueError):  # running the pipeline raises a better error
            files = reader_files(lambda: defined({}))
    return Source(
        f"DALI pipeline {getattr(define, '__qualname__', '')}".strip(),
        settings={**changeable, **{name: value for name, value in given.items() if name not in found}},
        open=lambda changed: PipelineBatches(defined(changed)),
        define=defined,
        files=files,
        ahead=ahead,
        conditions={**found, **given},
        options=OF_PIPELINES,
    )


def _accepted(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of the arguments that a function accepts; None if it accepts any."""
    parameters = inspect.signature(function).parameters
    named = {name for name, value in parameters.items() if value.kind is not value.VAR_KEYWORD}
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if getattr(inner, "_is_pipeline_def", False):
        return named | {"batch_size", "num_threads", "prefetch_queue_depth", "device_id"}
    return None if len(named) < len(parameters) else named


class PipelineBatches:
    """Batches of a DALI pipeline: tuples of PyTorch tensors, or DALI outputs if shapes differ or `raw` is set."""

    def __init__(self, pipeline: Any, *, raw: bool = False) -> None:
        self._pipeline = pipeline
        self._raw = raw
        with in_one_line("the pipeline cannot be built", explained):
            pipeline.build()
            sizes = [meta["epoch_size"] for meta in pipeline.reader_meta().values()]
        self.epoch_images = max(sizes, default=None)  # of all processes

    def __iter__(self) -> Iterator[Any]:
        """Yield batches until an external source ends the epoch; a pipeline with readers never ends."""
        while True:
            try:
                with in_one_line("the pipeline failed", explained):
                    outputs = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                return
            yield tuple(outputs) if self._raw else tuple(_as_tensor(output) for output in outputs)


def _as_tensor(output: Any) -> Any:
    if not output.is_dense_tensor():
        return output
    import torch

    return torch.utils.dlpack.from_dlpack(output.as_tensor())


def explained(error: BaseException) -> str:
    """Return the message of a DALI error on one line, without the stack trace."""
    text = str(error)
    raised = re.search(r"\b\w*(?:Error|Exception): (?!DLTensor)((?:.|\n)*?)\n\s*\nAt:", text)
    if raised:
        return " ".join(raised[0].removesuffix("At:").split())
    met = re.search(r"encountered:\s*((?:.|\n)*?)(?:Current pipeline object|$)", text)
    return one_line(RuntimeError(met[1])) if met else one_line(error)


def bytes_of(files: list[str] | None) -> float | None:
    """Return the total size of files; None if there are none or the size of one is unknown."""
    if not files:
        return None
    try:
        return float(sum(os.stat(file).st_size for file in files))
    except OSError:
        return None

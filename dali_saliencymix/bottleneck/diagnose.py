"""The complete measurement, from a source and a step to a report."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from dali_saliencymix.bottleneck.report import Report, build_report
from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.bottleneck.stages import Cut, cut_pipeline
from dali_saliencymix.bottleneck.storage import StorageRates, measure_storage
from dali_saliencymix.bottleneck.tune import tunable, tune
from dali_saliencymix.bottleneck.verdict import OF_THE_LOADER, Figures, RankFigures, Series, Stage, decide
from dali_saliencymix.bottleneck.whatifs import best_change, measured_rows, predicted_rows
from dali_saliencymix.measure.environment import oversubscription
from dali_saliencymix.measure.page_cache import memory_bytes
from dali_saliencymix.measure.processes import gather, slowest_by_round
from dali_saliencymix.measure.windows import Batches, MeasurementError, Meter, Step, Subject, copied, on_all

ROUNDS = 9
CACHES = ("auto", "warm", "cold")


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Disable Python's garbage collector, which would destroy unused pipelines in whichever thread it runs.

    Destroying a pipeline in a thread in which DALI calls a Python operator aborts the process, or deadlocks. Explicit
    calls of ``gc.collect`` destroy the pipelines instead.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
def measure_source(
    source: Source,
    step: Step | None,
    *,
    device: str = "cpu",
    seconds: float = 100.0,
    rounds: int = ROUNDS,
    cache: str = "auto",
    with_storage: bool = True,
    with_what_ifs: bool = True,
    with_tuning: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure a source and a training step, and return the report of `bottleneck.diagnose`.

    A step may have two attributes: `batches_per_update`, the number of batches for each update of the weights, and
    `alone`, the same step without communication with other processes.
    """
    if cache not in CACHES:
        msg = f"cache must be one of {', '.join(CACHES)}, got {cache!r}"
        raise ValueError(msg)
    if not seconds > 0:
        msg = f"seconds must be positive, got {seconds!r}"
        raise ValueError(msg)
    if with_tuning:
        tunable(source)
    start = time.perf_counter()
    if device == "cuda":
        import torch

        meter = Meter(torch.cuda.synchronize, notify)
    else:
        meter = Meter(notify=notify)
    notify("loader, step and stages, interleaved")
    share = 0.35 if with_tuning else 0.65 if with_storage or with_what_ifs else 1.0
    main = _main_windows(source, step, meter, seconds=share * seconds, rounds=rounds)
    gc.collect()  # the loaders' threads and mapped files would disturb the following measurements
    figures, images = main.figures, main.images
    loader = figures.loader_ms
    assert loader is not None

    stored = StorageRates(not_measured="not requested")
    if with_storage:
        notify("storage: dropping files from memory and reading them again")
        try:
            stored = measure_storage(
                source,
                images=images,
                loader_ms=median(loader),
                read_cut=main.cuts[0].make if main.cuts and main.cuts[0].category == "read" else None,
                seconds=(0.1 if with_tuning else 0.15) * seconds,
                meter=meter,
            )
        except MeasurementError as error:
            stored = StorageRates(not_measured=str(error))
    memory = memory_bytes()
    too_large = source.dataset_bytes is not None and memory is not None and source.dataset_bytes > 0.9 * memory
    figures = dataclasses.replace(
        figures,
        device=device,
        cold_ms=stored.from_storage(median(loader)),
        reading_ms=stored.reading(median(figures.stages[0].ms)) if figures.stages else None,
        storage_measured=stored.not_measured is None,
        reads_cold=cache == "cold" or (cache == "auto" and too_large),
    )
    verdict = decide(figures)

    what_ifs: list[dict[str, Any]] = []
    tuned = None
    if with_tuning:
        notify("tune: other settings of the loader, interleaved with the best so far")
        tuned = tune(
            source,
            step=figures.step_ms and _of_an_image(figures.step_ms, images),
            loader=_of_an_image(loader, images),
            seconds=0.55 * seconds,
            meter=meter,
        )
        tuned["settings"] = source.as_file(tuned["best"])
    elif with_what_ifs:
        notify("what-ifs: other settings of the loader")
        what_ifs = measured_rows(source, seconds=0.2 * seconds, meter=meter)
    change = best_change(source, what_ifs, tuned)
    threads, called = source.threads
    what_ifs += predicted_rows(
        figures,
        images=images,
        epoch_images=main.epoch_images,
        threads=threads,
        threads_are=called,
        stalls=verdict.stall is not None and verdict.stall.low > 0,
    )
    crowded = oversubscription(threads, called, computes=step is not None and device == "cpu")
    notes = [*source.conditions.get("notes", ()), *filter(None, [crowded])]
    return build_report(
        figures,
        verdict,
        images=images,
        stages_note=main.stages_note,
        stored=stored,
        what_ifs=what_ifs,
        change=change if verdict.name in OF_THE_LOADER else None,
        tuned=tuned,
        timeline=main.timeline,
        conditions={
            "source": source.name,
            **source.conditions,
            **({"notes": notes} if notes else {}),
            "settings": source.settings,
            "images_per_batch": images,
            "processes": figures.world_size,
            "device": device,
            "cache": cache,
            "data_set_bytes": source.dataset_bytes,
            "memory_bytes": memory,
            "seconds_asked": seconds,
            "seconds_taken": round(time.perf_counter() - start, 1),
            "steps_in_a_window": main.steps,
            "epochs_begun": main.epochs,
            "command": " ".join(sys.argv),
        },
    )


class _Main(NamedTuple):
    """The figures of the main windows, those with files in memory, and what they are figures of."""

    figures: Figures
    images: int  # in a batch
    cuts: list[Cut]
    stages_note: str | None  # why there are no cuts
    timeline: dict[str, list[list[float]]] | None
    steps: dict[str, int]  # in a window of each subject
    epochs: int  # that the loader has begun
    epoch_images: float | None  # in an epoch of all processes


def _main_windows(source: Source, step: Step | None, meter: Meter, *, seconds: float, rounds: int) -> _Main:
    """Measure the step, the stages, the loader, and loader and step together, in interleaved windows."""
    opened = source.open({})
    batches = Batches(opened, nominal=source.conditions.get("batch_size"), ahead=source.ahead)
    update = getattr(step, "batches_per_update", 1)
    subjects: dict[str, Subject] = {}
    if step is not None:
        constant = copied(batches.next(), tensors=True)
        subjects["step"] = Subject(step=step, constant=constant, update=update)
        alone = getattr(step, "alone", None)
        if alone and len(gather(None)) > 1:
            subjects["own step"] = Subject(step=alone, constant=constant, update=update)
    cuts: list[Cut] = []
    stages_note = "an iterable cannot be split into stages: it is measured as a whole"
    if source.define is not None:
        try:
            cuts, shorter = on_all(partial(_cut, source, batches))
            subjects |= shorter
        except MeasurementError as error:
            stages_note = f"{error}: the pipeline is measured as a whole"
    subjects["loader"] = Subject(batches)
    end = Subject(batches, step, update=update)
    if step is not None:
        subjects["end to end"] = end
    ms, steps = meter.in_turns(subjects, seconds=seconds, rounds=rounds)
    if step is not None:
        ms["waits"] = [sum(waits) / sum(totals) for waits, totals in zip(end.waits, end.totals, strict=True)]
    gathered = gather(ms)
    epoch_images = source.conditions.get("images_in_data_set", getattr(opened, "epoch_images", None))
    if epoch_images is None and batches.epoch_length:
        epoch_images = batches.epoch_length * batches.nominal * len(gathered)
    return _Main(
        figures=_figures(gathered, cuts),
        images=batches.nominal,
        cuts=cuts,
        stages_note=None if cuts else stages_note,
        timeline=None if step is None else {"waits_ms": end.waits, "steps_ms": end.totals},
        steps=steps,
        epochs=batches.epochs,
        epoch_images=epoch_images,
    )


def _cut(source: Source, batches: Batches) -> tuple[list[Cut], dict[str, Subject]]:
    """Return the cuts of a source, and what is measured of them."""
    define = source.define
    assert define is not None
    cuts = cut_pipeline(lambda: define({}))
    subjects = {}
    for number, cut in enumerate(cuts):
        shorter = PipelineBatches(cut.make(), raw=True)
        subjects[f"cut {number}"] = Subject(Batches(shorter, nominal=batches.nominal, ahead=batches.ahead))
    return cuts, subjects


def _figures(gathered: list[dict[str, list[float]]], cuts: list[Cut]) -> Figures:
    """Return the figures of all processes: those of the slowest in each round, and each one's own."""
    slowest = slowest_by_round(gathered)
    loader = slowest["loader"]
    wholes = [(cut.name, cut.category, slowest[f"cut {number}"]) for number, cut in enumerate(cuts)]
    stages = []
    before: Series = (0.0,) * len(loader)
    for name, category, whole in (*wholes, ("iterator", "iterator", loader)):
        stages.append(Stage(name, category, tuple(b - a for a, b in zip(before, whole, strict=True))))
        before = whole
    own = "own step" if "own step" in slowest else "step"
    ranks = tuple(RankFigures(tuple(each[own]) if own in each else None, tuple(each["loader"])) for each in gathered)
    return Figures(
        step_ms=slowest.get("step"),
        loader_ms=loader,
        end_ms=slowest.get("end to end"),
        waits=slowest.get("waits"),
        stages=tuple(stages) if cuts else None,
        ranks=ranks if len(ranks) > 1 else (),
    )


def _of_an_image(ms: Series, images: int) -> Series:
    return tuple(each / images for each in ms)

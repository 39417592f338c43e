"""The complete measurement, from a source and a step to a report."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from dali_saliencymix.bottleneck.report import Report, build_report
from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.bottleneck.stages import Cut, cut_pipeline
from dali_saliencymix.bottleneck.storage import StorageRates, measure_storage
from dali_saliencymix.bottleneck.tune import as_file, tunable, tune
from dali_saliencymix.bottleneck.verdict import OF_THE_LOADER, Figures, RankFigures, Series, Stage, decide
from dali_saliencymix.bottleneck.whatifs import best_change, measured_rows, predicted_rows
from dali_saliencymix.measure.environment import oversubscription
from dali_saliencymix.measure.page_cache import memory_bytes
from dali_saliencymix.measure.processes import agree, by_round, first_reason, gather
from dali_saliencymix.measure.windows import Batches, MeasurementError, Step, Subject, copied, measure_in_turns

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
    synchronise: Callable[[], None] = lambda: None  # noqa: E731
    if device == "cuda":
        from torch.cuda import synchronize as synchronise
    notify("loader, step and stages, interleaved")
    cuts, stages_note = _cuts(source)
    opened = source.open({})
    epoch_images = getattr(opened, "epoch_images", None)
    batches = Batches(opened, nominal=source.conditions.get("batch_size"), ahead=source.ahead)
    images = batches.nominal
    subjects = _subjects(batches, step, cuts)
    if cuts and "cut 0" not in subjects:
        cuts, stages_note = [], "a part of the pipeline could not be built or run"
    main = seconds * (0.35 if with_tuning else 0.65 if with_storage or with_what_ifs else 1.0)
    found = measure_in_turns(subjects, seconds=main, rounds=rounds, synchronise=synchronise, notify=notify)
    end = subjects.get("end to end")
    timeline = {"waits_ms": end.waits, "steps_ms": end.totals} if end else None
    epochs, epoch_images = batches.epochs, source.conditions.get("images_in_data_set", epoch_images)
    epoch_length = batches.epoch_length
    # The loaders' threads and mapped files would disturb the following measurements.
    del subjects, batches, opened, end
    gc.collect()

    shares = [sum(waits) / sum(steps) for waits, steps in zip(*timeline.values(), strict=True)] if timeline else None
    gathered = gather({**found.ms, **({"waits": shares} if shares else {})})
    stored = StorageRates(not_measured="not requested")
    if with_storage:
        notify("storage: dropping files from memory and reading them again")
        stored = measure_storage(
            source,
            images=images,
            loader_ms=median(found.ms["loader"]),
            read_cut=cuts[0].make if cuts and cuts[0].category == "read" else None,
            seconds=(0.1 if with_tuning else 0.15) * seconds,
            synchronise=synchronise,
        )
    what_ifs: list[dict[str, Any]] = []
    tuned = None
    if with_tuning:
        notify("tune: other settings of the loader, interleaved with the best so far")
        tuned = tune(
            source,
            step=_of_an_image(gathered, "step", images),
            loader=_of_an_image(gathered, "loader", images) or (),
            seconds=0.55 * seconds,
            synchronise=synchronise,
            notify=notify,
        )
    elif with_what_ifs:
        notify("what-ifs: other settings of the loader")
        what_ifs = measured_rows(source, seconds=0.2 * seconds, synchronise=synchronise, notify=notify)

    memory = memory_bytes()
    too_large = source.dataset_bytes is not None and memory is not None and source.dataset_bytes > 0.9 * memory
    reads_cold = cache == "cold" or (cache == "auto" and too_large)
    until = {cut.name: by_round(gathered, f"cut {number}") or () for number, cut in enumerate(cuts)}
    figures = _figures(gathered, cuts, until, stored, reads_cold=reads_cold, device=device)
    threads, called = _threads(source)
    times = {name: getattr(figures, f"{name}_ms") for name in ("step", "loader", "end", "cold")}
    rates = {name: 1000 * images / median(ms) if ms else None for name, ms in times.items()}
    world = len(gathered)
    if epoch_images is None and epoch_length:
        epoch_images = epoch_length * images * world
    verdict = decide(figures)
    change = best_change(source, what_ifs, tuned)
    what_ifs += predicted_rows(
        **rates,
        reads_cold=reads_cold,
        threads=threads,
        world=world,
        threads_are=called,
        images=epoch_images,
        stalls=verdict.stall is not None and verdict.stall.low > 0,
    )
    crowded = oversubscription(threads, called, computes=step is not None and device == "cpu")
    notes = [*source.conditions.get("notes", ()), *filter(None, [crowded])]
    return build_report(
        figures,
        verdict,
        images=images,
        until=until,
        stages_note=stages_note,
        stored=stored,
        what_ifs=what_ifs,
        change=change if verdict.name in OF_THE_LOADER else None,
        tuned=tuned and {**tuned, "settings": as_file(source, tuned["best"])},
        timeline=timeline,
        conditions={
            "source": source.name,
            **source.conditions,
            **({"notes": notes} if notes else {}),
            "settings": source.settings,
            "images_per_batch": images,
            "processes": world,
            "device": device,
            "cache": cache,
            "data_set_bytes": source.dataset_bytes,
            "memory_bytes": memory,
            "seconds_asked": seconds,
            "seconds_taken": round(time.perf_counter() - start, 1),
            "steps_in_a_window": found.steps,
            "epochs_begun": epochs,
            "command": " ".join(sys.argv),
        },
    )


def _of_an_image(gathered: list[dict[str, list[float]]], name: str, images: int) -> Series | None:
    """Return milliseconds per image; with several processes, those of the slowest."""
    series = by_round(gathered, name)
    return series and tuple(ms / images for ms in series)


def _cuts(source: Source) -> tuple[list[Cut], str | None]:
    """Return the cuts of a source, the same number on all processes, or the reason why there are none."""
    define, cuts, why = source.define, [], None
    try:
        cuts = cut_pipeline(lambda: define({})) if define else []
    except MeasurementError as error:
        why = f"{error}: the pipeline is measured as a whole"
    why = first_reason(why if define else "an iterable cannot be split into stages: it is measured as a whole")
    return ([], why) if why else (cuts, None)


def _subjects(batches: Batches, step: Step | None, cuts: list[Cut]) -> dict[str, Subject]:
    """Return what is measured in interleaved windows; without the cuts if one of them fails."""
    subjects: dict[str, Subject] = {}
    update = getattr(step, "batches_per_update", 1)
    if step is not None:
        constant = copied(batches.first, tensors=True)
        subjects["step"] = Subject(step=step, constant=constant, update=update)
        alone = getattr(step, "alone", None)
        if alone and len(gather(None)) > 1:
            subjects["own step"] = Subject(step=alone, constant=constant, update=update)
    batches.first = None
    shorter: list[Batches] = []
    with contextlib.suppress(MeasurementError):
        for cut in cuts:
            made = PipelineBatches(cut.make(), raw=True)
            shorter.append(Batches(made, nominal=batches.nominal, ahead=batches.ahead))
            shorter[-1].first = None
    if agree(len(shorter) == len(cuts), all):
        subjects |= {f"cut {number}": Subject(cut_batches) for number, cut_batches in enumerate(shorter)}
    subjects["loader"] = Subject(batches)
    if step is not None:
        subjects["end to end"] = Subject(batches, step, update=update)
    return subjects


def _figures(
    gathered: list[dict[str, list[float]]],
    cuts: list[Cut],
    until: dict[str, Series],
    stored: StorageRates,
    *,
    reads_cold: bool,
    device: str,
) -> Figures:
    """Return what a verdict depends on; with several processes, the slowest in each round."""
    loader = by_round(gathered, "loader")
    assert loader is not None
    stages = []
    before: Series = (0.0,) * len(loader)
    for name, category in (*((cut.name, cut.category) for cut in cuts), ("iterator", "iterator")):
        whole = until.get(name, loader)
        stages.append(Stage(name, category, tuple(b - a for a, b in zip(before, whole, strict=True))))
        before = whole
    own = "own step" if "own step" in gathered[0] else "step"
    ranks = tuple(RankFigures(tuple(each[own]) if own in each else None, tuple(each["loader"])) for each in gathered)
    return Figures(
        step_ms=by_round(gathered, "step"),
        loader_ms=loader,
        end_ms=by_round(gathered, "end to end"),
        waits=by_round(gathered, "waits"),
        stages=tuple(stages) if cuts else None,
        cold_ms=stored.from_storage(median(loader)),
        reading_ms=stored.reading(median(stages[0].ms)),
        storage_measured=stored.not_measured is None,
        reads_cold=reads_cold,
        device=device,
        ranks=ranks if len(ranks) > 1 else (),
    )


def _threads(source: Source) -> tuple[int | None, str]:
    """Return the number of threads or worker processes of a loader, and what they are called."""
    workers = source.settings.get("workers", source.conditions.get("num_workers"))
    if workers is not None:
        return workers, "worker processes"
    return source.settings.get("num_threads", source.conditions.get("num_threads")), "DALI threads"

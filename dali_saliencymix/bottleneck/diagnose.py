"""The whole measurement, from a source and a step to a report."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dali_saliencymix.bottleneck import ranks, storage
from dali_saliencymix.bottleneck.errors import BottleneckError
from dali_saliencymix.bottleneck.measure import (
    Batches,
    EndToEnd,
    LoaderAlone,
    Step,
    StepAlone,
    Subject,
    measure_in_turns,
)
from dali_saliencymix.bottleneck.report import build_report
from dali_saliencymix.bottleneck.sources import PipelineBatches, Source
from dali_saliencymix.bottleneck.stages import Cut, cut_pipeline
from dali_saliencymix.bottleneck.storage_rates import StorageRates, measure_storage
from dali_saliencymix.bottleneck.verdict import Figures, RankFigures, Stage, decide
from dali_saliencymix.bottleneck.whatifs import measured_rows, predicted_rows

ROUNDS = 9
CACHES = ("auto", "warm", "cold")


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keep Python's collector from running: it ends pipelines that are done with, in whichever thread it happens to.

    In one in which DALI calls a Python operator that aborts the process, or stops it for ever. Here pipelines are
    ended by calls of ``gc.collect``.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_at_rest()
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
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a source and a training step, and say what holds the training back.

    Parameters
    ----------
    source : Source
        See `dali_saliencymix.bottleneck.sources`.
    step : callable, optional
        ``step(batch)``; without it the loader is measured alone. Where it updates the weights once in N batches, its
        attribute `batches_per_update` is N: windows then have their share of updates.
    device : {"cpu", "cuda"}
        Where the step runs; with ``"cuda"`` the edges of windows wait for the current CUDA device.
    seconds : float
        For everything, about.
    rounds : int
        At most so many windows of each figure; at least 5, which are measured however long they take.
    cache : {"auto", "warm", "cold"}
        Whether the training will find its files in memory: ``"auto"`` compares the data set with the memory.
    with_storage, with_what_ifs : bool
        Whether to measure these.
    notify : callable
        Is told in lines what goes on.

    Returns
    -------
    dict
        The report, see `dali_saliencymix.bottleneck.report`.

    Raises
    ------
    BottleneckError
        If the loader or the step fail.
    ValueError
        If an option is out of its range.
    """
    if cache not in CACHES:
        msg = f"cache must be one of {', '.join(CACHES)}, got {cache!r}"
        raise ValueError(msg)
    if not seconds > 0:
        msg = f"seconds must be positive, got {seconds!r}"
        raise ValueError(msg)
    start = time.perf_counter()
    synchronise = _synchronise(device)
    main = seconds * (0.65 if with_storage or with_what_ifs else 1.0)
    notify("loader, step and stages, in turns")
    cuts, stages_note = _cuts(source)
    batches = Batches(source.open({}), nominal=source.conditions.get("batch_size"), ahead=source.ahead)
    images = batches.nominal
    assert images is not None
    subjects = _subjects(batches, step, cuts, images)
    if cuts and "cut 0" not in subjects:
        cuts, stages_note = [], "a part of the pipeline could not be built or run"
    found = measure_in_turns(subjects, seconds=main, rounds=rounds, synchronise=synchronise, notify=notify)
    end = subjects.get("end to end")
    timeline = {"waits_ms": end.waits, "steps_ms": end.totals} if isinstance(end, EndToEnd) else None
    epochs = batches.epochs
    # The loaders' threads and mapped files would be in the way of what follows.
    del subjects, batches, end
    gc.collect()

    stored = StorageRates(not_measured="was not asked for")
    loader_ms = statistics.median(found["loader"].ms)
    if with_storage:
        notify("storage: files dropped from memory and read again")
        reading = cuts[0].make if cuts and cuts[0].category == "read" else None
        stored = measure_storage(
            source,
            images=images,
            loader_ms=loader_ms,
            read_cut=reading,
            seconds=0.15 * seconds,
            synchronise=synchronise,
        )
    what_ifs: list[dict[str, Any]] = []
    if with_what_ifs:
        notify("what-ifs: other settings of the loader")
        what_ifs = measured_rows(source, seconds=0.2 * seconds, synchronise=synchronise, notify=notify)

    gathered = ranks.gather({name: windows.ms for name, windows in found.items()})
    reads_cold = cache == "cold" or (cache == "auto" and _larger_than_memory(source.dataset_bytes))
    figures = _figures(gathered, cuts, stored, reads_cold=reads_cold, device=device)
    what_ifs += predicted_rows(
        step=_rate(figures.step_ms, images),
        loader=_rate(figures.loader_ms, images),
        end=_rate(figures.end_ms, images),
        cold=_rate(figures.cold_ms, images),
        reads_cold=reads_cold,
        threads=source.settings.get("num_threads") or source.settings.get("workers"),
        world=ranks.count(),
        threads_are="worker processes" if "workers" in source.settings else "DALI threads",
    )
    return build_report(
        figures,
        decide(figures),
        images=images,
        cuts=[(cut.name, cut.category, [max(values) for values in _by_round(gathered, f"cut {i}")])
              for i, cut in enumerate(cuts)],
        stages_note=stages_note,
        stored=stored,
        what_ifs=what_ifs,
        timeline=timeline,
        conditions={
            "source": source.name,
            **source.conditions,
            "settings": source.settings,
            "images_per_batch": images,
            "processes": ranks.count(),
            "device": device,
            "cache": cache,
            "data_set_bytes": source.dataset_bytes,
            "memory_bytes": storage.memory_bytes(),
            "seconds_asked": seconds,
            "seconds_taken": round(time.perf_counter() - start, 1),
            "steps_in_a_window": {name: windows.steps for name, windows in found.items()},
            "epochs_begun": epochs,
            "command": " ".join(sys.argv),
        },
    )  # fmt: skip


def _cuts(source: Source) -> tuple[list[Cut], str | None]:
    """Return the cuts of a source, the same number on all processes, or why there are none."""
    cuts: list[Cut] = []
    why = None
    if source.define is None:
        why = "an iterable cannot be cut into stages: it is measured as a whole"
    else:
        define = source.define
        try:
            cuts = cut_pipeline(lambda: define({}))
        except BottleneckError as error:
            why = f"{error}: the pipeline is measured as a whole"
    why = ranks.agree(why, lambda reasons: next((reason for reason in reasons if reason), None))
    return ([], why) if why else (cuts, None)


def _subjects(batches: Batches, step: Step | None, cuts: list[Cut], images: int) -> dict[str, Subject]:
    """Return what takes turns; without the cuts if one of them does not work."""
    subjects: dict[str, Subject] = {}
    group = getattr(step, "batches_per_update", 1)
    if step is not None:
        from dali_saliencymix.bottleneck.steps import kept

        constant = kept(batches.first)
        subjects["step"] = StepAlone(step, constant, group)
        alone = getattr(step, "alone", None)
        if alone and ranks.count() > 1:
            subjects["own step"] = StepAlone(alone, constant, group)
    batches.first = None
    cut_subjects: dict[str, Subject] = {}
    works = True
    for number, cut in enumerate(cuts):
        try:
            shorter = Batches(PipelineBatches(cut.make(), raw=True), nominal=images, ahead=batches.ahead)
        except BottleneckError:
            works = False
            break
        shorter.first = None
        cut_subjects[f"cut {number}"] = LoaderAlone(shorter)
    if ranks.agree(works, all):
        subjects |= cut_subjects
    subjects["loader"] = LoaderAlone(batches)
    if step is not None:
        subjects["end to end"] = EndToEnd(step, batches, group)
    return subjects


def _figures(
    gathered: list[dict[str, list[float]]],
    cuts: list[Cut],
    stored: StorageRates,
    *,
    reads_cold: bool,
    device: str,
) -> Figures:
    """Put together what a verdict needs: of several processes the slowest in each round."""

    def slowest(name: str) -> tuple[float, ...] | None:
        return tuple(max(values) for values in _by_round(gathered, name)) if name in gathered[0] else None

    loader = slowest("loader")
    assert loader is not None
    stages = []
    before: tuple[float, ...] = (0.0,) * len(loader)
    for number, cut in enumerate(cuts):
        until = slowest(f"cut {number}")
        assert until is not None
        stages.append(Stage(cut.name, cut.category, tuple(b - a for a, b in zip(before, until, strict=True))))
        before = until
    if stages:
        stages.append(Stage("hand-over", "hand-over", tuple(b - a for a, b in zip(before, loader, strict=True))))
    own = "own step" if "own step" in gathered[0] else "step"
    several = tuple(RankFigures(tuple(each[own]) if own in each else None, tuple(each["loader"])) for each in gathered)
    return Figures(
        step_ms=slowest("step"),
        loader_ms=loader,
        end_ms=slowest("end to end"),
        stages=tuple(stages) or None,
        cold_ms=stored.from_storage(statistics.median(loader)),
        reading_ms=stored.reading(statistics.median(stages[0].ms)) if stages else None,
        storage_measured=stored.not_measured is None,
        reads_cold=reads_cold,
        device=device,
        ranks=several if len(several) > 1 else (),
    )


def _by_round(gathered: list[dict[str, list[float]]], name: str) -> list[tuple[float, ...]]:
    return list(zip(*(each[name] for each in gathered), strict=True))


def _rate(ms: tuple[float, ...] | None, images: int) -> float | None:
    return 1000 * images / statistics.median(ms) if ms else None


def _larger_than_memory(size: float | None) -> bool:
    memory = storage.memory_bytes()
    return size is not None and memory is not None and size > 0.9 * memory


def _synchronise(device: str) -> Callable[[], None]:
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize

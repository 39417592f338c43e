"""What-ifs: measured changes of settings, and predictions. Each row says which of the two it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from dali_saliencymix.bottleneck.sources import Settings, Source, explained
from dali_saliencymix.bottleneck.verdict import PASS_STALL, Figures, Series
from dali_saliencymix.measure.environment import cores, counted
from dali_saliencymix.measure.figures import interval
from dali_saliencymix.measure.processes import gather, slowest_by_round
from dali_saliencymix.measure.windows import Batches, MeasurementError, Meter, Subject, on_all


def _half_and_double(value: int) -> tuple[int, ...]:
    return max(value // 2, 1), value * 2


_TRIED: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "num_threads": ("DALI threads", _half_and_double),
    "workers": ("worker processes", _half_and_double),
    "prefetch_queue_depth": ("prefetch depth", lambda value: (value * 2,) if isinstance(value, int) else ()),
    "prefetch_factor": ("prefetch factor of the workers", lambda value: (value * 2,)),
    "hw_decoder_load": ("hw_decoder_load", lambda value: (0.3, 0.9)),
    "batch_size": ("batch size", _half_and_double),
}
LABELS = {setting: label for setting, (label, _) in _TRIED.items()}


def measured_rows(source: Source, *, seconds: float, meter: Meter) -> list[dict[str, Any]]:
    """Measure the loader alone with other settings, interleaved with the present ones.

    Return one row for each setting and value. A setting that this loader does not have gets one row in which `then` and
    `change` are None. With several processes, the slowest counts.
    """
    rows: list[dict[str, Any]] = []
    variants: list[tuple[str, Any]] = []
    of_workers = "workers" in source.settings
    others = ("num_threads", "prefetch_queue_depth") if of_workers else ("workers", "prefetch_factor")
    for setting, (_, values) in _TRIED.items():
        if setting in others:
            continue
        present = source.settings.get(setting)
        tried = [value for value in values(present) if value != present] if present is not None else []
        if not tried:
            why = f"this loader has no {setting} that can be changed"
            rows.append(_row(setting, present, None, compared(why, why)))
        variants += [(setting, value) for value in tried]
    if not variants:
        return rows
    settings = [{setting: value} for setting, value in variants]
    now, *found = measure_settings(source, [{}, *settings], seconds, meter)
    for (setting, value), then in zip(variants, found, strict=True):
        rows.append(_row(setting, source.settings[setting], value, compared(now, then)))
    return rows


def measure_settings(source: Source, variants: Sequence[Settings], seconds: float, meter: Meter) -> list[Series | str]:
    """Measure the loader alone with each of these settings, interleaved.

    Return for each setting the milliseconds per image in each round (with several processes, of the slowest), or the
    reason why the loader could not be opened.
    """
    opened: list[Batches | str] = []
    for changed in variants:
        try:
            opened.append(on_all(partial(_opened, source, changed)))
        except MeasurementError as error:
            opened.append(str(error))
    batches = {str(number): each for number, each in enumerate(opened) if not isinstance(each, str)}
    found = meter.in_turns({key: Subject(each) for key, each in batches.items()}, seconds=seconds)
    ms = {key: [ms / each.nominal for ms in found.ms[key]] for key, each in batches.items()}
    slowest = slowest_by_round(gather(ms))
    return [each if isinstance(each, str) else slowest[str(number)] for number, each in enumerate(opened)]


def _opened(source: Source, changed: Settings) -> Batches:
    try:
        return Batches(source.open(changed), ahead=_ahead(source, changed))
    except (RuntimeError, ValueError) as error:  # errors of DALI, or a MeasurementError
        why = explained(error) if isinstance(error, RuntimeError) else str(error)
        raise MeasurementError(why) from error


def best_change(source: Source, rows: Sequence[dict[str, Any]], tuned: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the change of settings that makes the loader fastest, beyond the noise; None if there is none.

    This is the result of the search, if there was one. Batch sizes do not count, because they change the training.
    """
    if tuned is not None:
        sure = [(tuned["best"], tuned["confirmed"]["change"])] if tuned["is_better"] else []
    else:
        measured = [row for row in rows if row["kind"] == "measured" and row["setting"] != "batch_size"]
        sure = [({row["setting"]: row["then"]}, row["change"]) for row in measured if row["change"] is not None]
    sure = [(settings, change) for settings, change in sure if change.low > 1]
    if not sure:
        return None
    settings, change = max(sure, key=lambda pair: pair[1].median)
    changed = {name: value for name, value in settings.items() if value != source.settings[name]}
    on_command_line = changed.keys() <= source.options.keys()
    return {
        "settings": changed,
        "words": source.in_words(changed),
        "of_train_py": source.is_training,
        "options": {source.options[name]: value for name, value in changed.items()} if on_command_line else None,
        "loader_changes": change,
        "command": None,
    }


def _ahead(source: Source, changed: Settings) -> int:
    """Return how many batches a loader with these settings may prefetch."""
    ahead = source.ahead
    for setting, value in changed.items():
        if setting == "prefetch_queue_depth" and isinstance(value, int):
            ahead = value
        elif setting in ("workers", "prefetch_factor"):
            ahead = ahead * value // source.settings[setting]
    return ahead


def compared(now: Series | str, then: Series | str) -> dict[str, Any]:
    """Return the figures of a change of settings, from milliseconds per image; or why there are none."""
    if isinstance(now, str) or isinstance(then, str):
        why = then if isinstance(then, str) else f"no baseline: {now}"
        return {**dict.fromkeys(("now_images_per_second", "loader_images_per_second", "change")), "not_measured": why}
    return {
        "now_images_per_second": interval([1000 / ms for ms in now]),
        "loader_images_per_second": interval([1000 / ms for ms in then]),
        "change": interval([old / new for old, new in zip(now, then, strict=True)]),
        "not_measured": None,
    }


def _row(setting: str, now: Any, then: Any, found: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "measured", "what": LABELS[setting], "setting": setting, "now": now, "then": then, **found}


def predicted_rows(
    figures: Figures,
    *,
    images: int,
    epoch_images: float | None = None,
    threads: int | None,
    threads_are: str = "DALI threads",
    stalls: bool = True,
) -> list[dict[str, Any]]:
    """Return predictions from the measured rates. Predictions that would change nothing are left out.

    If the training reads from storage and that was not measured, there are no predictions for the training. `stalls`
    says whether the training is slower than its step alone beyond the noise.

    Examples
    --------
    >>> figures = Figures(step_ms=(100.0,) * 5, loader_ms=(50.0,) * 5, end_ms=(125.0,) * 5)
    >>> predicted_rows(figures, images=100, threads=4)[0]["text"]
    'a step twice as fast: 1600 images/s, 2.00 times the present rate'
    """
    step, loader, end, cold = (  # images per second of one process
        1000 * images / median(ms) if ms else None
        for ms in (figures.step_ms, figures.loader_ms, figures.end_ms, figures.cold_ms)
    )
    reads_cold, world = figures.reads_cold, figures.world_size
    bound = cold if reads_cold else None
    fed = min(loader, bound or loader) if loader else None  # of the loader in the training
    rows: list[dict[str, Any]] = []

    def add(what: str, value: float | None, text: str, kind: str = "predicted") -> None:
        rows.append({"kind": kind, "what": what, "value": value, "text": text})

    if step and loader and threads and loader < (1 - PASS_STALL) * step:  # otherwise it keeps up
        needed = -(-threads * step // loader)
        more = f"; this machine has {counted(cores(), 'cores')}" if needed * world > cores() else ""
        text = f"{needed:.0f}, if the loader scales linearly with them ({threads} now{more})"
        if bound and bound < loader:
            text += f"; this is with files in memory: from storage, the loader reaches {bound:.0f} images/s"
        add("threads to reach the step's rate", needed, f"{threads_are} to keep up with the step: {text}")
    known = cold is not None or not reads_cold
    today = min(end, bound or end) if end and known else None
    if step and fed and today:
        # Assume that loader and step slow each other down as much as today.
        kept = min(today / min(step, fed), 1.0)
        value = min(2 * step, fed) * kept
        if value > 1.02 * today:
            add(
                "a step twice as fast",
                value,
                f"a step twice as fast: {value:.0f} images/s, {value / today:.2f} times the present rate",
            )
    if not epoch_images:
        return rows
    epoch = f"an epoch of {epoch_images:,.0f} images"
    if not known:
        why = "not measured: the training reads from storage, which was not measured"
        add("epoch as it is", None, f"{epoch}: {why}", "-")
        return rows
    if fed and not step:
        seconds = epoch_images / (fed * world)
        text = f"{epoch}: {_duration(seconds)} for the loader alone"
        add("epoch of the loader alone", seconds, text, "extrapolated")
    if today:
        seconds = epoch_images / (today * world)
        limit = "at the present rate" if today == end else "at the rate of the loader from storage"
        add("epoch as it is", seconds, f"{epoch}: {_duration(seconds)} {limit}", "extrapolated")
    if step and today:
        if step > today and (stalls or today != end):
            seconds = epoch_images / (step * world)
            add("epoch without a stall", seconds, f"{epoch}: {_duration(seconds)} if the loader cost nothing")
        else:
            add("epoch without a stall", None, f"{epoch}: equally long, within the noise, if the loader cost nothing")
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"

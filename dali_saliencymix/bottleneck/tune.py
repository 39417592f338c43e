"""Search for a faster setting of a loader within a time limit: ``--tune``."""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

from dali_saliencymix.bottleneck.sources import Source
from dali_saliencymix.bottleneck.verdict import Series
from dali_saliencymix.bottleneck.whatifs import LABELS, compared, measure_settings
from dali_saliencymix.measure.environment import cores, local_processes
from dali_saliencymix.measure.figures import interval
from dali_saliencymix.measure.processes import agree, longest
from dali_saliencymix.measure.windows import MeasurementError, Meter

_MARGIN = 1.1  # a loader that exceeds the step's rate by this factor is fast enough
_AS_FAST = 0.95  # a smaller setting counts as equally fast if the lower end of its change is at least this
_TRIALS = 8  # each trial gets 1 / _TRIALS of the time
_MOST_PREFETCHED = 16

_THREADS = ("num_threads", "workers")
_TUNABLE = (*_THREADS, "prefetch_queue_depth", "prefetch_factor", "hw_decoder_load")  # in the order of the search


def tunable(source: Source) -> dict[str, Any]:
    """Return the present values of the settings that can be searched; raise an error if there are none."""
    found = {
        name: value for name in _TUNABLE if isinstance(value := source.settings.get(name), (int, float)) and value >= 0
    }
    if not found:
        msg = f"tune needs a loader that takes at least one of {', '.join(_TUNABLE)}; {source.name} takes none"
        raise MeasurementError(msg)
    return found


def tune(source: Source, *, step: Series | None, loader: Series, seconds: float, meter: Meter) -> dict[str, Any]:
    """Search for a faster setting, starting from the present one; trials are interleaved with the best so far.

    The search halves and doubles one setting at a time, as long as the result is faster beyond the noise, or smaller
    and as fast. Finally, the best setting is interleaved with the present one, and replaces it only if it is then
    faster beyond the noise, or smaller and as fast.

    `step` (if there is one) and `loader` are the milliseconds per image of the step alone and of the loader with the
    present setting. The search ends when the loader's rate is more than 10 % above the step's.

    Returns
    -------
    dict
        ``present`` and ``best``: the settings. ``words``: the best setting as the user would write it. ``is_better``:
        whether best and present differ. ``trials``: what was tried, in order, with figures. ``confirmed``: figures of
        the final comparison, None if no setting was kept. ``stopped``: why the search ended.

    Raises
    ------
    MeasurementError
        If the loader has no setting to search.
    """
    present = tunable(source)
    start, takes = time.perf_counter(), seconds / _TRIALS
    most = max(agree(cores() // local_processes(), min), 1)  # threads
    best = present
    trials: list[dict[str, Any]] = []
    tried = [best]

    def measured(*variants: dict[str, Any]) -> list[Series | str]:
        nonlocal takes
        begun = time.perf_counter()
        changes = [_changed(present, settings) for settings in variants]
        found = measure_settings(source, changes, seconds / _TRIALS, meter)
        gc.collect()  # destroys pipelines: Python's automatic collection is off
        takes = max(takes, longest(time.perf_counter() - begun))
        return found

    def untried(name: str) -> list[dict[str, Any]]:
        others = [{**best, name: value} for value in _neighbours(name, best[name], most)]
        return [settings for settings in others if settings not in tried]

    def searched() -> str:
        """Run the search; return why it ended."""
        nonlocal best
        if _is_fast_enough(loader, step):
            return "the loader exceeds the rate of the step by more than 10 % with the present setting"
        settled = 0  # settings in succession of which no neighbour was chosen
        for name in itertools.cycle(present):
            while others := untried(name):
                if longest(time.perf_counter() - start) + 2 * takes > seconds:  # keep time for the final comparison
                    return "the time is over; a larger --seconds continues the search"
                now, *then = measured(best, *others)
                tried.extend(others)
                found = [compared(now, series) for series in then]
                chosen = _chosen(name, best, others, found)
                for settings, figures in zip(others, found, strict=True):
                    row = {"what": LABELS[name], "setting": name, "now": best[name], "then": settings[name]}
                    trials.append({**row, "kept": settings is chosen, **figures})
                    meter.notify(f"tune: {row['what']} {row['now']} -> {row['then']}: {_said(trials[-1])}")
                if chosen is None:
                    break
                best, settled = chosen, 0
                if _is_fast_enough(then[others.index(chosen)], step):
                    return "the loader exceeds the rate of the step by more than 10 %"
            settled += 1
            if settled == len(present):
                break
        return "no neighbour of the best setting is faster beyond the noise"

    stopped, confirmed = searched(), None
    if best != present:
        changed = _changed(present, best)
        now, then = measured(present, best)
        confirmed = compared(now, then)
        meter.notify(f"tune: {source.in_words(best)} against {source.in_words(present)}: {_said(confirmed)}")
        smaller = all(_is_smaller(name, value, present[name]) for name, value in changed.items())
        if confirmed["change"] is None or confirmed["change"].low <= (_AS_FAST if smaller else 1):
            lacks = "as fast" if smaller else "faster beyond the noise"
            stopped += f"; in the final comparison with the present setting, {source.in_words(changed)} was not {lacks}"
            best = present
    return {
        "present": present,
        "best": best,
        "words": source.in_words(best),
        "is_better": best != present,
        "trials": trials,
        "confirmed": confirmed,
        "stopped": stopped,
    }


def _changed(present: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != present[name]}


def _neighbours(name: str, value: Any, most: int) -> list[Any]:
    """Return the values to try next: half and double, with threads limited to `most`; for `hw_decoder_load`, +-0.2."""
    if name == "hw_decoder_load":
        near = (round(max(value - 0.2, 0.0), 2), round(min(value + 0.2, 1.0), 2))
    else:
        limit = most if name in _THREADS else _MOST_PREFETCHED
        near = (max(value // 2, 1), max(min(2 * value, limit), value))
    return [each for each in dict.fromkeys(near) if each != value]


def _chosen(
    name: str, best: dict[str, Any], others: list[dict[str, Any]], found: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the fastest setting that is faster beyond the noise, else a smaller one that is as fast, else None."""
    changes = [(each["change"], settings) for each, settings in zip(found, others, strict=True) if each["change"]]
    faster = [(change.median, settings) for change, settings in changes if change.low > 1]
    if faster:
        return max(faster, key=lambda pair: pair[0])[1]
    smaller = (each for change, each in changes if change.low >= _AS_FAST and _is_smaller(name, each[name], best[name]))
    return next(smaller, None)


def _is_smaller(name: str, value: Any, than: Any) -> bool:
    """Return whether a value costs less than another: fewer threads or batches. A lower `hw_decoder_load` does not."""
    return bool(value < than) and name != "hw_decoder_load"


def _is_fast_enough(loader: Series | str, step: Series | None) -> bool:
    return step is not None and not isinstance(loader, str) and interval(loader).high * _MARGIN < interval(step).low


def _said(found: dict[str, Any]) -> str:
    if found["change"] is None:
        return f"not measured: {found['not_measured']}"
    return f"{found['change'].median:.2f}x{', kept' if found.get('kept') else ''}"

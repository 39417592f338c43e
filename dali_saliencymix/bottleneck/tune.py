"""Search for a faster setting of a loader within a time limit: ``--tune``."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from dali_saliencymix.bottleneck.sources import Source, data_flags
from dali_saliencymix.bottleneck.verdict import Series
from dali_saliencymix.bottleneck.whatifs import LABELS, compared, measure_settings
from dali_saliencymix.measure.environment import cores, local_processes
from dali_saliencymix.measure.figures import interval
from dali_saliencymix.measure.processes import agree
from dali_saliencymix.measure.windows import MeasurementError, longest

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


def tune(
    source: Source,
    *,
    step: Series | None,
    loader: Series,
    seconds: float,
    synchronise: Callable[[], None],
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Search for a faster setting, starting from the present one; trials are interleaved with the best so far.

    The search halves and doubles one setting at a time, as long as the result is faster beyond the noise, or smaller
    and as fast. Finally, the best setting is interleaved with the present one, and replaces it only if it is then
    faster beyond the noise, or smaller and as fast.

    Parameters
    ----------
    source : Source
        The loader; its `settings` are the present ones.
    step, loader : tuple of float
        Milliseconds per image of the step alone (if there is a step) and of the loader with the present setting. The
        search ends when the loader's rate is more than 10 % above the step's.
    seconds : float
        Approximate duration of the search.

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
    best, trials = dict(present), list[dict[str, Any]]()
    tried = {_key(best)}

    def measured(*others: dict[str, Any]) -> list[Series | str]:
        nonlocal takes
        begun = time.perf_counter()
        found = measure_settings(
            source,
            [_changed(present, settings) for settings in (best, *others)],
            seconds=seconds / _TRIALS,
            synchronise=synchronise,
            notify=notify,
        )
        gc.collect()  # destroys pipelines: Python's automatic collection is off
        takes = max(takes, longest(time.perf_counter() - begun))
        return found

    def searched() -> str:
        """Run the search; return why it ended."""
        nonlocal best
        if _is_fast_enough(loader, step):
            return "the loader exceeds the rate of the step by more than 10 % with the present setting"
        again = True
        while again:
            again = False
            for name in present:
                while True:
                    others = [{**best, name: value} for value in _neighbours(name, best[name], most)]
                    others = [settings for settings in others if _key(settings) not in tried]
                    if not others:
                        break
                    if longest(time.perf_counter() - start) + 2 * takes > seconds:  # keep time for the final comparison
                        return "the time is over; a larger --seconds continues the search"
                    now, *then = measured(*others)
                    chosen = _chosen(name, best, others, now, then)
                    for settings, series in zip(others, then, strict=True):
                        tried.add(_key(settings))
                        row = {"what": LABELS[name], "setting": name, "now": best[name], "then": settings[name]}
                        trials.append({**row, "kept": settings is chosen, **compared(now, series)})
                        notify(f"tune: {row['what']} {row['now']} -> {row['then']}: {_said(trials[-1])}")
                    if chosen is None:
                        break
                    best, again = chosen, True
                    if _is_fast_enough(then[others.index(chosen)], step):
                        return "the loader exceeds the rate of the step by more than 10 %"
        return "no neighbour of the best setting is faster beyond the noise"

    stopped, confirmed = searched(), None
    if best != present:
        found, best = best, present
        now, then = measured(found)
        confirmed = compared(now, then)
        said = _said({**confirmed, "kept": False})
        notify(f"tune: {source.in_words(found)} against {source.in_words(present)}: {said}")
        smaller = all(_is_smaller(name, value, present[name]) for name, value in _changed(present, found).items())
        if confirmed["change"] is not None and confirmed["change"].low > (_AS_FAST if smaller else 1):
            best = found
        else:
            lacks = "as fast" if smaller else "faster beyond the noise"
            changed = source.in_words(_changed(present, found))
            stopped += f"; in the final comparison with the present setting, {changed} was not {lacks}"
    return {
        "present": present,
        "best": best,
        "words": source.in_words(best),
        "is_better": best != present,
        "trials": trials,
        "confirmed": confirmed,
        "stopped": stopped,
    }


def as_file(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they are written to a file: options for ``train.py --config``, or arguments by name."""
    if not source.is_training:
        return settings
    return {data_flags(source.options[name])[-1].removeprefix("--"): value for name, value in settings.items()}


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(settings.values())


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
    name: str,
    best: dict[str, Any],
    others: list[dict[str, Any]],
    now: Series | str,
    then: list[Series | str],
) -> dict[str, Any] | None:
    """Return the fastest setting that is faster beyond the noise, else a smaller one that is as fast, else None."""
    changes = [compared(now, series)["change"] for series in then]
    found = [(change, settings) for change, settings in zip(changes, others, strict=True) if change is not None]
    faster = [(change.median, settings) for change, settings in found if change.low > 1]
    if faster:
        return max(faster, key=lambda pair: pair[0])[1]
    smaller = (each for change, each in found if change.low >= _AS_FAST and _is_smaller(name, each[name], best[name]))
    return next(smaller, None)


def _is_smaller(name: str, value: Any, than: Any) -> bool:
    """Return whether a value costs less than another: fewer threads or batches. A lower `hw_decoder_load` does not."""
    return bool(value < than) and name != "hw_decoder_load"


def _is_fast_enough(loader: Series | str, step: Series | None) -> bool:
    return step is not None and not isinstance(loader, str) and interval(loader).high * _MARGIN < interval(step).low


def _said(found: dict[str, Any]) -> str:
    if found["change"] is None:
        return f"not measured: {found['not_measured']}"
    return f"{found['change'].median:.2f}x{', kept' if found['kept'] else ''}"

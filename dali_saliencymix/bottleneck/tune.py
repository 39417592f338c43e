"""The search for a faster setting of a loader, within a time: ``--tune``."""

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

_MARGIN = 1.1  # times the step's rate: a loader that is faster than this is fast enough
_AS_FAST = 0.95  # by the lower end of its range: the smaller one of two settings is then taken for as fast
_TRIALS = 8  # that the time is divided by
_MOST_PREFETCHED = 16

_THREADS = ("num_threads", "workers")
_TUNABLE = (*_THREADS, "prefetch_queue_depth", "prefetch_factor", "hw_decoder_load")  # in the order of the search


def tunable(source: Source) -> dict[str, Any]:
    """Return the present values of the settings that can be searched; refuse a loader without any."""
    found = {
        name: value for name in _TUNABLE if isinstance(value := source.settings.get(name), (int, float)) and value >= 0
    }
    if not found:
        msg = f"tune needs a loader that takes one of {', '.join(_TUNABLE)}; {source.name} takes none"
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
    """Search from the present setting for a faster one, each trial in turns with the best so far.

    One setting after the other is halved and doubled, for as long as that is faster beyond the noise, or smaller and as
    fast. At the end the best one is measured in turns with the present one, which stays where the best is then neither.

    Parameters
    ----------
    source : Source
        The loader; its `settings` are the present ones.
    step, loader : tuple of float
        Milliseconds per image of the step alone, where there is one, and of the loader as it is. The search ends where
        the loader's rate is more than 10 % above the step's.
    seconds : float
        Time for the search, about.

    Returns
    -------
    dict
        ``present`` and ``best``: the settings. ``words``: the best as they are given. ``is_better``: whether they
        differ. ``trials``: what was tried, with figures, in order. ``confirmed``: best against present in figures, None
        where they are the same. ``stopped``: why the search ended.

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
        gc.collect()  # pipelines end here, where Python's collector is off
        takes = max(takes, longest(time.perf_counter() - begun))
        return found

    def searched() -> str:
        """Return why the search has ended."""
        nonlocal best
        if _is_fast_enough(loader, step):
            return "the loader exceeds the rate of the step by more than 10 % as it is"
        again = True
        while again:
            again = False
            for name in present:
                while True:
                    others = [{**best, name: value} for value in _neighbours(name, best[name], most)]
                    others = [settings for settings in others if _key(settings) not in tried]
                    if not others:
                        break
                    if longest(time.perf_counter() - start) + 2 * takes > seconds:  # the last one confirms
                        return "the time is over: more of it (--seconds) searches further"
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
            stopped += f"; at last, in turns with the present setting, {changed} was not {lacks}"
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
    """Return settings as a file holds them: options for ``train.py --config``, or arguments of a function by name."""
    if not source.is_training:
        return settings
    return {data_flags(source.options[name])[-1].removeprefix("--"): value for name, value in settings.items()}


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(settings.values())


def _changed(present: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != present[name]}


def _neighbours(name: str, value: Any, most: int) -> list[Any]:
    """Return the values next to one: half and double, no more threads than cores; of a share less and more by 0.2."""
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
    """Return the fastest that is faster beyond the noise, else a smaller one that is as fast; None if there is none."""
    changes = [compared(now, series)["change"] for series in then]
    found = [(change, settings) for change, settings in zip(changes, others, strict=True) if change is not None]
    faster = [(change.median, settings) for change, settings in found if change.low > 1]
    if faster:
        return max(faster, key=lambda pair: pair[0])[1]
    smaller = (each for change, each in found if change.low >= _AS_FAST and _is_smaller(name, each[name], best[name]))
    return next(smaller, None)


def _is_smaller(name: str, value: Any, than: Any) -> bool:
    """Return whether a value costs less than another one: fewer threads, fewer batches; of a share less does not."""
    return bool(value < than) and name != "hw_decoder_load"


def _is_fast_enough(loader: Series | str, step: Series | None) -> bool:
    return step is not None and not isinstance(loader, str) and interval(loader).high * _MARGIN < interval(step).low


def _said(found: dict[str, Any]) -> str:
    if found["change"] is None:
        return f"not measured: {found['not_measured']}"
    return f"{found['change'].median:.2f}x{', kept' if found['kept'] else ''}"

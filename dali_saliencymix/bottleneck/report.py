"""Build, save, load and compare reports. A report is a dictionary that can be written as JSON.

Values that were not measured are None (``null`` in the file), never 0; the reason is beside them. Shares are from 0 to
1, times are in milliseconds per batch, and rates are in images per second of one process.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dali_saliencymix._json import finite
from dali_saliencymix.bottleneck.verdict import CRITICAL_STALL, PASS_STALL, Figures, Series, Verdict
from dali_saliencymix.measure.environment import environment
from dali_saliencymix.measure.figures import Interval, apart, differing, interval, rate
from dali_saliencymix.measure.results import read_json, write_json
from dali_saliencymix.measure.windows import MeasurementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dali_saliencymix.bottleneck.storage import StorageRates

SCHEMA = "dali-saliencymix/bottleneck"
VERSION = 3

Report = dict[str, Any]

# Conditions that change from run to run, or that are results.
_NO_CONDITIONS = ("seconds_taken", "command", "host.load_average", "steps_in_a_window", "memory_bytes", "epochs_begun")


def build_report(
    figures: Figures,
    verdict: Verdict,
    *,
    images: int,
    stages_note: str | None,
    stored: StorageRates,
    what_ifs: Sequence[dict[str, Any]],
    change: dict[str, Any] | None = None,
    tuned: dict[str, Any] | None = None,
    timeline: dict[str, list[list[float]]] | None,
    conditions: dict[str, Any],
) -> Report:
    """Return a report.

    `stages_note` says why there are no stages. `what_ifs` are rows of the module `whatifs`, `change` and `tuned` the
    results of `best_change` and `tune`. `timeline` holds ``waits_ms`` and ``steps_ms`` of each window, end to end.
    """
    stall, no_step = verdict.stall, "no training step was given"
    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "verdict": {"name": verdict.name, "why": verdict.why, "next": verdict.next_step},
        "stall": None if stall is None else {**_spread(stall), "band": _band(stall)},
        "waits": figures.waits and {**_spread(interval(figures.waits)), "windows_share": figures.waits},
        # How much slower loader and step are together than the slower one alone, and whether that is above 10 %.
        "contention": verdict.clash and {**_spread(verdict.clash), "answer": verdict.contention},
        "utilisation": None if stall is None else 1 - stall.median,
        # None if the range of the stall contains the limit.
        "passes": None if stall is None or stall.low <= PASS_STALL <= stall.high else stall.high < PASS_STALL,
        "rates": {
            "step": _figure(figures.step_ms, images, no_step),
            "loader": _figure(figures.loader_ms, images),
            "end_to_end": _figure(figures.end_ms, images, no_step),
            "loader_from_storage": _figure(figures.cold_ms, images, stored.not_measured),
            "storage": _storage_rate(figures, stored, images),
        },
        "prediction": _prediction(figures, images),
        "stages": _stages(figures, images),
        "stages_sum": _stages_sum(figures),
        "stages_note": stages_note,
        "storage": {
            "not_measured": stored.not_measured,
            "training_reads_from_storage": figures.reads_cold,
            "batches_in_a_pass": stored.batches or None,
            "passes_ms": {name: getattr(stored, name) or None for name in ("cold_ms", "read_cold_ms", "warm_ms")},
        },
        "ranks": [
            {"rank": number, "step": _figure(each.step_ms, images), "loader": _figure(each.loader_ms, images)}
            for number, each in enumerate(figures.ranks)
        ],
        "change": change,
        "what_ifs": what_ifs,
        "tune": tuned,
        "timeline": timeline,
        "conditions": {**conditions, "host": environment(str(conditions.get("device", "cpu")))},
    }
    # The same as after saving and loading: lists instead of tuples, dictionaries instead of intervals, None for numbers
    # that are not finite.
    return finite(json.loads(json.dumps(report, default=_without_type)))


def _band(stall: Interval) -> str:
    """Return the band of a stall, or the first and last band of its range."""
    low, high = (
        "ok" if end < PASS_STALL else "warning" if end < CRITICAL_STALL else "critical"
        for end in (stall.low, stall.high)
    )
    return low if low == high else f"{low} to {high}"


def _without_type(value: Any) -> Any:
    return _spread(value) if isinstance(value, Interval) else str(value)


def _spread(values: Interval) -> dict[str, float | int]:
    return {"median": values.median, "low": values.low, "high": values.high, "windows": values.count}


def _figure(ms: Series | None, images: int, why: str | None = None) -> dict[str, Any]:
    spread = interval(ms) if ms else None
    return {
        "images_per_second": spread and rate(spread, images),
        "ms_per_batch": spread,
        "windows_ms": ms or None,
        "not_measured": None if ms else why or "not measured",
    }


def _storage_rate(figures: Figures, stored: StorageRates, images: int) -> dict[str, Any]:
    """Return the rate of storage: of reading alone, or from the extra time of a loader with files not in memory."""
    if figures.reading_ms:
        return {**_figure(figures.reading_ms, images), "method": "reading alone, files not in memory"}
    why = stored.not_measured
    if not why and interval(stored.cold_ms).low <= interval(stored.warm_ms).high:
        why = "files from storage were not slower than files in memory, beyond the noise"
    if why:
        return {**_figure(None, images, why), "method": None}
    extra = tuple(cold - warm for cold, warm in zip(stored.cold_ms, stored.warm_ms, strict=True))
    return {**_figure(extra, images), "method": "loader with files not in memory, less the same in memory"}


def _prediction(figures: Figures, images: int) -> dict[str, Any] | None:
    """Predict the rate of loader and step together from the slower of the two, and compare it with the measurement.

    This is with files in memory. If the training reads from storage, also predict the rate from storage.
    """
    if figures.step_ms is None or figures.loader_ms is None or figures.end_ms is None:
        return None
    slower = [max(pair) for pair in zip(figures.step_ms, figures.loader_ms, strict=True)]
    longer = interval([end / alone - 1 for end, alone in zip(figures.end_ms, slower, strict=True)])
    from_storage = None
    if figures.reads_cold and figures.cold_ms:  # measured in other rounds than the step
        step, cold = interval(figures.step_ms), interval(figures.cold_ms)
        ends = (max(step.median, cold.median), max(step.low, cold.low), max(step.high, cold.high))
        from_storage = rate(Interval(*ends, min(step.count, cold.count)), images)
    return {
        "images_per_second": rate(interval(slower), images),
        "end_to_end_takes_longer_by": longer,
        "from_storage_images_per_second": from_storage,
    }


def _stages(figures: Figures, images: int) -> list[dict[str, Any]] | None:
    if figures.stages is None or figures.loader_ms is None:
        return None
    step = median(figures.step_ms) if figures.step_ms else None
    rows = []
    so_far = [0.0] * len(figures.loader_ms)
    for stage in figures.stages:
        added = interval(stage.ms)
        so_far = [before + ms for before, ms in zip(so_far, stage.ms, strict=True)]
        whole = interval(so_far)
        share = interval([part / total for part, total in zip(stage.ms, figures.loader_ms, strict=True)])
        rows.append(
            {
                "name": stage.name,
                "category": stage.category,
                "added_ms": added,
                "below_noise": added.low <= 0,
                "share": share,
                "until_here_images_per_second": rate(whole, images),
                "against_step": step / whole.median if step else None,
                "windows_ms": stage.ms,
            }
        )
    return rows


def _stages_sum(figures: Figures) -> dict[str, Any] | None:
    """Return the sum of the stages (negative ones count as 0), and its ratio to the time of the whole loader."""
    if figures.stages is None or figures.loader_ms is None:
        return None
    total = sum(max(median(stage.ms), 0.0) for stage in figures.stages)
    whole = median(figures.loader_ms)
    return {"sum_ms": total, "loader_ms": whole, "ratio": total / whole}


def save_report(report: Report, path: str | Path) -> None:
    """Write a report as JSON; missing folders are created."""
    write_json(path, report)


def load_report(path: str | Path) -> Report:
    """Read a report.

    Raises
    ------
    MeasurementError
        If the file is not a report of this version, or is damaged.
    OSError
        If the file cannot be read.
    """
    try:
        report = read_json(path)
    except ValueError as error:
        raise MeasurementError(str(error)) from error
    if report.get("schema") != SCHEMA:
        msg = f"{path}: not a report of the bottleneck tool"
        raise MeasurementError(msg)
    if report.get("version") != VERSION:
        msg = f"{path}: a report of version {report.get('version')}; this tool reads version {VERSION}"
        raise MeasurementError(msg)
    if fault := _fault_of(report):
        msg = f"{path}: a damaged report of the bottleneck tool: {fault}"
        raise MeasurementError(msg)
    return report


def _fault_of(report: Report) -> str | None:
    """Return what is wrong with a report that `compare` could not use; None if nothing is."""
    verdict, rates, stages = (report.get(name) for name in ("verdict", "rates", "stages"))
    if not isinstance(verdict, dict) or not isinstance(verdict.get("name"), str):
        return "verdict.name must be a text"
    missing = {"stages", "stall"} - report.keys()
    if missing:
        return f"{min(missing)} is missing"
    if not isinstance(report.get("conditions"), dict):
        return "conditions must be an object"
    if not isinstance(rates, dict) or not all(isinstance(each, dict) for each in rates.values()):
        return "rates must be an object of objects"
    if stages is not None and not (isinstance(stages, list) and all(isinstance(row, dict) for row in stages)):
        return "stages must be null or a list of objects"
    if not all(isinstance(row.get("name"), str) for row in stages or ()):
        return "the name of each stage must be a text"
    faults = [_fault_of_spread(f"rates.{name}", each, "images_per_second") for name, each in rates.items()]
    faults += [_fault_of_spread(f"stages.{row['name']}", row, "added_ms") for row in stages or ()]
    return next(filter(None, [*faults, _fault_of_spread("report", report, "stall")]), None)


def _fault_of_spread(where: str, parent: dict[str, Any], name: str) -> str | None:
    if name not in parent:
        return f"{where}.{name} is missing"
    spread: Any = parent[name]
    if spread is None:  # not measured
        return None
    if not isinstance(spread, dict):
        return f"{where}.{name} must be null or an object, got {spread!r:.40}"
    for key in ("median", "low", "high", *({"windows"} & spread.keys())):
        value: Any = spread.get(key)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return f"{where}.{name}.{key} must be a finite number, got {value!r:.40}"
    if name == "images_per_second" and spread["median"] <= 0:
        return f"{where}.{name}.median must be above 0, got {spread['median']}"
    return None


def compare(before: Report, after: Report) -> dict[str, Any]:
    """Compare two reports.

    Parameters
    ----------
    before, after : dict
        Reports of `diagnose` or `load_report`.

    Returns
    -------
    dict
        ``verdicts``: the two names. ``conditions``: the two values of each condition that differs. ``rates`` and
        ``stages``: for each figure ``before`` and ``after`` with median and range, the ``ratio`` of the medians (rates)
        or their ``difference`` in milliseconds (stages), and ``more_than_noise``: True if the two ranges do not
        overlap, None if one of them was not measured. ``stall``: the same as for stages, as shares from 0 to 1.
    """
    rates = {
        name: _changed(before["rates"][name]["images_per_second"], after["rates"][name]["images_per_second"], "ratio")
        for name in before["rates"]
        if name in after["rates"]
    }
    old, new = ({row["name"]: row["added_ms"] for row in report["stages"] or ()} for report in (before, after))
    conditions = differing(before["conditions"], after["conditions"], _NO_CONDITIONS)
    return {
        "verdicts": [before["verdict"]["name"], after["verdict"]["name"]],
        "conditions": {name: list(values) for name, values in conditions.items()},
        "rates": rates,
        "stages": {name: _changed(old.get(name), new.get(name), "difference") for name in {**old, **new}},
        "stall": _changed(before["stall"], after["stall"], "difference"),
    }


def _changed(before: dict[str, Any] | None, after: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    change = more = None
    if before is not None and after is not None:
        change = after["median"] / before["median"] if kind == "ratio" else after["median"] - before["median"]
        more = apart(before, after)
    return {"before": before, "after": after, kind: change, "more_than_noise": more}

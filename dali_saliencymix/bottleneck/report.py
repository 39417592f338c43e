"""The report: a dictionary that is JSON as it stands.

What was not measured is None, ``null`` in the file, with the reason beside it; never 0. Shares are 0 to 1, times
milliseconds per batch, rates images per second of one process.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dali_saliencymix._json import finite
from dali_saliencymix._versions import versions
from dali_saliencymix.bottleneck.errors import BottleneckError
from dali_saliencymix.bottleneck.spread import Interval, interval, rate
from dali_saliencymix.bottleneck.verdict import CRITICAL_STALL, PASS_STALL, Figures, Series, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dali_saliencymix.bottleneck.storage_rates import StorageRates

SCHEMA = "dali-saliencymix/bottleneck"
VERSION = 1

Report = dict[str, Any]


def build_report(
    figures: Figures,
    verdict: Verdict,
    *,
    images: int,
    cuts: Sequence[tuple[str, str, list[float]]],
    stages_note: str | None,
    stored: StorageRates,
    what_ifs: Sequence[dict[str, Any]],
    timeline: dict[str, list[list[float]]] | None,
    conditions: dict[str, Any],
) -> Report:
    """Put figures, verdict and conditions together.

    Parameters
    ----------
    figures, verdict
        From and of `verdict.decide`.
    images : int
        Images in a batch of one process.
    cuts : sequence of (name, category, list of float)
        Times of the cut pipelines, each with all stages up to this one.
    stages_note : str or None
        Why there are no cuts.
    stored : StorageRates
        Passes over the files.
    what_ifs : sequence of dict
        Rows of `whatifs`.
    timeline : dict or None
        ``waits_ms`` and ``steps_ms`` of each window, end to end.
    conditions : dict
        All that the figures depend on.

    Returns
    -------
    dict
        Of None, bool, int, float, str, list and dict.
    """
    rates = {
        "step": _figure(figures.step_ms, images, "no training step was given"),
        "loader": _figure(figures.loader_ms, images),
        "end_to_end": _figure(figures.end_ms, images, "no training step was given"),
        "loader_from_storage": _figure(figures.cold_ms, images, stored.not_measured),
        "storage": _storage_rate(stored, cuts, images),
    }
    stall = verdict.stall
    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "verdict": {"name": verdict.name, "why": verdict.why, "next": verdict.next_step},
        "stall": None if stall is None else {**_spread(stall), "band": band(stall.median)},
        "utilisation": None if stall is None else 1 - stall.median,
        "passes": _passes(stall),
        "rates": rates,
        "prediction": _prediction(figures, images),
        "stages": _stages(figures, cuts, images),
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
        "what_ifs": list(what_ifs),
        "timeline": timeline,
        "conditions": {**conditions, "host": host(str(conditions.get("device")))},
    }
    return _json_ready(report)


def band(stall: float) -> str:
    """Return the word for a stall.

    Examples
    --------
    >>> band(0.05), band(0.15), band(0.4)
    ('ok', 'warning', 'critical')
    """
    return "ok" if stall < PASS_STALL else "warning" if stall < CRITICAL_STALL else "critical"


def _passes(stall: Interval | None) -> bool | None:
    """Say whether a stall is under the line; None where its range lies on both sides."""
    if stall is None or stall.low <= PASS_STALL <= stall.high:
        return None
    return stall.high < PASS_STALL


def host(device: str) -> dict[str, Any]:
    """Return the machine and the versions that figures depend on."""
    gpu = driver = None
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        driver_file = Path("/proc/driver/nvidia/version")
        driver = driver_file.read_text().splitlines()[0] if driver_file.exists() else None
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "gpu": gpu,
        "driver": driver,
        "versions": versions(),
    }


def _spread(values: Interval) -> dict[str, float | int]:
    return {"median": values.median, "low": values.low, "high": values.high, "windows": values.count}


def _figure(ms: Series | None, images: int, why: str | None = None) -> dict[str, Any]:
    if not ms:
        return {
            "images_per_second": None,
            "ms_per_batch": None,
            "windows_ms": None,
            "not_measured": why or "not measured",
        }
    spread = interval(ms)
    return {
        "images_per_second": _spread(rate(spread, images)),
        "ms_per_batch": _spread(spread),
        "windows_ms": list(ms),
        "not_measured": None,
    }


def _storage_rate(stored: StorageRates, cuts: Sequence[tuple[str, str, list[float]]], images: int) -> dict[str, Any]:
    """Return the rate of storage: reading alone, or what a loader takes more with files that are not in memory."""
    if stored.not_measured:
        return {**_figure(None, images, stored.not_measured), "method": None}
    if stored.read_cold_ms and cuts:
        reading = stored.reading(statistics.median(cuts[0][2]))
        return {**_figure(reading, images), "method": "reading alone, files not in memory"}
    more = interval(stored.cold_ms).low - interval(stored.warm_ms).high
    if more <= 0:
        why = "files from storage were not slower than files in memory, beyond the spread"
        return {**_figure(None, images, why), "method": None}
    pairs = zip(stored.cold_ms, stored.warm_ms, strict=True)
    extra = tuple(cold - warm for cold, warm in pairs)
    return {**_figure(extra, images), "method": "loader with files not in memory, less the same in memory"}


def _prediction(figures: Figures, images: int) -> dict[str, Any] | None:
    """Compare the slower of step and loader with what both together were measured to do, with files in memory.

    Where the training will not find them there, the loader is the one from storage.
    """
    if figures.step_ms is None or figures.loader_ms is None or figures.end_ms is None:
        return None
    slower = [max(pair) for pair in zip(figures.step_ms, figures.loader_ms, strict=True)]
    error = interval([end / apart - 1 for end, apart in zip(figures.end_ms, slower, strict=True)])
    from_storage = None
    if figures.reads_cold and figures.cold_ms:  # of other rounds than the step
        step, cold = interval(figures.step_ms), interval(figures.cold_ms)
        ends = (max(step.median, cold.median), max(step.low, cold.low), max(step.high, cold.high))
        from_storage = _spread(rate(Interval(*ends, min(step.count, cold.count)), images))
    return {
        "images_per_second": _spread(rate(interval(slower), images)),
        "end_to_end_takes_longer_by": _spread(error),
        "from_storage_images_per_second": from_storage,
    }


def _stages(figures: Figures, cuts: Sequence[tuple[str, str, list[float]]], images: int) -> list[dict[str, Any]] | None:
    if figures.stages is None:
        return None
    loader = figures.loader_ms
    assert loader is not None
    step = statistics.median(figures.step_ms) if figures.step_ms else None
    rows = []
    until = {name: ms for name, _, ms in cuts}
    for stage in figures.stages:
        added = interval(stage.ms)
        whole = interval(until.get(stage.name, loader))
        share = interval([part / total for part, total in zip(stage.ms, loader, strict=True)])
        rows.append(
            {
                "name": stage.name,
                "category": stage.category,
                "added_ms": _spread(added),
                "below_noise": added.low <= 0,
                "share": _spread(share),
                "until_here_images_per_second": _spread(rate(whole, images)),
                "against_step": step / whole.median if step else None,
                "windows_ms": list(stage.ms),
            }
        )
    return rows


def _stages_sum(figures: Figures) -> dict[str, Any] | None:
    """Return what the stages that stand out of the noise sum up to, against the loader as a whole."""
    if figures.stages is None or figures.loader_ms is None:
        return None
    parts = [max(statistics.median(stage.ms), 0.0) for stage in figures.stages]
    whole = statistics.median(figures.loader_ms)
    return {"sum_ms": sum(parts), "loader_ms": whole, "ratio": sum(parts) / whole}


def _json_ready(report: Report) -> Report:
    """Return a report as it comes back from its file: with lists, not tuples, and null for numbers that are none."""
    return finite(json.loads(json.dumps(report, default=_without_type)))


def _without_type(value: Any) -> Any:
    return _spread(value) if isinstance(value, Interval) else str(value)


def save_report(report: Report, path: str | Path) -> None:
    """Write a report as JSON; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_report(path: str | Path) -> Report:
    """Read a report.

    Raises
    ------
    BottleneckError
        If the file is no report of this version.
    OSError
        If it cannot be read.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path}: not a JSON file"
        raise BottleneckError(msg) from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        msg = f"{path}: not a report of the bottleneck tool"
        raise BottleneckError(msg)
    if report.get("version") != VERSION:
        msg = f"{path}: a report of version {report.get('version')}; this tool reads version {VERSION}"
        raise BottleneckError(msg)
    return report

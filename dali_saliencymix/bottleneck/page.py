"""A report as one HTML page, with charts."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dali_saliencymix.bottleneck.display import RATE_NAMES, report_text, stall_lines
from dali_saliencymix.bottleneck.verdict import LOADER_ALONE
from dali_saliencymix.measure.results import replace_file
from dali_saliencymix.packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dali_saliencymix.bottleneck.report import Report

_COLOURS = {
    "read": "#6b7280",
    "decode": "#2563eb",
    "prep": "#0d9488",
    "mix": "#d97706",
    "iterator": "#9ca3af",
    "step": "#16a34a",
    "wait": "#dc2626",
}
_OUT_OF_SIGHT = 8  # times as long as the others: they could not be seen beside such a bar
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111827; }
h1 { margin-bottom: 0; } pre { white-space: pre-wrap; background: #f3f4f6; padding: 1rem; font-size: 13px; }
svg { max-width: 100%; height: auto; } .next { border-left: 4px solid #2563eb; padding-left: 1rem; }
"""


def save_page(report: Report, path: str | Path) -> None:
    """Write the page of a report, with `page_html`; folders are made."""
    replace_file(Path(path), page_html(report))


def page_html(report: Report) -> str:
    """Return a report as one HTML page that needs no network and no scripts; the charts are inline SVG.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    verdict = {key: html.escape(text) for key, text in report["verdict"].items()}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{verdict["name"]}</title><style>{_STYLE}</style></head>',
        f"<body><h1>{verdict['name']}</h1><p>{verdict['why']}</p><p class='next'>{verdict['next']}</p>",
        f"<p>{'<br>'.join(html.escape(line) for line in stall_lines(report))}</p>",
    ]
    for title, chart in (
        ("What a batch is made of", _stage_waterfall(report)),
        ("Rates", _rate_bars(report)),
        ("Waiting for data, step by step", _wait_timeline(report)),
    ):
        if chart or report["verdict"]["name"] != LOADER_ALONE:
            parts.append(f"<h2>{title}</h2>{chart or '<p>not measured</p>'}")
    parts.append(f"<h2>Figures</h2><pre>{html.escape(report_text(report))}</pre>")
    conditions = html.escape(json.dumps(report["conditions"], indent=1))
    parts.append(f"<details><summary>Conditions</summary><pre>{conditions}</pre></details></body></html>\n")
    return "\n".join(parts)


def _stage_waterfall(report: Report) -> str | None:
    """Draw what each stage adds to the time of a batch, and the step beside it."""
    stages, step = report["stages"], report["rates"]["step"]["ms_per_batch"]
    if not stages:
        return None
    bars, start = [], 0.0
    for stage in stages:
        added = stage["added_ms"]
        bars.append((f"{stage['name']} ({added['median']:.1f} ms)", added, start, _COLOURS[stage["category"]]))
        start += added["median"]
    if step:
        bars.append((f"the step alone ({step['median']:.1f} ms)", step, 0.0, _COLOURS["step"]))
    axes = _bars(bars, "ms per batch")
    if step and step["median"] > _OUT_OF_SIGHT * start:  # the stages would be lines
        axes.set_xlim(0, 1.3 * start)
        axes.text(1.29 * start, len(stages), "longer", ha="right", va="center", color="white")
    return _svg(axes)


def _rate_bars(report: Report) -> str | None:
    """Draw the rates that were measured as bars with their ranges."""
    measured = [(name, report["rates"][key]["images_per_second"]) for key, name in RATE_NAMES.items()]
    rows = [(f"{name}: {speed['median']:,.0f}", speed, 0.0, _COLOURS["decode"]) for name, speed in measured if speed]
    if not rows:
        return None
    medians = [speed["median"] for _, speed, *_ in rows]
    logarithmic = max(medians) > _OUT_OF_SIGHT * min(medians)
    axes = _bars(rows, "images per second" + (", on a logarithmic scale" if logarithmic else ""))
    axes.set_xscale("log" if logarithmic else "linear")
    return _svg(axes)


def _bars(rows: list[tuple[str, dict[str, float], float, str]], unit: str) -> Axes:
    """Draw spreads as horizontal bars from their starts, with their ranges."""
    axes = _axes(height=0.45 * len(rows) + 1.2)
    for row, (_, spread, start, colour) in enumerate(rows):
        axes.barh(row, spread["median"], left=start, color=colour)
        axes.plot([start + spread["low"], start + spread["high"]], [row, row], color="#111827", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    return axes


def _wait_timeline(report: Report) -> str | None:
    """Draw for each step, end to end, how long the host waited for its batch, and how long the step took."""
    timeline = report["timeline"]
    if not timeline or not any(timeline["waits_ms"]):
        return None
    axes = _axes(height=3.2)
    for key, name, alpha, label in (
        ("steps_ms", "step", 0.4, "step with wait"),
        ("waits_ms", "wait", 1, "wait for data"),
    ):
        values = [value for window in timeline[key] for value in window]
        axes.fill_between(range(len(values)), values, step="mid", color=_COLOURS[name], alpha=alpha, label=label)
    edge = 0
    for window in timeline["waits_ms"][:-1]:
        edge += len(window)
        axes.axvline(edge - 0.5, color="#9ca3af", linewidth=0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step (lines: between two windows)")
    axes.set_ylabel("ms, as the host sees it")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    return _svg(axes)


def _axes(height: float) -> Axes:
    require("matplotlib", by="the page")
    from matplotlib.figure import Figure

    axes = Figure(figsize=(9, height), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg(axes: Axes) -> str:
    stream = io.StringIO()
    axes.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    # The metadata names addresses, which a page that needs no network should not.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

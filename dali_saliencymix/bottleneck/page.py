"""A report as one HTML page that needs nothing else: no network, no scripts; the charts are inline SVG."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dali_saliencymix.bottleneck.report import Report
from dali_saliencymix.bottleneck.report_text import report_text, stall_lines
from dali_saliencymix.bottleneck.verdict import LOADER_ALONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "read": "#6b7280",
    "decode": "#2563eb",
    "prep": "#0d9488",
    "mix": "#d97706",
    "hand-over": "#9ca3af",
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
    """Write the page of a report; folders are made.

    Parameters
    ----------
    report : dict
        As `dali_saliencymix.bottleneck.diagnose` returns it or `load_report` reads it.
    path : path
        HTML file to write.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_html(report), encoding="utf-8")


def page_html(report: Report) -> str:
    """Return the page as text."""
    verdict = {key: html.escape(text) for key, text in report["verdict"].items()}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{verdict["name"]}</title><style>{_STYLE}</style></head>',
        f"<body><h1>{verdict['name']}</h1><p>{verdict['why']}</p><p class='next'>{verdict['next']}</p>",
        f"<p>{'<br>'.join(html.escape(line) for line in stall_lines(report))}</p>",
    ]
    for title, chart in (
        ("What a batch is made of", stage_waterfall(report)),
        ("Rates", rate_bars(report)),
        ("Waiting for data, step by step", wait_timeline(report)),
    ):
        if chart or report["verdict"]["name"] != LOADER_ALONE:
            parts.append(f"<h2>{title}</h2>{chart or '<p>not measured</p>'}")
    parts.append(f"<h2>Figures</h2><pre>{html.escape(report_text(report))}</pre>")
    conditions = html.escape(json.dumps(report["conditions"], indent=1))
    parts.append(f"<details><summary>Conditions</summary><pre>{conditions}</pre></details></body></html>\n")
    return "\n".join(parts)


def stage_waterfall(report: Report) -> str | None:
    """Draw what each stage adds to the time of a batch, and the step beside it, as SVG; None without stages."""
    stages = report["stages"]
    if not stages:
        return None
    figure, axes = _axes(height=0.45 * len(stages) + 1.6)
    start = 0.0
    names = []
    for row, stage in enumerate(stages):
        added = stage["added_ms"]["median"]
        axes.barh(row, added, left=start, color=_COLOURS[stage["category"]])
        low, high = start + stage["added_ms"]["low"], start + stage["added_ms"]["high"]
        axes.plot([low, high], [row, row], color="#111827", linewidth=1)
        start += added
        names.append(f"{stage['name']} ({added:.1f} ms)")
    step = report["rates"]["step"]["ms_per_batch"]
    if step:
        names.append(f"the step alone ({step['median']:.1f} ms)")
        axes.barh(len(stages), step["median"], color=_COLOURS["step"])
        if step["median"] > _OUT_OF_SIGHT * start:  # the stages would be lines
            axes.set_xlim(0, 1.3 * start)
            axes.text(1.29 * start, len(stages), "goes on", ha="right", va="center", color="white")
        else:
            axes.axvline(step["median"], color=_COLOURS["step"], linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms per batch")
    return _svg(figure)


def rate_bars(report: Report) -> str | None:
    """Draw the rates that were measured as bars with their ranges."""
    names = {"step": "step alone (G)", "loader": "loader alone (P)", "storage": "storage (F)"}
    names |= {"loader_from_storage": "loader from storage", "end_to_end": "end to end (E)"}
    measured = [(name, report["rates"][key]["images_per_second"]) for key, name in names.items()]
    rows = [(name, speed) for name, speed in measured if speed]
    if not rows:
        return None
    figure, axes = _axes(height=0.45 * len(rows) + 1.2)
    for row, (_, speed) in enumerate(rows):
        axes.barh(row, speed["median"], color=_COLOURS["decode"])
        axes.plot([speed["low"], speed["high"]], [row, row], color="#111827", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{name}: {speed['median']:,.0f}" for name, speed in rows])
    axes.invert_yaxis()
    medians = sorted(speed["median"] for _, speed in rows)
    apart = medians[-1] > _OUT_OF_SIGHT * medians[0]
    if apart:
        axes.set_xscale("log")
    axes.set_xlabel("images per second" + (", on a logarithmic scale" if apart else ""))
    return _svg(figure)


def wait_timeline(report: Report) -> str | None:
    """Draw for each step, end to end, how long the host waited for its batch, and how long the step took."""
    timeline = report["timeline"]
    if not timeline or not any(timeline["waits_ms"]):
        return None
    waits = [wait for window in timeline["waits_ms"] for wait in window]
    steps = [step for window in timeline["steps_ms"] for step in window]
    figure, axes = _axes(height=3.2)
    axes.fill_between(range(len(steps)), steps, step="mid", color=_COLOURS["step"], alpha=0.4, label="step with wait")
    axes.fill_between(range(len(waits)), waits, step="mid", color=_COLOURS["wait"], label="wait for data")
    edge = 0
    for window in timeline["waits_ms"][:-1]:
        edge += len(window)
        axes.axvline(edge - 0.5, color="#9ca3af", linewidth=0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step (lines: between two windows)")
    axes.set_ylabel("ms, as the host sees it")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    return _svg(figure)


def _axes(height: float) -> tuple[Any, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "the page needs matplotlib: pip install 'dali-saliencymix[preview]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    svg = text[text.index("<svg") :]
    # The metadata names addresses, which a page that needs no network should not.
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)

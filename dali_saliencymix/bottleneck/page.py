"""Format a report as one HTML page, with charts."""

from __future__ import annotations

import html
import json
import math
import re
import textwrap
from collections.abc import Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from dali_saliencymix.bottleneck.display import RATE_NAMES, number_text, report_text, stall_lines
from dali_saliencymix.bottleneck.verdict import LOADER_ALONE
from dali_saliencymix.measure.environment import counted
from dali_saliencymix.measure.results import replace_file

if TYPE_CHECKING:
    from dali_saliencymix.bottleneck.report import Report

    Bar = tuple[str, str, float, Mapping[str, float]]  # name, CSS class, start, spread of the length

_TONES = {"GPU-BOUND": "good", "COMPUTE-BOUND": "good", LOADER_ALONE: "plain", "INCONCLUSIVE": "open"}  # others: bad
_KINDS = {"step": "step", "loader": "loader", "storage": "read", "loader_from_storage": "loader", "end_to_end": "end"}
_OUT_OF_SIGHT = 8  # a bar this many times as long as the others would make them invisible
_COLUMNS = 400  # of the timeline at most
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 240, 56, 40  # of the timeline
_RANGE = "thin lines: 90 % confidence interval of the median"
_STYLE = """
:root { color-scheme: light dark; --ink: #111827; --soft: #6b7280; --paper: #fff; --shade: #f3f4f6; --good: #15803d;
  --bad: #b91c1c; --open: #a16207; --read: #6b7280; --decode: #2563eb; --prep: #0d9488; --mix: #d97706;
  --iterator: #9ca3af; --loader: #2563eb; --step: #16a34a; --wait: #dc2626; --end: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --paper: #111827; --shade: #1f2937;
  --good: #4ade80; --bad: #f87171; --open: #facc15; --decode: #60a5fa; --loader: #60a5fa; --wait: #f87171;
  --end: #a78bfa; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { margin: 0; line-height: 1.2; } h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.about, .caption { color: var(--soft); font-size: 14px; margin: .25rem 0; }
.next { border-left: 4px solid var(--decode); padding-left: 1rem; }
pre, .scroll { overflow-x: auto; }
pre { background: var(--shade); padding: .75rem 1rem; font-size: 13px; line-height: 1.4; }
table { width: 100%; border-collapse: collapse; }
th { font-weight: normal; text-align: left; padding: .15rem .75rem .15rem 0; overflow-wrap: normal; }
td { padding: 0; } td.track { width: 65%; } td.number { padding-left: .75rem; text-align: right; white-space: nowrap; }
.track div { position: relative; height: 1.2rem; overflow: hidden; background: var(--shade); }
.track i, .track b { position: absolute; } .track i { top: 0; bottom: 0; }
.track .cut { mask-image: linear-gradient(90deg, #000 85%, transparent); }
.track b { top: 50%; height: 1px; background: var(--ink); }
i.read { background: var(--read); } i.decode { background: var(--decode); }
i.prep { background: var(--prep); } i.mix { background: var(--mix); } i.iterator { background: var(--iterator); }
i.loader { background: var(--loader); } i.step { background: var(--step); }
i.end { background: var(--end); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 0; }
.key.step { background: var(--step); opacity: .45; } .key.wait { background: var(--wait); margin-left: 1em; }
@media (max-width: 40rem) { td.track { width: 45%; } }
svg { display: block; width: 100%; min-width: 46rem; height: auto; font-size: 13px; }
svg text { fill: var(--ink); } svg line { stroke: var(--soft); stroke-width: .5; }
svg .step { fill: var(--step); opacity: .45; } svg .wait { fill: var(--wait); }
"""


def save_page(report: Report, path: str | Path) -> None:
    """Write a report as an HTML page; missing folders are created."""
    replace_file(Path(path), page_html(report))


def page_html(report: Report) -> str:
    """Return a report as one HTML page: the text of `report_text`, and charts, without scripts or network."""
    head, *blocks = re.split(r"\n{2,}", report_text(report))
    name, *said = head.splitlines()
    about, date = _about(report)
    stall = "\n".join(stall_lines(report))
    title = html.escape(", ".join([name, *about[:2], date]))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f'<h1 class="{_TONES.get(name, "bad")}">{html.escape(name)}</h1>',
        f'<p class="about">{html.escape(" · ".join([*about, date]))}</p>',
        *(_text([line[2:]]) for line in said),
        *([_text(stall.splitlines())] if stall else []),
    ]
    for heading, chart in (
        ("Time per batch", _stage_chart(report)),
        ("Rates", _rate_chart(report)),
        ("Waiting for data, step by step", _timeline(report)),
    ):
        if chart or name != LOADER_ALONE:
            parts.append(f"<h2>{heading}</h2>{chart or '<p>not measured</p>'}")
    parts.append("<h2>Figures</h2>")
    for block in blocks:
        if block != stall:
            parts.append(_text(block.splitlines()))
    conditions = html.escape(json.dumps(report["conditions"], indent=1))
    parts.append(f"<details><summary>Conditions</summary><pre>{conditions}</pre></details></body></html>\n")
    return "\n".join(parts)


def _about(report: Report) -> tuple[list[str], str]:
    """Return the source, the data, the machine and the processes of a report; and its date."""
    conditions = report["conditions"]
    host, processes = conditions["host"], conditions["processes"]
    machine = host["device"] if host["cuda"] else f"{host['cpu']}, {counted(host['cores'], 'cores')}"
    several = [f"{processes} processes"] if processes > 1 else []
    date = datetime.fromisoformat(report["created"]).strftime("%Y-%m-%d %H:%M UTC")
    return [conditions["source"], *filter(None, [conditions.get("data")]), machine, *several], date


def _text(lines: list[str]) -> str:
    """Return lines as a paragraph, or preformatted if they have columns or are indented like a command."""
    if any("  " in line.rstrip() for line in lines):
        return f"<pre>{html.escape(textwrap.dedent(chr(10).join(lines)))}</pre>"
    escaped = [html.escape(line) for line in lines]
    return f"<p{' class=next' if escaped[0].startswith('Next: ') else ''}>{'<br>'.join(escaped)}</p>"


def _stage_chart(report: Report) -> str | None:
    """Draw the time that each stage adds to a batch, and below it the whole loader and the step."""
    stages = report["stages"]
    if not stages:
        return None
    bars: list[Bar] = []
    start = 0.0
    for stage in stages:
        bars.append((stage["name"], stage["category"], start, stage["added_ms"]))
        start += stage["added_ms"]["median"]
    loader, step = (report["rates"][key]["ms_per_batch"] for key in ("loader", "step"))
    bars.append(("the whole loader", "loader", 0.0, loader))
    end = max(begun + spread["median"] for *_, begun, spread in bars)
    caption = "ms per batch"
    if step:
        bars.append(("the step alone", "step", 0.0, step))
        if step["median"] > _OUT_OF_SIGHT * end:  # otherwise the stages would be too small to see
            caption += "; the bar of the step is cut off"
        else:
            end = max(end, step["median"])
    least = min(0.0, *(begun + spread["median"] for *_, begun, spread in bars))
    room = 0.1 * (end - least)
    return _bars(bars, (least and least - room, end + room), " ms") + _caption(f"{caption}; {_RANGE}")


def _rate_chart(report: Report) -> str | None:
    """Draw the measured rates."""
    rates = {key: report["rates"][key]["images_per_second"] for key in RATE_NAMES}
    bars: list[Bar] = [(RATE_NAMES[key], _KINDS[key], 0.0, speed) for key, speed in rates.items() if speed]
    if not bars:
        return None
    medians = [speed["median"] for *_, speed in bars]
    if max(medians) <= _OUT_OF_SIGHT * min(medians):
        return _bars(bars, (0.0, 1.1 * max(medians)), "") + _caption(f"images per second; {_RANGE}")
    least = min(medians) / 2
    scale = f"logarithmic from {number_text(least)}"
    return _bars(bars, (least, 1.5 * max(medians)), "", logarithmic=True) + _caption(
        f"images per second, {scale}; {_RANGE}"
    )


def _bars(bars: list[Bar], ends: tuple[float, float], unit: str, *, logarithmic: bool = False) -> str:
    """Draw bars with their ranges and numbers; bars beyond the scale are cut off."""

    def place(value: float) -> float:
        low, high = ends
        value = min(max(value, low), high)
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return 100 * share

    def spot(low: float, high: float) -> str:
        left, right = sorted((place(low), place(high)))
        return f"left:{left:.2f}%;width:{right - left:.2f}%"

    rows = []
    for name, kind, start, spread in bars:
        cut = " cut" * (start + spread["median"] > ends[1])
        bar = f'<i class="{kind}{cut}" style="{spot(start, start + spread["median"])}"></i>'
        line = f'<b style="{spot(start + spread["low"], start + spread["high"])}"></b>'
        rows.append(
            f'<tr><th scope="row">{html.escape(name)}</th><td class="track"><div>{bar}{line}</div></td>'
            f'<td class="number">{number_text(spread["median"])}{unit}</td></tr>'
        )
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _caption(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>'


def _timeline(report: Report) -> str | None:
    """Draw for each step of the end-to-end windows its duration and its wait for data, measured on the host."""
    timeline = report["timeline"]
    if not timeline or not any(timeline["waits_ms"]):
        return None
    steps, waits = ([*chain.from_iterable(timeline[key])] for key in ("steps_ms", "waits_ms"))
    together = math.ceil(len(steps) / _COLUMNS)
    top = max(*steps, *waits, 1e-9)
    tick = _tick(top)
    across, up = (_WIDTH - _LEFT) / len(steps), (_HEIGHT - _BOTTOM - 8) / (top * 1.02)
    ground = _HEIGHT - _BOTTOM

    def area(values: list[float], kind: str) -> str:
        path = f"M{_LEFT} {ground}"
        for first in range(0, len(values), together):
            part = values[first : first + together]
            path += f"V{ground - up * max(part):.1f}H{_LEFT + across * (first + len(part)):.1f}"
        return f'<path class="{kind}" d="{path}V{ground}Z"/>'

    marks, edge = [], 0
    for level in range(math.floor(top / tick) + 1):
        y = ground - up * tick * level
        marks.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * level:g}</text>')
    for window in timeline["waits_ms"][:-1]:
        edge += len(window)
        x = _LEFT + across * edge
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{ground}"/>')
    for x, anchor, text in (
        (_LEFT, "start", "1"),
        ((_LEFT + _WIDTH) / 2, "middle", "step"),
        (_WIDTH, "end", f"{len(steps):,}"),
    ):
        marks.append(f'<text x="{x}" y="{ground + 18}" text-anchor="{anchor}">{text}</text>')
    longest = f"; each column is the longest of {together} steps" if together > 1 else ""
    most, longest_wait = number_text(top), number_text(max(waits))
    said = f"{len(steps):,} steps of up to {most} ms, with waits for data of up to {longest_wait} ms"
    keys = '<span class="key step"></span>step, including its wait <span class="key wait"></span>wait for data'
    return (
        f'<p class="caption">{keys}</p><div class="scroll">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT - 16}" role="img" aria-label="{said}">'
        f"{area(steps, 'step')}{area(waits, 'wait')}{''.join(marks)}</svg></div>"
        + _caption(f"ms, measured on the host; vertical lines separate windows{longest}")
    )


def _tick(top: float) -> float:
    """Return a round distance between tick marks, with at most five marks below `top`."""
    power: float = 10.0 ** math.floor(math.log10(top))
    return next(each * power for each in (0.2, 0.5, 1.0, 2.0, 5.0) if top / (each * power) <= 5)

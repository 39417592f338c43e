"""The HTML page of a report: it is well-formed and complete, and names are escaped.

The reports are built from given times; the pages are parsed with Python's HTML parser.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from dali_saliencymix.bottleneck.display import report_text
from dali_saliencymix.bottleneck.page import page_html, save_page
from dali_saliencymix.bottleneck.report import build_report
from dali_saliencymix.bottleneck.storage import StorageRates
from dali_saliencymix.bottleneck.verdict import Figures, RankFigures, Stage, decide

VOID = {"meta", "br", "line", "path"}
EVIL = '<script src="//evil">&"\''


class Page(HTMLParser):
    """A parsed page: elements with attributes and text; checks that elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.declarations: list[str] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_decl(self, decl):
        self.declarations.append(decl)

    def handle_starttag(self, tag, attrs):
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self.open.append((tag, text))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, text in self.open:
            text.append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def bars(self) -> dict[str, str]:
        """Return the numbers of the charts by bar name."""
        rows = [re.sub(r"\s+", " ", text) for text in self.texts("td") if text]
        return dict(zip(self.texts("th"), rows, strict=True))


def report_of(figures: Figures, *, source: str = "pipeline", timeline=None, **conditions) -> dict:
    found = build_report(
        figures,
        decide(figures),
        images=64,
        stages_note=None if figures.stages else "it <cannot> be cut",
        stored=StorageRates(not_measured="not requested"),
        what_ifs=[{"kind": "predicted", "what": "rest", "text": "Two <more> threads"}],
        timeline=timeline,
        conditions={"source": source, "images_per_batch": 64, "processes": 1, "device": "cpu", **conditions},
    )
    return {**found, "created": "2026-11-27T16:04:14+00:00"}


STAGES = tuple(
    Stage(name, name if name != "saliency" else "mix", (ms,) * 5)
    for name, ms in {"read": 1.25, "decode": 150.0, "saliency": -2.0, "iterator": 0.5}.items()
)
TIMELINE = {"waits_ms": [[1.0, 2.0, 30.0], [4.0, 5.0]], "steps_ms": [[11.0, 12.0, 40.0], [14.0, 15.0]]}
SLOW_LOADER = Figures((10.0,) * 5, (149.75,) * 5, (151.0,) * 5, stages=STAGES)
REPORTS = {
    "loader": report_of(SLOW_LOADER, timeline=TIMELINE, data="/data/train", notes=["few <files>"]),
    "step": report_of(Figures((5000.0,) * 5, (149.75,) * 5, (5001.0,) * 5, stages=STAGES), timeline=TIMELINE),
    "whole": report_of(Figures((10.0,) * 5, (20.0,) * 5, (21.0,) * 5)),
    "alone": report_of(Figures(None, (149.75,) * 5, None, stages=STAGES)),
    "ranks": report_of(
        Figures(
            (20.0,) * 5,
            (10.0,) * 5,
            (21.0,) * 5,
            ranks=(RankFigures((10.0,) * 5, (8.0,) * 5), RankFigures((20.0,) * 5, (10.0,) * 5)),
        ),
        timeline=TIMELINE,
        processes=2,
    ),
}
each_report = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)


@each_report
def test_the_page_says_all_that_the_text_says_and_the_verdict_once(report):
    shown = page_html(report)
    page = Page(shown)
    (body,) = page.texts("body")
    for line in report_text(report).splitlines():
        assert line.strip() in body
    (heading,) = page.texts("h1")
    assert heading == report["verdict"]["name"]
    assert body.count(heading) == 1
    assert "2026-11-27 16:04 UTC" in body
    (title,) = page.texts("title")
    assert title.startswith(f"{heading}, pipeline, ")
    assert "2026-11-27" in title


@each_report
def test_the_page_fits_a_telephone_and_needs_no_network(report):
    page = Page(page_html(report))
    assert page.declarations == ["doctype html"]
    attributes = [(tag, found) for tag, found, _ in page.elements]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in attributes
    assert {tag for tag, _ in attributes}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "use"})
    assert not any({"src", "href", "srcset"} & found.keys() for _, found in attributes)
    (style,) = page.texts("style")
    assert not re.search(r"url\(|@import", style)
    assert "pre, .scroll { overflow-x: auto; }" in style
    shown = page_html(report)
    for wide in ("<table>", "<svg "):
        assert shown.count(wide) == shown.count(f'<div class="scroll">{wide}')


def test_bars_have_the_numbers_of_the_tables():
    text, bars = report_text(REPORTS["loader"]), Page(page_html(REPORTS["loader"])).bars()
    for name in ("read", "decode", "saliency", "iterator"):
        (number,) = re.findall(rf"^{name} +(\S+)", text, re.MULTILINE)
        assert bars[name] == f"{number} ms"
    for name in ("step alone (G)", "loader alone (P)", "end to end (E)"):
        (number,) = re.findall(rf"^{re.escape(name)} +(\S+)", text, re.MULTILINE)
        assert bars[name] == number
    assert bars["the whole loader"] == "150 ms"
    assert bars["the step alone"] == "10.0 ms"
    assert "storage (F)" not in bars  # not measured


def places(page: Page, tag: str) -> list[tuple[str | None, float, float]]:
    """Return class, left and right end of bars or of their ranges, in percent of the scale."""
    found = [attributes for name, attributes, _ in page.elements if name == tag]
    ends = [[float(end) for end in re.findall(r"[\d.]+(?=%)", attributes["style"])] for attributes in found]
    return [(each.get("class"), left, left + width) for each, (left, width) in zip(found, ends, strict=True)]


def test_a_stage_begins_where_the_one_before_it_ends():
    page = Page(page_html(REPORTS["loader"]))
    read, decode, saliency, iterator, loader, step, *rates = places(page, "i")
    zero = read[1]
    per_ms = (loader[2] - zero) / 149.75
    assert read[2] == pytest.approx(zero + 1.25 * per_ms, abs=0.02)
    assert (decode[1], decode[2]) == pytest.approx((read[2], read[2] + 150 * per_ms), abs=0.02)
    assert (saliency[1], saliency[2]) == pytest.approx((decode[2] - 2 * per_ms, decode[2]), abs=0.02)
    assert (iterator[1], iterator[2]) == pytest.approx((saliency[1], loader[2]), abs=0.02)
    assert (step[1], step[2]) == pytest.approx((zero, zero + 10 * per_ms), abs=0.02)
    assert all(0 <= left <= right <= 100.01 for _, left, right in places(page, "b") + rates)


def test_a_step_far_longer_than_its_loader_is_cut_off_and_rates_far_apart_are_logarithmic():
    shown = page_html(REPORTS["step"])
    bars = places(Page(shown), "i")
    assert [kind for kind, *_ in bars if "cut" in kind] == ["step cut"]
    assert bars[5][2] == pytest.approx(100)
    assert "the bar of the step is cut off" in shown
    assert "images per second, logarithmic from 6.4; " in shown
    assert "cut off" not in page_html(REPORTS["loader"])


def test_the_timeline_is_drawn_to_scale_and_its_legend_stands_outside():
    page = Page(page_html(REPORTS["loader"]))
    tops = {}
    for tag, attributes, _ in page.elements:
        if tag == "path":
            tops[attributes["class"]] = [float(y) for y in re.findall(r"V([\d.]+)H", attributes["d"])]
    ground = 200
    heights = {kind: [ground - top for top in found] for kind, found in tops.items()}
    per_ms = heights["step"][2] / 40
    assert heights["step"] == pytest.approx([each * per_ms for each in (11, 12, 40, 14, 15)], abs=0.1)
    assert heights["wait"] == pytest.approx([each * per_ms for each in (1, 2, 30, 4, 5)], abs=0.1)
    labels = page.texts("text")
    assert labels == ["0", "10", "20", "30", "40", "1", "step", "5"]
    assert not any("wait" in text for text in page.texts("svg"))
    (label,) = (attributes["aria-label"] for tag, attributes, _ in page.elements if tag == "svg")
    assert label == "5 steps of up to 40.0 ms, with waits for data of up to 30.0 ms"


def test_a_long_timeline_has_columns_of_several_steps():
    waits = [[float(number % 7) for number in range(1001)]]
    shown = page_html({**REPORTS["loader"], "timeline": {"waits_ms": waits, "steps_ms": waits}})
    assert "each column is the longest of 3 steps" in shown
    assert [len(re.findall("H", path)) for path in re.findall(r' d="(.*?)"', shown)] == [334, 334]


def test_what_was_not_measured_is_said_but_not_where_it_was_not_to_be():
    whole, alone = Page(page_html(REPORTS["whole"])), Page(page_html(REPORTS["alone"]))
    assert whole.texts("p").count("not measured") == 2  # stages and timeline
    assert "it <cannot> be cut" in whole.texts("body")[0]
    assert "not measured" not in alone.texts("p")
    assert "Waiting for data, step by step" not in alone.texts("h2")
    assert not {"step alone (G)", "the step alone"} & alone.bars().keys()
    assert "2 processes" in Page(page_html(REPORTS["ranks"])).texts("p")[0]


def test_a_command_stands_as_it_is(monkeypatch):
    text = "MIX-BOUND\n  why\n  Next: this\n  Change: that\n    python -m this && that\n\n\nrates  1\n\nNote: a\nb"
    monkeypatch.setattr("dali_saliencymix.bottleneck.page.report_text", lambda report: text)
    page = Page(page_html(REPORTS["alone"]))
    assert page.texts("p")[1:4] == ["why", "Next: this", "Change: that"]
    assert page.texts("pre")[:2] == ["python -m this && that", "rates  1"]
    assert page.texts("p")[-1] == "Note: ab"


def test_names_are_text():
    stages = (Stage(EVIL, "decode", (9.0,) * 5), Stage("iterator", "iterator", (1.0,) * 5))
    evil = Figures((1.0,) * 5, (10.0,) * 5, (11.0,) * 5, stages=stages)
    report = report_of(evil, source=EVIL, data=EVIL, notes=[EVIL], command=EVIL)
    page = Page(page_html(report))
    assert "script" not in {tag for tag, *_ in page.elements}
    assert EVIL in page.texts("title")[0]
    assert EVIL in page.texts("th")
    assert page.texts("body")[0].count(EVIL) >= 4


def test_the_page_is_a_file_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "made" / "report.html"
    save_page(REPORTS["loader"], path)
    assert path.read_text() == page_html(REPORTS["loader"])


def test_a_stage_whose_range_reaches_0_is_below_the_noise():
    stages = tuple(Stage(f"decode {low}", "decode", (low, 1.0, 2.0, 3.0, 4.0)) for low in (-1.0, 0.0, 0.5))
    found = report_of(Figures(loader_ms=(10.0,) * 5, stages=stages))
    assert [row["below_noise"] for row in found["stages"]] == [True, True, False]

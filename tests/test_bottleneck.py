"""The bottleneck tool on real pipelines and files, with faults that are far larger than any noise.

No test depends on a measured time: the tests check the verdicts of certain faults, and the content of reports.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from shared.training_fixtures import torchrun

from benchmarks import bottleneck_faults as faults
from dali_saliencymix import bottleneck
from dali_saliencymix.__main__ import main
from dali_saliencymix.bottleneck import BottleneckError, stages, whatifs
from dali_saliencymix.bottleneck.command import step_of
from dali_saliencymix.bottleneck.diagnose import measure_source
from dali_saliencymix.bottleneck.display import comparison_text, report_text
from dali_saliencymix.bottleneck.report import build_report, compare, load_report, save_report
from dali_saliencymix.bottleneck.sources import PipelineBatches, Source, load_function, loader_source, pipeline_source
from dali_saliencymix.bottleneck.storage import PASSES, StorageRates, measure_storage
from dali_saliencymix.bottleneck.verdict import Figures, RankFigures, Stage, decide
from dali_saliencymix.bottleneck.whatifs import measured_rows, predicted_rows
from dali_saliencymix.measure import page_cache, windows
from dali_saliencymix.measure.figures import Interval
from dali_saliencymix.measure.windows import Batches, Meter, Subject, Windows, images_in

pytest_plugins = ["shared.training_fixtures", "shared.measuring"]
pytestmark = pytest.mark.usefixtures("short_windows")

QUICK = {"seconds": 1.0, "rounds": 5, "what_ifs": False, "storage": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """JPEG files that are cheap to decode."""
    return faults.make_files(tmp_path_factory.mktemp("small"), count=16, size=96)


class Slow:
    """A loader with a delay at the start of an epoch and before each batch."""

    def __init__(self, seconds: float, *, batches: int = 50, start: float = 0.0, sizes=(4,)) -> None:
        self.seconds, self.batches, self.start, self.sizes = seconds, batches, start, sizes

    def __iter__(self):
        time.sleep(self.start)
        for number in range(self.batches):
            size = self.sizes[number % len(self.sizes)]
            time.sleep(self.seconds * size / max(self.sizes))
            yield {"image": np.zeros((size, 3, 8, 8), np.float32), "label": np.zeros(size)}


def decided(loader, step, **options) -> dict:
    """Return a report with a verdict; retry if it is INCONCLUSIVE, which is correct on a busy machine."""
    for _ in range(4):
        found = bottleneck.diagnose(loader, step, **options)
        verdict = found["verdict"]
        if verdict["name"] != "INCONCLUSIVE" and "tell the stages apart" not in verdict["next"]:
            break
    return found


@pytest.fixture(scope="module")
def report(files, short_windows) -> dict:
    """The report of a pipeline, with everything measured. Tests must not change it."""
    define = functools.partial(faults.pipeline, files, detect=0.02)
    return decided(define, faults.step_of(0.002), seconds=1, rounds=5)


# Faults.


def verdict_of(files, seconds_of_step=0.001, **options) -> str:
    define = functools.partial(faults.pipeline, files, **options)
    return decided(define, faults.step_of(seconds_of_step), **QUICK)["verdict"]["name"]


def test_an_expensive_detector_is_found(report):
    assert report["verdict"]["name"] == "MIX-BOUND"
    assert "saliency" in report["verdict"]["why"]


def test_a_slow_read_is_found_where_storage_can_be_measured(files):
    define = functools.partial(faults.pipeline, files, read=0.02, mixed=False)
    found = decided(define, faults.step_of(0.001), **{**QUICK, "storage": True, "files": files})
    measured = found["storage"]["not_measured"] is None
    assert found["verdict"]["name"] == ("DISK-BOUND" if measured else "LOADER-BOUND")
    assert (found["rates"]["storage"]["images_per_second"] is not None) == measured


def test_two_that_wait_for_one_lock_are_in_contention(files):
    define = functools.partial(faults.pipeline, files, prep=0.02, held=True, mixed=False)
    found = decided(define, faults.step_of(0.03, held=True), **QUICK)
    assert found["verdict"]["name"] == "CONTENTION"


def test_a_slow_iterable_is_the_loader_as_a_whole(clock):
    found = bottleneck.diagnose(Slow(0.03), faults.step_of(0.001), **QUICK)
    assert found["verdict"]["name"] == "LOADER-BOUND"
    assert found["stages"] is None
    assert found["stages_note"] == "an iterable cannot be split into stages: it is measured as a whole"
    assert "stages of the loader: not measured (an iterable cannot be split" in report_text(found)
    assert found["conditions"]["images_per_batch"] == 4
    assert found["rates"]["loader"]["images_per_second"]["median"] == pytest.approx(4 / 0.03)
    assert found["rates"]["step"]["images_per_second"]["median"] == pytest.approx(4 / 0.001)
    assert found["rates"]["end_to_end"]["images_per_second"]["median"] == pytest.approx(4 / 0.031)


def test_a_slow_step_is_no_fault_of_the_loader(clock):
    found = bottleneck.diagnose(Slow(0.001), faults.step_of(0.2), **QUICK)
    assert found["verdict"]["name"] == "COMPUTE-BOUND"
    assert found["stall"]["median"] == pytest.approx(1 - 0.2 / 0.201)


@pytest.mark.parametrize("sized", [False, True])
def test_what_the_beginning_of_short_epochs_costs_is_a_part_of_the_rate(clock, monkeypatch, sized):
    if sized:
        monkeypatch.setattr(Slow, "__len__", lambda self: self.batches, raising=False)
    found = bottleneck.diagnose(Slow(0.005, batches=4, start=0.48), faults.step_of(0.01), **{**QUICK, "seconds": 20})
    assert found["verdict"]["name"] == "LOADER-BOUND"
    assert found["rates"]["loader"]["windows_ms"] == pytest.approx([125.0] * 5)
    assert found["rates"]["end_to_end"]["windows_ms"] == pytest.approx([135.0] * 5)


def test_a_step_may_take_its_batch_apart(clock):
    """The batches of a list come again in each epoch, and the constant batch in each step."""
    import collections

    class Encoding(collections.UserDict):  # as of Hugging Face's tokenizers
        def to(self, device):
            return self

    def step(batch):
        batch = batch.to("cpu")
        assert batch.pop("label").shape == (4,)
        batch["parts"].clear()
        time.sleep(0.01)

    batches = [Encoding(image=np.zeros((4, 3)), label=np.zeros(4), parts=[1, 2]) for _ in range(5)]
    found = bottleneck.diagnose(batches, step, **QUICK)
    assert found["rates"]["end_to_end"]["images_per_second"]["median"] == pytest.approx(400)
    assert all(set(batch) == {"image", "label", "parts"} and batch["parts"] == [1, 2] for batch in batches)


def test_a_slow_process_is_found(tmp_path):
    output = tmp_path / "ranks.json"
    command = ["-m", "dali_saliencymix", "bottleneck", "--loader", "benchmarks.bottleneck_faults:RankLoader"]
    command += ["--step", "benchmarks.bottleneck_faults:rank_step", "--seconds", "2", "--rounds", "5"]
    ended = torchrun(*command, "--device", "cpu", "--no-what-ifs", "--no-storage", "-o", output)
    found = load_report(output)
    assert found["verdict"]["name"] == "STRAGGLER"
    assert "Process 1 of 2" in found["verdict"]["why"]
    assert [each["rank"] for each in found["ranks"]] == [0, 1]
    assert ended.stdout.count("STRAGGLER") == 1  # only one process prints


# The content of a report.


def test_the_verdict_comes_first_and_then_what_to_do(report):
    lines = report_text(report).splitlines()
    assert lines[0] == "MIX-BOUND"
    assert lines[1].strip() == report["verdict"]["why"]
    assert lines[2].startswith("  Next: ")


def test_the_stages_are_those_of_the_graph(report):
    names = [row["name"] for row in report["stages"]]
    assert names == ["read", "decode", "resize", "paste", "saliency", "normalise", "iterator"]
    text = report_text(report)
    for name in names:
        assert re.search(rf"^{name}\b", text, re.MULTILINE)


def test_the_stages_sum_up_to_the_loader(report):
    """Recompute the sum from the raw windows: the stages telescope, and the figures contain the remainder."""
    loader = report["rates"]["loader"]["windows_ms"]
    for number, whole in enumerate(loader):
        assert sum(row["windows_ms"][number] for row in report["stages"]) == pytest.approx(whole)
    assert report["stages_sum"]["loader_ms"] == pytest.approx(np.median(loader))


def test_figures_follow_from_the_raw_windows(report):
    for key in ("step", "loader", "end_to_end"):
        figure = report["rates"][key]
        assert figure["ms_per_batch"]["median"] == pytest.approx(np.median(figure["windows_ms"]))
        speed = 1000 * faults.BATCH / np.median(figure["windows_ms"])
        assert figure["images_per_second"]["median"] == pytest.approx(speed)
        assert len(figure["windows_ms"]) >= 5
    step, end = (np.array(report["rates"][key]["windows_ms"]) for key in ("step", "end_to_end"))
    assert report["stall"]["median"] == pytest.approx(np.median(1 - step / end))
    assert report["utilisation"] == pytest.approx(1 - report["stall"]["median"])
    assert report["stall"]["band"] == "critical"
    assert report["passes"] is False


def test_what_ifs_say_whether_they_are_measured_or_predicted(report):
    assert {row["kind"] for row in report["what_ifs"]} == {"measured", "predicted", "extrapolated"}
    rows = {(row["what"], row.get("then")): row for row in report["what_ifs"]}
    assert rows["DALI threads", 4]["change"] is not None
    assert rows["prefetch depth", 4]["change"] is not None
    assert rows["batch size", 16]["change"] is not None
    assert rows["hw_decoder_load", None]["change"] is None
    text = report_text(report)
    assert "hw_decoder_load" not in text  # a pipeline on a CPU does not have it
    for row in report["what_ifs"]:
        if row["kind"] == "measured" and row["change"]:
            now, then = (row[key]["median"] for key in ("now_images_per_second", "loader_images_per_second"))
            assert then / now == pytest.approx(row["change"]["median"], rel=0.5)  # medians of the same rounds
    sure = r"[\d,.]+ images/s against [\d,.]+, interleaved"
    found = rf"DALI threads 2 -> 4: [\d.]+x \([\d.]+ to [\d.]+\), ({sure}|within the noise)$"
    assert re.search(found, text, re.MULTILINE)
    rate = report["rates"]["end_to_end"]["images_per_second"]["median"]
    assert rows["epoch as it is", None]["value"] == pytest.approx(16 / rate, rel=1e-6)  # of the existing files
    assert re.search(r"^  extrapolated an epoch of 16 images: [\d.]+ s at the present rate$", text, re.MULTILINE)


def test_a_setting_that_cannot_be_tried_is_a_row_with_the_reason():
    def opened(changed):
        if changed.get("batch_size") == 8:
            msg = "no memory\nleft"
            raise RuntimeError(msg)
        return [np.zeros((changed.get("batch_size", 4), 2))] * 5

    rows = measured_rows(Source("loader", {"batch_size": 4}, opened), seconds=0.1, meter=Meter())
    found = {row["then"]: row for row in rows if row["what"] == "batch size"}
    assert found[2]["change"] is not None
    assert (found[8]["change"], found[8]["not_measured"]) == (None, "RuntimeError: no memory left")


def test_what_ifs_of_several_processes_are_those_of_the_slowest(monkeypatch):
    """Two processes, of which this one takes half the time of the other."""
    monkeypatch.setattr(whatifs, "gather", lambda ms: [ms, {key: [1.5 * each for each in ms[key]] for key in ms}])

    def in_turns(self, subjects, *, seconds):
        return Windows({key: [4.0 if key == "0" else 2.0] * 5 for key in subjects}, {})

    monkeypatch.setattr(Meter, "in_turns", in_turns)
    source = Source("loader", {"num_threads": 1}, lambda _: [np.zeros((6, 2))] * 5)
    rows = measured_rows(source, seconds=0.1, meter=Meter())
    (row,) = (row for row in rows if row["what"] == "DALI threads")
    assert row["now_images_per_second"].median == pytest.approx(1000)
    assert row["loader_images_per_second"].median == pytest.approx(2000)
    assert row["change"].median == pytest.approx(2)


@pytest.mark.parametrize(
    ("threads", "processes", "note"),
    [
        (2, "2", []),
        (8, "1", ["8 DALI threads share 4 cores: more than one per core does not help and slows the steps down"]),
        (3, "2", ["2 processes with 3 DALI threads each share 4 cores: more than one per core does not help and "
                  "slows the steps down"]),
    ],
)  # fmt: skip
def test_a_report_tells_of_more_threads_than_cores(monkeypatch, clock, threads, processes, note):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    source = Source("loader", {"num_threads": threads}, lambda changed: Slow(0.01))
    found = measure_source(source, None, seconds=1, with_storage=False, with_what_ifs=False)
    assert found["conditions"].get("notes", []) == note
    assert report_text(found).count("Note: ") == len(note)


def figures_of(**rates):
    """Return the figures of these rates, in images per second with batches of 100."""
    times = {f"{name}_ms": None if rate is None else (100_000 / rate,) * 5 for name, rate in rates.items()}
    return Figures(**times)


def test_predictions_for_a_training_that_reads_from_storage_start_from_what_storage_allows():
    rates = {"step": 400, "loader": 500, "end": 380}

    def rows_of(cold, reads_cold, ranks=()):
        figures = dataclasses.replace(figures_of(**rates, cold=cold), reads_cold=reads_cold, ranks=ranks)
        rows = predicted_rows(figures, images=100, epoch_images=10_000, threads=2)
        return {row["what"]: row for row in rows}

    rows = rows_of(cold=100, reads_cold=True)
    assert "a step twice as fast" not in rows  # it would change nothing
    assert "threads to reach the step's rate" not in rows  # there are enough
    assert rows["epoch as it is"]["value"] == pytest.approx(10_000 / 100)
    assert rows["epoch as it is"]["text"].endswith("at the rate of the loader from storage")
    assert rows["epoch without a stall"]["value"] == pytest.approx(10_000 / 400)
    rates |= {"loader": 370, "end": 365}
    # A stall of 9 % is below the limit.
    assert "threads to reach the step's rate" not in rows_of(cold=None, reads_cold=False)
    rates |= {"loader": 300, "end": 280}
    few = rows_of(cold=100, reads_cold=True)["threads to reach the step's rate"]
    assert (few["value"], few["text"].endswith("from storage, the loader reaches 100 images/s")) == (3, True)
    rates |= {"loader": 500, "end": 380}
    rows = rows_of(cold=None, reads_cold=True)  # storage could not be measured
    assert "a step twice as fast" not in rows
    assert rows["epoch as it is"]["value"] is None
    assert "the training reads from storage, which was not measured" in rows["epoch as it is"]["text"]
    warm = rows_of(cold=100, reads_cold=False)
    assert warm["epoch as it is"]["value"] == pytest.approx(10_000 / 380)
    assert warm["a step twice as fast"]["text"] == "a step twice as fast: 475 images/s, 1.25 times the present rate"
    assert warm == rows_of(cold=None, reads_cold=False)
    of_four = rows_of(cold=100, reads_cold=False, ranks=(RankFigures(None, None),) * 4)  # rates are those of one
    for row in ("epoch as it is", "epoch without a stall"):
        assert of_four[row]["value"] == pytest.approx(warm[row]["value"] / 4)
    rates |= {"loader": 300}  # less than was measured together with a step
    assert "a step twice as fast" not in rows_of(cold=None, reads_cold=False)
    rates |= {"loader": 500, "step": None, "end": None}  # the loader alone
    assert rows_of(cold=100, reads_cold=True)["epoch of the loader alone"]["value"] == pytest.approx(10_000 / 100)
    assert rows_of(cold=None, reads_cold=False)["epoch of the loader alone"]["value"] == pytest.approx(10_000 / 500)
    assert [row["value"] for row in rows_of(cold=None, reads_cold=True).values()] == [None]


@pytest.mark.parametrize(("step", "stalls"), [(350, True), (400, False)])
def test_a_loader_that_cost_nothing_is_never_said_to_make_an_epoch_longer(step, stalls):
    figures, options = figures_of(step=step, loader=500, end=380), {"images": 100, "threads": 2, "stalls": stalls}
    rows = {row["what"]: row for row in predicted_rows(figures, epoch_images=3_800_000, **options)}
    assert rows["epoch as it is"]["text"] == "an epoch of 3,800,000 images: 2 h 47 min at the present rate"
    assert rows["epoch without a stall"]["value"] is None
    assert "equally long, within the noise, if the loader cost nothing" in rows["epoch without a stall"]["text"]
    unknown = predicted_rows(figures, epoch_images=None, **options)
    assert not [row for row in unknown if "epoch" in row["what"]]


def test_a_prediction_for_a_training_that_reads_from_storage_is_bounded_by_the_loader_from_there(report):
    warm = Figures((10.0,) * 5, (20.0,) * 5, (21.0,) * 5)
    stored = StorageRates(cold_ms=[40.0, 41.0, 42.0, 43.0, 44.0], warm_ms=[20.0] * 5)
    cold = dataclasses.replace(warm, cold_ms=tuple(stored.cold_ms), storage_measured=True, reads_cold=True)
    unknown = dataclasses.replace(warm, reads_cold=True)
    rest = {"images": 84, "stages_note": None, "what_ifs": [], "timeline": None}
    conditions = report["conditions"]
    why = StorageRates(not_measured="not requested")

    def built(figures, stored):
        return build_report(figures, decide(figures), stored=stored, conditions=conditions, **rest)

    found = built(cold, stored)
    assert found["prediction"]["images_per_second"]["median"] == 1000 * 84 / 20
    assert found["prediction"]["from_storage_images_per_second"]["median"] == 1000 * 84 / 42
    assert found["stall"]["median"] == pytest.approx(1 - 10 / 42)
    assert re.search(r"^predicted from storage +2,000 +\(1,909 to 2,100\)$", report_text(found), re.MULTILINE)
    assert "files in memory" in report_text(found)
    waited = dataclasses.replace(cold, waits=(0.4,) * 5, end_ms=(30.0,) * 5)
    text = report_text(built(waited, stored))
    assert "waits for data 40 % (40 % to 40 %) of the time, measured on the host, with the files in memory" in text
    assert "of the time per batch, with the files in memory" in text
    assert re.search(r"^predicted from storage +-  not measured$", report_text(built(unknown, why)), re.MULTILINE)
    assert "predicted from storage" not in report_text(built(warm, why))
    # A step that is slower than the storage is the limit.
    slow = dataclasses.replace(cold, step_ms=(60.0,) * 5, end_ms=(61.0,) * 5)
    assert built(slow, stored)["prediction"]["from_storage_images_per_second"]["median"] == 1000 * 84 / 60


def text_of(figures: Figures, report: dict) -> str:
    """Return the text of a report with these figures and the conditions of another report."""
    rest = {"images": 32, "stages_note": "x", "what_ifs": [], "timeline": None}
    stored, conditions = StorageRates(not_measured="not requested"), report["conditions"]
    return report_text(build_report(figures, decide(figures), stored=stored, conditions=conditions, **rest))


RECORDED = faults.recorded()


@pytest.mark.parametrize("name", RECORDED)
def test_the_text_of_a_busy_machine_does_not_contradict_itself(name, report):
    figures, _ = RECORDED[name]
    verdict, text = decide(figures), text_of(figures, report)
    band = re.search(r"^stall .*\), ([a-z ]+) \(warning", text, re.MULTILINE)[1]
    if verdict.name in ("COMPUTE-BOUND", "INCONCLUSIVE"):
        assert band.startswith("ok")  # as the range of the stall, which reaches over the line
    assert ("contention is undecided" in text) == (verdict.contention == "open")
    assert "the step waits for data" in text
    assert not re.search(r"-\d+ % (longer|less)|step 1(0[1-9]|[1-9]\d) %|\d{3}\.\d+x", text)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ((99.0, 101.0, 100.0, 102.0, 98.0), "E took equally long, within the noise (-2 % to 2 %)"),
        ((110.0, 111.0, 112.0, 111.0, 110.0), "E took 11 % longer (10 % to 12 %)"),
        ((95.0, 94.0, 96.0, 95.0, 95.0), "E took 5 % less (4 % to 6 %)"),
    ],
)
def test_what_is_faster_is_not_said_to_take_longer(end, said, report):
    assert said in text_of(Figures((100.0,) * 5, (20.0,) * 5, end), report)


@pytest.mark.parametrize(("loader", "ratio"), [(0.02, "5,000x"), (2.0, "50.0x"), (30.0, "3.33x"), (400.0, "0.25x")])
def test_ratios_have_sensible_digits(loader, ratio, report):
    stages = (Stage("read", "read", (loader,) * 5),)
    text = text_of(Figures((100.0,) * 5, (loader,) * 5, (100.0 + loader,) * 5, stages), report)
    assert re.search(rf"^read .* {re.escape(ratio)}$", text, re.MULTILINE)


def test_contention_is_named_beside_a_verdict_that_it_did_not_decide(report):
    text = text_of(Figures((50.0,) * 5, (80.0,) * 5, (100.0,) * 5), report)
    assert text.startswith("LOADER-BOUND")
    assert "also contention: loader and step cost each other 20 % (20 % to 20 %) of the time per batch" in text
    assert "also contention" not in text_of(Figures((50.0,) * 5, (50.0,) * 5, (100.0,) * 5), report)


def test_the_timeline_has_the_steps_of_all_windows(report):
    timeline = report["timeline"]
    count = report["conditions"]["steps_in_a_window"]["end to end"]
    windows = len(report["rates"]["end_to_end"]["windows_ms"])
    assert [len(window) for window in timeline["waits_ms"]] == [count] * windows
    pairs = zip(np.ravel(timeline["waits_ms"]), np.ravel(timeline["steps_ms"]), strict=True)
    assert all(0 <= wait <= step for wait, step in pairs)


def test_a_report_is_strict_json_and_comes_back(report, tmp_path):
    path = tmp_path / "made" / "report.json"
    save_report(report, path)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == report
    assert load_report(path) == report
    assert report["schema"] == "dali-saliencymix/bottleneck"
    assert report["version"] == 3
    assert {"host", "settings", "command", "cache"} <= report["conditions"].keys()


def test_what_json_has_no_word_for_is_put_into_its_words():
    figures = Figures(loader_ms=(1.0,) * 5)
    change = Interval(1.0, 0.5, math.inf, 5)
    found = build_report(
        figures,
        decide(figures),
        images=8,
        stages_note=None,
        stored=StorageRates(not_measured="not requested"),
        what_ifs=[{"change": change}],
        timeline=None,
        conditions={"device": "cpu", "options": {"lr": math.nan, "data": Path("data"), "sizes": (1, 2)}},
    )
    assert found["what_ifs"] == [{"change": {"median": 1.0, "low": 0.5, "high": None, "windows": 5}}]
    assert found["conditions"]["options"] == {"lr": None, "data": "data", "sizes": [1, 2]}


def test_nothing_that_was_not_measured_is_a_number(files):
    define = functools.partial(faults.pipeline, files)
    found = bottleneck.diagnose(define, None, **QUICK)
    assert found["verdict"]["name"] == "LOADER-ALONE"
    for key in ("step", "end_to_end", "storage", "loader_from_storage"):
        assert found["rates"][key]["images_per_second"] is None
        assert found["rates"][key]["not_measured"]
    assert found["stall"] is None
    assert found["utilisation"] is None
    assert found["passes"] is None
    assert found["prediction"] is None
    assert all(row["against_step"] is None for row in found["stages"])
    assert found["rates"]["loader"]["images_per_second"]["median"] > 0


def test_without_a_step_the_report_is_of_the_loader_and_nothing_is_said_to_be_missing(files, tmp_path):
    define = functools.partial(faults.pipeline, files)
    found = bottleneck.diagnose(define, None, **{**QUICK, "what_ifs": True, "seconds": 0.5})
    text = report_text(found)
    assert text.startswith("LOADER-ALONE\n")
    assert "saliency" in text
    assert not re.search("stall|step alone|end to end|of the step|step on", text)
    missing = [line.split(":")[0].split()[0] for line in text.splitlines() if "not measured" in line]
    assert missing == ["storage", "loader"]  # switched off
    rate = found["rates"]["loader"]["images_per_second"]["median"]
    assert [row for row in found["what_ifs"] if "epoch" in row["what"]] == [
        {
            "kind": "extrapolated",
            "what": "epoch of the loader alone",
            "value": pytest.approx(16 / rate),
            "text": mock.ANY,
        }
    ]
    assert re.search(r"extrapolated +an epoch of 16 images: .* for the loader alone$", text, re.MULTILINE)
    several = {**found, "ranks": [{"rank": 0, "step": found["rates"]["step"], "loader": found["rates"]["loader"]}]}
    assert re.search(r"^process +loader images/s\n0 +[\d,.]+$", report_text(several), re.MULTILINE)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not a JSON file"),
        (
            '{"schema": "dali-saliencymix/bottleneck", "version": 3, "rates": {"loader": {}}}',
            "a damaged report .*: verdict.name must be a text",
        ),
        ("[]", "must hold a JSON object, got a list"),
        ('{"schema": "dali-saliencymix/bottleneck"}', "of version None"),
    ],
)
def test_files_that_are_no_report_are_refused(content, text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BottleneckError, match=text):
        load_report(path)


# Comparison.


def shifted(report: dict, factor: float) -> dict:
    """Return a report whose loader is faster by this factor."""
    changed = json.loads(json.dumps(report))
    speed = changed["rates"]["loader"]["images_per_second"]
    speed |= {key: speed[key] * factor for key in ("median", "low", "high")}
    changed["conditions"]["settings"]["num_threads"] = 16
    return changed


def test_a_report_compared_with_itself_has_not_changed(report):
    found = compare(report, report)
    assert found["conditions"] == {}
    assert found["rates"]["loader"]["ratio"] == 1
    assert not any(row["more_than_noise"] for row in found["rates"].values())
    assert "measured under the same conditions" in comparison_text(found)


def test_a_large_change_is_more_than_noise(report):
    found = compare(report, shifted(report, 1000.0))
    assert found["rates"]["loader"]["more_than_noise"] is True
    assert found["rates"]["loader"]["ratio"] == pytest.approx(1000)
    assert found["conditions"] == {"settings.num_threads": [2, 16]}
    assert re.search(r"^loader .* 1,000x  more than noise", comparison_text(found), re.MULTILINE)


def test_a_change_within_the_ranges_is_noise(report):
    wide = json.loads(json.dumps(report))
    wide["rates"]["loader"]["images_per_second"]["high"] *= 2
    assert compare(wide, shifted(report, 1.5))["rates"]["loader"]["more_than_noise"] is False


def test_what_one_report_lacks_is_not_compared(report):
    without = json.loads(json.dumps(report))
    without["rates"]["step"]["images_per_second"] = None
    without["stages"] = None
    found = compare(report, without)
    assert found["rates"]["step"]["ratio"] is None
    assert found["rates"]["step"]["more_than_noise"] is None
    assert found["stages"]["decode"]["more_than_noise"] is None
    assert "not measured in both" in comparison_text(found)


# Stages.


def test_a_cut_gives_what_the_next_operator_would_get(files):
    cuts = stages.cut_pipeline(functools.partial(faults.pipeline, files))
    by_name = {cut.name: cut.make().run() for cut in cuts}
    assert [by_name[name][0].dtype.name for name in ("decode", "resize", "normalise")] == ["UINT8", "UINT8", "FLOAT"]
    assert by_name["decode"][0].at(0).shape == (96, 96, 3)
    assert by_name["resize"][0].at(0).shape == (64, 64, 3)
    assert by_name["normalise"][0].at(0).shape == (3, 64, 64)
    assert len(by_name["normalise"]) == 3  # the whole pipeline has all its outputs


def test_pasting_is_measured_without_a_search_for_saliency(files):
    calls = []

    def detector(images):
        calls.append(len(images))
        return images[..., 0].astype(np.float32)

    from nvidia.dali import fn, pipeline_def

    from dali_saliencymix.fn import saliencymix

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        encoded, labels = fn.readers.file(files=files)
        return saliencymix(fn.resize(fn.decoders.image(encoded), size=(8, 8)), labels, saliency=detector)

    cuts = {cut.name: cut for cut in stages.cut_pipeline(pipeline)}
    cuts["paste"].make().run()
    assert calls == []
    cuts["saliency"].make().run()
    assert calls


@pytest.mark.parametrize("preset", ["default", "paper", "released-code"])
def test_every_preset_can_be_cut(files, preset):
    from nvidia.dali import fn, pipeline_def

    from dali_saliencymix.fn import saliencymix

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        encoded, labels = fn.readers.file(files=files)
        return saliencymix(fn.resize(fn.decoders.image(encoded), size=(24, 24)), labels, preset=preset)

    cuts = stages.cut_pipeline(pipeline)
    assert [cut.name for cut in cuts] == ["read", "decode", "resize", "paste", "saliency"]
    for cut in cuts:
        cut.make().run()


def test_a_stage_is_what_its_node_says_whatever_its_function_looks_like(files):
    from nvidia.dali import fn, pipeline_def

    from dali_saliencymix._dali.python_operator import Stage, python_operator

    left_out = []

    def theirs(images, function, detector, smoothing, options):
        return images + 0

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=files)
        images = fn.resize(fn.decoders.image(encoded), size=(24, 24))
        like_ours = functools.partial(theirs, function="saliencymix", detector="d", smoothing=0.1, options=None)
        images = fn.python_function(images, function=like_ours, output_layouts=["HWC"])
        images = python_operator(lambda renamed: (renamed + 0,), images, name="x", stage=Stage("pasted twice"))
        searching = Stage("found and pasted", lambda: left_out.append(1))
        return python_operator(lambda renamed: (renamed + 0,), images, name="y", stage=searching)

    cuts = stages.cut_pipeline(pipeline)
    assert [(cut.name, cut.category) for cut in cuts] == [
        ("read", "read"),
        ("decode", "decode"),
        ("resize", "prep"),
        ("python function theirs", "prep"),
        ("pasted twice", "mix"),
        ("found and pasted", "mix"),
        ("saliency", "mix"),
    ]
    assert left_out == []
    for cut in cuts:
        cut.make()
    assert left_out == [1]


def test_many_operators_are_joined_to_few_stages(files):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        encoded, labels = fn.readers.file(files=files)
        images = fn.resize(fn.decoders.image(encoded), size=(24, 24))
        for _ in range(15):
            images = fn.flip(images)
        return images, labels

    cuts = stages.cut_pipeline(pipeline)
    assert len(cuts) == stages.MOST_STAGES
    assert [cut.name for cut in cuts][:2] == ["read", "decode"]
    cuts[4].make().run()


def test_a_pipeline_that_cannot_be_cut_is_measured_as_a_whole(files):
    def built():
        pipeline = faults.pipeline(files)
        pipeline.build()
        return pipeline

    found = bottleneck.diagnose(built, faults.step_of(0.01), **QUICK)
    assert found["stages"] is None
    assert "already built" in found["stages_note"]
    assert "measured as a whole" in found["stages_note"]
    assert found["rates"]["loader"]["images_per_second"]["median"] > 0


def test_the_files_of_a_reader_are_known(files, tmp_path):
    from nvidia.dali import Pipeline, fn

    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("class/a.jpg 0\n")

    def pipeline(where):
        made = Pipeline(batch_size=1, num_threads=1, device_id=None)
        with made:
            made.set_outputs(*fn.readers.file(**where))
        return made

    for where in (
        {"file_root": str(folder.parent), "file_filters": ["*.jpg"]},
        {"file_list": str(tmp_path / "list.txt")},
        {"files": [str(folder / "a.jpg")]},
        {"file_root": str(tmp_path), "files": ["class/a.jpg"]},
    ):
        assert str(folder / "a.jpg") in stages.reader_files(functools.partial(pipeline, where))
    assert stages.reader_files(functools.partial(faults.pipeline, files)) == sorted(files)
    assert stages.reader_files(functools.partial(faults.pipeline, files, read=0.01)) is None


# Storage.


def test_dropped_files_are_gone_and_read_files_are_back(files):
    page_cache.read_into_memory(files)
    assert page_cache.resident_share(files) == 1.0
    for file in files:  # check that this file system can drop pages
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if page_cache.resident_share(files):
        pytest.skip("this file system keeps its files in memory")
    page_cache.read_into_memory(files)
    assert page_cache.why_not_dropped(files) is None
    assert page_cache.resident_share(files) == 0.0
    page_cache.read_into_memory(files[:8])
    assert 0.3 < page_cache.resident_share(files) < 0.7


def test_files_that_stay_in_memory_are_not_measured(files, monkeypatch):
    monkeypatch.setattr(page_cache, "resident_share", lambda files: 0.8)
    source = loader_source([np.zeros((2, 4))] * 5, files=files)
    with pytest.raises(BottleneckError, match="80% of the files' bytes stayed in memory after they were dropped"):
        measure_storage(source, images=2, loader_ms=1.0, read_cut=None, seconds=0.1, meter=Meter())


def test_residency_that_cannot_be_seen_is_not_taken_for_absence(files, monkeypatch):
    monkeypatch.setattr(page_cache, "resident_share", lambda files: None)
    assert "unknown which of" in page_cache.why_not_dropped(files)


def test_a_file_that_is_missing_is_a_reason(tmp_path):
    assert "could not be dropped" in page_cache.why_not_dropped([str(tmp_path / "missing")])


def test_unknown_files_are_a_reason():
    found = bottleneck.diagnose([np.zeros((2, 4))] * 5, None, **{**QUICK, "storage": True})
    assert "the files of the loader are not known" in found["rates"]["storage"]["not_measured"]


def test_a_loader_that_is_cut_is_only_timed_on_dropped_files_which_end_up_in_memory(files):
    define = functools.partial(faults.pipeline, files[:8])
    source = pipeline_source(define, {}, files=files)  # the loader does not read half of the dropped files
    read_cut = stages.cut_pipeline(define)[0].make
    try:
        stored = measure_storage(
            source, images=faults.BATCH, loader_ms=10.0, read_cut=read_cut, seconds=0.5, meter=Meter()
        )
    except BottleneckError as error:
        pytest.skip(str(error))
    assert (len(stored.cold_ms), len(stored.read_cold_ms), len(stored.warm_ms)) == (PASSES, PASSES, 0)
    assert page_cache.resident_share(files) == 1.0


def test_what_a_loader_needs_to_begin_is_not_taken_for_storage(tmp_path, monkeypatch):
    """The loader starts processes in 1 s, then takes 10 ms a batch, or 30 ms from storage, and prefetches 4 batches."""
    files = [str(tmp_path / str(number)) for number in range(80)]
    for file in files:
        Path(file).write_bytes(b"x")
    now, cold, taken = [0.0], [False], [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(page_cache, "read_into_memory", lambda files: cold.__setitem__(0, False))
    monkeypatch.setattr(page_cache, "why_not_dropped", lambda files: cold.__setitem__(0, True))
    monkeypatch.setattr(page_cache, "resident_share", lambda files: (taken[0] + 4) * 8 / len(files))

    class Loader:
        def __iter__(self):
            now[0] += 1.0 + 4 * (0.03 if cold[0] else 0.01)
            for taken[0] in range(1, 1000):
                now[0] += 0.03 if cold[0] else 0.01
                yield np.zeros((8, 2))

    source = loader_source(Loader(), files=files)
    common = {"images": 8, "read_cut": None, "seconds": 1.0, "meter": Meter()}
    stored = measure_storage(source, loader_ms=10.0, **common)
    assert stored.batches == 9
    assert stored.from_storage(10.0) == pytest.approx([30.0] * PASSES)


def test_storage_makes_no_loader_faster():
    stored = StorageRates(cold_ms=[40.0, 8.0], warm_ms=[20.0, 9.0], read_cold_ms=[3.0, 1.0])
    assert stored.from_storage(10.0) == (30.0, 10.0)
    assert stored.reading(2.0) == (3.0, 2.0)


# Windows.


def test_windows_do_not_count_prefetched_batches(monkeypatch):
    """Processes synchronise, then a subject settles and its window starts at once: otherwise its queue would refill."""
    log = []

    @dataclasses.dataclass
    class Logged(Subject):
        name: str = ""

        def settle(self):
            log.append((self.name, "settle"))

        def run(self, count):
            log.append((self.name, count))
            return count

    gather = windows.gather
    monkeypatch.setattr(windows, "gather", lambda value: (value is None and log.append("all wait"), gather(value))[1])
    subjects = {"a": Logged(name="a"), "b": Logged(name="b")}
    found = Meter(lambda: log.append("device")).in_turns(subjects, seconds=0.01, rounds=5)
    assert {name: len(ms) for name, ms in found.ms.items()} == {"a": 5, "b": 5}
    counted = [log[-50:][start : start + 5] for start in range(0, 50, 5)]
    assert sorted(name for _, (name, _), *_ in counted) == ["a"] * 5 + ["b"] * 5
    for waits, (name, settles), begins, (also, count), ends in counted:
        assert (waits, settles, also) == ("all wait", "settle", name)
        assert begins == ends == "device"
        assert count == found.steps[name]


def test_a_subject_settles_by_discarding_what_was_prefetched():
    """Three batches wait in the queue, and one more may have been begun."""
    batches = Batches([[np.full((1, 1), number)] for number in range(9)], ahead=3)
    Subject(batches).settle()
    assert batches.next()[0].item() == 5  # the first was taken to look at


def test_steps_alone_and_steps_with_the_loader_have_windows_of_one_length(clock):
    """Otherwise noise that slows down single steps would look like a difference between the two."""
    batches = Batches(Slow(0.0001))
    subjects = {
        "step": Subject(step=lambda batch: None, constant=batches.next()),
        "loader": Subject(batches),
        "end to end": Subject(batches, lambda batch: time.sleep(0.001)),
    }
    steps = Meter().in_turns(subjects, seconds=0.5, rounds=5).steps
    assert steps["step"] == steps["end to end"] < steps["loader"]


def test_windows_have_their_share_of_updates(clock):
    """The step updates the weights after every third batch."""

    def step(batch):
        time.sleep(0.001)

    step.batches_per_update = 3
    found = bottleneck.diagnose([np.zeros((4, 2))] * 50, step, **QUICK)
    windows = found["conditions"]["steps_in_a_window"]
    assert windows["step"] == windows["end to end"] >= 3
    assert windows["step"] % 3 == 0
    slow = {"step": Subject(step=lambda batch: time.sleep(0.002), update=64)}
    assert Meter().in_turns(slow, seconds=0.01, rounds=5).steps["step"] == 64  # the limit, whatever is asked for


def test_times_are_per_full_batch(clock):
    """Half a batch at the end of an epoch counts as half."""
    loader = Slow(1.0, batches=3, sizes=(8, 8, 4))
    found = Meter().in_turns({"loader": Subject(Batches(loader, ahead=0))}, seconds=1000, rounds=5)
    assert found.ms["loader"] == pytest.approx([1000.0] * 5)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (np.zeros((3, 2)), 3),
        ([np.zeros((5, 2)), np.zeros(5)], 5),
        ({"label": np.float32(1), "image": np.zeros((7, 2))}, 7),
        (("name", np.zeros((2, 2))), 2),
        (3.5, None),
        ([], None),
        ("text", None),
    ],
)
def test_images_in_a_batch(batch, count):
    assert images_in(batch) == count


def test_a_subject_can_be_a_step():
    taken = []
    subject = Subject(step=taken.append, constant="batch")
    subject.settle()
    assert subject.run(3) == 3
    assert taken == ["batch"] * 4


# Bad input: one line each.


def one_batch_then_error():
    yield np.zeros((2, 4))
    msg = "the disk is gone"
    raise OSError(msg)


def failing_step(batch):
    msg = "the loss is\nnot finite"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("loader", "step", "text"),
    [
        ([], lambda batch: None, "the loader produces no batches"),
        (iter([np.zeros((2, 4))] * 20), lambda batch: None, "ended after 1 epoch and produces no more batches"),
        (one_batch_then_error(), lambda batch: None, "the loader failed: OSError: the disk is gone"),
        ([np.zeros((2, 4))] * 5, failing_step, "the training step failed: RuntimeError: the loss is not finite"),
        ([1.5] * 5, lambda batch: None, "the number of images in a batch of type float is unknown"),
        (7, lambda batch: None, "the loader must be an iterable of batches, got a int"),
    ],
    ids=["empty", "iterator", "failing loader", "failing step", "batch of one number", "no iterable"],
)
def test_bad_input_is_one_clear_line(loader, step, text):
    with pytest.raises(BottleneckError, match=re.escape(text)) as caught:
        bottleneck.diagnose(loader, step, **QUICK)
    assert "\n" not in str(caught.value)


def test_the_batch_size_can_be_given_where_it_cannot_be_seen():
    found = bottleneck.diagnose([1.5] * 5, None, batch_size=16, **QUICK)
    assert found["conditions"]["images_per_batch"] == 16


def test_what_dali_raises_becomes_one_line(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"this is no image")
    define = functools.partial(faults.pipeline, [str(broken)] * 8)
    with pytest.raises(BottleneckError, match="the pipeline failed") as caught:
        bottleneck.diagnose(define, faults.step_of(0.001), **QUICK)
    assert "\n" not in str(caught.value)


def test_what_python_raises_within_dali_is_quoted(files):
    from nvidia.dali import fn, pipeline_def

    def refuse(samples):
        msg = "no cats please"
        raise ValueError(msg)

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def pipeline():
        encoded, labels = fn.readers.file(files=files)
        return fn.python_function(fn.decoders.image(encoded), function=refuse, batch_processing=True), labels

    with pytest.raises(BottleneckError, match=r"the pipeline failed: ValueError: no cats please$"):
        next(iter(PipelineBatches(pipeline())))


def test_a_pipeline_without_an_argument_says_so(files):
    def fixed():
        return faults.pipeline(files)

    assert bottleneck.diagnose(fixed, None, **QUICK)["conditions"]["batch_size"] == faults.BATCH
    with pytest.raises(BottleneckError, match="fixed takes no batch_size"):
        pipeline_source(fixed, {"batch_size": 4})


def test_something_else_than_a_pipeline_is_refused():
    with pytest.raises(BottleneckError, match="must return a DALI pipeline, got a list"):
        bottleneck.diagnose(lambda: [1, 2], None, **QUICK)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("math", "--step must be module:function, got 'math'"),
        ("no_such_module_here:f", "--step: cannot import no_such_module_here: ModuleNotFoundError"),
        ("math:nothing", "--step: module 'math' has no 'nothing'"),
        ("math:pi", "--step: math:pi must be a function, got a float"),
    ],
)
def test_functions_that_cannot_be_found(name, text):
    with pytest.raises(BottleneckError, match=re.escape(text)):
        load_function(name, "--step")


def test_a_step_is_a_function_of_a_batch_or_makes_one():
    made = []
    assert step_of(made.append) == made.append
    step = step_of(lambda: made.append)
    step(5)
    assert made == [5]
    with pytest.raises(BottleneckError, match="got a int"):
        step_of(lambda: 5)


@pytest.mark.parametrize("option", [{"seconds": 0}, {"seconds": math.nan}, {"rounds": 4}, {"cache": "hot"}], ids=str)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        bottleneck.diagnose([np.zeros((2, 4))] * 5, None, **{**QUICK, **option})


# A torch DataLoader and the built-in step.


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_dataloader_tells_how_far_it_reads_ahead():
    from torch.utils.data import DataLoader

    data = [np.zeros(3, np.float32)] * 8
    source = loader_source(DataLoader(data, batch_size=2, num_workers=2, prefetch_factor=3))
    assert source.ahead == 6
    assert loader_source(DataLoader(data, batch_size=2)).ahead == 2


def test_a_dataloader_is_measured(files):
    from torch.utils.data import DataLoader

    loader = DataLoader([np.zeros(3, np.float32)] * 9, batch_size=4)  # the last batch is incomplete
    found = bottleneck.diagnose(loader, faults.step_of(0.001), **{**QUICK, "storage": True}, files=files)
    assert found["conditions"]["images_per_batch"] == 4
    assert found["rates"]["loader"]["images_per_second"]["median"] > 0
    # It reads none of the given files, so storage adds nothing, and there is no rate of storage.
    storage_rate = found["rates"]["storage"]
    assert storage_rate["images_per_second"] is None or storage_rate["method"].endswith("less the same in memory")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_webdataset_is_measured_from_memory_and_from_storage(files, tmp_path):
    import torch
    import webdataset

    shard = tmp_path / "shard.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:03d}", "jpg": Path(file).read_bytes(), "cls": number % 3})
    dataset = webdataset.WebDataset(str(shard), shardshuffle=False).decode("torchrgb").to_tuple("jpg", "cls")
    loader = webdataset.WebLoader(dataset.batched(4), batch_size=None)
    step = torch.nn.Conv2d(3, 1, 1)
    found = bottleneck.diagnose(
        loader, lambda batch: step(batch[0]), **{**QUICK, "storage": True}, files=[str(shard)], cache="cold"
    )
    assert found["conditions"]["images_per_batch"] == 4
    assert found["storage"]["not_measured"] is None
    assert found["rates"]["loader_from_storage"]["images_per_second"]["median"] > 0
    passes = found["storage"]["passes_ms"]
    assert (len(passes["cold_ms"]), len(passes["warm_ms"]), passes["read_cold_ms"]) == (PASSES, PASSES, None)
    assert found["stages"] is None
    del dataset, loader
    gc.collect()  # it leaves its files open, and each would cause a warning later


def test_the_built_in_step_trains_on_any_images_and_changes_nothing(one_thread):
    import torch

    from dali_saliencymix.bottleneck.training import TrainingStep
    from dali_saliencymix.loaders.processes import Processes
    from dali_saliencymix.training.arguments import parse_arguments

    torch.manual_seed(0)
    args = parse_arguments(["DATA", "-a", "resnet18", "--clip-grad-norm", "1", "--model-ema"])
    step = TrainingStep(args.model, args.optimizer, Processes(0, 0, 1, torch.device("cpu")), num_classes=4)
    before = {name: value.clone() for name, value in step.network.named_parameters()}
    updated = []

    def record(optimizer, arguments, keywords):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        updated.append(pytest.approx(torch.cat([gradient.ravel() for gradient in gradients]).norm().item(), rel=1e-3))

    step._updater.optimizer.register_step_pre_hook(record)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    for batch in (
        (images, labels, labels.flip(0), torch.tensor([0.5, 1.0])),
        {"image": images.half(), "label": labels},
        [images.permute(0, 2, 3, 1)],
        images,
    ):
        step(batch)
        assert updated == [1.0]
        updated.clear()
    step.alone(images)
    assert all(torch.equal(value, before[name]) for name, value in step.network.named_parameters())
    with pytest.raises(BottleneckError, match=re.escape("got int64 (2,); pass your own step with --step")):
        step([labels])
    wrong = dataclasses.replace(args.model, arch="resnet19")
    with pytest.raises(BottleneckError, match=r"arch: name must be .*, got 'resnet19'"):
        TrainingStep(wrong, args.optimizer, Processes(0, 0, 1, torch.device("cpu")), num_classes=4)


def test_the_built_in_step_accumulates_as_the_training_does(one_thread):
    """Gradients of three batches make one update, with an all-reduce in the last batch only."""
    import contextlib

    import torch

    from dali_saliencymix.bottleneck.training import TrainingStep
    from dali_saliencymix.loaders.processes import Processes
    from dali_saliencymix.training.arguments import parse_arguments

    args = parse_arguments(["DATA", "-a", "resnet18", "--accumulation-steps", "3"])
    step = TrainingStep(args.model, args.optimizer, Processes(0, 0, 1, torch.device("cpu")), num_classes=4)
    log = []

    @contextlib.contextmanager
    def no_sync():
        yield log.append("no exchange")

    step.network.no_sync = no_sync  # as with several processes
    step._updater.optimizer.register_step_pre_hook(lambda *_: log.append("update"))
    gradients = []
    for _ in range(6):
        step(torch.ones(2, 3, 32, 32))
        bias = step.network.fc.bias.grad
        gradients.append(None if bias is None else bias.tolist())
        log.append("batch")
    assert log == ["no exchange", "batch", "no exchange", "batch", "update", "batch"] * 2
    # Each batch adds a third of its mean gradient, all batches are equal, and the sum is cleared by the update.
    assert gradients[1] == pytest.approx([2 * value for value in gradients[0]])
    assert gradients[2] is None
    assert step.batches_per_update == 3


# The command line.


def lines_of(capfd) -> tuple[str, str]:
    captured = capfd.readouterr()
    return captured.out, captured.err


def test_the_command_measures_our_pipeline(data_folder, tmp_path, capfd, one_thread):
    output, page = tmp_path / "r.json", tmp_path / "r.html"
    command = ["bottleneck", "-a", "tiny_resnet", "-b", "8", "-j", "1", "--train-crop-size", "32", "--device", "cpu"]
    command += ["--mix", "saliencymix", "--saliency", "fine_grained", str(data_folder), "--seconds", "1"]
    command += ["--rounds", "5", "-o", str(output), "--html", str(page), "--fail-above-stall", "100"]
    assert main(command) == 0
    out, _ = lines_of(capfd)
    found = load_report(output)
    assert out.startswith(found["verdict"]["name"] + "\n")
    assert [row["name"] for row in found["stages"]][3:5] == ["paste and normalise", "saliency"]
    conditions = found["conditions"]
    assert conditions["images_per_batch"] == 8
    assert conditions["options"]["saliency"] == "fine_grained"
    assert conditions["options"]["arch"] == conditions["step"] == "tiny_resnet"
    assert conditions["settings"] == {"batch_size": 8, "num_threads": 1, "prefetch_queue_depth": 2}
    assert conditions["images_read"] == conditions["images_in_data_set"] == 48
    assert page.read_text().startswith("<!doctype html>")
    assert main(["compare", str(output), str(output)]) == 0
    assert "(unchanged)" in lines_of(capfd)[0]


def test_two_processes_train_the_built_in_step_together(data_folder, tmp_path):
    output = tmp_path / "r.json"
    command = ["-m", "dali_saliencymix", "bottleneck", data_folder, "-a", "tiny_resnet", "-b", "4", "-j", "1"]
    command += ["--train-crop-size", "32", "--device", "cpu", "--seconds", "1", "--rounds", "5", "--no-what-ifs"]
    ended = torchrun(*command, "--no-storage", "-o", output)
    found = load_report(output)
    assert ended.stdout.count(found["verdict"]["name"] + "\n") == 1  # only one process prints
    assert found["conditions"]["processes"] == 2
    for each in found["ranks"]:  # a step alone has no all-reduce
        assert each["step"]["ms_per_batch"]["median"] > 0
        assert each["loader"]["ms_per_batch"]["median"] > 0
    assert found["rates"]["end_to_end"]["images_per_second"]["median"] > 0


def user_loader():
    return [np.zeros((4, 3, 8, 8), np.float32)] * 20


def user_slow_loader():
    return Slow(0.02, batches=20)


def user_step(batch):
    time.sleep(0.002)


def user_pipeline(batch_size=4, num_threads=1):
    return faults.pipeline(user_files, batch_size=batch_size, num_threads=num_threads)


user_files: list[str] = []  # of `user_pipeline`


@pytest.fixture
def here(monkeypatch):
    """The name of this module for the command line."""
    monkeypatch.setitem(sys.modules, "user_code", sys.modules[__name__])
    return "user_code"


FAST_COMMAND = ["--device", "cpu", "--seconds", "1", "--rounds", "5", "--no-what-ifs", "--no-storage"]


@pytest.mark.parametrize(("loader", "status"), [("user_loader", 0), ("user_slow_loader", 3)])
def test_the_exit_status_tells_a_stall(loader, status, here, capfd, clock):
    command = ["bottleneck", "--loader", f"{here}:{loader}", "--step", f"{here}:user_step", *FAST_COMMAND]
    assert main([*command, "--fail-above-stall", "40"]) == status
    assert ("is above 40 %" in lines_of(capfd)[1]) == (status == 3)


def test_the_command_measures_a_users_pipeline(here, files, capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "user_files", files)
    output = tmp_path / "r.json"
    command = ["bottleneck", "--pipeline", f"{here}:user_pipeline", "--step", f"{here}:user_step", "-b", "2"]
    assert main([*command, *FAST_COMMAND, "-o", str(output)]) == 0
    assert load_report(output)["conditions"]["images_per_batch"] == 2
    assert "saliency" in lines_of(capfd)[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--loader", "no_such_module_here:f"], "cannot import no_such_module_here"),
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        (["--loader", "user_code:user_loader", "--files", "/no/such/file"], "--files: /no/such/file: no such file"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, text, here, capfd):
    assert main(["bottleneck", *arguments, *FAST_COMMAND]) == 1
    err = [line for line in lines_of(capfd)[1].splitlines() if "error:" in line]
    assert len(err) == 1
    assert text in err[0]
    assert err[0].startswith("python -m dali_saliencymix bottleneck: error: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give one of DATA, --pipeline and --loader"),
        (["DATA", "--loader", "a:b"], "give one of DATA, --pipeline and --loader"),
        (["DATA", "--rounds", "4"], "argument --rounds: must be a whole number of at least 5, got 4"),
        (["DATA", "--no-step", "--fail-above-stall", "20"], "leave out --no-step"),
        (["DATA", "--fail-above-stall", "nan"], "--fail-above-stall must be a number of percent, got nan"),
        (["DATA", "--files", "x"], "--files needs --pipeline or --loader"),
        (["--loader", "a:b", "--tune", "x"], "--tune needs DATA or --pipeline: the settings of --loader"),
        (["--loader", "a:b", "-j4"], "--workers does nothing with --loader: leave it out"),
        (["--loader", "a:b", "--prefetch", "4"], "--prefetch does nothing with --loader: leave it out"),
        (["DATA", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_arguments_that_make_no_sense_end_with_usage(arguments, text, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["bottleneck", *arguments])
    assert ended.value.code == 2
    assert text in lines_of(capfd)[1]


@pytest.mark.parametrize("option", ["--tune", "-o", "--html"])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_measured(
    option, here, files, tmp_path, capfd, monkeypatch
):
    monkeypatch.setitem(globals(), "user_files", files)
    monkeypatch.setattr("dali_saliencymix.bottleneck.command.measure_source", None)
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for path, text in ((folder, f"error: {folder}: Is a directory\n"), (file / "x.yaml", f"error: {file}: ")):
        line = ["bottleneck", "--pipeline", f"{here}:user_pipeline", "--no-step", *FAST_COMMAND, option, str(path)]
        assert main(line) == 1
        assert text in lines_of(capfd)[1]

"""The benchmarks run, write complete results, and report errors in one line. No test depends on a measured time."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import tiny_model  # noqa: F401 (adds a network to torchvision's)
from shared.programs import run_program

from benchmarks import (
    bench_pipeline,
    bench_scale,
    bench_train,
    compare,
    loaders,
    machine,
    opencv,
    peers,
    program,
    record,
    render,
)
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.figures import figure, figures
from dali_saliencymix.measure.results import read_json, write_json

ROOT = Path(__file__).parents[1]
CONDITIONS = {"date", "device", "cuda", "versions", "machine", "rounds", "command", "commit"}
FIGURE = {"median", "low", "high", "min", "max", "rounds"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sample_data(folder, train=2, val=1)
    return folder / "train"


@pytest.fixture
def main_of(monkeypatch):
    """Return a function that runs a module of the benchmarks in this process, on one thread and the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "cores_given", lambda processes: float(processes))

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        program.run(importlib.import_module(f"benchmarks.{name}").main)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def run_small(main_of, tmp_path, capsys):
    """Return a function that runs a benchmark for two rounds and returns what it wrote."""

    def run(name, *options):
        output = tmp_path / "x.json"
        main_of(name, *options, "--rounds", 2, "-o", output)
        return checked(name, output, capsys.readouterr().out)

    return run


def checked(name, output, shown):
    """Return the result in a file after checking what all results have in common."""
    result = json.loads(output.read_text())
    assert result["benchmark"] == name.removeprefix("bench_")
    assert result["conditions"].keys() >= CONDITIONS
    assert result["conditions"]["device"].startswith("CPU")
    assert str(output) not in result["conditions"]["command"]
    found = dict(figures(result))
    assert found
    for path, one in found.items():
        assert one.keys() >= FIGURE
        assert one["min"] <= one["low"] <= one["median"] <= one["high"] <= one["max"]
        assert f"{' / '.join(path)}: " in shown
    return result


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_ops(run_small):
    names = ("fine_grained", "spectral_residual")
    result = run_small("bench_ops", "--sizes", 16, "-b", 2, "--copy-megabytes", 1, "--detectors", *names)
    steps = result["milliseconds_per_batch"]["16 px, batch 2"]
    assert {"paste", "labels", "boxes and lam", "mix fine_grained", "saliency spectral_residual"} <= steps.keys()
    assert steps["paste"]["numpy"]["bytes"] == 2 * 2 * 16 * 16 * 3
    assert steps["saliency fine_grained"]["numpy"]["bytes"] == 2 * 16 * 16 * (3 + 4)
    rate = result["copy_gigabytes_per_second"]["cpu"]["median"]
    paste = steps["paste"]["numpy"]
    expected = paste["bytes"] / paste["median"] / 1e6 / rate
    assert paste["share_of_copy_rate"] == pytest.approx(expected, rel=0.02)
    assert result["complete"]
    reasons = {name: why for name, why in result["not_measured"].items() if "other packages" not in name}
    if opencv.why_not() is None:
        assert f"opencv, {cores()} processes" in steps["saliency fine_grained"]
        assert reasons == {}
    else:
        assert reasons == {"opencv": opencv.why_not()}


def test_pipeline_as_a_program(data, tmp_path):
    small = ("-b", 4, "-j", 1, "--crop-size", 16, "--batches", 1, "--rounds", 2, "--device", "cpu")
    names = ("none", "saliencymix fine_grained", "after: cutmix", "after: saliencymix fine_grained")
    output = tmp_path / "x.json"
    ended = run_program("-m", "benchmarks.bench_pipeline", data, *map(str, small), "-o", output, "--variants", *names)
    assert ended.returncode == 0, ended.stderr
    result = checked("pipeline", output, ended.stdout)
    assert set(names) == result["images_per_second"].keys()
    assert result["not_measured"] == {}
    assert result["relative_to_none"]["none"]["median"] == 1
    conditions = result["conditions"]
    assert conditions["images"] == 16
    assert conditions["command"].startswith("OMP_NUM_THREADS=1 python -m benchmarks.bench_pipeline DATA -b 4 ")
    assert conditions["machine"]["cores_given_to_two_processes"] > 0


def test_train(data, run_small):
    small = ("-a", "tiny_resnet", "-b", 4, "-j", 1, "--crop-size", 32, "--steps", 1, "--detectors", "fine_grained")
    result = run_small("bench_train", data, *small)
    mixed = "saliencymix fine_grained"
    assert result["images_per_second"].keys() == {"constant batch", "none", "none, again", mixed}
    assert result["relative_to_constant_batch"].keys() == {"constant batch", "none", "none, again", mixed}
    assert result["relative_to_none"].keys() == {"none", "none, again", mixed}
    assert {name: found["rounds"] for name, found in result["operator_call_ms"][mixed].items()} == {"wall": 2, "cpu": 2}
    assert result["lock_held_ms_per_batch"].keys() == {"none", "none, again", mixed}
    assert result["not_measured"] == {}
    assert result["complete"]


def test_scale(data, run_small):
    points = ("--batch", 1, 2, "--every", 1, 2, "--threads", 1, "--size", 16, "-b", 2, "-j", 1, "--crop-size", 16)
    result = run_small("bench_scale", data, *points, "--detectors", "fine_grained")
    assert result["curves"].keys() == {"batch", "size", "detector_size", "threads"}
    assert result["curves"]["detector_size"]["points"]["fine_grained"].keys() == {"16", "8"}
    assert result["curves"]["threads"]["points"].keys() == {"none", "fine_grained"}


def test_detectors(data, run_small):
    result = run_small("bench_detectors", data, "-b", 2, "--size", 16, "--images", 4)
    assert result["conditions"]["images"] == 4
    assert result["agreement_with_fine_grained"]["fine_grained"] == {"mean_distance": 0.0, "within_an_eighth": 1.0}


def test_a_loader_that_cannot_be_made_is_listed_and_its_group_goes_on(data, run_small, monkeypatch):
    def fail(setting):
        msg = "no room for it"
        raise MemoryError(msg)

    makers = {**loaders.makers(), "mixup": fail}
    monkeypatch.setattr(loaders, "makers", lambda: makers)
    small = ("-b", 4, "-j", 1, "--crop-size", 16, "--batches", 1)
    result = run_small("bench_pipeline", data, *small, "--variants", "mixup", "cutmix")
    assert result["images_per_second"].keys() == {"none", "cutmix"}
    assert result["not_measured"] == {"mixup": "MemoryError: no room for it"}
    assert not result["complete"]


def test_a_run_that_was_cut_is_continued_with_what_is_missing(data, main_of, monkeypatch, tmp_path, capsys):
    made, cut = [], True

    def recorded(name, make, setting):
        made.append(name)
        stream = make(setting)
        if name != "mixup" or not cut:
            return stream
        return stream_that_is_interrupted(stream)

    def stream_that_is_interrupted(stream):
        def batches():
            for _ in range(2 * stream.ahead + 4):  # the first two rounds
                yield next(stream.batches)
            raise KeyboardInterrupt

        return loaders.Stream(batches(), stream.ahead)

    complete_between = []
    write = program.write
    monkeypatch.setattr(
        program, "write", lambda result, to: (complete_between.append(result["complete"]), write(result, to))
    )
    makers = {name: functools.partial(recorded, name, make) for name, make in loaders.makers().items()}
    monkeypatch.setattr(loaders, "makers", lambda: makers)
    monkeypatch.setattr(bench_pipeline, "default_groups", lambda gpu: [["none", "cutmix"], ["mixup", "after: cutmix"]])
    output = tmp_path / "pipeline.json"
    words = (data, "-b", 4, "-j", 1, "--crop-size", 16, "--batches", 1, "--rounds", 3, "-o", output)
    with pytest.raises(SystemExit, match="interrupted"):
        main_of("bench_pipeline", *words)
    before = json.loads(output.read_text())
    assert made == ["none", "cutmix", "none", "mixup", "after: cutmix"]
    assert not before["complete"]
    assert not any(complete_between)  # while there are groups that have not been asked for
    assert {name: found["rounds"] for name, found in before["images_per_second"].items()} == {
        "none": 3,
        "cutmix": 3,
        "mixup": 1,
        "after: cutmix": 1,
    }

    made.clear()
    cut = False
    main_of("bench_pipeline", *words, "--continue")
    after = checked("bench_pipeline", output, capsys.readouterr().out)
    assert made == ["none", "mixup", "after: cutmix"]
    assert after["complete"]
    assert {found["rounds"] for found in after["images_per_second"].values()} == {3}
    for section in ("images_per_second", "relative_to_none"):
        for name in ("none", "cutmix"):
            assert after[section][name] == before[section][name]
    assert [part["conditions"]["date"] for part in after["parts"]] == [before["conditions"]["date"]] * 2
    assert all(part["conditions"]["device"].startswith("CPU") for part in after["parts"])
    names = [{name.rpartition(" / ")[2] for name in part["measured"]} for part in after["parts"]]
    assert names == [{"none", "cutmix"}, {"mixup", "after: cutmix"}]

    made.clear()
    main_of("bench_pipeline", *words, "--continue")
    assert made == []
    assert json.loads(output.read_text())["images_per_second"] == after["images_per_second"]
    with pytest.raises(SystemExit, match=r"--continue: .*pipeline.json was measured with batch_size 4, this run has 8"):
        main_of("bench_pipeline", data, "-b", 8, *words[3:], "--continue")


def test_an_interrupt_does_not_end_the_processes_of_opencv():
    if why_not := opencv.why_not():
        pytest.skip(why_not)
    processes = opencv.Processes(1)
    try:
        path = processes.share(np.zeros((2, 16, 16, 3), np.uint8))
        processes.saliency_maps(path, 2, "fine_grained")
        for number in processes._pool._processes:
            os.kill(number, signal.SIGINT)
        processes.saliency_maps(path, 2, "fine_grained")
    finally:
        processes.close()


@pytest.mark.parametrize("name", ["bench_detectors", "bench_pipeline"])
def test_a_file_that_is_no_image_is_named(main_of, tmp_path, name):
    make_sample_data(tmp_path, train=2, val=1)
    bad = min((tmp_path / "train").glob("*/*.jpg"))
    bad.write_text("no image")
    with pytest.raises(SystemExit) as ended:
        main_of(name, tmp_path / "train", "--rounds", 1)
    assert str(ended.value.code).startswith("error: ")
    assert str(bad) in ended.value.code


def test_a_result_without_a_figure_is_an_error():
    with pytest.raises(RuntimeError, match="nothing could be measured"):
        program.show({"images_per_second": {}, "not_measured": {"none": "no memory"}})


@pytest.mark.parametrize("source", [True, False], ids=["from photographs", "of samples"])
def test_images_are_made(data, main_of, tmp_path, capsys, source):
    main_of("data", tmp_path, "--images", 9, *(["--from", data] if source else []))
    assert capsys.readouterr().err.startswith("images 9, mean_size ")
    assert len(list(tmp_path.glob("*/*.jpg"))) == 9


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("bench_pipeline", "--seconds", "-1"), "argument --seconds: must be a number above 0, got '-1'"),
        (
            ("bench_train", "--hw-decoder-load", "7"),
            "--hw-decoder-load: must be a number from 0 to 1, got '7'",
        ),
        (("bench_detectors", "--images", "1"), "argument --images: must be at least 2, got '1'"),
        (("soak", "--every", "nan"), "argument --every: must be a number above 0, got 'nan'"),
        (("bottleneck_faults", "--runs", "0"), "argument --runs: must be a positive integer, got '0'"),
        (("bench_ops", "-o", ROOT), f"argument -o/--output: must be a file that can be written, got '{ROOT}'"),
        (("bench_ops", "-o", "/proc/x"), "argument -o/--output: must be a file that can be written, got '/proc/x'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_measured(main_of, capsys, words, text):
    with pytest.raises(SystemExit) as ended:
        main_of(*words)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("bench_pipeline", "/nowhere"), "error: /nowhere: no such folder"),
        (("bench_ops", "--device", "gpu"), "error: --device must be cpu where CuPy sees no GPU, got gpu"),
        (("bench_scale", "--axes", "hw_decoder_load"), "error: --axes must not name hw_decoder_load without a GPU"),
        (("bench_train", "-a", "net"), "error: --arch must be a classification network of torchvision, got 'net'"),
        (("soak", "--minutes", "1"), "error: --every must be at most a tenth of the run, 6 s, got 10"),
        (("gpu_suite", "/tmp/never-made"), "error: there must be a GPU that CuPy sees, or --dry"),
        (("smoke",), "error: there must be a GPU that CuPy sees, or --dry"),
        (("sanitize",), "error: there must be a GPU that CuPy sees"),
        (("data", ROOT / "benchmarks"), f"error: FOLDER must be empty or not exist, got {ROOT}/benchmarks"),
        (("compare", ROOT / "Makefile", "Makefile"), f"error: {ROOT}/Makefile: not a JSON file"),
        (("render", ROOT / "nowhere.md"), "error: [Errno 2] No such file or directory"),
    ],
)
def test_an_error_is_one_line(main_of, words, text):
    with pytest.raises(SystemExit) as ended:
        main_of(*words)
    assert str(ended.value.code).startswith(text)
    assert "\n" not in ended.value.code


def test_a_program_ends_with_status_1_and_no_traceback():
    ended = run_program("-m", "benchmarks.compare", "Makefile", "Makefile", check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: Makefile: not a JSON file")


# ---- loaders ---------------------------------------------------------------------------------------------------------


def test_a_turn_discards_prefetched_batches_and_times_whole_sets_of_batches():
    used, seen = [], []

    class Watch:
        def __enter__(self):
            seen.append(len(used))

        def __exit__(self, *_):
            seen.append(len(used))

    stream = loaders.Stream(((torch.tensor([number]),) for number in itertools.count()), ahead=2, at_a_time=3)
    assert loaders.images_per_second(stream, 4, use=used.append, watch=Watch()) > 0
    assert seen == [2, 8]
    assert used == [*range(8)]


@pytest.mark.parametrize("gpu", [True, False])
def test_every_group_names_loaders_that_there_are(gpu):
    names = loaders.makers() | peers.makers()
    for groups in (
        bench_pipeline.default_groups(gpu=gpu),
        bench_train.groups(["spectral_residual", "fine_grained"], gpu=gpu),
    ):
        flat = [name for group in groups for name in group]
        assert flat[:2] == ["none", "none, again"] or not gpu
        assert len(flat) == len(set(flat))
        assert set(flat) <= names.keys()


def test_a_share_of_memory_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))
    setting = loaders.Setting(None, batch_size=128, workers=16, crop_size=224, device=torch.device("cpu"))
    with pytest.raises(MemoryError, match="/dev/shm must have 3528 MiB for the batches of 16 workers, got 64 MiB"):
        loaders.check_shared_memory(setting)


# ---- machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [["-o", "/home/me/x.json"], ["-o/home/me/x.json"], ["--output=/home/me/x.json"]])
def test_a_command_names_no_folder_of_the_machine(monkeypatch, output):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["x", "/home/me/photos/", "-b", "4", *output])
    options = argparse.Namespace(data=Path("/home/me/photos"))
    assert machine.command(options).split()[-3:] == ["DATA", "-b", "4"]
    assert "/home" not in machine.command(options)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_variant_that_fails_is_listed_and_the_others_go_on(main_of, capsys):
    calls = iter([1.0, 2.0])
    options = program.parser("x", *program.ROUNDS).parse_args(["--rounds", "4"])
    made = record.Record("x", options)
    variants = {"good": lambda: 1.0, "bad": lambda: next(calls)}
    made.measure(variants, lambda values: {"ms": record.figures_of(values)}, where="place / ")
    assert made.result["ms"]["good"]["rounds"] == 4
    assert made.not_measured == {"place / bad": "StopIteration"}
    assert "not measured: place / bad: StopIteration" in capsys.readouterr().err


def test_of_two_figures_with_one_name_that_of_more_rounds_stays(main_of):
    made = record.Record("x", program.parser("x", *program.ROUNDS).parse_args([]))
    for rounds, value in ((3, 1.0), (5, 2.0), (5, 3.0), (4, 4.0)):
        made.add({"ms": {"a": figure([value] * rounds)}})
    assert made.result["ms"]["a"]["median"] == 2


@pytest.mark.parametrize(
    ("axis", "medians", "expected"),
    [
        ("batch", {"1": 5, "2": 5, "4": 5, "8": 8, "16": 16}, {"linear_from": 8}),
        ("size", {"10": 1, "20": 4, "40": 16}, {"linear_from": 10}),
        ("detector_size", {"10": 4, "20": 4, "40": 16}, {"linear_from": 20}),
        ("threads", {"1": 100, "2": 190, "4": 350, "8": 400, "16": 1600}, {"linear_to": 4}),
        ("hw_decoder_load", {"0.5": 1}, {}),
    ],
)
def test_where_a_curve_is_linear(axis, medians, expected):
    assert bench_scale.linear(axis, {point: {"median": value} for point, value in medians.items()}) == expected


# ---- compare ---------------------------------------------------------------------------------------------------------


def result_of(median, half_width=1.0, rounds=9, names=("low", "high"), **conditions):
    bounds = dict(zip(names, (median - half_width, median + half_width), strict=True))
    found = {"median": median, **bounds, "min": 0, "max": 99, "rounds": rounds}
    return {"images_per_second": {"none": found}, "conditions": conditions}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"median": 13}, "MORE"),
        ({"median": 7, "names": ("q1", "q3")}, "LESS"),  # an older result has quartiles
        ({"median": 11.5, "names": ("q1", "q3")}, "within the noise"),
        ({"median": 13, "half_width": 3}, "within the noise"),
        ({"median": 13, "rounds": 4}, "too few rounds to tell"),
    ],
)
def test_a_change_counts_if_it_is_more_than_noise(changes, verdict):
    (line,) = compare.compared(result_of(10), result_of(**changes))
    assert line.startswith("images_per_second / none")
    assert line.endswith(verdict)


def test_conditions_that_differ_are_said_first():
    before, after = (result_of(10, versions={"numpy": numpy}, device="CPU", date=numpy) for numpy in ("1", "2"))
    assert compare.compared(before, after)[0] == "versions.numpy: '1' -> '2'"
    assert len(compare.compared(before, after)) == 2


def test_results_of_two_benchmarks_are_refused():
    with pytest.raises(ValueError, match="of one benchmark, got 'pipeline' and 'train'"):
        compare.compared(*(result_of(1) | {"benchmark": name} for name in ("pipeline", "train")))


def test_results_without_a_figure_in_common_are_refused():
    with pytest.raises(ValueError, match="no figure in common"):
        compare.compared(result_of(1), {"other": {}})


# ---- render ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results and a page, instead of the real ones."""
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render, "PLOTS", tmp_path / "docs" / "plots")
    result = result_of(1234.5, device="CPU, 2 threads", versions={"numpy": "2"}, command="python x", rounds=9)
    result["relative_to_none"] = {"none": figure([1.0])}
    write_json(tmp_path / "results" / "a.json", result)
    return tmp_path


def rendered_page(monkeypatch, folder, text, *options):
    page = folder / "page.md"
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr(sys, "argv", ["render", *options, str(page)])
    render.main()
    return page.read_text()


TABLE = "before\n<!-- table: pipeline a.json -->\nold\n<!-- end of result -->\nafter\n"


def test_what_stands_between_the_marks_is_replaced(results, monkeypatch, capsys):
    page = rendered_page(monkeypatch, results, TABLE)
    assert page == TABLE.replace(
        "old\n",
        "| loader | images/s | relative to `none` |\n"
        "| --- | --- | --- |\n"
        "| `none` | 1,234 (1,234 to 1,236) | 1 (1 to 1) |\n"
        "\n"
        "Medians; in brackets, the 90 % confidence interval of the median (the full range with fewer than five rounds)"
        ".\n",
    )
    assert "page.md: updated" in capsys.readouterr().out
    assert rendered_page(monkeypatch, results, None, "--check") == page
    assert capsys.readouterr().out == ""


def test_a_table_says_what_the_ranges_of_an_older_result_are(results, monkeypatch):
    result = result_of(10, names=("q1", "q3")) | {"relative_to_none": {}}
    write_json(results / "results" / "a.json", result)
    text = rendered_page(monkeypatch, results, TABLE)
    assert "| `none` | 10 (9 to 11) |  |\n\nMedians; in brackets, the middle half of the rounds.\n" in text


def test_check_fails_where_a_page_is_old_and_changes_nothing(results, monkeypatch):
    with pytest.raises(ValueError, match=r"out of date: page\.md; run python -m benchmarks\.render"):
        rendered_page(monkeypatch, results, TABLE, "--check")
    assert (results / "page.md").read_text() == TABLE


def test_conditions_are_a_sentence(results, monkeypatch):
    page = rendered_page(monkeypatch, results, "<!-- conditions: a.json -->\n<!-- end of result -->\n")
    assert page.splitlines()[1] == "CPU, 2 threads, 1 to 9 rounds. numpy 2. `python x`"


def test_conditions_name_the_device_and_the_date_of_each_part(results, monkeypatch):
    result = read_json(results / "results" / "a.json")
    result["parts"] = [
        {"conditions": {"device": "a GPU", "date": f"2026-01-0{day}", "commit": "abc"}, "measured": ["x"] * day}
        for day in (1, 2)
    ]
    write_json(results / "results" / "a.json", result)
    page = rendered_page(monkeypatch, results, "<!-- conditions: a.json -->\n<!-- end of result -->\n")
    expected = "1 figure on a GPU on 2026-01-01, commit abc; 2 figures on a GPU on 2026-01-02, commit abc."
    assert page.splitlines()[1].endswith(f"`python x` Measured in 2 runs: {expected}")


def test_a_plot_is_drawn_and_known_by_its_result(results, monkeypatch):
    pytest.importorskip("matplotlib")
    text = "<!-- plot: pipeline a.json -->\n<!-- end of result -->\n"
    page = rendered_page(monkeypatch, results, text)
    assert "![pipeline: a](docs/plots/pipeline-a.svg)" in page
    assert "</svg>" in (results / "docs/plots/pipeline-a.svg").read_text()
    rendered_page(monkeypatch, results, None, "--check")
    write_json(results / "results" / "a.json", result_of(2))
    with pytest.raises(ValueError, match=r"out of date: docs/plots/pipeline-a\.svg"):
        rendered_page(monkeypatch, results, None, "--check")


@pytest.mark.parametrize("what", ["table: nothing a.json", "plot: nothing a.json"])
def test_an_unknown_kind_is_refused(results, monkeypatch, what):
    with pytest.raises(ValueError, match=r"page\.md: \w+ must be one of .*, got 'nothing'"):
        rendered_page(monkeypatch, results, f"<!-- {what} -->\n<!-- end of result -->\n")


@pytest.mark.parametrize("what", ["table: train", "table: train a.json", "table: ops a.json", "plot: scale a.json"])
def test_a_result_that_is_missing_or_of_another_kind_is_named(results, monkeypatch, what):
    if what == "table: train a.json":
        write_json(results / "results" / "a.json", {"benchmark": "ops"})
    with pytest.raises(ValueError, match=rf"page\.md: <!-- {what} --> must name a result of its kind"):
        rendered_page(monkeypatch, results, f"<!-- {what} -->\n<!-- end of result -->\n")


def test_text_between_a_mark_without_an_end_and_the_next_one_is_kept(results, monkeypatch):
    text = "<!-- conditions: a.json -->\nwritten by hand\n" + TABLE
    with pytest.raises(ValueError, match=r"page\.md: each result must have its own .*, got 2 results and 1 with"):
        rendered_page(monkeypatch, results, text)
    assert (results / "page.md").read_text() == text


def test_the_pages_of_this_repository_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render", "--check"])
    render.main()

"""The search for faster settings, with loaders whose speed is a function of their settings."""

from __future__ import annotations

import itertools
import json
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from shared.cifar_files import write_cifar

from benchmarks import bottleneck_faults as faults
from dali_saliencymix.__main__ import main
from dali_saliencymix.bottleneck import BottleneckError, command, load_report, report_text, tune
from dali_saliencymix.bottleneck.diagnose import measure_source
from dali_saliencymix.bottleneck.sources import Source, pipeline_source
from dali_saliencymix.bottleneck.training import training_source
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.windows import Meter
from dali_saliencymix.training.arguments import parse_arguments

pytest_plugins = ["shared.measuring"]


@pytest.fixture
def data_folder(tmp_path):
    """Two classes with eight images each."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        faults.make_files(tmp_path / "data" / name, count=8, size=48)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(tune, "cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


class Paced:
    """Fifty batches of one image, each after a delay."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __iter__(self):
        for _ in range(50):
            time.sleep(self.seconds)
            yield np.zeros((1, 3))


def source_of(seconds, **settings):
    """Return a source whose batches take ``seconds(**settings)``, and the list of settings that it is opened with."""
    opened = []

    def open_with(changed):
        opened.append({**settings, **changed})
        return Paced(seconds(**opened[-1]))

    return Source("loader", settings, open_with), opened


def tuned(source, *, step=None, loader=(1e6,) * 5, seconds=300.0):
    return tune.tune(source, step=step, loader=loader, seconds=seconds, meter=Meter())


def by_threads_and_depth(num_threads, prefetch_queue_depth):
    """Threads help up to eight, and a queue of four is 20 % better than all others."""
    return 0.08 / min(num_threads, 8) * (1 if prefetch_queue_depth == 4 else 1.2)


@pytest.mark.parametrize(("threads", "depth"), [(1, 2), (16, 16), (8, 4), (3, 8)])
def test_the_best_setting_is_found_from_anywhere(threads, depth, clock):
    source, _ = source_of(by_threads_and_depth, num_threads=threads, prefetch_queue_depth=depth)
    found = tuned(source)
    wanted = {"num_threads": 8, "prefetch_queue_depth": 4}
    # From three threads, six and then twelve are tried, and twelve are as fast as eight.
    assert found["best"] == ({**wanted, "num_threads": 12} if threads == 3 else wanted)
    assert found["is_better"] == ((threads, depth) != (8, 4))
    assert found["stopped"] == "no neighbour of the best setting is faster beyond the noise"
    if found["is_better"]:
        was, now = (by_threads_and_depth(**found[name]) for name in ("present", "best"))
        assert found["confirmed"]["change"].median == pytest.approx(was / now)
        assert found["confirmed"]["loader_images_per_second"].median == pytest.approx(1 / now)


def test_of_two_that_are_as_fast_the_smaller_one_is_taken(clock):
    source, _ = source_of(lambda num_threads: 0.01 / min(num_threads, 2), num_threads=16)
    found = tuned(source)
    assert found["best"] == {"num_threads": 2}
    assert [(row["now"], row["then"], row["kept"]) for row in found["trials"]] == [
        *((16, 8, True), (8, 4, True), (4, 2, True), (2, 1, False))
    ]


def test_no_more_threads_than_the_cores_that_processes_share(monkeypatch, clock):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    source, opened = source_of(lambda num_threads: 0.1 / num_threads, num_threads=3)
    assert tuned(source)["best"] == {"num_threads": 4}
    assert max(settings["num_threads"] for settings in opened) == 4


def test_noise_changes_nothing(clock):
    """The speed varies at random, so no change is beyond the noise."""
    random = np.random.default_rng(3)
    source, _ = source_of(lambda num_threads: None, num_threads=4)
    source.open = lambda changed: Noisy(random)
    found = tuned(source, seconds=300)
    assert found["best"] == found["present"] == {"num_threads": 4}
    assert found["confirmed"] is None


def test_a_faster_median_within_the_noise_is_not_kept(clock, monkeypatch):
    now, then = (10.0,) * 5, (8.0, 8.0, 8.0, 8.0, 12.0)
    monkeypatch.setattr(tune, "measure_settings", lambda source, variants, *_: [now, *[then] * (len(variants) - 1)])
    found = tuned(source_of(None, num_threads=4)[0])
    assert [row["kept"] for row in found["trials"]] == [False, False]
    assert found["best"] == found["present"]


class Noisy(Paced):
    def __init__(self, random):
        self.random = random

    def __iter__(self):
        slow = self.random.lognormal(0, 1.5)  # drawn again every eight batches
        for number in itertools.count():
            slow = self.random.lognormal(0, 1.5) if number % 8 == 0 else slow
            time.sleep(0.02 * slow)
            yield np.zeros((1, 3))


@pytest.mark.parametrize(("step", "threads"), [(18.0, 8), (40.0, 4), (None, 16)])
def test_the_search_ends_where_the_loader_exceeds_the_step_with_a_margin(step, threads, clock):
    source, _ = source_of(lambda num_threads: 0.12 / num_threads, num_threads=1)
    found = tuned(source, step=step and (step,) * 5, loader=(120.0,) * 5)
    assert found["best"] == {"num_threads": threads}
    assert ("exceeds the rate of the step by more than 10 %" in found["stopped"]) == (step is not None)


def test_a_loader_that_is_fast_enough_is_left_alone(clock):
    source, opened = source_of(lambda num_threads: 0.01, num_threads=4)
    found = tuned(source, step=(12.0,) * 5, loader=(10.0,) * 5)
    assert (found["best"], found["trials"], opened) == ({"num_threads": 4}, [], [])
    assert found["stopped"] == "the loader exceeds the rate of the step by more than 10 % with the present setting"


def test_the_share_of_the_jpeg_engine_is_searched_both_ways(clock):
    source, _ = source_of(lambda hw_decoder_load: 0.02 + abs(hw_decoder_load - 0.25) / 50, hw_decoder_load=0.65)
    assert tuned(source)["best"] == {"hw_decoder_load": 0.25}


def test_less_for_the_jpeg_engine_is_not_cheaper(clock):
    """A smaller share that is faster for a while but 3 % slower at the end does not count as equally fast."""

    def seconds(hw_decoder_load):
        if hw_decoder_load == 0.45:
            return 0.09 if len(opened) < 6 else 0.103
        return 0.1 if hw_decoder_load == 0.65 else 0.2

    source, opened = source_of(seconds, hw_decoder_load=0.65)
    found = tuned(source)
    assert [(row["then"], row["kept"]) for row in found["trials"]] == [(0.45, True), (0.85, False), (0.25, False)]
    assert found["best"] == found["present"]


def test_the_time_is_kept(clock):
    source, _ = source_of(lambda num_threads, prefetch_queue_depth: 0.1 / num_threads, num_threads=1,
                          prefetch_queue_depth=2)  # fmt: skip
    start = time.perf_counter()
    found = tuned(source, seconds=20)
    assert found["stopped"].startswith("the time is over")
    assert found["best"]["num_threads"] > 1
    assert time.perf_counter() - start < 30


def test_a_setting_that_cannot_be_opened_is_a_row_with_the_reason(clock):
    def seconds(num_threads):
        if num_threads > 2:
            msg = "no threads\nleft"
            raise RuntimeError(msg)
        return 0.1 / num_threads

    source, _ = source_of(seconds, num_threads=1)
    found = tuned(source)
    assert found["best"] == {"num_threads": 2}
    assert found["trials"][-1]["not_measured"] == "RuntimeError: no threads left"


def test_what_is_not_confirmed_at_the_end_is_not_taken(clock):
    """The setting is faster only for a while."""
    source, opened = source_of(lambda num_threads: 0.1 if len(opened) > 6 else 0.1 / num_threads, num_threads=1)
    found = tuned(source)
    assert found["trials"][0]["kept"]
    assert found["best"] == found["present"]
    assert not found["is_better"]
    assert found["confirmed"]["change"].median == pytest.approx(1)
    assert found["stopped"].endswith(
        "in the final comparison with the present setting, num_threads=8 was not faster beyond the noise"
    )


def test_a_report_does_not_say_that_nothing_was_faster_where_something_was_for_a_while(clock):
    told = []
    source, _ = source_of(lambda num_threads: 0.1 if "kept" in "".join(told) else 0.1 / num_threads, num_threads=1)
    options = {"seconds": 200, "with_storage": False, "with_tuning": True, "notify": told.append}
    found = measure_source(source, lambda batch: time.sleep(0.02), **options)
    assert (found["tune"]["trials"][0]["kept"], found["tune"]["is_better"]) == (True, False)
    text = report_text(found)
    assert "num_threads=1, the present setting: the settings kept during the search were not better in the" in text
    assert "no trial was faster" not in text


def test_a_loader_without_settings_is_refused():
    with pytest.raises(BottleneckError, match=r"tune needs a loader that takes at least one of num_threads, .* none"):
        measure_source(Source("loader", {"batch_size": 4}, lambda _: []), None, with_tuning=True)


# In a report.


def test_a_report_has_the_search_and_the_change(tmp_path, clock):
    source, _ = source_of(lambda num_threads: 0.12 / num_threads, num_threads=1)
    told = []
    found = measure_source(
        source, lambda batch: time.sleep(0.02), seconds=200, with_storage=False, with_tuning=True, notify=told.append
    )
    assert found["verdict"]["name"] == "LOADER-BOUND"
    assert found["tune"]["settings"] == {"num_threads": 8}
    assert found["change"]["words"] == "num_threads=8"
    assert json.loads(json.dumps(found)) == found
    assert "tune: DALI threads 1 -> 2: 2.00x, kept" in told
    text = report_text(found)
    assert "  Change: num_threads=8 (arguments of the pipeline function): the loader alone is 8.00x (" in text
    assert "  kept         DALI threads 1 -> 2: 2.00x (2.00 to 2.00), 16.7 images/s against 8.3, interleaved" in text
    assert "  best         num_threads=8, against the present setting: 8.00x (8.00 to 8.00), 66.7 images/s" in text
    assert "  ended        the loader exceeds the rate of the step by more than 10 %" in text


def test_a_training_that_is_not_input_bound_gets_no_change(clock):
    source, _ = source_of(lambda num_threads: 0.12 / num_threads, num_threads=4)
    found = measure_source(source, lambda batch: time.sleep(0.5), seconds=100, with_storage=False)
    assert found["verdict"]["name"] == "COMPUTE-BOUND"
    assert found["change"] is None
    assert "Change:" not in report_text(found)
    alone = measure_source(source, None, seconds=100, with_storage=False)
    assert alone["change"]["settings"] == {"num_threads": 8}


@pytest.mark.parametrize("searched", [True, False])
def test_where_no_setting_helps_that_is_said_beside_the_advice(searched, clock):
    source, _ = source_of(lambda num_threads: 0.12, num_threads=4)
    options = {"seconds": 100, "with_storage": False, "with_tuning": searched}
    found = measure_source(source, lambda batch: time.sleep(0.02), **options)
    assert (found["verdict"]["name"], found["change"]) == ("LOADER-BOUND", None)
    said = "  Change: no other setting made the loader faster beyond the noise\n"
    assert said in report_text(found)
    unknown = measure_source(
        source, lambda batch: time.sleep(0.02), **{**options, "with_tuning": False}, with_what_ifs=False
    )
    assert "Change:" not in report_text(unknown)


# As options and files.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["D", "-j", "1"], "D -j 4 --prefetch 8"),
        (["-j1", "--prefetch=2", "D", "--workers=3"], "D -j 4 --prefetch 8"),
        (["D", "--workers", "2", "--tune", "best.yaml", "-b", "8"], "D -b 8 -j 4 --prefetch 8"),
        (["a folder", "--tune=x"], "'a folder' -j 4 --prefetch 8"),
        (["--no-step", "-j", "2", "--", "D"], "--no-step -j 4 --prefetch 8 -- D"),
    ],
)
def test_the_new_command_is_the_old_one_with_the_options_changed(line, words, monkeypatch):
    changed = {"workers": 4, "prefetch": 8}
    assert command.changed_command("python -m x", line, changed) == f"python -m x {words}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.changed_command("python -m x", line, changed) == f"torchrun --nproc_per_node=2 -m x {words}"
    assert command.changed_command("x", line, changed) == f"torchrun --nproc_per_node=2 --no-python x {words}"
    monkeypatch.setenv("WORLD_SIZE", "4")  # on two machines
    assert command.changed_command("python -m x", line, changed) == f"torchrun ... -m x {words}"


@pytest.mark.usefixtures("short_windows")
def test_train_py_takes_the_file_and_its_command_line_comes_first(data_folder, tmp_path, capfd, monkeypatch):
    best = {"num_threads": 3, "prefetch_queue_depth": 5}
    found = {"present": {}, "best": best, "words": "", "is_better": False, "trials": [], "confirmed": None}
    diagnose = sys.modules["dali_saliencymix.bottleneck.diagnose"]  # the package has a function of this name
    monkeypatch.setattr(diagnose, "tune", lambda *_, **__: {**found, "stopped": ""})
    path = tmp_path / "made" / "loader.yaml"
    line = ["bottleneck", str(data_folder), "--no-step", "-b", "4", "-j", "1", "--train-crop-size", "32"]
    line += ["--device", "cpu", "--seconds", "1", "--rounds", "5", "--no-storage", "--tune", str(path)]
    assert main(line) == 0
    assert f"written to   {path}" in capfd.readouterr().out
    assert yaml.safe_load(path.read_text()) == {"workers": 3, "prefetch": 5}
    data = parse_arguments(["data", "--config", str(path)]).data
    assert (data.workers, data.prefetch) == (3, 5)
    data = parse_arguments(["data", "--config", str(path), "-j", "2"]).data
    assert (data.workers, data.prefetch) == (2, 5)


@pytest.mark.parametrize(
    ("device", "more", "best"),
    [
        ("cpu", (), "-j 8 --prefetch 4"),
        ("cpu", ("--data-backend", "pytorch"), "-j 8 --prefetch 4"),
        ("cpu", ("--dataset", "cifar10"), "-j 8 --prefetch 4"),
        ("cuda", (), "-j 8 --prefetch 4 --hw-decoder-load 0.9"),
        ("cuda", ("--dataset", "cifar10"), "-j 8 --prefetch 4"),
    ],
)
def test_settings_of_a_training_become_its_options(data_folder, device, more, best):
    line = [str(data_folder), "-b", "4", "-j", "1", "--device", device, *more]
    if "cifar10" in more:
        write_cifar(data_folder, "cifar10", train=30, test=5)
    processes = Processes(0, 0, 1, torch.device(device))
    source = training_source(parse_arguments(line, validates=False), processes, images=64)
    of_kinds = {"prefetch": 4, "workers": 8, "hw_decoder_load": 0.9}
    settings = {name: of_kinds[source.options[name]] for name in tune.tunable(source)}
    assert source.in_words(settings) == best
    file = source.as_file(settings)
    args = parse_arguments([*line, *best.split()], validates=False).config
    (data_folder / "best.yaml").write_text(yaml.safe_dump(file))
    taken = parse_arguments([*line[:3], *line[5:], "--config", str(data_folder / "best.yaml")], validates=False).config
    assert taken == {**args, "config": taken["config"]}


@pytest.mark.usefixtures("short_windows")
def test_a_pipeline_is_tuned(tmp_path, capfd, monkeypatch):
    """A real pipeline, which pauses with one thread and not with two; the result is arguments by name."""
    files = faults.make_files(tmp_path, count=16, size=64)

    def made(num_threads=1, hw_decoder_load=0.65):
        return faults.pipeline(files, prep=0.01 if num_threads == 1 else 0, mixed=False, num_threads=num_threads)

    monkeypatch.setattr(command, "load_function", lambda name, option: made)
    monkeypatch.setattr(tune, "cores", lambda: 2)
    assert pipeline_source(made, {}).settings == {"num_threads": 1, "hw_decoder_load": 0.65}
    path, output = tmp_path / "best.yaml", tmp_path / "r.json"
    line = ["bottleneck", "--pipeline", "m:f", "--no-step", "--device", "cpu", "--seconds", "2", "--rounds", "5"]
    assert main([*line, "--no-storage", "--tune", str(path), "-o", str(output)]) == 0
    out, err = capfd.readouterr()
    assert yaml.safe_load(path.read_text())["num_threads"] == 2
    found = load_report(output)
    assert found["tune"]["best"]["num_threads"] == 2
    assert f"-o {output} -j 2" in found["change"]["command"]
    assert "Change: num_threads=2" in out
    assert "tune: DALI threads 1 -> 2: " in err


@pytest.mark.usefixtures("short_windows")
def test_options_set_the_arguments_of_a_pipeline_and_one_without_settings_is_not_tuned(tmp_path, capfd, monkeypatch):
    files = faults.make_files(tmp_path, count=8, size=48)
    made = {}

    def takes_all(batch_size=4, num_threads=1, prefetch_queue_depth=2, hw_decoder_load=0.65):
        made.update(locals())
        return faults.pipeline(files, mixed=False, batch_size=batch_size, num_threads=num_threads)

    def takes_little(batch_size=4):
        return takes_all(batch_size)

    function = takes_all
    monkeypatch.setattr(command, "load_function", lambda name, option: function)
    line = ["bottleneck", "--pipeline", "m:f", "--no-step", "--seconds", "1", "--rounds", "5", "--no-storage"]
    options = ["-b", "2", "-j2", "--prefetch=3", "--hw-decoder-load", "0.5"]
    assert main([*line, "--no-what-ifs", *options, "-o", str(tmp_path / "r.json")]) == 0
    assert {name: made[name] for name in ("batch_size", "num_threads", "prefetch_queue_depth")} == {
        "batch_size": 2, "num_threads": 2, "prefetch_queue_depth": 3
    }  # fmt: skip
    assert (
        load_report(tmp_path / "r.json")["conditions"]["settings"]["hw_decoder_load"] == made["hw_decoder_load"] == 0.5
    )
    function = takes_little
    capfd.readouterr()
    assert main([*line, *options]) == 1
    assert "takes_little takes no hw_decoder_load, so it cannot be set" in capfd.readouterr().err
    monkeypatch.setattr(command, "_named_bad_file", None)  # the files are not the cause
    assert main([*line, "--tune", str(tmp_path / "x.yaml")]) == 1
    assert "tune needs a loader that takes at least one of num_threads, " in capfd.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_only_numbers_are_searched():
    """A queue depth can also be two numbers, for CPU and GPU."""
    settings = {"batch_size": 4, "num_threads": 2, "prefetch_queue_depth": {"cpu_size": 2, "gpu_size": 1}}
    assert tune.tunable(Source("x", settings, lambda _: [])) == {"num_threads": 2}

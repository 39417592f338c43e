"""The checks of whole programs on a GPU: what counts as an error, how results are merged, and how they are rendered."""

from __future__ import annotations

import json
import sys

import pytest
from shared.programs import run_program

from benchmarks import gpu_checks, render
from dali_saliencymix.datasets.sample_data import make_sample_data


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs `gpu_checks` in this process with a single check."""
    monkeypatch.setattr("benchmarks.machine.cores_given", lambda processes: processes)

    def main(*arguments, check):
        monkeypatch.setattr(gpu_checks, "CHECKS", {"ends": lambda options, folder: check()})
        monkeypatch.setattr(sys, "argv", ["gpu_checks", *map(str, arguments), "--device", "cpu"])
        gpu_checks.main()

    return main


def test_a_result_that_is_there_is_added_to_and_what_is_wrong_is_an_error(run, tmp_path):
    result = tmp_path / "checks.json"
    result.write_text(json.dumps({"benchmark": "gpu_checks", "parts": [{"check": "memory", "seconds": 7}]}))
    run(tmp_path, "--programs", 1, "-o", result, check=lambda: {"programs": 1, "wrong": []})
    with pytest.raises(RuntimeError, match=r"^ends: iterator: it did not exit$"):
        run(tmp_path, "-o", result, check=lambda: {"wrong": ["iterator: it did not exit"]})
    earlier, first, second = json.loads(result.read_text())["parts"]
    assert earlier == {"check": "memory", "seconds": 7}
    assert (first["check"], first["programs"], first["wrong"]) == ("ends", 1, [])
    assert first["conditions"]["command"].endswith("DATA --programs 1 --device cpu")
    assert second["wrong"] == ["iterator: it did not exit"]


def test_a_check_that_raises_is_wrong_and_written_down(run, tmp_path):
    def fail():
        msg = "no GPU\nleft"
        raise OSError(msg)

    with pytest.raises(RuntimeError, match=r"^ends: OSError: no GPU left$"):
        run(tmp_path, "-o", tmp_path / "new.json", check=fail)
    (part,) = json.loads((tmp_path / "new.json").read_text())["parts"]
    assert part["wrong"] == ["OSError: no GPU left"]


def test_the_result_of_another_benchmark_is_refused(run, tmp_path):
    result = tmp_path / "other.json"
    result.write_text('{"benchmark": "ops"}')
    with pytest.raises(ValueError, match=r"^-o must name a result of gpu_checks or a new file, got "):
        run(tmp_path, "-o", result, check=lambda: {"wrong": []})
    assert result.read_text() == '{"benchmark": "ops"}'


def test_a_program_that_takes_a_batch_ends_on_a_cpu(tmp_path):
    make_sample_data(tmp_path, train=2, val=1)
    code = gpu_checks._on_a_cpu(gpu_checks.TAKES_A_BATCH["iterator"])
    assert run_program("-c", code, tmp_path / "train").stdout == "[8, 3, 64, 64]\n"


def test_a_program_that_fails_is_told_from_one_that_ends(tmp_path):
    assert gpu_checks.took_a_batch("print(64)", tmp_path)[0] == 0
    status, text, _ = gpu_checks.took_a_batch("raise SystemExit('no batch')", tmp_path)
    assert (status, text) == (1, "no batch")


def test_progress_of_a_training_is_neither_a_warning_nor_an_error():
    text = "epoch 1/9  30%\repoch 1/9 [10/16]  loss 5.1\nwarning: a batch failed\nvalidation 3/4\n\nend\n"
    assert gpu_checks.said(text) == ["warning: a batch failed", "end"]


def training(**changes):
    return {"exit_status": 0, "said": [], "steps": 60, "losses": [5.0, 4.0], **changes}


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (training(), []),
        (training(steps=40), ["x: 40 steps instead of 60"]),
        (training(losses=[5.0, None]), ["x: losses of [5.0, None]"]),
        (training(losses=[float("nan")]), ["x: losses of [nan]"]),
        (training(exit_status=1, said=["no memory"], losses=[]), ["x: exit status 1: no memory"]),
    ],
)
def test_what_is_wrong_with_a_training(found, wrong):
    assert gpu_checks.wrong_with("x", found, 60) == wrong


@pytest.mark.parametrize(
    ("last", "wrong"),
    [
        ({"resident_mb": 2150, "gpu_mb": 5000}, []),
        ({"resident_mb": 2300, "gpu_mb": 5000}, ["resident_mb grew from 2000 to 2300"]),
        ({"resident_mb": 2000, "gpu_mb": 6000}, ["gpu_mb grew from 5000 to 6000"]),
    ],
)
def test_memory_that_grows_after_a_third_of_the_batches(last, wrong):
    readings = [
        {"batches": 10, "resident_mb": 900, "gpu_mb": 100},
        {"batches": 20, "resident_mb": 2000, "gpu_mb": 5000},
    ]
    assert gpu_checks.growth([*readings, {"batches": 30, **last}]) == wrong


def test_the_last_training_of_a_name_and_the_last_check_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.program.RESULTS", tmp_path)
    checks = [
        {"check": "trainings", "runs": {"none": training(), "fp16": training(exit_status=1, steps=0, losses=[])}},
        {"check": "trainings", "runs": {"fp16": training(losses=[6.0])}},
        {"check": "ends", "programs": 20, "ended_well": 3},
        {"check": "ends", "programs": 20, "ended_well": 20},
    ]
    files = {
        "checks.json": {"benchmark": "gpu_checks", "parts": checks},
        "tests.json": {"counts": {"passed": 5, "failed": 1}},
        "sanitize.json": {"tools": {"memcheck": {"errors": 0}, "racecheck": {"errors": None}}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    table = render.checks_table(files["checks.json"], "tests.json", "sanitize.json")
    assert table.splitlines()[2:] == [
        "| tests marked `gpu` | 5 passed, 1 failed |",
        "| errors found by compute-sanitizer | memcheck 0, racecheck did not end |",
        "| training: none | 60 steps, mean loss of each epoch: 5, 4 |",
        "| training: fp16 | 60 steps, mean loss of each epoch: 6 |",
        "| programs that exit without releasing a pipeline | 20 of 20 |",
    ]

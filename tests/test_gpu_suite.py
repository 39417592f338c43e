"""The suite for GPU hosts: what it runs, in which order, what it skips, and how it continues."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared.programs import python_path

from benchmarks import gpu_suite, machine, sanitize, smoke
from dali_saliencymix.measure.results import write_json

ROOT = Path(__file__).parents[1]


# ---- tests on a GPU host ---------------------------------------------------------------------------------------------


def test_what_matters_most_is_tested_first_and_trainings_last():
    files = gpu_suite.test_files()
    assert files[:6] == [f"tests/test_{name}.py" for name in gpu_suite._FIRST_TESTS]
    assert files[-2:] == [f"tests/test_{name}.py" for name in gpu_suite._LAST_TESTS]
    assert {"tests/test_saliency.py", "tests/test_boxes.py", "tests/test_pixels.py"} <= set(files)
    assert len(files) == len(set(files))


def test_every_file_with_a_test_for_a_gpu_is_run(request):
    # Checks the tests that are collected in this session: all of them in a full run.
    files = {item.path.name for item in request.session.items if item.get_closest_marker("gpu")}
    assert files <= {name.removeprefix("tests/") for name in gpu_suite.test_files()}


OUTCOMES = """{"test": "tests/test_x.py::test_y[a-b]", "outcome": "passed"}
{"test": "tests/test_x.py::test_y[a-b]", "outcome": "failed", "why": "AssertionError"}
{"test": "tests/test_x.py::test_z", "outcome": "passed"}
{"test": "tests/test_x.py::test_s", "outcome": "skipped"}
"""


def test_tests_that_passed_are_not_run_again(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('name', ['a-b', 'a-bc'])\n"
        "def test_y(name): pass\n"
        "def test_z(): assert False\n"
        "def test_s(): assert False\n"
        "def test_zz(): pytest.skip()\n"
        "@pytest.fixture\n"
        "def failing(): yield; assert False\n"
        "def test_w(failing): pass\n"
    )
    (tmp_path / "tests" / "test_v.py").write_text("import nowhere\n")
    (tmp_path / "tests.jsonl").write_text(OUTCOMES)
    line = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    line += ["-p", "xdist", "-n", "1", "--continue-on-collection-errors"]
    command = [*line, "-p", "benchmarks.outcomes", "--outcomes", str(tmp_path / "tests.jsonl"), "tests"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    new = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()[4:]]
    assert {(line["test"].rpartition("/")[2], line["outcome"]) for line in new} == {
        ("test_x.py::test_y[a-bc]", "not run"),
        ("test_x.py::test_zz", "not run"),
        ("test_x.py::test_w", "not run"),
        ("test_v.py", "failed"),
        ("test_x.py::test_y[a-b]", "passed"),
        ("test_x.py::test_y[a-bc]", "passed"),
        ("test_x.py::test_zz", "skipped"),
        ("test_x.py::test_w", "passed"),
        ("test_x.py::test_w", "failed"),
    }
    assert gpu_suite.tests_summary(tmp_path) == (
        "tests: 3 passed, 1 failed, 2 skipped, 1 without a package\n  tests/test_x.py::test_w\n"
        "not run: tests/test_v.py: nowhere is not installed"
    )


def test_tests_that_are_cut_short_leave_their_outcomes(tmp_path):
    begun = tmp_path / "begun"
    (tmp_path / "test_x.py").write_text(
        "import pathlib, time\n"
        "def test_a(): assert False\n"
        f"def test_b(): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
    )
    line = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", str(tmp_path / "test_x.py")]
    line += ["-p", "benchmarks.outcomes", "--outcomes", str(tmp_path / "tests.jsonl")]
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert gpu_suite.tests_summary(tmp_path).startswith("tests: 0 passed, 1 failed, 0 skipped, 1 not run")


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("E   ModuleNotFoundError: No module named 'nowhere.at_all'", True),
        ("E   ModuleNotFoundError: No module named 'numpy.nowhere'", False),
        ("E   AssertionError", False),
    ],
)
def test_tests_that_only_lack_a_package_are_no_failure(tmp_path, text, lacking):
    assert not gpu_suite.only_packages_are_missing(tmp_path)
    line = {"test": "tests/test_x.py", "outcome": "failed", "why": text}
    (tmp_path / "tests.jsonl").write_text(OUTCOMES.splitlines()[2] + "\n" + json.dumps(line) + "\n")
    assert gpu_suite.only_packages_are_missing(tmp_path) is lacking
    with open(tmp_path / "tests.jsonl", "a") as file:
        file.write(json.dumps({"test": "tests/test_y.py::test_y", "outcome": "not run"}) + "\n")
    assert not gpu_suite.only_packages_are_missing(tmp_path)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_a_stage_that_hangs_is_ended_and_one_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_PATIENCE", 0.5)
    with open(tmp_path / "log", "w", buffering=1) as log:
        code = "import os, signal, time; signal.signal(2, signal.SIG_IGN); print('begun'); time.sleep(60)"
        hang = gpu_suite.Stage("hang", 1, ["-c", code])
        fail = gpu_suite.Stage("fail", 9, ["-c", "raise SystemExit(5)"])
        assert gpu_suite.run_stage(hang, 0.5, log)["ended"] == "was ended at its time limit"
        assert gpu_suite.run_stage(fail, 9, log) == {"ended": "failed with status 5", "well": False, "seconds": 0}
        no_test_left = fail._replace(name="tests")
        assert gpu_suite.run_stage(no_test_left, 9, log)["well"]
    text = (tmp_path / "log").read_text()
    assert "begun" in text
    assert "fail: failed with status 5" in text


def test_every_stage_names_a_module_and_writes_into_the_folder(tmp_path):
    for dry in (False, True):
        made = gpu_suite.stages(tmp_path, tmp_path / "data", None, device="NVIDIA X 80GB", dry=dry)
        assert [stage.name for stage in made] == [
            name for name in gpu_suite._STAGES if not (dry and name == "sanitize")
        ]
        for stage in made:
            assert importlib.util.find_spec(stage.command[1])
        assert {stage.result for stage in made if stage.result} == {
            tmp_path / f"{name}-nvidia-x-80gb.json" for name in ("ops", "pipeline", "train", "scale")
        }


def test_the_tests_of_the_smoke_stage_are_there():
    for test in smoke.TESTS:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Return a function that runs the suite with fake stages, which write their names to a file."""
    written = tmp_path / "written"
    failing = set()

    def stages(out, data, source, *, device, dry):
        def stage(name, result=None):
            script = f"open({str(written)!r}, 'a').write({name!r} + ' '); raise SystemExit({int(name in failing)})"
            return gpu_suite.Stage(name, 30, ["-c", script], result)

        return [stage("smoke"), stage("tests"), stage("images"), stage("pipeline", out / "pipeline.json")]

    def run(*words):
        written.write_text("")
        monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry", *map(str, words)])
        try:
            gpu_suite.main()
        except (RuntimeError, ValueError) as error:
            return written.read_text().split(), str(error)
        return written.read_text().split(), None

    monkeypatch.setattr(gpu_suite, "stages", stages)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    run.failing = failing
    return run


def test_what_ended_well_is_not_run_again(suite, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    suite.failing |= {"tests"}
    assert suite(first) == (["smoke", "tests", "images", "pipeline"], "tests: failed with status 1")
    assert "OUT must hold no earlier run" in suite(first)[1]
    suite.failing.clear()
    assert suite(second, "--continue", first) == (["tests", "images", "pipeline"], None)
    assert suite(second, "--continue") == (["images", "pipeline"], None)  # it has no result, so it is not done
    write_json(second / "pipeline.json", {"benchmark": "pipeline", "complete": True})
    assert suite(second, "--continue") == ([], None)
    runs = json.loads((second / "suite.json").read_text())["runs"]
    assert [list(run["stages"]) for run in runs] == [
        ["smoke", "tests", "images", "pipeline"],
        ["tests", "images", "pipeline"],
        ["images", "pipeline"],
    ]
    assert all(run["device"].startswith("CPU, ") for run in runs)
    assert "--continue must name a folder with the suite.json" in suite(tmp_path / "x", "--continue", tmp_path)[1]


def test_another_machine_has_to_pass_the_smoke_stage_again(suite, tmp_path):
    suite(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "suite.json").read_text())
    state["runs"][0]["machine"] = "another one"
    write_json(tmp_path / "out" / "suite.json", state)
    assert suite(tmp_path / "out", "--continue")[0] == ["smoke", "images", "pipeline"]


def test_nothing_begins_after_a_smoke_stage_that_failed(suite, tmp_path):
    suite.failing |= {"smoke"}
    assert suite(tmp_path / "out") == (["smoke"], "smoke: failed with status 1")


def test_tests_that_lack_a_package_do_not_fail_the_suite(suite, tmp_path):
    suite.failing |= {"tests"}
    (tmp_path / "out").mkdir()
    line = {"test": "tests/test_x.py", "outcome": "failed", "why": "ModuleNotFoundError: No module named 'nowhere'"}
    (tmp_path / "out" / "tests.jsonl").write_text(json.dumps(line) + "\n")
    assert suite(tmp_path / "out", "--stages", "tests") == (["tests"], None)
    assert "- tests: ended, except tests that lack a package" in (tmp_path / "out" / "summary.md").read_text()


def test_some_stages_can_be_asked_for_and_images_are_made_where_they_are_used(suite, tmp_path):
    assert suite(tmp_path / "a", "--stages", "tests") == (["tests"], None)
    assert suite(tmp_path / "b", "--stages", "pipeline") == (["images", "pipeline"], None)


def test_the_summary_names_what_failed(tmp_path):
    (tmp_path / "tests.jsonl").write_text(OUTCOMES)
    figure = {"median": 5, "q1": 4, "q3": 6, "min": 1, "max": 9, "rounds": 9, "share_of_copy_rate": 0.5}
    conditions = {"device": "a GPU"}
    result = {"benchmark": "ops", "images_per_second": {"none": figure}, "conditions": conditions}
    write_json(tmp_path / "x.json", {**result, "not_measured": {"opencv": "cv2 is not installed"}})
    found = {"memcheck": {"errors": 1, "kinds": {"paste_4: Invalid read": 1}}, "racecheck": {"errors": 0, "kinds": {}}}
    write_json(tmp_path / "sanitize.json", {"benchmark": "sanitize", "conditions": conditions, "tools": found})
    stage = {"tests": {"ended": "failed with status 1", "well": False, "seconds": 7}}
    text = gpu_suite.summary(tmp_path, [{"date": "2026-01-02", "device": "a GPU", "commit": "abc", "stages": stage}])
    for line in (
        "2026-01-02, a GPU, commit abc:\n- tests: failed with status 1, 7 s",
        "tests: 1 passed, 1 failed, 1 skipped\n  tests/test_x.py::test_y[a-b]",
        "## x.json: a GPU\nimages_per_second / none: 5 (4 to 6), 9 rounds, 50.0% of a copy",
        "not measured: opencv: cv2 is not installed",
        "| memcheck | 1 | paste_4: Invalid read | 1 |\n| racecheck | 0 | none |  |",
    ):
        assert line in text


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at paste_4+0x70 in paste.cu:5
=========     by thread (33,0,0) in block (0,0,0)
=========     Address 0x7f0 is out of bounds
=========     Host Frame: launch [0x1]
=========
========= Invalid __global__ read of size 4 bytes
=========     at paste_4+0x90
========= Program hit cudaErrorIllegalAddress (error 700) due to "illegal memory access" on CUDA API call
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void surrounds<int>(int*)+0x100 in x.cu:7
=========     and Read access at surrounds+0x200 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_findings_of_the_sanitizer_are_counted_by_kernel():
    kinds = {
        "paste_4: Invalid __global__ read of size 4 bytes": 2,
        'no kernel: Program hit cudaErrorIllegalAddress (error 700) due to "illegal memory access" on CUDA API call': 1,
    }
    assert sanitize.findings(MEMCHECK) == {"errors": 3, "kinds": kinds}
    found = sanitize.findings(RACECHECK)
    assert found["errors"] == 1
    assert [name.partition(":")[0] for name in found["kinds"]] == ["surrounds"]
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.findings(clean) == {"errors": 0, "kinds": {}}
    assert sanitize.findings("Traceback")["errors"] is None


@pytest.mark.parametrize(("text", "status", "errors"), [("0 errors", 0, 0), ("0 errors", 1, None), ("2 errors", 1, 2)])
def test_a_program_that_fails_under_the_sanitizer_has_not_passed(tmp_path, text, status, errors):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {text}'\nexit {status}\n")
    tool.chmod(0o755)
    assert sanitize.run_tool(str(tool), "memcheck")["errors"] == errors

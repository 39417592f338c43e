"""A pytest plugin that writes the outcome of each test to a file at once, and does not rerun tests that passed.

    python -m pytest -p benchmarks.outcomes --outcomes tests.jsonl

A run with the same file continues the last one, however that ended, since the file starts with a line for each
collected test with the outcome "not run". Tests that were skipped do not rerun either.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dali_saliencymix.packages import is_installed

# A host may have other plugins than those that the tests know, so none is loaded automatically, and the options of
# pyproject.toml that need one are overridden. Its versions are not ours: warnings are shown and do not fail a test.
PYTEST = ("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "default", "--tb=short", "-v", "-ra")

_LEFT_TO_RUN = ("failed", "not run")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="file with a line of JSON for each outcome")


def pytest_configure(config: Any) -> None:
    """Register the recorder, with pytest-xdist only in the process that receives the reports of all workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config.getoption("outcomes")))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect the tests that passed or were skipped before."""
    found = read(config.getoption("outcomes"))
    done = {test for test in found if found[test]["outcome"] not in _LEFT_TO_RUN}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


class _Recorder:
    """Writes a line for each test, and for each file that cannot be imported."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = read(path)

    def pytest_collection_finish(self, session: Any) -> None:
        self._say_what_is_to_run(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._say_what_is_to_run(ids)  # all processes of pytest-xdist collect the same tests

    def _say_what_is_to_run(self, tests: Iterable[str]) -> None:
        for test in tests:
            if test not in self._known:
                self._known[test] = {}
                self._append({"test": test, "outcome": "not run"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test that passes gets its line from the call; setup and teardown are recorded only if they do not pass.
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self._write(report)

    def _write(self, report: Any) -> None:
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
        if report.nodeid in self._known:  # a file has no duration
            line["seconds"] = round(report.duration, 2)
        if report.outcome == "failed":
            line["why"] = report.longreprtext
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def timeout(seconds: int) -> list[str]:
    """Return the pytest options that end a test that hangs, if the plugin is installed."""
    return ["-p", "pytest_timeout", f"--timeout={seconds}"] if is_installed("pytest_timeout") else []


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each test: outcome ("passed", "failed", "skipped", "not run"), seconds, why it failed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.pop("test"): line for line in map(json.loads, lines)}


def counted(path: Path) -> tuple[dict[str, int], list[str], dict[str, str]]:
    """Return the number of tests by outcome, the names of failed tests, and the missing package of each test.

    A file that cannot be imported because a package is not installed counts as one test.
    """
    bad = {test: found["why"] for test, found in read(path).items() if found["outcome"] == "failed"}
    missing = {test: re.search(r"No module named '(\w+)", why) for test, why in bad.items()}
    lacking = {test: found[1] for test, found in missing.items() if found and not is_installed(found[1])}
    counts = collections.Counter(found["outcome"] for found in read(path).values())
    numbers = {"passed": counts["passed"], "failed": len(bad) - len(lacking), "skipped": counts["skipped"]}
    if counts["not run"]:
        numbers["not run"] = counts["not run"]
    if lacking:
        numbers["without a package"] = len(lacking)
    return numbers, [test for test in bad if test not in lacking], lacking

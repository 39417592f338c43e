"""A plugin for pytest: outcomes of tests go to a file as they come, and tests that have passed are not run again.

    python -m pytest -p benchmarks.outcomes --outcomes tests.jsonl

However a run ends, the next one with the same file continues it. Tests that were skipped are not run again either.
"""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import installed


def pytest_addoption(parser: Any) -> None:
    """Add the option that names the file."""
    parser.addoption("--outcomes", type=Path, required=True, help="file with a line of JSON for each outcome")


def pytest_configure(config: Any) -> None:
    """Record what happens, in the process that the reports of all workers arrive in."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config.getoption("outcomes")))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests that need not run again."""
    done = {test for test, found in read(config.getoption("outcomes")).items() if found["outcome"] != "failed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


class _Recorder:
    """Writes a line for each test, and for each file that cannot be imported."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test that passes has its line from the call; setting up and clearing away count if they do not pass.
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self._write(report)

    def _write(self, report: Any) -> None:
        line: dict[str, str] = {"test": report.nodeid, "outcome": report.outcome}
        if report.outcome == "failed":
            line["why"] = report.longreprtext
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the last outcome of each test: ``{"outcome": "passed" | "failed" | "skipped", "why": text}``."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.pop("test"): line for line in map(json.loads, lines)}


def counted(path: Path) -> tuple[dict[str, int], list[str], dict[str, str]]:
    """Return the tests by outcome: their numbers, the names of those that failed, and of those that lack a package.

    A file that imports a package that is not installed counts as one test.
    """
    bad = {test: found["why"] for test, found in read(path).items() if found["outcome"] == "failed"}
    missing = {test: re.search(r"No module named '(\w+)", why) for test, why in bad.items()}
    lacking = {test: found[1] for test, found in missing.items() if found and not installed(found[1])}
    counts = collections.Counter(found["outcome"] for found in read(path).values())
    numbers = {"passed": counts["passed"], "failed": len(bad) - len(lacking), "skipped": counts["skipped"]}
    if lacking:
        numbers["without a package"] = len(lacking)
    return numbers, [test for test in bad if test not in lacking], lacking

"""A plugin for pytest: outcomes of tests go to a file as they come, and tests that have passed are not run again.

    python -m pytest -p benchmarks.outcomes --outcomes tests.jsonl

However a run ends, the next one with the same file continues it. Tests that were skipped are not run again either.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any


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
    if not path.exists():
        return {}
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found[line.pop("test")] = line
    return found


def counted(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return the number of tests by their last outcome, and the names of those that failed."""
    found = read(path)
    counts = collections.Counter(outcome["outcome"] for outcome in found.values())
    bad = [test for test, outcome in found.items() if outcome["outcome"] == "failed"]
    return {name: counts[name] for name in ("passed", "failed", "skipped")}, bad

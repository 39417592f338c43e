"""Fixtures for tests that measure: a clock that only sleeping advances, and short windows.

A test module gets them with ``pytest_plugins = ["shared.measuring"]``. pytest imports this file earlier, to look for
examples, and cannot rewrite its assertions then, so rewriting is disabled: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dali_saliencymix.measure import windows


@pytest.fixture
def clock(monkeypatch) -> None:
    """A clock that only `sleep` advances, so that measurements are exact whatever the load of the machine."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


@pytest.fixture(scope="module")
def short_windows() -> Iterator[None]:
    """Windows of at least 20 ms instead of 80 ms, for faults that are far larger than any noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "LEAST_SECONDS", 0.02)
        yield

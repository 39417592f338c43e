"""Signals that ask a run to make room: it finishes its step, writes a checkpoint, and ends with a status of its own."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

# "Temporary failure, try again" in sysexits.h: nothing is wrong with the run, and it wants to be started again.
EXIT_PREEMPTED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run stops because it was asked to. The text names the signal."""


class StopSignals:
    """Notes `STOP_SIGNALS` instead of dying of them, for as long as it is entered as a context."""

    def __init__(self) -> None:
        self._received = [0] * len(STOP_SIGNALS)
        self._before: list[Any] = []

    def __enter__(self) -> StopSignals:
        self._before = [signal.signal(number, self._note) for number in STOP_SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(STOP_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    @property
    def received(self) -> list[int]:
        """For each of `STOP_SIGNALS`, 1 if it has come, else 0."""
        return list(self._received)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received[STOP_SIGNALS.index(signal.Signals(number))] = 1

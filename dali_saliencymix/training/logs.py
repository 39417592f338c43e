"""What a run tells its user: lines on the screen, a progress bar, and a log file for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dali_saliencymix._versions import versions

Batch = TypeVar("Batch")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the device that a result depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions(), "device": name, "cuda": torch.version.cuda if device.type == "cuda" else None}


class JsonLines:
    """A log with one JSON object on each line, flushed line by line.

    Parameters
    ----------
    path : path or None
        File to append to; with None nothing is written, as in all processes but the main one.
    anew : bool
        Whether to begin an empty file, in the place of one that may be there.
    """

    def __init__(self, path: Path | None, *, anew: bool = False) -> None:
        self._path = path
        if anew and path is not None:
            path.write_text("")

    def write(self, event: str, **values: Any) -> None:
        """Append a line."""
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")


class Stopwatch:
    """Seconds since it was made, and the part of them spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._start

    @property
    def wait_share(self) -> float:
        """Share of that time spent waiting for batches, as the host sees it."""
        return self.waited / max(self.seconds, 1e-9)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches, and add the time that each one takes to arrive."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch


class Progress:
    """A progress bar on a terminal; elsewhere one line each time something is shown.

    Parameters
    ----------
    description : str
        What is going on.
    total : int
        Number of steps.
    enabled : bool
        False in all processes but the main one.
    """

    def __init__(self, description: str, total: int, *, enabled: bool) -> None:
        self._description = description
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit="step",
            disable=not enabled or self._lines,
            leave=False,
            dynamic_ncols=True,
        )
        self._total = total
        self._step = 0

    def advance(self) -> None:
        """Count one step."""
        self._step += 1
        self._bar.update()

    def show(self, **values: str) -> None:
        """Show figures beside the bar."""
        if self._lines:
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            sys.stderr.write(f"{self._description} [{self._step}/{self._total}]  {shown}\n")
        else:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def say(line: str, *, enabled: bool = True) -> None:
    """Write a line to stdout, above any progress bar."""
    if enabled:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def warn(line: str, *, enabled: bool = True) -> None:
    """Write a line to stderr, above any progress bar."""
    if enabled:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

"""What a run tells its user: lines on the screen, a progress bar, and a log file for programs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dali_saliencymix._json import finite
from dali_saliencymix._versions import versions

Batch = TypeVar("Batch")

_DRIVER = r"Kernel Module.*?\s(\d+\.[\d.]+)"  # not the number in "for x86_64"


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on beside the options: versions, device, driver, processor, state of the code."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {
        "versions": versions("tensorboard", "wandb"),
        "device": name,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,  # type: ignore[no-untyped-call]
        "driver": _first_match("/proc/driver/nvidia/version", _DRIVER),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*: (.+)"),
        "cores": len(os.sched_getaffinity(0)),
        "git_commit": _git_commit(),
    }


def _first_match(file: str, pattern: str) -> str | None:
    """Return what a pattern finds in a file of the system, if there is such a file."""
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text(errors="replace"))
        return found[1].strip() if found else None
    return None


def _git_commit() -> str | None:
    """Return the commit of the code that runs, with a plus sign if files differ from it; None outside of git."""
    folder = Path(__file__).parent
    try:
        git = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        tracked = git(["git", "ls-files", "--error-unmatch", __file__])
        commit, changed = (git(["git", *words]) for words in (("rev-parse", "HEAD"), ("diff", "--stat", "HEAD")))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout else "") if tracked.stdout else None


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return memory of a GPU in MiB; {} on a CPU.

    Returns
    -------
    dict from str to float
        ``gpu_peak_mib``: the most that PyTorch's tensors took since the last call, without what DALI takes;
        ``gpu_used_mib``: what all programs take there now.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_peak_mib": round(peak / 2**20, 1), "gpu_used_mib": round((total - free) / 2**20, 1)}


def has_hardware_decoder(device: torch.device) -> bool | None:
    """Whether a GPU has an engine for JPEG that DALI can use: tried by decoding a small image with it alone.

    Returns
    -------
    bool or None
        None on a CPU, and if it could not be found out.
    """
    if device.type != "cuda":
        return None
    try:
        from nvidia import nvimgcodec
        from PIL import Image

        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
        engine = nvimgcodec.Backend(nvimgcodec.BackendKind.HW_GPU_ONLY)
        decoder = nvimgcodec.Decoder(device_id=device.index or 0, backends=[engine])
        return decoder.decode(jpeg.getvalue()) is not None
    except Exception:  # whatever another version of the library says: the training does not depend on it
        return None


class JsonLines:
    """A log with one JSON object on each line, which is only added to.

    Parameters
    ----------
    path : path or None
        The file; with None nothing is written, as in all processes but the main one.
    anew : bool
        Whether to begin an empty file, in the place of one that may be there.
    """

    def __init__(self, path: Path | None, *, anew: bool = False) -> None:
        self._path = path
        if anew and path is not None:
            path.write_text("")

    def write(self, event: str, **values: Any) -> None:
        """Append a line, and give it to the system at once. Numbers that are not finite are null: NaN is no JSON."""
        if self._path is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite(values)}, allow_nan=False) + "\n"
        with open(self._path, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a full disk or a killed process left half a line
                    line = "\n" + line
            stream.write(line.encode())


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

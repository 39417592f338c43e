"""The machine that a result comes from: its GPU, its cores and whether it gives them, versions, command and commit."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from dali_saliencymix._versions import versions

# Beside those that the package itself works with.
_PACKAGES = ("numba", "scipy", "opencv-contrib-python-headless", "opencv-python-headless", "pillow")
_PACKAGES += ("timm", "kornia", "mixup", "spdl", "torchcodec")  # what benchmarks/peers.py measures

# Options that say what is measured for how long and where it goes, not how.
_NOT_A_CONDITION = ("data", "output", "seconds", "device", "go_on", "logs", "checks")

# Of a pool of processes: an interrupt, which all of them get, is for the one that started them.
DEAF_TO_INTERRUPTS: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}

# Counts for a given time, beginning at a given moment: what one core can do.
_BUSY = """
import sys, time
start, seconds = map(float, sys.argv[1:])
while time.time() < start: pass
count, end = 0, start + seconds
while time.time() < end: count += 1
print(count)
"""


def has_gpu() -> bool:
    """Tell whether CuPy sees a GPU."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # not installed, no driver, another CUDA version: without a GPU everything is measured on the CPU
        return False


@functools.cache
def installed(name: str) -> bool:
    """Tell whether a module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def wants_gpu(options: argparse.Namespace) -> bool:
    """Return whether to measure on a GPU."""
    if options.device == "gpu" and not has_gpu():
        msg = "--device must be cpu where CuPy sees no GPU, got gpu"
        raise ValueError(msg)
    return options.device != "cpu" and has_gpu()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def resident_mb(pid: int | str) -> float:
    """Return the resident memory of a process in MB; ``"self"`` is this one."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def cores_given(processes: int, seconds: float = 0.4) -> float:
    """Return how many times as much `processes` busy processes get done in a given time as a single one does."""

    def counted(number: int) -> int:
        start = time.time() + 0.15 + 0.02 * number
        command = [sys.executable, "-I", "-S", "-c", _BUSY, str(start), str(seconds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(number)]
        return sum(int(process.communicate()[0]) for process in running)

    return round(counted(processes) / counted(1), 2)


def conditions(options: argparse.Namespace, *, gpu: bool) -> dict[str, Any]:
    """Return what a result depends on: machine, versions, options, command and commit."""
    machine: dict[str, Any] = {"cpu": _cpu_model(), "cores": cores(), "cores_given_to_two_processes": cores_given(2)}
    if cores() > 2:
        machine[f"cores_given_to_{cores()}_processes"] = cores_given(cores())
    if machine["cores_given_to_two_processes"] < 1.7:
        measure.say(
            f"two busy processes do {machine['cores_given_to_two_processes']} times the work of one: a noisy machine"
        )
    return {
        **{name: value for name, value in vars(options).items() if name not in _NOT_A_CONDITION},
        **identity(gpu=gpu),
        "versions": versions(*_PACKAGES),
        "machine": machine,
        "command": command(options),
    }


def identity(*, gpu: bool) -> dict[str, Any]:
    """Return date, device and commit."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": f"CPU, {cores()} threads",
        "cuda": None,
        **(_gpu() if gpu else {}),
        # A copy that git knows nothing of, or the wrong thing, is told its commit.
        "commit": os.environ.get("COMMIT")
        or _output(["git", "-C", str(measure.ROOT), "describe", "--always", "--dirty"]),
    }


def command(options: argparse.Namespace) -> str:
    """Return the command line, without the names of this machine's folders."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    words = collections.deque(sys.argv[1:])
    shown = ["python", "-m", module.name if module else "benchmarks"]
    while words:
        word = words.popleft()
        if word in ("-o", "--output", "--logs"):
            words.popleft()
        elif not word.startswith(("-o", "--output=")):
            shown.append("DATA" if Path(word) == getattr(options, "data", None) else word)
    threads = os.environ.get("OMP_NUM_THREADS")
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(shown)


def _gpu() -> dict[str, Any]:
    import cupy

    runtime = cupy.cuda.runtime
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    version = runtime.runtimeGetVersion()
    return {
        "device": runtime.getDeviceProperties(0)["name"].decode(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "driver": _output(query),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(line: list[str]) -> str | None:
    """Return what a program prints, if it is there and succeeds."""
    if shutil.which(line[0]) is None:
        return None
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else None

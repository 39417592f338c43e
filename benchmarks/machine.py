"""Describe the machine of a result: GPU, cores and whether they are available, versions, command and commit."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import program
from dali_saliencymix.measure.environment import cores, environment, resident_mib

# Packages to record in addition to the package's own dependencies; the second line is for benchmarks/peers.py.
_PACKAGES = ("numba", "scipy", "opencv-contrib-python-headless", "opencv-python-headless", "pillow")
_PACKAGES += ("timm", "kornia", "mixup", "spdl", "torchcodec")

# Options that do not change how something is measured: only what, for how long, and where the result goes.
_NOT_A_CONDITION = ("data", "output", "seconds", "device", "go_on", "logs", "checks")

# Options of a process pool. Ctrl-C reaches all processes, but only the parent should handle it.
DEAF_TO_INTERRUPTS: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}

# Counts for a given time from a given moment on, to measure what one core can do.
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
    except Exception:  # not installed, no driver, another CUDA version: measure on the CPU
        return False


def check_gpu(*, or_dry: bool | None = None) -> None:
    """Raise ValueError if there is no GPU; `or_dry` is the option --dry of a script that has it."""
    if not (or_dry or has_gpu()):
        msg = "there must be a GPU that CuPy sees" + ("" if or_dry is None else ", or --dry")
        raise ValueError(msg)


def wants_gpu(options: argparse.Namespace) -> bool:
    """Return whether to measure on a GPU; raise ValueError if one is asked for and CuPy sees none."""
    device = getattr(options, "device", "cpu")
    if device == "gpu" and not has_gpu():
        msg = "--device must be cpu where CuPy sees no GPU, got gpu"
        raise ValueError(msg)
    return device != "cpu" and has_gpu()


def resident_mb(pid: int | str = "self") -> float:
    """Return the resident memory of a process in MB, the unit of the results."""
    found = resident_mib(pid)
    if found is None:
        msg = f"the resident memory of process {pid} cannot be read"
        raise RuntimeError(msg)
    return round(found * 2**20 / 1e6, 1)


def cores_given(processes: int, seconds: float = 0.4) -> float:
    """Return the work that `processes` busy processes get done together, in units of that of a single one."""

    def counted(number: int) -> int:
        start = time.time() + 0.15 + 0.02 * number
        command = [sys.executable, "-I", "-S", "-c", _BUSY, str(start), str(seconds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(number)]
        return sum(int(process.communicate()[0]) for process in running)

    return round(counted(processes) / counted(1), 2)


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on: options, machine, versions, command and commit."""
    found = surroundings(gpu=wants_gpu(options))
    machine = {name: found[name] for name in ("cpu", "cores", "system", "load_average")}
    given = machine["cores_given_to_two_processes"] = cores_given(2)
    if cores() > 2:
        machine[f"cores_given_to_{cores()}_processes"] = cores_given(cores())
    if given < 1.7:
        program.say(f"the machine is noisy: two busy processes do {given} times the work of one")
    return {
        **{name: value for name, value in vars(options).items() if name not in _NOT_A_CONDITION},
        **identity(found),
        "versions": found["versions"],
        "machine": machine,
        "command": command(options),
    }


def surroundings(*, gpu: bool) -> dict[str, Any]:
    """Return the environment of this machine, as `dali_saliencymix.measure` describes it."""
    return environment("cuda:0" if gpu else "cpu", *_PACKAGES)


def identity(found: dict[str, Any]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    of_device = {name: found[name] for name in ("device", "cuda", "driver")}
    return {"date": date, **of_device, "commit": found["git_commit"]}


def command(options: argparse.Namespace) -> str:
    """Return the command line without paths of this machine."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    words = collections.deque(sys.argv[1:])
    shown = ["python", "-m", module.name.removesuffix(".__main__") if module else "benchmarks"]
    while words:
        word = words.popleft()
        if word in ("-o", "--output", "--logs"):
            words.popleft()
        elif not word.startswith(("-o", "--output=")):
            shown.append("DATA" if Path(word) == getattr(options, "data", None) else word)
    threads = os.environ.get("OMP_NUM_THREADS")
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(shown)

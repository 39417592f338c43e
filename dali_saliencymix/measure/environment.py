"""What a measurement depends on beside its options: versions, device, driver, processor, state of the code."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from dali_saliencymix._versions import versions
from dali_saliencymix.measure.processes import gather

_CGROUP = Path("/sys/fs/cgroup")
_DRIVER = r"Kernel Module.*?\s(\d+\.[\d.]+)"  # not the number in "for x86_64"


def environment(device: str = "cpu", *packages: str) -> dict[str, Any]:
    """Return what a result depends on, as plain values for a log or a result file.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:0"``: where the work is done. Of a GPU PyTorch is asked if it is imported,
        else CuPy.
    *packages : str
        Packages whose versions matter too, if they are installed.

    Returns
    -------
    dict
        ``device``, ``cuda``, ``cudnn``, ``driver``, ``cpu``, ``cores``, ``system``, ``load_average``,
        ``torch_threads``, ``versions`` and ``git_commit``; None where that is unknown or does not apply.
    """
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    here = {"device": f"CPU, {counted(threads or cores(), 'threads')}", "cuda": None, "cudnn": None}
    return {
        **(here if device == "cpu" else _gpu(device)),
        "driver": _first_match("/proc/driver/nvidia/version", _DRIVER),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*: (.+)") or platform.machine(),
        "cores": cores(),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch_threads": threads,
        "versions": versions(*packages),
        "git_commit": git_commit(),
    }


def cores() -> int:
    """Return the number of cores that this process may use: those of its affinity, or fewer by a container's quota."""
    return _within_quota(len(os.sched_getaffinity(0)))


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _within_quota(count: int) -> int:
    """Return a number of cores, or fewer where the control group of a container has time for no more, rounded up."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # the latter of the word "max": no limit, as is -1
            quota, period = (int(word) for name in names for word in (_CGROUP / name).read_text().split())
            return min(count, math.ceil(quota / period)) if quota > 0 else count
    return count


def oversubscription(loader: int | None, called: str = "DALI threads", *, computes: bool) -> str | None:
    """Say that the processes of this machine have more threads than cores; all of them have to call this.

    Parameters
    ----------
    loader : int, optional
        Threads or worker processes of each loader; None where they are not known, and then not counted.
    called : str
        What they are called, in the plural.
    computes : bool
        Whether the training step runs on a CPU, where PyTorch's own threads count: beside a GPU they wait. One thread
        of each loader is not counted then, since no loader has fewer.

    Returns
    -------
    str or None
        A sentence with the numbers and without a full stop; None where the cores are enough.
    """
    here = local_processes()
    host, torch = platform.node(), sys.modules.get("torch")
    of_step = torch.get_num_threads() if computes and torch is not None else 0
    gathered = gather((host, os.sched_getaffinity(0)))  # a launcher may have given each process cores of its own
    available = _within_quota(len(set().union(*(allowed for name, allowed in gathered if name == host))))
    if here * max(loader or 0, max((loader or 0) - 1, 0) + of_step) <= available:
        return None
    kinds = {called: loader, "PyTorch threads": of_step}
    each = " and ".join(counted(count, kind) for kind, count in kinds.items() if count)
    who = f"{here} processes with {each} each" if here > 1 else each
    setting = "; OMP_NUM_THREADS sets those of PyTorch" if of_step > 1 else ""
    more = "more than one per core does not help, and takes time from the steps"
    return f"{who} share {counted(available, 'cores')}: {more}{setting}"


def counted(count: int, plural: str) -> str:
    """Return a number of things in words.

    Examples
    --------
    >>> counted(1, "processes"), counted(2, "cores")
    ('1 process', '2 cores')
    """
    return f"{count} {plural if count > 1 else re.sub('(?<=ss)es$|s$', '', plural)}"


def resident_mib(pid: int | str = "self") -> float | None:
    """Return the resident memory of a process in MiB; None where Linux's /proc is not."""
    found = _first_match(f"/proc/{pid}/status", r"VmRSS:\s*(\d+) kB")
    return round(int(found) / 1024, 1) if found else None


def git_commit() -> str | None:
    """Return the commit of the code that runs, with a plus sign if files differ from it; None outside of git.

    The environment variable COMMIT comes first: a copy that git does not know is told its commit.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    folder = Path(__file__).parent
    try:
        git = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        tracked = git(["git", "ls-files", "--error-unmatch", __file__])
        commit, changed = (git(["git", *words]) for words in (("rev-parse", "HEAD"), ("diff", "--stat", "HEAD")))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout else "") if tracked.stdout else None


def _gpu(device: str) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    import cupy

    runtime = cupy.cuda.runtime
    version = runtime.runtimeGetVersion()
    name = runtime.getDeviceProperties(int(device.partition(":")[2] or 0))["name"].decode()
    return {"device": name, "cuda": f"{version // 1000}.{version % 1000 // 10}", "cudnn": None}


def _first_match(file: str, pattern: str) -> str | None:
    """Return what a pattern finds in a file of the system, if there is such a file."""
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text(errors="replace"))
        return found[1].strip() if found else None
    return None

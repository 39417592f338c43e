"""Collect the environment of a measurement: versions, device, driver, processor, commit of the code."""

from __future__ import annotations

import contextlib
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
    """Return the environment of a measurement, as plain values for a log or a result file.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:0"``: where the work is done. Properties of a GPU come from PyTorch if it is
        imported, else from CuPy.
    *packages : str
        Further packages whose versions are included, if they are installed.

    Returns
    -------
    dict
        ``device``, ``cuda``, ``cudnn``, ``driver``, ``cpu``, ``cores``, ``system``, ``load_average``,
        ``torch_threads``, ``versions`` and ``git_commit``. Values that are unknown or do not apply are None.
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
    """Return the number of cores that the affinity of this process and the CPU quota of its container allow."""
    return _within_quota(len(os.sched_getaffinity(0)))


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _within_quota(count: int) -> int:
    """Return a number of cores, limited to the CPU quota of the container, rounded up."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number, and means no limit, as does -1
            quota, period = (int(word) for name in names for word in (_CGROUP / name).read_text().split())
            return min(count, math.ceil(quota / period)) if quota > 0 else count
    return count


def oversubscription(loader: int | None, called: str = "DALI threads", *, computes: bool) -> str | None:
    """Return a warning if the processes of a machine have more threads than cores; all processes must call this.

    Parameters
    ----------
    loader : int, optional
        Threads or worker processes of each loader; None if unknown, and then not counted.
    called : str
        What `loader` counts, in the plural.
    computes : bool
        Whether the training step runs on a CPU. Only then do PyTorch's threads count, and one thread of each loader
        does not count, because every loader has at least one.

    Returns
    -------
    str or None
        A sentence with the numbers, without a full stop; None if there are enough cores.
    """
    here = local_processes()
    host, torch = platform.node(), sys.modules.get("torch")
    of_step = torch.get_num_threads() if computes and torch is not None else 0
    gathered = gather((host, os.sched_getaffinity(0)))  # a launcher may give each process its own cores
    available = _within_quota(len(set().union(*(allowed for name, allowed in gathered if name == host))))
    if here * max(loader or 0, max((loader or 0) - 1, 0) + of_step) <= available:
        return None
    kinds = {called: loader, "PyTorch threads": of_step}
    each = " and ".join(counted(count, kind) for kind, count in kinds.items() if count)
    who = f"{here} processes with {each} each" if here > 1 else each
    setting = "; OMP_NUM_THREADS sets those of PyTorch" if of_step > 1 else ""
    more = "more than one per core does not help and slows the steps down"
    return f"{who} share {counted(available, 'cores')}: {more}{setting}"


def counted(count: int, plural: str) -> str:
    """Return a count with its noun in the singular or plural.

    Examples
    --------
    >>> counted(1, "processes"), counted(2, "cores")
    ('1 process', '2 cores')
    """
    return f"{count} {plural if count != 1 else re.sub('(?<=ss)es$|s$', '', plural)}"


def resident_mib(pid: int | str = "self") -> float | None:
    """Return the resident memory of a process in MiB; None if there is no /proc."""
    found = _first_match(f"/proc/{pid}/status", r"VmRSS:\s*(\d+) kB")
    return round(int(found) / 1024, 1) if found else None


def git_commit() -> str | None:
    """Return the commit of the running code, with a plus sign if files differ from it; None outside of git.

    The environment variable COMMIT takes precedence, for copies of the code without a git repository.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]

    def git(*words: str) -> str:
        command, folder = ["git", *words], Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails if this code is not in the repository around it
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.SubprocessError):
        return None


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
    """Return the first match of a pattern in a system file; None if there is no match or no file."""
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text(errors="replace"))
        return found[1].strip() if found else None
    return None

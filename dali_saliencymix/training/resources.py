"""What this process holds of the machine's resources: to see in a log whether a long run leaks."""

from __future__ import annotations

import os
from pathlib import Path


def resources_in_use() -> dict[str, int]:
    """Return the resident memory in MB and the number of open files of this process; {} where Linux's /proc is not."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        open_files = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    except OSError:
        return {}
    return {"resident_mb": pages * os.sysconf("SC_PAGE_SIZE") // 2**20, "open_files": open_files}

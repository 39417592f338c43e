"""Drop files from the page cache, check that they are gone, and read them again.

``posix_fadvise`` asks the kernel to drop files, and needs only read permission. The kernel may not do it: on file
systems in memory, and for pages that another process has mapped or that are not written back. ``mincore`` counts the
resident pages, so that nothing is measured with files that stayed in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

MOST_RESIDENT = 0.05  # share of the bytes after dropping


def read_into_memory(files: Iterable[str]) -> None:
    """Read files into the page cache."""
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def why_not_dropped(files: Iterable[str]) -> str | None:
    """Drop files from memory; return why that failed, or None if they are gone."""
    files = list(files)
    try:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written back cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        share = resident_share(files)
    except (OSError, ValueError) as error:
        return f"the files' pages could not be dropped from memory ({error})"
    if share is None:
        return "it is unknown which of the files' pages are in memory: write access or mincore is missing"
    if share > MOST_RESIDENT:
        return f"{share:.0%} of the files' bytes stayed in memory after they were dropped"
    return None


def resident_share(files: Iterable[str]) -> float | None:
    """Return the share of the bytes of files, 0 to 1, that is in the page cache; None if unknown.

    Notes
    -----
    The kernel reports the true state only of files that the user owns or may write. For other files it reports all or
    no pages as resident, so the result is None if there is such a file.

    Examples
    --------
    >>> resident_share([]) is None
    True
    """
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return None
    pages = resident = 0
    for file in files:
        found = Path(file).stat()
        if found.st_size == 0:
            continue
        if not os.access(file, os.W_OK) and found.st_uid != os.geteuid():
            return None
        count = -(-found.st_size // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * count)()
        with open(file, "rb") as stream:
            # ctypes needs a writable mapping for its address; nothing is written.
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(stream.fileno(), found.st_size, flags=mmap.MAP_PRIVATE, prot=protection)
        try:
            start = ctypes.c_char.from_buffer(mapped)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(found.st_size), seen)
            del start  # the mapping cannot be closed while something points into it
        finally:
            mapped.close()
        if failed:
            return None
        pages += count
        resident += sum(page & 1 for page in seen)
    return resident / pages if pages else None


def memory_bytes() -> int | None:
    """Return the bytes of memory that are available to this process for the page cache; None if unknown."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # the file is missing, or holds "max"
            limits.append(int(Path(path).read_text()))
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return min(limits) if limits else None

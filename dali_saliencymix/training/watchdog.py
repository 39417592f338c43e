"""A watchdog thread that ends a process without progress, and reports what the process was waiting for."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dali_saliencymix.training.distributed import announce_failure

# Factors of the time limit. If one process waits for data and others wait for that process, it must be the first to
# report. At the start, the first steps may compile.
WAITING_FOR_DATA, WAITING_FOR_OTHERS = "waiting for data", "waiting for the other processes"
_PATIENCE_FOR_DATA, _PATIENCE_ELSEWHERE = 1.0, 1.5
_PATIENCE_AT_THE_START = 3.0
_FIRST_BEATS = 10

_PROBE_SECONDS = 5.0

_GUARD = Path(__file__).with_name("watchdog_guard.py")

# System calls that may hang on a file, with the index of the argument that points to its name.
_NAMES_A_FILE = {
    "x86_64": {2: 0, 4: 0, 6: 0, 257: 1, 262: 1, 332: 1},  # open, stat, lstat, openat, newfstatat, statx
    "aarch64": {56: 1, 79: 1, 291: 1},  # openat, newfstatat, statx
}


class Watchdog:
    """Ends the process with status 1 if no `beat` comes for `seconds`.

    The limit is 1.5 times as long if the process is not waiting for data, and three times as long for the first beats.

    The watchdog reports what the process was doing, the files below `roots` for which it was waiting, if these can be
    determined, and the Python stacks of all threads. If C code hangs and holds the GIL, `watchdog_guard` ends the
    process with SIGABRT after six times `seconds`. Time in which the process is suspended does not count. With 0, there
    is no limit.
    """

    def __init__(self, seconds: float, rank: int = 0, roots: Sequence[str | Path] = ()) -> None:
        self._seconds = seconds
        self._rank = rank
        # Both as given to a reader and with links resolved, as the system reports them.
        self._roots = [way(root) for root in roots for way in (os.path.abspath, os.path.realpath)]
        self._beats = 0
        self._doing = "starting"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._pause = min(seconds / 10, 5.0)
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            if not faulthandler.is_enabled():
                faulthandler.enable()  # SIGABRT then writes the stacks, even if the GIL is held
            patience = 2 * _PATIENCE_AT_THE_START * self._seconds
            line = self._line(patience, "C code holds the GIL")
            command = [sys.executable, "-I", "-S", str(_GUARD), str(self._pause), str(patience), line]
            self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._guard is not None:
            self._guard.kill()  # closing its stdin is not enough, as worker processes have it open, too
            self._guard.communicate()

    def beat(self, doing: str) -> None:
        """Record progress, and what the process does next: "waiting for data", "in a step", ..."""
        self._doing = doing
        self._beats += 1

    def _watch(self) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        seen, stalled = 0, 0.0
        # Count pauses instead of reading a clock: there are none while the process is suspended.
        while not self._closed.wait(self._pause):
            with contextlib.suppress(BrokenPipeError):  # the guard was killed
                self._guard.stdin.write(b".")
            beats, doing = self._beats, self._doing
            stalled = stalled + self._pause if beats == seen else 0.0
            seen = beats
            patience = _PATIENCE_FOR_DATA if doing == WAITING_FOR_DATA else _PATIENCE_ELSEWHERE
            if beats < _FIRST_BEATS:
                patience *= _PATIENCE_AT_THE_START
            if stalled > patience * self._seconds:
                self._give_up(doing, stalled)

    def _line(self, seconds: float, what: str) -> str:
        after = f"no progress for {seconds:.0f} seconds (--stall-timeout {self._seconds:g})"
        return f"train.py: error: process {self._rank}: {after} while {what}"

    def _give_up(self, doing: str, seconds: float) -> None:
        if not announce_failure() and doing == WAITING_FOR_OTHERS:
            return  # the process for which this one waits reports the reason
        stalled, open_files = stalled_files(self._roots)
        said = ("no answer from", stalled) if stalled else ("open files:", open_files)
        why = f"; {said[0]} {', '.join(said[1][:5])}" if said[1] else ""
        sys.stderr.write(f"{self._line(seconds, doing)}{why}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def stalled_files(roots: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files below `roots` that do not respond, and all files below `roots` that this process uses.

    The files are those named in pending system calls of a thread, and those that are open or memory-mapped. Each is
    opened and read again; a file responds if this succeeds or fails within a few seconds.
    """
    waited_for = [path for path in _files_in_system_calls() if _is_below(path, roots)]
    open_files = [path for path in _open_files() if _is_below(path, roots) and path not in waited_for]
    candidates = [*waited_for, *open_files[:100]]
    answers = {path: threading.Event() for path in candidates}
    for path, answered in answers.items():
        threading.Thread(target=_read_a_little, args=(path, answered), daemon=True).start()
    deadline = time.monotonic() + _PROBE_SECONDS
    silent = [path for path, answered in answers.items() if not answered.wait(max(deadline - time.monotonic(), 0))]
    return silent, [*waited_for, *open_files]


def _read_a_little(path: str, answered: threading.Event) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as stream:  # an error is an answer
        stream.read(1)
    answered.set()


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _files_in_system_calls() -> list[str]:
    """Return the names of files in the pending system calls of this process's threads."""
    arguments = _NAMES_A_FILE.get(platform.machine(), {})
    paths = []
    for task in _listed("/proc/self/task"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            number, *values = Path(f"/proc/self/task/{task}/syscall").read_text().split()
            if number.isdecimal() and int(number) in arguments:
                address = int(values[arguments[int(number)]], 16)
                paths.append(os.path.abspath(os.fsdecode(_text_at(address))))
    return list(dict.fromkeys(paths))


def _text_at(address: int) -> bytes:
    """Return the null-terminated string at an address in the memory of this process."""
    # Through /proc, where an address that is no longer valid is an error, not a crash.
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(memory, 4096, address).split(b"\0")[0]
    finally:
        os.close(memory)


def _open_files() -> list[str]:
    """Return the files that this process has opened or memory-mapped."""
    paths = []
    for number in _listed("/proc/self/fd"):
        with contextlib.suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        paths += [line[line.index("/") :] for line in maps if "/" in line]
    return list(dict.fromkeys(paths))


def _listed(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []

"""A thread that ends a process which has stood still for too long, and says what it was waiting for."""

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

# How much longer than for data to wait in what may take its time: a process that waits for another one which waits
# for a file has to leave the word to it, and a first step compiles.
WAITING_FOR_DATA, WAITING_FOR_OTHERS = "waiting for data", "waiting for the other processes"
_PATIENCE = {WAITING_FOR_DATA: 1.0}
_PATIENCE_ELSEWHERE = 1.5
_PATIENCE_AT_THE_START = 3.0
_FIRST_BEATS = 10

_PROBE_SECONDS = 5.0

_GUARD = Path(__file__).with_name("watchdog_guard.py")

# System calls that may hang on a file, with the number of the argument that points to its name.
_NAMES_A_FILE = {
    "x86_64": {2: 0, 4: 0, 6: 0, 257: 1, 262: 1, 332: 1},  # open, stat, lstat, openat, newfstatat, statx
    "aarch64": {56: 1, 79: 1, 291: 1},  # openat, newfstatat, statx
}


class Watchdog:
    """Ends the process with status 1 if no `beat` comes for `seconds`, or half as long again if it waits for no data.

    It writes what the process was doing, the files below `roots` that it was waiting for where that can be found out,
    and the Python stack of every thread. Where C code hangs and keeps the GIL, `watchdog_guard` ends the process by
    SIGABRT, after six times as long. Time in which the process is suspended does not count. With 0 it waits for ever.
    """

    def __init__(self, seconds: float, rank: int = 0, roots: Sequence[str | Path] = ()) -> None:
        self._seconds = seconds
        self._rank = rank
        # As they are given to a reader, and as the system knows them.
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
                faulthandler.enable()  # with it SIGABRT writes the stacks, whoever holds the GIL
            patience = 2 * _PATIENCE_AT_THE_START * self._seconds
            line = self._line(patience, "C code keeps the GIL")
            command = [sys.executable, "-I", "-S", str(_GUARD), str(self._pause), str(patience), line]
            self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._guard is not None:
            self._guard.kill()  # closing its stdin is not enough: worker processes have it too
            self._guard.communicate()

    def beat(self, doing: str) -> None:
        """Note that the process goes on, and what it does next: "waiting for data", "in a step", ..."""
        self._doing = doing
        self._beats += 1

    def _watch(self) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        seen, stalled = 0, 0.0
        # Pauses are counted, and no clock is read: in the time in which the process is suspended there are none.
        while not self._closed.wait(self._pause):
            with contextlib.suppress(BrokenPipeError):  # someone has killed the guard
                self._guard.stdin.write(b".")
            beats, doing = self._beats, self._doing
            stalled = stalled + self._pause if beats == seen else 0.0
            seen = beats
            patience = _PATIENCE.get(doing, _PATIENCE_ELSEWHERE)
            if beats < _FIRST_BEATS:
                patience *= _PATIENCE_AT_THE_START
            if stalled > patience * self._seconds:
                self._give_up(doing, stalled)

    def _line(self, seconds: float, what: str) -> str:
        after = f"no progress for {seconds:.0f} seconds (--stall-timeout {self._seconds:g})"
        return f"train.py: error: process {self._rank}: {after} while {what}"

    def _give_up(self, doing: str, seconds: float) -> None:
        if not announce_failure() and doing == WAITING_FOR_OTHERS:
            return  # the one that is waited for is about to say why, and ends
        stalled, open_files = stalled_files(self._roots)
        said = ("no answer from", stalled) if stalled else ("open at this moment:", open_files)
        why = f"; {said[0]} {', '.join(said[1][:5])}" if said[1] else ""
        sys.stderr.write(f"{self._line(seconds, doing)}{why}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def stalled_files(roots: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files below `roots` that do not answer, and those that this process has open.

    A thread that hangs in a system call with a file's name is taken at its word; an open or mapped file is opened and
    read once more, which has to succeed within a few seconds.
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
    """Return the names of files that threads of this process are waiting for in the system."""
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
    """Return the text in the memory of this process that begins at an address and ends with a zero."""
    # Through the file system, where an address that is no longer valid is an error and not the end of the process.
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(memory, 4096, address).split(b"\0")[0]
    finally:
        os.close(memory)


def _open_files() -> list[str]:
    """Return the files that this process has open, and those that it has mapped into memory."""
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

"""Lock an output folder for one run, with a lock file that names its owner and shows whether the owner is alive.

The lock is a plain file that only one process can create, on local and network file systems, which need not support
locks. A process on the same machine is looked up in the process table. A process on another machine or in another
container cannot be looked up: it updates the modification time of its lock every few seconds, and a process that wants
the folder watches that time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from pathlib import Path

from dali_saliencymix._errors import naming
from dali_saliencymix.training.distributed import end_at_once

LOCK = "run.lock"

_BEAT_SECONDS = 10.0
_LOOKS, _LOOK_SECONDS = 60, 1.0  # if a lock does not change in so many looks, its process is dead


class FolderInUseError(OSError):
    """Another run writes into the folder. The one-line message names the folder and the process."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that created a lock, as the lock file holds it."""

    host: str  # name of the machine
    pid: int
    since: float  # creation time of the lock, in seconds since 1970
    place: str  # scope in which `pid` is valid: boot ID of the machine, and PID namespace
    started: str  # start time of the process, in clock ticks since that boot
    token: str  # random

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process as the owner of a lock that it creates now."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, time.time(), _place(), _start(pid), secrets.token_hex(16))

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"

    def has_ended(self) -> bool | None:
        """Return whether the process has ended; None if it cannot be looked up from here."""
        if not self.place or self.place != _place():
            return None
        try:
            os.kill(self.pid, 0)
            return _start(self.pid) != self.started  # the PID may have been reused
        except (FileNotFoundError, ProcessLookupError):
            return True
        except PermissionError:  # a process of another user
            return False


def _place() -> str:
    """Return the boot ID of this machine and the PID namespace; "" if these are hidden."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start(pid: int) -> str:
    """Return the start time of a process; "" if it is a zombie."""
    state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return "" if state in (b"Z", b"X") else fields[18].decode()


class FolderLock:
    """Context manager that locks an output folder for this process, and creates the folder if necessary.

    A folder that it created is removed if it is empty at the end, for example after an invalid option.

    The lock of a dead process is removed, and stderr reports it. This takes a minute for a process of another machine.
    If another run takes over the lock, which can happen while this process is suspended, this process exits at once
    with status 1.

    Parameters
    ----------
    folder : path or None
        The folder. With None nothing is locked; only the process that writes needs the lock.
    prog : str
        Name of the program in messages.

    Raises
    ------
    FolderInUseError
        On entry, if another process that is alive, or may be, holds the folder.
    OSError
        On entry, if the lock cannot be written. The message names the file.
    """

    def __init__(self, folder: Path | None, prog: str = "train.py") -> None:
        self._path = None if folder is None else folder / LOCK
        self._prog = prog
        self._owner = Owner.this_process()
        self._has_made_folder = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)

    def __enter__(self) -> FolderLock:
        if self._path is not None:
            self._has_made_folder = not self._path.parent.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take(self._path)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._closed.set()
            self._thread.join()
            with contextlib.suppress(OSError):  # a lock of an ended process is harmless
                if (found := _read(self._path)) and found[0] == self._owner:
                    self._path.unlink()
            if self._has_made_folder:
                with contextlib.suppress(OSError):  # not empty
                    self._path.parent.rmdir()

    def check(self) -> None:
        """End the process if another run has taken over the folder; recreate the lock if someone has removed it."""
        if self._path is None:
            return
        while not (found := _read(self._path)):
            if self._created(self._path):
                return
        if found[0] not in (self._owner, None):  # None: it is being written, maybe by another thread
            taken = f"taken over by another run, {_named(found[0])}"
            end_at_once(f"{self._prog}: error: {self._path.parent}: {taken}")

    def _beat(self) -> None:
        assert self._path is not None
        while not self._closed.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file server may be unavailable for a while
                self.check()
                os.utime(self._path)

    def _take(self, path: Path) -> None:
        while not self._created(path):
            found = _read(path)
            if found is None:  # released in between
                continue
            if not self._is_left(path, found):
                msg = f"{path.parent}: another run writes there, {_named(found[0])}; give another --output-dir"
                raise FolderInUseError(msg)
            # Several processes may find the same stale lock. Only one at a time may remove it, if it is unchanged.
            removal = path.with_name(f"{path.name}.removal")
            self._take(removal)
            try:
                if _read(path) == found:
                    path.unlink()
                    why = "its process has ended" if found[0] and found[0].has_ended() else "no sign of life"
                    sys.stderr.write(f"{path}: removed, {why}: {_named(found[0])}\n")
            finally:
                removal.unlink()

    def _created(self, path: Path) -> bool:
        """Create a lock; return False if it exists already."""
        try:
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with naming(path), open(number, "w", encoding="utf-8") as stream:
                json.dump(dataclasses.asdict(self._owner), stream)
        except OSError:
            path.unlink()
            raise
        return True

    def _is_left(self, path: Path, found: tuple[Owner | None, int]) -> bool:
        """Return whether the process of a lock has ended; also True if the caller should read the lock again."""
        owner, _ = found
        ended = owner.has_ended() if owner else None
        if ended is not None:
            return ended
        sys.stderr.write(f"{path}: watched for {_LOOKS * _LOOK_SECONDS:.0f} s, to see if {_named(owner)} still runs\n")
        # Count looks instead of reading a clock, since this process or the file server may be suspended for a while.
        for _ in range(_LOOKS):
            time.sleep(_LOOK_SECONDS)
            now = _read(path)
            if now != found:
                return now is None or owner is None  # it is gone, or has become readable: read it again
        return True


def _read(path: Path) -> tuple[Owner | None, int] | None:
    """Return the owner of a lock (None if unreadable) and its modification time; None if there is no lock.

    OSError if the path is not a regular file, since opening it might block for ever.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "should be the lock file of a run, but is not a file; remove it", str(path))
        with open(path, "rb") as stream:
            text, changed = stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    return _owner_in(text), changed


def _owner_in(text: bytes) -> Owner | None:
    try:
        owner = Owner(**json.loads(text))
    except (TypeError, ValueError, RecursionError):  # partly written, or damaged
        return None
    names = (owner.host, owner.place, owner.started, owner.token)
    numbers = isinstance(owner.pid, int) and isinstance(owner.since, (int, float))
    if numbers and 0 < owner.pid < 2**31 and 0 <= owner.since < 2**33 and all(isinstance(name, str) for name in names):
        return owner
    return None


def _named(owner: Owner | None) -> str:
    return str(owner) if owner else "an unknown process"

"""One run at a time in an output folder: a lock file that says who writes there, and that tells dead from living.

It is a plain file that only one process can create, on local and on network file systems, which need not have locks of
their own. A process of this machine is looked up. One of another machine or container cannot be: it changes the time of
its file every few seconds, and a process that wants the folder watches that, by its own clock.
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
_LOOKS, _LOOK_SECONDS = 60, 1.0  # a lock that stays the same in so many looks is that of a dead process


class FolderInUseError(OSError):
    """Another run writes into the folder. The text names both in one line."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that has created a lock.

    Attributes
    ----------
    host : str
        Name of the machine.
    pid : int
        Number of the process.
    since : float
        When it has created the lock, in seconds since 1970.
    place : str
        Where `pid` names this process: a boot of a machine, and a namespace of process numbers.
    started : str
        When the process was started, in clock ticks since that boot.
    token : str
        A random number.
    """

    host: str
    pid: int
    since: float
    place: str
    started: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process as the owner of a lock that it creates now."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, time.time(), _place(), _start(pid), secrets.token_hex(16))

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"

    def has_ended(self) -> bool | None:
        """Return whether the process has ended; None if that cannot be looked up from here."""
        if not self.place or self.place != _place():
            return None
        try:
            os.kill(self.pid, 0)
            return _start(self.pid) != self.started  # the number may be that of another process by now
        except (FileNotFoundError, ProcessLookupError):
            return True
        except PermissionError:  # a process of another user
            return False


def _place() -> str:
    """Return the boot of this machine and the namespace of its process numbers; "" where that is hidden."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start(pid: int) -> str:
    """Return when a process was started; "" if it has ended, and its parent has not asked for its status yet."""
    state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return "" if state in (b"Z", b"X") else fields[18].decode()


class FolderLock:
    """Keeps an output folder for this process, as a context; the folder is made where there is none.

    A folder that was made and is empty at the end, as after a mistake in the options, is removed.

    A lock that a dead process has left is removed, which stderr says. If it is that of another machine, this takes a
    minute. If another run takes the lock away, which can happen to a process that is suspended, this process ends at
    once with status 1.

    Parameters
    ----------
    folder : path or None
        The folder. With None nothing is locked, as in all processes but the one that writes.
    prog : str
        Name of the program in messages.

    Raises
    ------
    FolderInUseError
        When it is entered, if another process that lives, or may live, has the folder.
    OSError
        When it is entered, if the lock cannot be written. It names the file.
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
            with contextlib.suppress(OSError):  # the lock of a process that has ended does no harm
                if (found := _read(self._path)) and found[0] == self._owner:
                    self._path.unlink()
            if self._has_made_folder:
                with contextlib.suppress(OSError):  # it is not empty
                    self._path.parent.rmdir()

    def check(self) -> None:
        """End the process if the folder is no longer its own; make the lock again if someone has removed it."""
        if self._path is None:
            return
        while not (found := _read(self._path)):
            if self._created(self._path):
                return
        if found[0] not in (self._owner, None):  # None: it is being written, maybe by another thread of this process
            taken = f"taken over by another run, {_named(found[0])}"
            end_at_once(f"{self._prog}: error: {self._path.parent}: {taken}")

    def _beat(self) -> None:
        assert self._path is not None
        while not self._closed.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # of a file server that is away for a while
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
            # Several processes may find the same lock left behind: one at a time removes it, if it still is that one.
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
        """Create a lock; return False if there is one."""
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
        """Return whether the process of a lock has ended; also True if the lock has gone, or can be read only now."""
        owner, _ = found
        ended = owner.has_ended() if owner else None
        if ended is not None:
            return ended
        sys.stderr.write(f"{path}: watched for {_LOOKS * _LOOK_SECONDS:.0f} s, to see if {_named(owner)} still runs\n")
        # Looks are counted, and no clock is read: this process, or the file server, may stand still for a while too.
        for _ in range(_LOOKS):
            time.sleep(_LOOK_SECONDS)
            now = _read(path)
            if now != found:
                return now is None or owner is None  # to be looked at anew
        return True


def _read(path: Path) -> tuple[Owner | None, int] | None:
    """Return the owner of a lock, None if that is not readable, and the time of its file; None if there is no lock.

    An OSError says if something else than a file has that name: opening it might wait for ever.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "not a file, as the lock of a run would be; remove it", str(path))
        with open(path, "rb") as stream:
            text, changed = stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    return _owner_in(text), changed


def _owner_in(text: bytes) -> Owner | None:
    try:
        owner = Owner(**json.loads(text))
    except (TypeError, ValueError, RecursionError):  # it is being written, the disk was full, or it is damaged
        return None
    names = (owner.host, owner.place, owner.started, owner.token)
    numbers = isinstance(owner.pid, int) and isinstance(owner.since, (int, float))
    if numbers and 0 < owner.pid < 2**31 and 0 <= owner.since < 2**33 and all(isinstance(name, str) for name in names):
        return owner
    return None


def _named(owner: Owner | None) -> str:
    return str(owner) if owner else "a process that its lock does not name"

"""A program that aborts its parent process if that does not write to it for too long.

    python watchdog_guard.py PAUSE PATIENCE LINE

The parent writes to the program's stdin every PAUSE seconds. After PATIENCE seconds without a byte, the program writes
LINE to stderr and sends SIGABRT to the parent. Time is counted in waits of PAUSE seconds, and does not count while the
parent is suspended. The program ends with its parent.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def is_suspended(pid: int) -> bool:
    """Return whether a process is stopped by SIGSTOP and the like, or by a debugger."""
    with open(f"/proc/{pid}/stat", "rb") as stream:
        return stream.read().rpartition(b")")[2].split()[0] in (b"T", b"t")


def main() -> None:
    """Watch the parent until it ends or closes stdin."""
    pause, patience, line = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    # Ignore signals to the whole process group: they are for the parent, which may continue to run.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent, silent = os.getppid(), 0.0
    while os.getppid() == parent:
        if select.select([0], [], [], pause)[0]:
            if not os.read(0, 4096):
                return
            silent = 0.0
        elif not is_suspended(parent):
            silent += pause
            if silent > patience:
                sys.stderr.write(f"{line}\n")
                os.kill(parent, signal.SIGABRT)
                return


if __name__ == "__main__":
    main()

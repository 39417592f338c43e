"""Tasks for the worker processes of a scan. The workers import this module, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time

from dali_saliencymix.datasets.damage import Examined


def die_on_bad(file: str) -> Examined:
    """Die on one file."""
    if "bad" in file:
        os.kill(os.getpid(), signal.SIGKILL)
    return Examined({"words": file})


def hang_on_bad(file: str) -> Examined:
    """Hang on one file."""
    while "bad" in file:
        time.sleep(1)
    return Examined({"words": file})


def print_blocked() -> None:
    """Print whether SIGINT is blocked in this process."""
    sys.stdout.write(f"{signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())}\n")

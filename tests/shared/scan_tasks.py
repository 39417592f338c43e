"""What tests have the processes of a scan do, which import it: so this imports little."""

from __future__ import annotations

import os
import signal
import sys
import time

from dali_saliencymix.datasets.damage import Examined


def die_on_bad(file: str) -> Examined:
    """Be killed by one file."""
    if "bad" in file:
        os.kill(os.getpid(), signal.SIGKILL)
    return Examined({"words": file})


def hang_on_bad(file: str) -> Examined:
    """Never come back from one file."""
    while "bad" in file:
        time.sleep(1)
    return Examined({"words": file})


def print_blocked() -> None:
    """Print whether Ctrl-C is kept away from this process."""
    sys.stdout.write(f"{signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())}\n")

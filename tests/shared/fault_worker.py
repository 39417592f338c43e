"""Run `train.py` for the tests of faults: record each training batch, and inject a fault at one of them.

    python fault_worker.py RECORD FAULT [options of train.py]

RECORD.0, RECORD.1, ... get a line for each batch of a process, before its step: epoch, step, a hash of all tensors.
FAULT is ``none`` or ``WHAT@RANK:STEP``. The fault happens in process RANK when it gets its STEP-th batch, counted from
1 in this process; if STEP is ``val``, at the first batch of a validation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys

import psutil

import train
from shared import tiny_model  # noqa: F401
from shared.pipes import stall


def happen(what: str) -> None:
    if what == "raise":
        msg = "enough of this"
        raise ZeroDivisionError(msg)
    if what.startswith("stall "):
        stall(what.removeprefix("stall "))
    elif what.startswith("vanish "):
        shutil.rmtree(what.removeprefix("vanish "))
    elif what.endswith(" to all"):  # from another process: workers treat a signal from their main process differently
        processes = [str(process.pid) for process in (*psutil.Process().children(), psutil.Process())]
        subprocess.run(["kill", "-s", what.removesuffix(" to all").removeprefix("SIG"), *processes], check=True)
    elif what == "SIGKILL of torchrun":
        os.kill(os.getppid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.Signals[what])


def main() -> int:
    record, fault, *arguments = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    what, _, where = fault.partition("@")
    real_batches, trainers, count = train.Lockstep.batches, [], 0

    class Trainer(train.Trainer):
        def __init__(self, *args):
            trainers.append(self)
            super().__init__(*args)

    def batches(self, loader, *monitor):
        nonlocal count
        for batch in real_batches(self, loader, *monitor):
            if len(batch) == 4:
                count += 1
                digest = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in batch)).hexdigest()
                with open(f"{record}.{rank}", "a") as stream:
                    stream.write(f"{trainers[-1].epoch} {trainers[-1].step} {digest}\n")
            if where == f"{rank}:{count if len(batch) == 4 else 'val'}":
                happen(what)
            yield batch

    train.Trainer = Trainer
    train.Lockstep.batches = batches
    sys.argv[1:] = arguments
    return train.main()


if __name__ == "__main__":
    sys.exit(main())

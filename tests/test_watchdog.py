"""The watchdog ends a process that hangs and reports what it waits for; with real processes and files that block."""

from __future__ import annotations

import os
import signal

import pytest
from shared.programs import run_program

from dali_saliencymix.training import watchdog
from dali_saliencymix.training.watchdog import Watchdog, stalled_files

pytest_plugins = ["shared.training_fixtures"]

LOAD = """
import sys, torch
from dali_saliencymix.training import watchdog as module
from shared.pipes import stall
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.training.watchdog import Watchdog
from dali_saliencymix.loaders.imagenet import training_loader
folder = list_image_folder(sys.argv[1])
stall(sys.argv[2])
module._PROBE_SECONDS = 1.0
loader = training_loader(folder, batch_size=8, num_threads=1, device=torch.device("cpu"), crop_size=32)
with Watchdog(1, rank=3, roots=[sys.argv[1]]) as watchdog:
    while True:
        for number, batch in enumerate(loader):
            watchdog.beat("in a step")
            watchdog.beat("waiting for data")
"""

HANG = """
import ctypes, os, signal, subprocess, sys, time
from dali_saliencymix.training.watchdog import Watchdog
with Watchdog(0.5, roots=[os.path.dirname(__file__)]) as watchdog:
    for _ in range(20):
        watchdog.beat("in a step")
    if sys.argv[1] == "sleep":
        time.sleep(1000)
    if sys.argv[1] == "holding the GIL":
        ctypes.PyDLL(None).sleep(1000)
    if sys.argv[1] == "suspended":
        subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(20):
        time.sleep(0.1)
        watchdog.beat("waiting for data")
print("done")
"""


def test_a_file_that_gives_nothing_is_named(own_data, tmp_path):
    file = own_data / "train" / "red_square" / "00003.jpg"
    (tmp_path / "load.py").write_text(LOAD)
    ended = run_program(tmp_path / "load.py", own_data / "train", file, check=False)
    assert ended.returncode == 1
    (line,) = (line for line in ended.stderr.splitlines() if "error:" in line)
    assert "process 3: no progress for " in line
    assert line.endswith(f"(--stall-timeout 1) while waiting for data; no answer from {file}")
    assert "in share_outputs" in ended.stderr  # the stack of the waiting thread


@pytest.mark.parametrize(
    ("how", "status", "doing"),
    [("sleep", 1, "in a step"), ("holding the GIL", -signal.SIGABRT, "C code holds the GIL")],
)
def test_a_process_that_hangs_elsewhere_is_ended_with_its_stack(tmp_path, how, status, doing):
    (tmp_path / "hang.py").write_text(HANG)
    ended = run_program(tmp_path / "hang.py", how, check=False)
    assert ended.returncode == status
    assert ended.stdout == ""
    assert 'hang.py", line' in ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if "error:" in line and "Fatal" not in line)
    assert line.endswith(f"(--stall-timeout 0.5) while {doing}")


# Suspended for longer than all limits of the watchdog; the longest is six times its option.
@pytest.mark.parametrize("how", ["suspended", "beats for four times as long as it may stand still"])
def test_a_process_that_goes_on_is_left_alone(tmp_path, how):
    (tmp_path / "hang.py").write_text(HANG)
    ended = run_program(tmp_path / "hang.py", how)
    assert ended.stdout == "done\n"
    assert ended.stderr == ""


def test_nothing_is_watched_with_0_seconds():
    with Watchdog(0) as watching:
        watching.beat("waiting for data")
        assert not watching._thread.is_alive()


def test_files_that_answer_are_told_from_those_that_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_PROBE_SECONDS", 1.0)
    whole, pipe, elsewhere = tmp_path / "data" / "a.jpg", tmp_path / "data" / "b.jpg", tmp_path / "c"
    whole.parent.mkdir()
    whole.write_bytes(b"x")
    elsewhere.write_bytes(b"x")
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)  # opens at once, and reading waits
    with open(whole, "rb"), open(elsewhere, "rb"):
        silent, known = stalled_files([str(tmp_path / "data")])
    os.write(end, b"x")  # unblocks the thread that reads
    os.close(end)
    assert silent == [str(pipe)]
    assert sorted(known) == [str(whole), str(pipe)]

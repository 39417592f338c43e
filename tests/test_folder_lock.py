"""The lock of an output folder, with real processes: running, killed, or apparently on another machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from shared.programs import run_program, torchrun
from shared.training_fixtures import TINY

from dali_saliencymix.training import folder_lock
from dali_saliencymix.training.folder_lock import LOCK, FolderInUseError, FolderLock, Owner

pytest_plugins = ["shared.training_fixtures"]

HOLD = """
import os, signal, sys, time
from pathlib import Path
from dali_saliencymix.training import folder_lock
folder_lock._BEAT_SECONDS = 0.05
with folder_lock.FolderLock(Path(sys.argv[1])) as lock:
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "robbed":
        (Path(sys.argv[1]) / "run.lock").write_text(sys.argv[3])
        time.sleep(60)
"""


def hold(folder, how, *more, check=False):
    return run_program("-c", HOLD, folder, how, *more, check=check)


def write_lock(folder, **changed) -> Owner:
    """Write a lock file with the data of this process, except what is `changed`."""
    owner = dataclasses.replace(Owner.this_process(), **changed)
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


@pytest.fixture
def few_looks(monkeypatch):
    monkeypatch.setattr(folder_lock, "_LOOKS", 5)
    monkeypatch.setattr(folder_lock, "_LOOK_SECONDS", 0.1)


def test_a_second_run_is_refused_at_once_and_names_the_first(data_folder, tmp_path, train_here):
    folder = tmp_path / "run"
    options = (data_folder, *TINY, "--epochs", "1", "--output-dir", folder)
    named = f"another run writes there, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-')}"
    with FolderLock(folder):
        ended = train_here(*options)
        assert ended.status == 1
        assert ended.error.startswith(f"train.py: error: {folder}: {named}")
        ended = torchrun("train.py", *options, "-b", "4", check=False)
        assert ended.returncode == 1
        assert ended.stderr.count("error: ") == ended.stderr.count(f"{folder}: {named}") == 1
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert train_here(*options).status == 0
    assert LOCK not in [path.name for path in folder.iterdir()]


def test_the_lock_of_a_killed_process_is_removed_and_its_number_may_be_in_use_again(tmp_path, capfd):
    assert hold(tmp_path, "killed").returncode == -signal.SIGKILL
    pid = json.loads((tmp_path / LOCK).read_text())["pid"]
    with FolderLock(tmp_path):
        assert f"{LOCK}: removed, its process has ended: process {pid} on " in capfd.readouterr().err
    write_lock(tmp_path, started="1")  # from another process with the same id as this one
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["started"] != "1"
    assert list(tmp_path.iterdir()) == []


def test_a_process_whose_status_nobody_has_asked_for_yet_has_ended(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "killed"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with FolderLock(tmp_path):
        pass
    process.wait()


@pytest.mark.usefixtures("few_looks")
def test_a_lock_of_another_machine_is_watched(tmp_path, capfd):
    elsewhere = write_lock(tmp_path, host="elsewhere", place="another boot", since=0.0)
    with FolderLock(tmp_path):  # the process of the lock has ended
        watched, removed = capfd.readouterr().err.splitlines()
        assert watched.startswith(f"{tmp_path / LOCK}: watched for ")
        assert removed == f"{tmp_path / LOCK}: removed, no sign of life: {elsewhere}"
    write_lock(tmp_path, host="elsewhere", place="another boot")

    def beat():
        time.sleep(0.2)
        os.utime(tmp_path / LOCK)

    def release():
        time.sleep(0.2)
        (tmp_path / LOCK).unlink()

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(FolderInUseError, match=f"{tmp_path}: another run writes there, process .* on elsewhere, since"):
        FolderLock(tmp_path).__enter__()
    thread.join()
    thread = threading.Thread(target=release)
    thread.start()
    with FolderLock(tmp_path):
        thread.join()
    (tmp_path / LOCK).touch()  # from a process that was killed before it wrote to the lock
    with FolderLock(tmp_path):
        assert "an unknown process still runs" in capfd.readouterr().err
    assert elsewhere.has_ended() is None


@pytest.mark.parametrize(
    "damage",
    [b"\x86\xff", b"[" * 100_000, b"{}", {"pid": "1"}, {"pid": 10**30}, {"since": 1e300}, {"since": None}, {"host": 1}],
    ids=["no text", "deep", "empty", "pid is text", "pid is huge", "since is huge", "no since", "host is a number"],
)
@pytest.mark.usefixtures("few_looks")
def test_a_damaged_lock_is_watched_and_removed(tmp_path, capfd, damage):
    if isinstance(damage, dict):
        write_lock(tmp_path, **damage)
    else:
        (tmp_path / LOCK).write_bytes(damage)
    with FolderLock(tmp_path):
        assert "removed, no sign of life: an unknown process\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")], ids=["pipe", "d", "link"]
)
def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(OSError, match=f"remove it: '{tmp_path / LOCK}'"):
        FolderLock(tmp_path).__enter__()


def test_of_many_that_find_a_dead_lock_one_gets_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_LOOK_SECONDS", 0.02)
    for _ in range(20):
        write_lock(tmp_path, started="1")
        (tmp_path / f"{LOCK}.removal").write_bytes((tmp_path / LOCK).read_bytes())  # as if killed while removing it
        together, got = threading.Barrier(8), []

        def enter(together=together, got=got):
            lock = FolderLock(tmp_path)
            together.wait()
            with contextlib.suppress(FolderInUseError):
                got.append(lock.__enter__())

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        got[0].__exit__()


def test_a_process_that_has_lost_the_folder_ends_and_one_whose_lock_was_removed_makes_it_again(tmp_path):
    other = dataclasses.replace(Owner.this_process(), host="elsewhere")
    ended = hold(tmp_path, "robbed", json.dumps(dataclasses.asdict(other)))
    assert ended.returncode == 1
    assert ended.stderr == f"train.py: error: {tmp_path}: taken over by another run, {other}\n"
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"
    (tmp_path / LOCK).unlink()
    with FolderLock(tmp_path) as lock:
        before = (tmp_path / LOCK).read_text()
        (tmp_path / LOCK).unlink()
        lock.check()
        assert (tmp_path / LOCK).read_text() == before
        (tmp_path / LOCK).write_text("")  # as it is briefly while another thread creates it again
        lock.check()


def test_a_folder_lock_of_no_folder_does_nothing():
    with FolderLock(None) as lock:
        lock.check()


def test_a_folder_that_was_made_and_stays_empty_is_removed(tmp_path):
    made, there, used = (tmp_path / name for name in ("made", "there", "used"))
    there.mkdir()
    for folder in (made, there, used):
        with FolderLock(folder):
            if folder == used:
                (folder / "log.jsonl").touch()
    assert (made.exists(), there.exists(), used.exists()) == (False, True, True)

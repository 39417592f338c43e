"""The output and logs of a run."""

from __future__ import annotations

import contextlib
import json
import sys
import time

import pytest

from dali_saliencymix.measure import environment
from dali_saliencymix.training import run_log
from dali_saliencymix.training.run_log import Progress, StartUp, duration, say, warn, write_event


def test_each_line_of_the_log_is_one_object_and_lines_are_added(tmp_path):
    path = tmp_path / "log.jsonl"
    write_event(path, "start", config={"name": "two\nlines, é"})
    assert len(path.read_text().splitlines()) == 1  # written at once
    write_event(path, "epoch", epoch=1, val={"top1": 12.5})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["event"], first["config"]) == ("start", {"name": "two\nlines, é"})
    assert (second["event"], second["epoch"], second["val"]) == ("epoch", 1, {"top1": 12.5})
    assert time.time() - 60 < first["time"] <= second["time"] <= time.time() + 1


def test_half_a_line_of_a_process_that_was_killed_spoils_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "ep')
    write_event(path, "resume", epoch=1)
    half, whole = path.read_text().splitlines()
    assert half == '{"event": "ep'
    assert json.loads(whole)["event"] == "resume"


def test_where_there_is_no_terminal_each_display_is_one_line(capsys):
    progress = Progress("epoch 2/5", 8)
    for step in range(8):
        progress.advance()
        if step in (3, 7):
            progress.show(loss="1.25", eta="0:00:07")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "epoch 2/5 [4/8]  loss 1.25  eta 0:00:07\nepoch 2/5 [8/8]  loss 1.25  eta 0:00:07\n"


def test_where_there_is_no_terminal_a_long_silence_is_broken(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("validation", 8)
    for seconds in (6, 6, 6, 6, 1, 1):
        now[0] += seconds
        progress.advance()
        if now[0] == 18:
            progress.show(loss="1.25")
    assert capsys.readouterr().err == "validation [2/8]\nvalidation [3/8]  loss 1.25\n"


def test_a_slow_start_is_taken_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slow, quick = StartUp(begun=90.0), StartUp(begun=99.0)
    slow.end_of("imports")
    quick.end_of("imports")
    for seconds, part in ((0.4, "model"), (25.0, "loaders")):
        now[0] += seconds
        slow.end_of(part)
    assert slow.summary() == "first batch after 35 s: loaders 25 s, imports 10 s"
    assert quick.summary() is None
    monkeypatch.setattr(run_log, "compile_seconds", lambda: 12.3)
    assert slow.summary().endswith("imports 10 s; Numba's first compilation took 12 s of this")


def test_on_a_terminal_there_is_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("epoch 2/5", 8)
    progress.show(loss="1.25")
    progress.advance()
    progress.close()
    err = capsys.readouterr().err
    assert "epoch 2/5" in err
    assert "\n" not in err


def test_a_bar_is_gone_before_anything_is_said_of_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with contextlib.suppress(ValueError), Progress("epoch 2/5", 8) as progress:
        progress.advance()
        raise ValueError
    *_, bar, end = capsys.readouterr().err.split("\r")
    assert (bar.strip(), end) == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_show_nothing(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", "1")
    progress = Progress("epoch 2/5", 8)
    progress.advance()
    progress.show(loss="1.25")
    progress.close()
    say("best 12 %")
    warn("slow")
    assert capsys.readouterr() == ("", "")


def test_lines_for_the_user_go_to_stdout(capsys):
    say("best 12 %")
    assert capsys.readouterr() == ("best 12 %\n", "")


def test_durations_read_as_hours_minutes_seconds():
    assert [duration(seconds) for seconds in (0, 59.4, 59.6, 3599.7, 90061)] == [
        *("0:00:00", "0:00:59", "0:01:00", "1:00:00", "25:01:01")
    ]


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023", "535.54.03"),
        ("NVRM version: another one", None),
    ],
)
def test_the_driver_is_read_whatever_kind_of_module_it_has(tmp_path, line, driver):
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert environment._first_match(str(tmp_path / "version"), environment._DRIVER) == driver

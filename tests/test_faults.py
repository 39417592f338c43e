"""Faults of long training runs: killed, preempted, out of disk or data; with real processes, signals, files and disks.

Whatever stops a run, the resumed run ends with the weights and the data stream of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
from shared.programs import REPOSITORY, real_torchrun, run_program, torchrun
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS, VAL_PER_CLASS, read_log

from dali_saliencymix.training.checkpoints import LAST, load_checkpoint
from dali_saliencymix.training.lockstep import EXIT_PREEMPTED

pytest_plugins = ["shared.training_fixtures"]

WORKER = Path(__file__).parent.joinpath("shared", "fault_worker.py")
STEPS = TRAIN_PER_CLASS * CLASS_COUNT // 8
# CutMix avoids compiling a saliency detector in each process; DALI draws the random numbers in all mixing modes.
ONE = (
    *TINY,
    "--checkpoint-every",
    "2",
    "--keep-checkpoints",
    "2",
    "--model-ema",
    "--mix",
    "cutmix",
    "--mix-prob",
    "0.7",
)
TWO = (*ONE, "-b", "4")
DRAW = random.Random(20)


def launch(launcher, folder: Path, fault: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the worker, with output in `folder`, until it and its child processes have ended."""
    return launcher(WORKER, folder / "batches", fault, *options, "--output-dir", folder / "run", check=False)


def data_stream(folder: Path, rank: int) -> dict[str, str]:
    """Return the hash of each training batch of a process by epoch and step; fail if a step had two batches."""
    batches: dict[str, str] = {}
    for line in (folder / f"batches.{rank}").read_text().splitlines():
        place, digest = line.rsplit(" ", 1)
        assert batches.setdefault(place, digest) == digest, f"another batch at {place}"
    return batches


def assert_same_training(folder: Path, unbroken: Path, ranks: int) -> None:
    """Compare weights, optimiser, EMA, random states, data streams and metrics bit-exactly."""
    ours, theirs = (load_checkpoint(output / "run" / LAST) for output in (folder, unbroken))
    for name in ("model", "model_ema"):
        assert ours[name].keys() == theirs[name].keys()
        for weight in ours[name]:
            assert torch.equal(ours[name][weight], theirs[name][weight]), weight
    momenta = zip(*(saved["optimizer"]["state"].values() for saved in (ours, theirs)), strict=True)
    assert all(torch.equal(one["momentum_buffer"], other["momentum_buffer"]) for one, other in momenta)
    for one, other in zip(ours["random"], theirs["random"], strict=True):
        assert torch.equal(one["torch"], other["torch"])
    for name in ("epoch", "step", "best_top1", "ema_updates", "totals"):
        assert ours[name] == theirs[name], name
    for rank in range(ranks):
        assert data_stream(folder, rank) == data_stream(unbroken, rank)
    figures, expected = (epochs_of(output / "run") for output in (folder, unbroken))
    assert figures.keys() == expected.keys() == {1, 2}
    for epoch, line in figures.items():
        for name in ("val", "val_ema", "best_top1"):
            assert line[name] == expected[epoch][name]
        for name in ("loss", "mixed_top1", "images", "lr"):
            assert line["train"][name] == expected[epoch]["train"][name]


def epochs_of(output_dir: Path) -> dict[int, dict]:
    return {line["epoch"]: line for line in read_log(output_dir) if line["event"] == "epoch"}


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("train.py: ")]


@pytest.fixture(scope="module")
def unbroken(data_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert launch(run_program, folder, "none", data_folder, *ONE).returncode == 0
    return folder


@pytest.fixture(scope="module")
def unbroken_of_two(data_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken_of_two")
    assert launch(torchrun, folder, "none", data_folder, *TWO).returncode == 0
    return folder


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_and_preempted_again_and_again_ends_with_the_same_bits(unbroken, data_folder, tmp_path):
    options = (data_folder, *ONE, "--resume", "auto")
    killed_at = DRAW.randint(STEPS // 2 + 2, STEPS)  # after two checkpoints
    ended = launch(run_program, tmp_path, f"SIGKILL@0:{killed_at}", *options)
    assert ended.returncode == -9
    assert "--resume auto" not in ended.stderr
    newest = max((tmp_path / "run").glob("checkpoint_e*"))
    assert os.path.samefile(newest, tmp_path / "run" / LAST)
    torn = newest.read_bytes()[:-1000]
    newest.write_bytes(torn)

    ended = launch(run_program, tmp_path, "SIGTERM@0:3", *options)
    assert ended.returncode == EXIT_PREEMPTED
    assert f"skipped a damaged checkpoint: {tmp_path / 'run' / LAST}: damaged" in ended.stderr
    assert errors_in(ended.stderr) == [
        f"train.py: stopped by SIGTERM; --resume auto resumes from {tmp_path / 'run' / LAST}"
    ]
    places = [line.split()[:2] for line in (tmp_path / "batches.0").read_text().splitlines()]
    saved = load_checkpoint(tmp_path / "run" / LAST)
    assert saved["epoch"] * STEPS + saved["step"] - 1 <= int(places[-1][0]) * STEPS + int(places[-1][1]) + 1

    ended = launch(run_program, tmp_path, "SIGUSR1@0:val", *options)
    assert ended.returncode == EXIT_PREEMPTED
    assert "stopped by SIGUSR1" in ended.stderr
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == STEPS  # trained to the end, not validated

    ended = launch(run_program, tmp_path, f"SIGKILL@0:{DRAW.randint(1, STEPS)}", *options)
    assert ended.returncode == -9
    assert launch(run_program, tmp_path, "none", *options).returncode == 0
    assert_same_training(tmp_path, unbroken, ranks=1)
    assert len(list((tmp_path / "run").glob("checkpoint_e*"))) == 2
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_a_run_and_its_worker_processes_stops_it_with_a_checkpoint(data_folder, tmp_path, name):
    options = (*TINY, "--data-backend", "pytorch", "--mix", "none", "-j", "2", "--training-only")
    ended = launch(run_program, tmp_path, f"{name} to all@0:2", data_folder, *options)
    assert ended.returncode == EXIT_PREEMPTED
    assert errors_in(ended.stderr) == [
        f"train.py: stopped by {name}; --resume auto resumes from {tmp_path / 'run' / LAST}"
    ]
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] in (2, 3)


@pytest.mark.timeout(1200)
def test_two_processes_stop_together_whatever_befalls_one_and_end_with_the_same_bits(
    unbroken_of_two, data_folder, tmp_path
):
    options = (data_folder, *TWO, "--resume", "auto")
    ended = launch(torchrun, tmp_path, f"SIGKILL@1:{DRAW.randint(3, STEPS)}", *options)
    assert ended.returncode == 1
    assert errors_in(ended.stderr) == [
        "train.py: error: another process of the run exited without an error message (killed?)"
    ]

    ended = launch(torchrun, tmp_path, f"raise@0:{DRAW.randint(1, 3)}", *options)
    assert ended.returncode == 1
    (error,) = errors_in(ended.stderr)
    assert error.startswith("train.py: error: unexpected ZeroDivisionError: enough of this, at fault_worker.py:")
    assert ended.stderr.count("Traceback (most recent call last)") == 1

    ended = launch(torchrun, tmp_path, "SIGTERM@1:2", *options)
    assert f"exitcode  : {EXIT_PREEMPTED}" in ended.stderr
    assert errors_in(ended.stderr) == [
        f"train.py: stopped by SIGTERM; --resume auto resumes from {tmp_path / 'run' / LAST}"
    ]

    ended = launch(real_torchrun, tmp_path, "SIGKILL of torchrun@0:2", *options)
    assert ended.returncode == -9
    assert errors_in(ended.stderr) == [
        f"train.py: stopped by SIGTERM; --resume auto resumes from {tmp_path / 'run' / LAST}"
    ]
    assert launch(torchrun, tmp_path, "none", *options).returncode == 0
    assert_same_training(tmp_path, unbroken_of_two, ranks=2)


def fill(file: Path, free: int) -> None:
    """Fill a disk with a file, except for a number of bytes."""
    file.unlink(missing_ok=True)
    with open(file, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(file, file.stat().st_size - free)


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(data_folder, tmp_path, train_here):
    """The file system has room for one checkpoint but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        options = (data_folder, *ONE, "--output-dir", disk / "run")
        ended = train_here(*options, "--epochs", "1", "--no-model-ema", "--checkpoint-every", "100")
        assert ended.status == 0
        (whole,) = (disk / "run").glob("checkpoint_e*")
        ended = train_here(*options, "--no-model-ema", "--resume", "auto")
        assert ended.status == 1
        assert ended.error.startswith(f"train.py: error: {disk / 'run'}")
        assert ended.error.endswith(": No space left on device")
        assert [path.name for path in (disk / "run").glob("*.partial")] == []
        assert os.path.samefile(whole, disk / "run" / LAST)
        assert load_checkpoint(whole)["epoch"] == 1
        for pages, file in enumerate(("run.lock", "args.yaml")):  # the first files of a run, a page each
            fill(disk / "full", free=4096 * pages)
            ended = train_here(*options, "--no-model-ema", "--resume", "auto")
            assert ended.status == 1
            assert ended.error == f"train.py: error: {disk / 'run' / file}: No space left on device"
            assert load_checkpoint(disk / "run" / LAST)["epoch"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bad_files_are_named_and_counted_and_the_run_goes_on_or_stops_with_their_number(own_data, tmp_path, train_here):
    broken = [own_data / "train" / "red_square" / f"0000{number}.jpg" for number in (1, 3, 5)]
    broken[0].write_bytes(broken[0].read_bytes()[:24])
    broken[1].write_bytes(b"no image")
    broken[2].write_bytes(b"")
    in_validation = own_data / "val" / "red_square" / "00001.jpg"
    in_validation.write_bytes(b"")
    options = (own_data, *ONE, "--epochs", "1")
    ended = train_here(*options, "--output-dir", tmp_path / "run")
    assert ended.status == 0
    for file in (*broken, in_validation):
        assert ended.err.count(f"{file}: ") == 1
    assert "warning: a batch failed (3 of at most 10): " in ended.err
    line = epochs_of(tmp_path / "run")[1]
    assert line["bad_files"] == sorted(map(str, broken))
    assert line["train"]["images"] == TRAIN_PER_CLASS * CLASS_COUNT  # no step is lost
    assert line["val"]["images"] == VAL_PER_CLASS * CLASS_COUNT - 1
    ended = train_here(*options, "--output-dir", tmp_path / "other", "--max-bad-batches", "2")
    assert ended.status == 1
    assert "; 3 batches have failed by now" in ended.error


def test_a_file_that_vanishes_while_the_run_goes_on_is_named(own_data, tmp_path):
    # The fault removes the files in the first epoch. The reader has prefetched that epoch, so the second one fails.
    ended = launch(
        run_program,
        tmp_path,
        f"vanish {own_data / 'train' / 'red_square'}@0:3",
        own_data,
        *ONE,
        "--max-bad-batches",
        "2",
    )
    assert ended.returncode == 1
    (error,) = errors_in(ended.stderr)
    assert f"{own_data / 'train' / 'red_square'}/0000" in error
    assert error.endswith(": No such file or directory; 3 batches have failed by now")


def test_a_stalled_disk_under_one_of_two_processes_ends_both_and_names_the_file(own_data, tmp_path):
    file = own_data / "train" / "red_square" / "00003.jpg"
    ended = launch(torchrun, tmp_path, f"stall {file}@0:3", own_data, *TWO, "--stall-timeout", "3")
    assert ended.returncode == 1
    (error,) = errors_in(ended.stderr)
    assert "no progress for " in error
    assert error.endswith(f"while waiting for data; no answer from {file}")


def test_a_file_that_one_of_two_processes_cannot_read_ends_both_with_its_line(own_data, tmp_path):
    file = own_data / "train" / "red_square" / "00003.jpg"
    file.write_bytes(b"no image")
    ended = launch(torchrun, tmp_path, "none", own_data, *TWO, "--max-bad-batches", "0")
    assert ended.returncode == 1
    assert errors_in(ended.stderr) == [f"train.py: error: {file}: not an image: begins with b'no image'"]


def test_a_folder_that_is_not_there_is_named_once_by_two_processes(tmp_path):
    ended = launch(torchrun, tmp_path, "none", tmp_path / "nowhere", *TWO)
    assert ended.returncode == 1
    assert errors_in(ended.stderr) == [f"train.py: error: {tmp_path / 'nowhere' / 'train'}: no such folder"]


def test_the_main_process_alone_opens_files_to_write(data_folder, tmp_path):
    """Check all files that two processes open below the output folder, with Python's audit events."""
    (tmp_path / "audited.py").write_text(AUDITED)
    output_dir = tmp_path / "out" / "run"
    ended = torchrun(
        tmp_path / "audited.py", tmp_path / "opened", data_folder, *TWO, "--epochs", "1", "--output-dir", output_dir
    )
    assert ended.returncode == 0
    opened = {rank: (tmp_path / f"opened.{rank}").read_text() for rank in (0, 1)}
    assert str(output_dir / "log.jsonl") in opened[0]
    assert str(output_dir / "checkpoint_e001") in opened[0]
    assert str(output_dir) not in opened[1]


AUDITED = """
import os, sys
import train
record = os.open(sys.argv.pop(1) + "." + os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
def hook(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.link", "os.remove") or (event == "open" and arguments[2] & writing):
        os.write(record, f"{event} {arguments[0]}\\n".encode())
sys.addaudithook(hook)
sys.exit(train.main())
"""


def test_resident_memory_and_open_files_are_in_the_log_of_each_epoch(unbroken):
    for line in epochs_of(unbroken / "run").values():
        assert 50 < line["resources"]["resident_mb"] < 100_000
        assert 3 <= line["resources"]["open_files"] < 1000


def test_every_row_of_the_fault_table_names_tests_that_there_are():
    _, table = (REPOSITORY / "docs" / "faults.md").read_text().split("## Fault table")
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith("| Fault")]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (REPOSITORY / "tests" / file).read_text(), row

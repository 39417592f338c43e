"""The scan of a data set: its lists, its report, and that no file can end it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from shared.pipes import stall_once_listed
from shared.programs import REPOSITORY, environment_of_program, run_program
from shared.scan_tasks import die_on_bad, hang_on_bad

from dali_saliencymix.__main__ import main
from dali_saliencymix.datasets import scan as scan_module
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data, sample_jpeg
from dali_saliencymix.datasets.scan import check_output, examined_in_processes, scan, write_scan
from dali_saliencymix.loaders.data import open_data

JPEG = sample_jpeg("train", "red_square", 0)
HALF = len(JPEG) // 2
ROTTEN = JPEG[:HALF] + bytes(512) + JPEG[HALF + 512 :]
ADDED = {  # file below train/, content, kind, excluded
    "green_disc/half.jpg": (JPEG[:HALF], "truncated", True),
    "green_disc/rotten.jpg": (ROTTEN, "bit_rot", False),
    "red_square/a\nb.jpg": (JPEG, "unlistable", True),
    "red_square/no image.jpg": (b"404 not found", "not_an_image", True),
    "yellow_bowtie/é.jpg": (b"", "empty", True),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set with bad files, whose first class has no files. Tests must not change it."""
    root = tmp_path_factory.mktemp("scanned") / "data"
    make_sample_data(root, train=3, val=1)
    (root / "train" / "a_class_without_files").mkdir()
    for name, (content, _, _) in ADDED.items():
        (root / "train" / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def scanned(data, tmp_path_factory):
    """The output folder of a scan of `data` by the command, and the completed process."""
    output = tmp_path_factory.mktemp("output") / "made" / "scan"
    return output, run_program("-m", "dali_saliencymix", "scan", data, "-o", output, check=False)


def report_of(output: Path) -> dict:
    return json.loads((output / "scan.json").read_text())


def test_the_lists_hold_what_a_training_can_use_in_the_order_of_the_folder(data, scanned):
    output, _ = scanned
    assert sorted(path.name for path in output.iterdir()) == ["scan.json", "train.txt", "val.txt"]
    for part, unusable in (("train", [name for name, (_, _, out) in ADDED.items() if out]), ("val", [])):
        files = [os.path.relpath(file, data / part) for file in list_image_folder(data / part, classes=None).files]
        usable = [file for file in files if file not in unusable]
        assert (output / f"{part}.txt").read_text(encoding="utf-8").splitlines() == usable
    assert len(usable) == 8


def test_the_report_names_each_file_with_its_kind(data, scanned):
    output, _ = scanned
    report = report_of(output)
    assert (report["schema"], report["version"], report["root"]) == ("dali-saliencymix/scan", 1, str(data))
    assert report["versions"]["simplejpeg"]
    train, val = report["parts"]["train"], report["parts"]["val"]
    found = {finding["file"]: (finding["kind"], finding["excluded"]) for finding in train["findings"]}
    assert found == {name: (kind, out) for name, (_, kind, out) in ADDED.items()}
    assert all(finding["words"] for finding in train["findings"])
    assert train["counts"] == dict.fromkeys(("truncated", "bit_rot", "unlistable", "not_an_image", "empty"), 1)
    assert (train["files"], train["excluded"], train["classes"]) == (29, 4, 9)
    assert train["classes_without_a_usable_file"] == ["a_class_without_files"]
    assert (val["files"], val["excluded"], val["findings"]) == (8, 0, [])
    assert val["formats"] == {"JPEG": 8}
    assert sum(val["modes"].values()) == 8
    assert val["short_side"]["min"] <= val["short_side"]["median"] <= val["short_side"]["max"]
    assert val["file_bytes"]["mean"] == pytest.approx(
        sum(os.path.getsize(file) for file in list_image_folder(data / "val").files) / 8, abs=0.01
    )


def test_the_command_prints_a_table_and_says_by_its_status_that_files_are_excluded(scanned):
    _, ended = scanned
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "train: 29 files in 9 classes, 25 usable"
    kinds = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert kinds["not_an_image"].split()[:3] == ["not_an_image", "1", "excluded"]
    assert kinds["bit_rot"].split()[:3] == ["bit_rot", "1", "kept"]
    assert "red_square/no image.jpg: begins with b'404 not '" in kinds["not_an_image"]
    assert "Traceback" not in ended.stderr


def test_an_epoch_over_the_lists_meets_no_bad_file_and_labels_are_those_of_all_class_folders(data, scanned, capfd):
    from dali_saliencymix.loaders.processes import Processes
    from dali_saliencymix.training.arguments import parse_arguments

    output, _ = scanned
    lists = ("--train-list", output / "train.txt", "--val-list", output / "val.txt")
    sizes = ("--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32", "--min-crop-area", "1")
    command = (data, *lists, *sizes, "-b", "5", "-j", "1", "--device", "cpu", "--mix", "none")
    options = parse_arguments([str(argument) for argument in command]).data
    here = Processes(0, 0, 1, torch.device("cpu"))
    opened = open_data(options)
    capfd.readouterr()
    train = [labels for _, labels, _, _ in opened.train_loader(options, here)]
    val = [labels for _, labels in opened.val_loader(options, here)]
    assert "skip" not in capfd.readouterr().err
    assert opened.classes[0] == "a_class_without_files"
    usable = (output / "train.txt").read_text(encoding="utf-8").splitlines()
    expected = sorted(opened.classes.index(name.split("/")[0]) for name in usable)
    assert sorted(torch.cat(train).tolist()) == expected
    assert torch.cat(val).tolist() == list(range(1, 9))


def test_strict_excludes_what_the_decoder_warns_of(data):
    result = scan(data, strict=True)
    assert result.excluded == 5
    assert "green_disc/rotten.jpg" not in result.lists["train"]
    part = result.report["parts"]["train"]
    assert {finding["file"] for finding in part["findings"] if finding["excluded"]} == set(ADDED)


def test_a_folder_of_classes_has_one_list_and_a_clean_one_ends_with_0(data, tmp_path, capsys):
    assert main(["scan", str(data / "val"), "-o", str(tmp_path), "-j", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files.txt", "scan.json"]
    assert len((tmp_path / "files.txt").read_text().splitlines()) == 8
    assert report_of(tmp_path)["options"]["workers"] == 1
    assert "all: 8 files in 8 classes, 8 usable" in capsys.readouterr().out


def test_too_small_depends_on_the_option(data):
    found = scan(data / "val", min_size=10_000, workers=1)
    assert found.lists["all"] == []
    assert found.report["parts"]["all"]["counts"] == {"too_small": 8}


@pytest.mark.parametrize(("task", "kind"), [(die_on_bad, "crashed"), (hang_on_bad, "timed_out")])
def test_a_file_that_kills_or_holds_its_process_is_named_and_all_others_are_examined(task, kind):
    files = [f"file{number}" for number in range(36)]
    files[33] = "bad"
    results = dict(examined_in_processes(files, task, workers=2, timeout=1))
    assert sorted(results) == list(range(36))
    assert list(results.pop(33).findings) == [kind]
    assert all(found.findings == {"words": files[number]} for number, found in results.items())


def test_a_file_that_never_ends_is_given_up(tmp_path, monkeypatch):
    make_sample_data(tmp_path / "data", train=1, val=1)
    pipe = tmp_path / "data" / "val" / "red_square" / "pipe.jpg"
    pipe.touch()
    monkeypatch.setattr(scan_module, "list_image_folder", list_image_folder)  # so that monkeypatch restores it
    stall_once_listed(scan_module, pipe)
    result = scan(tmp_path / "data", timeout=1)
    (finding,) = result.report["parts"]["val"]["findings"]
    assert (finding["file"], finding["kind"]) == ("red_square/pipe.jpg", "timed_out")
    assert finding["words"] == "not done after 1 seconds"
    assert len(result.lists["val"]) == 8


def test_ctrl_c_leaves_neither_files_nor_processes(tmp_path):
    make_sample_data(tmp_path / "data", train=1, val=1)
    pipe = tmp_path / "data" / "train" / "red_square" / "pipe.jpg"
    pipe.touch()
    # A shell starts background jobs with SIGINT ignored, and the tests and their programs would inherit that.
    program = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from shared.pipes import stall_once_listed; from dali_saliencymix.datasets import scan; "
    program += f"stall_once_listed(scan, {str(pipe)!r}); "
    program += "runpy.run_module('dali_saliencymix', run_name='__main__')"
    command = [sys.executable, "-c", program, "scan", tmp_path / "data", "-o", tmp_path / "out"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment_of_program(),
    )
    other_end = _opened_once_it_is_read(pipe)  # so a worker is in the middle of its work
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
    out, err = process.communicate(timeout=120)
    os.close(other_end)
    assert (process.returncode, out) == (130, "")
    assert err == "python -m dali_saliencymix scan: interrupted\n"
    assert not (tmp_path / "out").exists()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_a_worker_that_is_starting_does_not_get_ctrl_c():
    """Python unblocks the signal when it starts its first process, so the test covers the first one."""
    program = "import multiprocessing; from shared import scan_tasks; from dali_saliencymix.datasets import scan\n"
    program += "worker = multiprocessing.get_context('spawn').Process(target=scan_tasks.print_blocked)\n"
    program += "with scan._interrupts_for_later(): worker.start()\n"
    program += "worker.join()"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, env=environment_of_program(), cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "True\n"


def _opened_once_it_is_read(pipe: Path) -> int:
    while True:
        try:
            if pipe.is_fifo():
                return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no process reads it yet
                raise
        time.sleep(0.05)


def test_a_second_scan_replaces_the_first_but_no_file_that_no_scan_has_written(data, tmp_path, capsys):
    mine = tmp_path / "train.txt"
    mine.write_text("mine\n")
    assert main(["scan", str(data), "-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{mine}: would be overwritten" in err
    assert mine.read_text() == "mine\n"

    output = tmp_path / "out"
    first = scan(data, workers=1)
    write_scan(first, output)
    check_output(data / "val", output)
    write_scan(scan(data / "val", workers=1), output)
    assert sorted(path.name for path in output.iterdir()) == ["files.txt", "scan.json"]


def test_a_scan_that_cannot_be_written_leaves_the_earlier_one_whole(data, tmp_path, monkeypatch):
    result = scan(data / "val", workers=1)
    write_scan(result, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result.lists["all"].clear()

    def full(self, text, **_):
        if "scan.json" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, text, encoding="utf-8")

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_scan(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_output_never_becomes_a_class_folder(data, monkeypatch, capsys):
    with pytest.raises(ValueError, match="would become a class folder"):
        check_output(data, data / "train" / "scan")
    check_output(data, data / "scan")
    monkeypatch.chdir(data / "val")
    assert main(["scan", "."]) == 2
    assert "output must not lie within" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such folder"),
        (["{data}", "--timeout", "0"], "timeout must be"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_2(data, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["scan", *(argument.format(data=data) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--min-size", "-j"])
def test_a_number_that_is_too_small_is_named_with_its_option(data, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main(["scan", str(data), option, "0"])
    assert f"argument {option}" in (err := capsys.readouterr().err)
    assert "must be a whole number of at least 1, got 0" in err

"""For any input, a program ends with a documented status and one line that names the error, without a traceback.

The cases are drawn with a fixed seed, so they are the same in each run. To run more cases, or others::

    FUZZ_CASES=20 FUZZ_SEED=7 python -m pytest tests/test_damaged_input.py

FUZZ_CASES multiplies the number of cases.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.programs import environment_of_program, run_program
from shared.rights import rights_of_a_user
from shared.training_fixtures import TINY, Ended
from shared.voc_fixtures import make_voc

import train
import transfer_voc
from dali_saliencymix import __main__ as package
from dali_saliencymix import bottleneck
from dali_saliencymix._errors import printable
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.training.arguments import make_parser
from dali_saliencymix.training.checkpoints import LAST

FACTOR, SEED = int(os.environ.get("FUZZ_CASES", "1")), int(os.environ.get("FUZZ_SEED", "0"))
NOT_UTF8 = b"caf\xe9".decode("utf-8", "surrogateescape")
# Allowed exit statuses in addition to 0 and argparse's 2.
STATUSES = {"train": {1}, "transfer_voc": {1}, "scan": {1}, "bottleneck": {1, 3}}
ODD_VALUES = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "\u0663",
        "\u00b2",
    ),
    *(
        "auto",
        "true",
        "none",
        "a\nb",
        "\N{SNOWMAN}",
        NOT_UTF8,
        "x" * 300,
        "/dev/null",
        "/proc/none",
        "/",
        ".",
        "..",
        "%s",
        "{}",
    ),
)
ODD_ENTRIES = (None, True, -1, 0, 1.5, float("nan"), 10**400, "", "text", "a\nb", [], [None], {}, {"a": [{}]})

Draw = random.Random


def cases(count: int) -> Any:
    return pytest.mark.parametrize("case", range(SEED * 100_000, SEED * 100_000 + count * FACTOR))


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends(monkeypatch, capfd) -> Callable[..., Ended]:
    """Return a function that runs a program in this process and checks its end; an error must name one of `names`."""
    mains = {"train": train.main, "transfer_voc": transfer_voc.main}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(program: str, *arguments: str | Path, names: tuple[str | Path, ...]) -> Ended:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
        capfd.readouterr()
        try:
            with rights_of_a_user():
                status = mains[program]() if program in mains else package.main([program, *words])
        except SystemExit as ended:
            status = ended.code
        ended = Ended(status, *capfd.readouterr())
        check(program, ended, words, names)
        return ended

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)  # the drawn options may include --deterministic


def check(program: str, ended: Ended, words: list[str], names: tuple[str | Path, ...]) -> None:
    told = f"{program} {words}\n{ended.status}\n{ended.err[-3000:]}"
    assert "Traceback" not in ended.err, told
    assert "unexpected" not in ended.err, told
    assert ended.status in {0, 2, *STATUSES.get(program, {1})}, told
    if ended.status == 0 or (program == "scan" and ended.status == 1 and "written to" in ended.out):
        return
    assert ended.status != 3, told
    *_, last = lines = ended.err.splitlines()
    begin, error, _ = last.partition(": error: ")
    assert error, told
    assert sum(line.startswith(begin + error) for line in lines) == 1, told
    assert any(printable(str(name)) in last for name in names), f"names none of {names}\n{told}"


# ---- damage ----------------------------------------------------------------------------------------------------------


def spoil(path: Path, draw: Draw) -> None:
    """Damage a file, or replace it by something else."""
    content = path.read_bytes()
    kinds: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(content[: draw.randrange(len(content))]),
        "empty": lambda: path.write_bytes(b""),
        "flipped": lambda: path.write_bytes(flipped(content, draw)),
        "noise": lambda: path.write_bytes(draw.randbytes(200)),
        "not UTF-8": lambda: path.write_bytes(b"caf\xe9: 1\n" + content),
        "binary": lambda: path.write_bytes(content.replace(b"\n", b"\0")),
        "nested": lambda: path.write_text("[" * 100_000),
        "gone": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "dangling": lambda: (path.unlink(), path.symlink_to("nowhere")),
        "itself": lambda: (path.unlink(), path.symlink_to(path.name)),
        "closed": lambda: path.chmod(0),
    }
    kinds[draw.choice(list(kinds))]()


def flipped(content: bytes, draw: Draw) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def with_odd_entry(value: Any, draw: Draw, depth: int = 6) -> Any:
    """Return nested dictionaries and lists with one entry replaced or removed."""
    changed = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    if depth > 1 and isinstance(value[key], dict | list) and value[key] and draw.random() < 0.8:
        changed[key] = with_odd_entry(value[key], draw, depth - 1)
    elif draw.random() < 0.2:
        del changed[key]
    else:
        changed[key] = draw.choice(ODD_ENTRIES)
    return changed


def close(folder: Path, draw: Draw) -> None:
    """Make a folder unwritable, or replace it by something that is not a folder."""
    kind = draw.choice(["file", "closed", "closed above", "dangling", "name too long"])
    if kind == "file":
        folder.write_text("a file")
    elif kind == "closed":
        folder.mkdir(mode=0o500)
    elif kind == "closed above":
        folder.parent.chmod(0o500)
    elif kind == "dangling":
        folder.symlink_to("nowhere/nothing")


# ---- commands that read JSON -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> dict[str, Any]:
    import time

    import numpy as np

    batches = [np.zeros((4, 3, 8, 8))] * 20
    found = bottleneck.diagnose(batches, lambda batch: time.sleep(0.001), seconds=0.5, rounds=5, storage=False)
    stage = {**found["rates"]["loader"], "name": "decode", "added_ms": found["rates"]["loader"]["ms_per_batch"]}
    return {**found, "stages": [stage, {**stage, "name": "resize"}]}


@cases(80)
def test_compare_with_a_damaged_report(ends, report, tmp_path, case):
    draw = Draw(case)
    paths = [
        tmp_path / name for name in ("before.json", draw.choice(["after.json", "a\nb.json", "\N{SNOWMAN}", NOT_UTF8]))
    ]
    for path in paths:
        path.write_text(json.dumps(report))
    damaged = draw.choice(paths)
    if draw.random() < 0.3:
        spoil(damaged, draw)
    else:
        damaged.write_text(json.dumps(with_odd_entry(report, draw)))
    ends("compare", *paths, names=(damaged,))


# ---- commands that read folders of images ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images") / "data"
    make_sample_data(root, train=2, val=1)
    return root


def spoiled_data(images: Path, root: Path, draw: Draw) -> tuple[Path, ...]:
    """Copy the data set with one damage; return names of which an error must contain one."""
    shutil.copytree(images, root)
    part = root / draw.choice(["train", "val"])
    folder = part / draw.choice(sorted(os.listdir(part)))
    file = folder / draw.choice(sorted(os.listdir(folder)))
    kinds: dict[str, Callable[[], object]] = {
        "no part": lambda: shutil.rmtree(part),
        "closed part": lambda: part.chmod(0),
        "closed root": lambda: root.chmod(0),
        "closed class": lambda: folder.chmod(0),
        "unsearchable class": lambda: folder.chmod(0o400),
        "loop": lambda: (folder / "loop").symlink_to(".."),
        "pipe": lambda: os.mkfifo(folder / "pipe.jpg"),
        "class": lambda: (part / draw.choice(["a\nb", NOT_UTF8, "\N{SNOWMAN}", "x" * 255, "new"])).mkdir(),
        "name": lambda: file.rename(folder / f"{draw.choice(['a' + chr(10) + 'b', NOT_UTF8, 'x' * 250])}.jpg"),
        "empty class": lambda: file.parent.rename(folder.with_name(".hidden")),
        "file for class": lambda: (shutil.rmtree(folder), folder.touch()),
        "file": lambda: spoil(file, draw),
    }
    kinds[draw.choice(list(kinds))]()
    return root, part, folder, file


def test_scan_of_a_damaged_folder(ends, images, tmp_path):
    for case in range(SEED * 1000, SEED * 1000 + 2 * FACTOR):
        draw, here = Draw(case), tmp_path / str(case)
        places = spoiled_data(images, here / "data", draw)
        ends("scan", here / "data", "-j", "1", "-o", here / "out", names=places)


@cases(8)
def test_preview_of_a_damaged_folder(ends, images, tmp_path, case):
    places = spoiled_data(images, tmp_path / "data", Draw(case))
    ends("preview", tmp_path / "data", "-n", "2", "--size", "32", "-o", tmp_path / "out.png", names=places)


@cases(16)
def test_commands_with_an_output_that_cannot_be_written(ends, images, tmp_path, case):
    draw = Draw(case)
    out = tmp_path / "above" / "out"
    out.parent.mkdir()
    close(out, draw)
    program = draw.choice(["scan", "preview", "sample-data"])
    if program == "sample-data":
        ends(program, out / "in", "--train", "1", "--val", "1", names=(out,))
    elif program == "preview":
        out = draw.choice([out / "picture.png", out.with_name("picture.odd"), out.with_name("x" * 260 + ".png")])
        ends(program, images, "-n", "1", "--size", "16", "-o", out, names=(out, out.parent, "odd"))
    else:
        ends(program, images / "nothing", "-j", "1", "-o", out, names=(out, images))


OPTIONS = {
    "sample-data": ("--train", "--val", "--seed"),
    "preview": (
        "-o",
        "-n",
        "--size",
        "--min-crop-area",
        "--modes",
        "--alpha",
        "--prob",
        "--preset",
        "--saliency",
        "--seed",
    ),
    "scan": ("-o", "--min-size", "-j", "--timeout"),
}


@cases(40)
def test_commands_with_odd_options(ends, images, tmp_path, case, monkeypatch):
    draw = Draw(case)
    monkeypatch.chdir(tmp_path)
    program = draw.choice(list(OPTIONS))
    option, value = draw.choice(OPTIONS[program]), draw.choice(ODD_VALUES)
    data = tmp_path / "none" if program == "sample-data" else images
    small = {"sample-data": ("--train", "1", "--val", "1"), "preview": ("-n", "1", "--size", "16"), "scan": ("-j", "1")}
    data = images / "none" if program == "scan" and draw.random() < 0.9 else data  # a scan takes seconds
    ends(
        program, data, *small[program], option, value, names=(option.lstrip("-").replace("-", "_"), option, value, data)
    )


# ---- train.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The output folder of a run on synthetic data, with checkpoint, options and log."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_program(
        "train.py", *SYNTHETIC, "--model-ema", "--checkpoint-every", "1", "--max-steps", "2", "--output-dir", folder
    )
    return folder


SYNTHETIC = (*TINY, "--data-backend", "synthetic", "--synthetic-steps", "3", "-b", "2", "--epochs", "1")
SHORT = ("--max-steps", "1", "--training-only", "--no-checkpoints")
# Options that start other programs, use the network or take long by design.
LEFT_OUT = {
    "help",
    "config",
    "compile",
    "log_wandb",
    "tensorboard",
    "profile_loader",
    "traceback",
    "arch",
    "data_backend",
}


@cases(80)
def test_train_with_odd_options(ends, tmp_path, case, monkeypatch):
    draw = Draw(case)
    monkeypatch.chdir(tmp_path)
    actions = [action for action in make_parser()._actions if action.dest not in LEFT_OUT and action.option_strings]
    action = draw.choice(actions)
    flag = draw.choice(action.option_strings)
    value = draw.choice(ODD_VALUES)
    given = (flag,) if action.nargs == 0 else (f"{flag}={value}",)
    ends("train", *SYNTHETIC, *SHORT, *given, names=(flag, *action.option_strings, value, action.dest))


@cases(24)
def test_train_with_a_damaged_file_of_options(ends, trained, tmp_path, case, monkeypatch):
    draw = Draw(case)
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((trained / "args.yaml").read_text())
    path = tmp_path / draw.choice(["args.yaml", "a\nb.yaml", NOT_UTF8])
    path.write_text(yaml.safe_dump(config))
    if draw.random() < 0.4:
        spoil(path, draw)
    else:
        kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
        changed = with_odd_entry(kept, draw, depth=2)
        path.write_text(yaml.safe_dump({**{key: config[key] for key in ("arch", "data_backend")}, **changed}))
    ends(
        "train",
        "-c",
        path,
        *SHORT,
        "--output-dir",
        tmp_path / "out",
        names=(path, "/train", *config, *(f"--{key.replace('_', '-')}" for key in config)),
    )


@cases(36)
def test_train_resumes_from_a_damaged_checkpoint(ends, trained, tmp_path, case):
    draw = Draw(case)
    path = tmp_path / "run" / LAST
    path.parent.mkdir()
    shutil.copy(trained / LAST, path)
    if draw.random() < 0.3:
        spoil(path, draw)
    else:
        saved = torch.load(path, weights_only=True)
        torch.save(with_odd_entry(saved, draw, depth=2), path)
    resume = draw.choice(["auto", path])
    more = draw.choice([(), (), ("--evaluate",), ("--restart-epoch",)])
    options = ("--model-ema", "--output-dir", path.parent, "--max-steps", "1", "--resume", resume)
    ends("train", *SYNTHETIC, *options, *more, names=(path, path.parent))


@cases(12)
def test_train_resumes_beside_damaged_records(ends, trained, tmp_path, case):
    draw = Draw(case)
    shutil.copytree(trained, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run" / "summary.csv").write_text("epoch,time\n1,2\n")
    damaged = tmp_path / "run" / draw.choice(["log.jsonl", "summary.csv", "report.json", "args.yaml"])
    spoil(damaged, draw)
    options = ("--model-ema", "--output-dir", tmp_path / "run", "--max-steps", "1", "--resume", "auto")
    ends("train", *SYNTHETIC, *options, names=(damaged,))


@cases(6)
def test_train_with_an_output_folder_that_cannot_be_written(ends, tmp_path, case):
    out = tmp_path / "above" / "out"
    out.parent.mkdir()
    close(out, Draw(case))
    ends("train", *SYNTHETIC, "--max-steps", "1", "--output-dir", out, names=(out, out.parent))


@cases(10)
def test_train_on_a_damaged_folder(ends, images, tmp_path, case):
    draw = Draw(case)
    places = spoiled_data(images, tmp_path / "data", draw)
    listed = tmp_path / "train.txt"
    listed.write_text(
        "".join(f"{file.relative_to(images / 'train')}\n" for file in sorted((images / "train").rglob("*.jpg")))
    )
    more = ()
    if draw.random() < 0.3:
        spoil(listed, draw)
        more = ("--train-list", listed)
    options = (
        "--data-backend",
        "dali-cpu",
        "--max-bad-batches",
        draw.choice(["0", "5"]),
        "-b",
        "4",
        "--epochs",
        "1",
        "-j",
        "1",
    )
    ends(
        "train",
        tmp_path / "data",
        *TINY,
        *options,
        *more,
        "--no-checkpoints",
        "--output-dir",
        tmp_path / "out",
        names=(*places, listed),
    )


# ---- bottleneck ------------------------------------------------------------------------------------------------------


BOTTLENECK = (
    "--pipeline",
    "--loader",
    "--step",
    "--files",
    "--images",
    "--cache",
    "--seconds",
    "--rounds",
    "-o",
    "--html",
)


@cases(25)
def test_bottleneck_with_odd_options(ends, images, tmp_path, case, monkeypatch):
    draw = Draw(case)
    monkeypatch.chdir(tmp_path)
    option, value = draw.choice((*BOTTLENECK, "--fail-above-stall")), draw.choice(ODD_VALUES)
    source = draw.choice([(images / "none",), ("--loader", "json:dumps"), ("--pipeline", "math:pi"), ()])
    ends(
        "bottleneck",
        *source,
        "--device",
        "cpu",
        f"{option}={value}",
        names=(option, value, *source, "DATA", "--loader", "loader"),
    )


# ---- transfer_voc.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def voc(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


VOC_OPTIONS = (
    *(
        "--train-sets",
        "--test-set",
        "--iterations",
        "-b",
        "--lr",
        "--lr-milestones",
        "--lr-gamma",
        "--momentum",
        "--wd",
    ),
    *("--trainable-layers", "--min-size", "--max-size", "-j", "--seed", "--output-dir", "--save-freq", "-p"),
)


@cases(12)
def test_transfer_with_odd_options_or_files(ends, trained, voc, tmp_path, case):
    draw = Draw(case)
    root = shutil.copytree(voc, tmp_path / "voc")
    path = shutil.copy(trained / LAST, tmp_path / "checkpoint.pt")
    names: tuple[Any, ...] = (path, root)
    more: tuple[Any, ...] = ()
    if draw.random() < 0.5:
        option, value = draw.choice(VOC_OPTIONS), draw.choice(ODD_VALUES)
        more, names = (option, value), (option, value, path)  # the checkpoint is invalid
    else:
        spoil(Path(draw.choice([path, *sorted(root.rglob("*.xml")), *sorted(root.rglob("*.txt"))])), draw)
    ends(
        "transfer_voc",
        root,
        "--checkpoint",
        path,
        "--device",
        "cpu",
        "--output-dir",
        tmp_path / "out",
        *more,
        names=names,
    )


# ---- single facts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", ["train", "transfer_voc", "bottleneck", "scan", "preview", "sample-data", "compare"]
)
def test_every_program_shows_where_an_error_comes_from_if_asked_to(monkeypatch, capfd, tmp_path, program):
    nothing = tmp_path / "file"
    nothing.touch()
    more = {"transfer_voc": ("--checkpoint", nothing), "compare": (nothing,), "bottleneck": ("--device", "cpu")}
    words = [str(nothing / "none"), *map(str, more.get(program, ())), "--traceback"]
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
    main = {"train": train.main, "transfer_voc": transfer_voc.main}.get(program)
    status = main() if main else package.main([program, *words])
    assert status == (2 if program == "scan" else 1)
    err = capfd.readouterr().err
    assert err.count("Traceback (most recent call last)") >= 1
    assert err.splitlines()[-1].partition(": error: ")[2].startswith(str(nothing))


def test_an_error_that_nobody_foresaw_has_its_traceback_above_a_line_that_says_where(monkeypatch, capfd, tmp_path):
    def fault(*_: object) -> None:
        raise KeyError(*["what\never"])

    monkeypatch.setattr(train, "run", fault)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path), *TINY])
    assert train.main() == 1
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith(r"train.py: error: unexpected KeyError: 'what\never', at test_damaged_input.py:")
    assert last.endswith(" in fault")


def test_a_stdout_that_is_closed_or_full_is_named_and_names_that_are_no_text_are_printed(report, tmp_path):
    path = tmp_path / NOT_UTF8
    path.write_text(json.dumps({**report, "verdict": {"name": "caf\udce9"}}))
    program = [sys.executable, "-m", "dali_saliencymix", "compare", path, path]
    environment = environment_of_program() | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONUNBUFFERED": ""}
    run = functools.partial(subprocess.run, program, stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
    with open("/dev/full", "wb") as full:
        ended = run(stdout=full)
    assert (ended.returncode, ended.stderr.decode()) == (
        *(1, "python -m dali_saliencymix compare: error: stdout: No space left on device\n"),
    )
    ended = run(stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(rb"caf\udce9 (unchanged)")


def test_bottleneck_names_the_file_that_a_pipeline_fails_at(ends, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "data")
    bad = root / "train" / "red_square" / "00001.jpg"
    bad.write_text("no image")
    options = ("--device", "cpu", "-b", "8", "-j", "1", "--train-crop-size", "32", "--no-step", "--seconds", "1")
    ended = ends("bottleneck", root, *options, "--max-bad-batches", "0", names=(bad,))
    assert ended.status == 1
    assert f"error: {bad}: not an image: begins with b'no image'; the " in ended.err

"""Errors of train.py: one line that names the file, the folder or the value."""

from __future__ import annotations

import resource
import shutil

import pytest
import torch
from shared.programs import run_program
from shared.training_fixtures import CLASS_COUNT, TINY, TRAIN_PER_CLASS

from dali_saliencymix.datasets.sample_data import CLASSES

pytest_plugins = ["shared.training_fixtures"]

TRAIN_IMAGES = TRAIN_PER_CLASS * CLASS_COUNT


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-400])


def only_class(folder) -> None:
    for name in sorted(CLASSES)[1:]:
        shutil.rmtree(folder / name)


def no_images(folder) -> None:
    for file in folder.rglob("*.jpg"):
        file.rename(file.with_suffix(".txt"))


def emptied(folder) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def made_a_file(folder) -> None:
    shutil.rmtree(folder)
    folder.touch()


BAD_DATA = {
    "training folder missing": ("train", shutil.rmtree, "no such folder"),
    "validation folder missing": ("val", shutil.rmtree, "no such folder"),
    "training folder is a file": ("train", made_a_file, "not a folder"),
    "training folder empty": ("train", emptied, "no class folders"),
    "validation folder empty": ("val", emptied, "no class folders"),
    "no images": ("train", no_images, "no images in its 8 class folders"),
    "one class": ("train", only_class, "only one class, 'blue_star'"),
    "unknown class": ("val", lambda folder: shutil.copytree(folder / "red_square", folder / "red_ring"), "'red_ring'"),
    "truncated JPEG": ("train/red_square/00003.jpg", cut, "truncated"),
    "text named .jpg": ("train/red_square/00003.jpg", lambda file: file.write_text("no image"), "not an image: begins"),
    "zero bytes": ("train/red_square/00003.jpg", lambda file: file.write_bytes(b""), "empty: zero bytes"),
    "broken link": ("train/red_square/x.jpg", lambda file: file.symlink_to("/no/such"), "No such file"),
    "truncated in validation": ("val/red_square/00001.jpg", cut, "truncated"),
    "zero bytes in validation": ("val/red_square/00001.jpg", lambda file: file.write_bytes(b""), "empty: zero bytes"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_with_one_line_that_names_the_file_or_folder(case, own_data, tmp_path, train_here):
    where, spoil, reason = BAD_DATA[case]
    spoil(own_data / where)
    ended = train_here(own_data, *TINY, "--epochs", "1", "--max-bad-batches", "0", "--output-dir", tmp_path / "run")
    assert ended.status == 1
    assert ended.error.strip().startswith(f"train.py: error: {own_data / where}: ")
    assert reason in ended.error
    assert not list(tmp_path.rglob("*.pt"))


# In a separate program, since it may crash: DALI 2.4 leaves threads running on a batch that its decoder has given up.
LOAD_UNTIL_IT_FAILS = """
import sys, torch
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.loaders.base import LoaderError
from dali_saliencymix.loaders.imagenet import training_loader, validation_loader
folder = list_image_folder(sys.argv[1])
common = {"batch_size": 40, "device": torch.device("cpu"), "crop_size": 64}
for seed in range(10):
    for loader in (
        training_loader(folder, num_threads=1 + seed % 4, seed=seed, **common),
        validation_loader(folder, num_threads=1 + seed % 4, resize_size=64, **common),
    ):
        try:
            for _ in range(2):
                for images, *_ in loader:
                    images.sum()
        except LoaderError as error:
            print(error)
"""


@pytest.mark.parametrize("content", [b"no image", b"\xff\xd8\xff"], ids=["text", "header only"])
def test_a_file_that_is_no_image_fails_in_the_same_way_wherever_it_is_in_a_batch(own_data, tmp_path, content):
    file = own_data / "train" / "red_square" / "00003.jpg"
    file.write_bytes(content)
    (tmp_path / "load.py").write_text(LOAD_UNTIL_IT_FAILS)
    ended = run_program(tmp_path / "load.py", own_data / "train", check=False)
    assert ended.returncode == 0, f"killed by signal {-ended.returncode} after {len(ended.stdout.splitlines())} loaders"
    lines = ended.stdout.splitlines()
    assert len(lines) == 20
    assert all(line.startswith(f"{file}: ") for line in lines)


def test_a_file_name_that_is_no_text_does_not_end_in_a_traceback(own_data, tmp_path, train_here):
    folder = own_data / "train" / "red_square"
    (folder / "00000.jpg").rename(folder / b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    ended = train_here(own_data, *TINY, "--epochs", "1", "--output-dir", tmp_path / "run")
    assert ended.status == 0 or "red_square" in ended.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mix-alpha 0", "alpha must be a positive number, got 0.0"),
        ("--mix-alpha nan", "alpha must be a positive number, got nan"),
        ("--mix-prob 2", "prob must be in [0, 1], got 2.0"),
        ("-b 1000", f"--batch-size must be at most {TRAIN_IMAGES}"),
        ("--seed -1", "argument --seed: must be a whole number of at least 0, got -1"),
        ("--min-crop-area 0", "--min-crop-area must be in (0, 1], got 0.0"),
        ("--val-crop-size 48", "--val-crop-size must be at most --val-resize-size 32, got 48"),
        ("--lr -1", "--lr must be a positive number, got -1.0"),
        ("--lr-warmup-epochs -1", "-1"),
        ("--lr 1e10", "the loss became nan in epoch 1, step 2; a smaller --lr may help"),
        ("--output-dir /proc/none", "/proc/none"),
    ],
)
def test_a_wrong_value_ends_with_one_line_that_says_what_is_allowed(
    data_folder, tmp_path, train_here, options, message
):
    ended = train_here(data_folder, *TINY, "--output-dir", tmp_path / "run", *options.split())
    assert ended.status in (1, 2)
    assert ended.error.startswith("train.py: error: ")
    assert message in ended.error
    assert not list(tmp_path.rglob("*.pt"))


def test_asking_for_a_gpu_that_is_not_there_is_refused_at_once(data_folder, tmp_path, train_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = train_here(data_folder, *TINY, "--device", "cuda", "--output-dir", tmp_path / "run")
    assert ended.status == 1
    assert "no CUDA GPU is left" in ended.error
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_ends_with_one_line_and_without_half_a_checkpoint(data_folder, tmp_path, train_here):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # larger files are an error, as on a full disk
    try:
        ended = train_here(data_folder, *TINY, "--epochs", "1", "--output-dir", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.status == 1
    assert "checkpoint_e001_s000000.pt" in ended.error
    written = ["args.yaml", "log.jsonl", "report.json", "summary.csv"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == written


def test_the_program_ends_with_status_1_and_no_traceback(tmp_path):
    ended = run_program("train.py", tmp_path / "nowhere", check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"train.py: error: {tmp_path / 'nowhere' / 'train'}: no such folder"
    assert "Traceback" not in ended.stderr

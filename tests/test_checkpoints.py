"""Checkpoints are whole or not there, and reading one runs no code from it."""

from __future__ import annotations

import errno
import os
import random
import resource

import pytest
import torch

from dali_saliencymix.training.checkpoints import LAST, find_checkpoint, load_checkpoint, save_checkpoint

OLD = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "loaders": [{"pipeline": b"\0x", "step": 0}]}
NEW = {"model": {"weight": torch.zeros(500, 500)}, "epoch": 4, "loaders": []}


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint that holds OLD, alone in its folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint(OLD, folder / LAST)
    return folder / LAST


def assert_only_old(saved) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [LAST]
    assert load_checkpoint(saved)["epoch"] == 3


def test_what_is_saved_comes_back(saved):
    loaded = load_checkpoint(saved)
    assert torch.equal(loaded["model"].pop("weight"), OLD["model"]["weight"])
    assert loaded == {**OLD, "model": {}}
    assert [path.name for path in saved.parent.iterdir()] == [LAST]


def test_a_new_checkpoint_takes_the_place_of_the_old_one(saved):
    save_checkpoint(NEW, str(saved))
    assert load_checkpoint(saved)["epoch"] == 4
    assert [path.name for path in saved.parent.iterdir()] == [LAST]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("unexpected pos")]
)
def test_a_save_that_stops_half_way_leaves_the_old_file_whole(saved, monkeypatch, error):
    def half_a_save(checkpoint, stream):
        stream.write(b"PK\3\4 half of it")
        stream.flush()
        raise error

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises((type(error), OSError)):
        save_checkpoint(NEW, saved)
    monkeypatch.undo()
    assert_only_old(saved)


def test_a_disk_that_is_full_leaves_the_old_file_whole(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses to make a file larger
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(NEW, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_only_old(saved)


def test_bytes_are_on_the_disk_before_the_file_has_its_name(saved, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    save_checkpoint(NEW, saved)
    assert order[:2] == ["fsync", "replace"]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_hostile_file_is_refused_and_its_code_does_not_run(tmp_path):
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    torch.save({"model": {}, "config": Hostile(marker)}, path)
    with pytest.raises(ValueError, match=r"hostile\.pt: damaged, or not a checkpoint of tensors"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def damaged() -> dict[str, bytes]:
    """Return files that are no checkpoints, and the beginnings of one."""
    import io

    stream = io.BytesIO()
    torch.save(OLD, stream)
    whole = stream.getvalue()
    draw = random.Random(0)
    files = {
        "empty": b"",
        "text": b"hello world\n",
        "a JPEG's head": b"\xff\xd8\xff\xe0\0\x10JFIF",
        "pickle": b"\x80\x02",
    }
    files |= {f"first {size} bytes": whole[:size] for size in (1, 3, len(whole) // 2, len(whole) - 1)}
    return files | {f"garbage {i}": draw.randbytes(draw.randint(1, 200)) for i in range(60)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # PyTorch guesses at garbage
def test_garbage_and_parts_of_a_checkpoint_are_refused_in_one_line_that_names_the_file(tmp_path):
    for content, data in damaged().items():
        path = tmp_path / content
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}: ") as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)
        assert "weights_only" not in str(raised.value)  # the advice of PyTorch's message is to run the file's code


@pytest.mark.parametrize("other", [[1, 2], {"state_dict": {}}, torch.zeros(3)], ids=["list", "other keys", "tensor"])
def test_files_of_other_programs_are_refused(tmp_path, other):
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "gone.pt")


def test_auto_means_the_last_checkpoint_of_the_output_folder_if_there_is_one(saved, tmp_path):
    assert find_checkpoint("auto", saved.parent) == saved
    assert find_checkpoint("auto", tmp_path / "new") is None
    assert find_checkpoint("some/where.pt", saved.parent).parts == ("some", "where.pt")

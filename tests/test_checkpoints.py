"""Checkpoints are written completely or not at all, and reading one does not execute code from it."""

from __future__ import annotations

import errno
import os
import random
import resource

import pytest
import torch

from dali_saliencymix.training.checkpoints import (
    BEST,
    LAST,
    differences,
    find_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_progress,
)

OLD = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "loaders": [{"pipeline": b"\0x", "step": 0}]}
NEW = {"model": {"weight": torch.zeros(500, 500)}, "epoch": 4, "loaders": []}


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint with the content OLD, alone in its folder."""
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files are an error, as on a full disk
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
    """Create a folder when unpickled."""

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
    assert marker.exists()  # check that the attack works with plain pickle


def damaged() -> dict[str, bytes]:
    """Return files that are not checkpoints, and truncated checkpoints."""
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # PyTorch tries to interpret garbage
def test_garbage_and_parts_of_a_checkpoint_are_refused_in_one_line_that_names_the_file(tmp_path):
    for content, data in damaged().items():
        path = tmp_path / content
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}: ") as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)
        assert "weights_only" not in str(raised.value)  # PyTorch's message advises to execute the file's code


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


def equal(one, other) -> bool:
    """Return whether two checkpoints have equal content."""
    return torch.equal(one["model"]["weight"], other["model"]["weight"]) and all(
        one[name] == other[name] for name in ("epoch", "loaders")
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch and zipfile warn about damaged files
def test_a_flipped_bit_is_found_or_changes_nothing(saved):
    whole, draw, refused = saved.read_bytes(), random.Random(4), 0
    weights = whole.index(torch.arange(6.0).numpy().tobytes())
    for position in [weights + 5, *(draw.randrange(len(whole)) for _ in range(400))]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << draw.randrange(8)
        saved.write_bytes(flipped)
        try:
            loaded = load_checkpoint(saved, tuple(OLD))
        except ValueError as error:
            refused += str(error).startswith(f"{saved}: ")
        else:
            assert equal(loaded, OLD)
            assert position != weights + 5
    assert refused > 100


def save_places(folder, *places, keep=100):
    for epoch, step in places:
        save_progress({**OLD, "epoch": epoch, "step": step}, folder, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_files_are_kept_and_last_is_the_newest(tmp_path):
    save_places(tmp_path, (0, 5), (0, 10), (1, 0), (1, 5), keep=2)
    assert names(tmp_path) == ["checkpoint_e001_s000000.pt", "checkpoint_e001_s000005.pt", LAST]
    assert load_checkpoint(tmp_path / LAST)["step"] == 5
    save_progress({**OLD, "epoch": 2, "step": 0}, tmp_path, keep=1, best=True)
    save_places(tmp_path, (1000, 2_000_000), keep=1)
    assert names(tmp_path) == [BEST, "checkpoint_e1000_s2000000.pt", LAST]
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 2
    save_places(tmp_path, (3, 0), keep=1)  # a run resumed from an older checkpoint does not delete newer ones
    assert names(tmp_path) == [BEST, "checkpoint_e003_s000000.pt", "checkpoint_e1000_s2000000.pt", LAST]


def test_what_a_killed_process_has_left_half_written_goes_away(tmp_path):
    (tmp_path / "checkpoint_e000_s000007.pt.partial").write_bytes(b"half")
    save_places(tmp_path, (1, 0))
    assert names(tmp_path) == ["checkpoint_e001_s000000.pt", LAST]


def test_last_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(source, name):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    save_places(tmp_path, (0, 5), (0, 10), keep=1)
    assert names(tmp_path) == ["checkpoint_e000_s000010.pt", LAST]
    assert load_checkpoint(tmp_path / LAST)["step"] == 10


def test_auto_takes_the_furthest_whole_checkpoint_whatever_the_clock_says(tmp_path, capsys):
    save_places(tmp_path, (0, 5), (0, 10), (1, 0))
    for age, name in enumerate(names(tmp_path)):
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    assert find_checkpoint("auto", tmp_path) == tmp_path / LAST
    assert capsys.readouterr().err == ""
    newest = tmp_path / "checkpoint_e001_s000000.pt"
    (tmp_path / LAST).unlink()  # as if the run had been killed before it updated LAST
    (tmp_path / LAST).write_bytes((tmp_path / "checkpoint_e000_s000010.pt").read_bytes())
    assert find_checkpoint("auto", tmp_path) == newest
    later = tmp_path / "checkpoint_e001_s000004.pt"
    save_checkpoint({**OLD, "epoch": 1, "step": 4}, later)
    (tmp_path / LAST).write_bytes(newest.read_bytes())
    assert find_checkpoint("auto", tmp_path) == later
    later.unlink()
    (tmp_path / LAST).unlink()
    os.link(newest, tmp_path / LAST)
    newest.write_bytes(newest.read_bytes()[:-10])  # also damages LAST, which is the same file
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint_e000_s000010.pt"
    (line,) = capsys.readouterr().err.splitlines()
    assert f"damaged checkpoint: {tmp_path / LAST}: damaged" in line
    (tmp_path / LAST).unlink()
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint_e000_s000010.pt"
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all of its 3 checkpoints are damaged"):
        find_checkpoint("auto", tmp_path)


def test_differences_name_what_was_and_what_is():
    assert differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5}) == [
        "b was 2, is now 4",
        "d was None, is now 5",
        "c was 3, is now None",
    ]


def test_random_states_go_through_a_file(tmp_path):
    device = torch.device("cpu")
    torch.manual_seed(3)
    random.seed(3)
    save_checkpoint({"model": {}, "random": random_state(device)}, tmp_path / "a.pt")
    expected = torch.rand(5), random.random()
    restore_random_state(load_checkpoint(tmp_path / "a.pt")["random"], device)
    assert torch.equal(torch.rand(5), expected[0])
    assert random.random() == expected[1]

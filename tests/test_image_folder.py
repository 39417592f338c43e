"""Lists of image files and their labels, and the search for broken ones."""

from __future__ import annotations

import os

import pytest
import torchvision
from PIL import Image

from dali_saliencymix.datasets.image_folder import find_unreadable, list_image_folder
from dali_saliencymix.datasets.sample_data import sample_jpeg

JPEG = sample_jpeg("train", "red_square", 0)


def fill(root, *names: str) -> None:
    """Make empty files; a name that ends with a slash makes a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()


def test_labels_are_those_of_torchvision_with_an_empty_class_between(tmp_path, capfd):
    fill(tmp_path, "b/1.jpg", "b/0.JPG", "a/x.jpeg", "empty/", "text/notes.txt", "Z/q.WebP", "10/c.png", "9/c.TIFF")
    fill(tmp_path, "b/deep/er/2.jpg", "b/deep/0.bmp", "z/i.ppm", "z/i.Pgm", "z/i.tif", "z/i.gif", "stray.jpg")
    ours = list_image_folder(tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path, allow_empty=True)
    assert ours.classes == theirs.classes == ["10", "9", "Z", "a", "b", "empty", "text", "z"]
    assert dict(zip(ours.files, ours.labels, strict=True)) == dict(theirs.samples)
    assert len(ours) == len(ours.files) == len(theirs.samples) == 11
    assert ours.labels == sorted(ours.labels)
    warning = capfd.readouterr().err
    assert "2 of 8 classes have no image here: empty, text" in warning
    assert warning.count("\n") == 1
    assert str(tmp_path) in warning


def test_without_nested_folders_the_order_of_the_files_is_torchvisions_too(tmp_path, capfd):
    fill(tmp_path, *(f"{name}/{file}.jpg" for name in ("b", "A", "c") for file in ("10", "9", "a b", "B", "é")))
    ours, theirs = list_image_folder(str(tmp_path)), torchvision.datasets.ImageFolder(tmp_path)
    assert list(zip(ours.files, ours.labels, strict=True)) == theirs.samples
    assert capfd.readouterr().err == ""


def test_hidden_files_and_hidden_folders_are_no_images_and_no_classes(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._1.jpg", ".ipynb_checkpoints/1.jpg", "b/1.jpg")
    folder = list_image_folder(tmp_path)
    assert folder.classes == ["a", "b"]
    assert folder.files == [str(tmp_path / "a/1.jpg"), str(tmp_path / "b/1.jpg")]


def test_a_second_folder_takes_the_labels_of_the_first(tmp_path, capfd):
    fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/b/1.jpg")
    classes = list_image_folder(tmp_path / "train").classes
    val = list_image_folder(tmp_path / "val", classes=classes)
    assert val.classes == ["a", "b", "c"]
    assert val.labels == [1, 2]
    assert "1 of 3 classes have no image here: a" in capfd.readouterr().err


def test_a_class_that_training_does_not_know_is_refused_by_name(tmp_path):
    fill(tmp_path, "a/1.jpg", "new/1.jpg")
    with pytest.raises(ValueError, match="class folder 'new' is not one of the 2 known classes"):
        list_image_folder(tmp_path, classes=["a", "b"])


def test_a_folder_that_cannot_serve_is_named(tmp_path):
    fill(tmp_path, "file", "hollow/", "loose/1.jpg", "texts/a/1.txt", "texts/b/")
    for name, error, why in (
        ("missing", FileNotFoundError, "no such folder"),
        ("file", NotADirectoryError, "not a folder"),
        ("hollow", FileNotFoundError, "no class folders in it"),
        ("loose", FileNotFoundError, "no class folders in it"),
        ("texts", FileNotFoundError, "no images in its 2 class folders"),
    ):
        with pytest.raises(error) as raised:
            list_image_folder(tmp_path / name)
        assert str(raised.value).startswith(f"{tmp_path / name}: {why}")
        assert "\n" not in str(raised.value)


BROKEN = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut_in_the_header.jpg": (JPEG[:200], "truncated"),
    "header_only.jpg": (JPEG[:3], "cannot identify"),
    "text.jpg": (b"<html>404 not found</html>", "not an image"),
    "empty.jpg": (b"", "empty file"),
}


@pytest.fixture
def healthy(tmp_path) -> list[str]:
    """Files of all kinds that decoders read."""
    (tmp_path / "plain.jpg").write_bytes(JPEG)
    (tmp_path / "trailing_bytes.jpg").write_bytes(JPEG + b"\0\0 made by some camera")
    image = Image.open(tmp_path / "plain.jpg").convert("RGB")
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("L").save(tmp_path / "image.pgm")
    for suffix in ("png", "bmp", "ppm", "tif", "webp"):
        image.save(tmp_path / f"image.{suffix}")
    image.save(tmp_path / "a_png_named.jpg", format="PNG")
    return sorted(str(path) for path in tmp_path.iterdir())


def test_healthy_files_are_not_accused(healthy):
    assert len(healthy) == 11
    assert find_unreadable(healthy) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_found_among_healthy_ones_with_its_reason(healthy, tmp_path, name):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    ((file, why),) = find_unreadable(sorted([*healthy, str(tmp_path / name)]))
    assert file == str(tmp_path / name)
    assert reason in why.lower()


def test_a_file_that_has_vanished_is_found(healthy):
    os.remove(healthy[3])
    assert find_unreadable(healthy) == [(healthy[3], "No such file or directory")]


def test_the_search_leaves_no_trace_in_a_log(healthy, capfd):
    """A progress bar in a file would put rubbish in front of the error, in the same line."""
    find_unreadable(healthy)
    assert capfd.readouterr().err == ""


def test_finds_come_in_the_order_of_the_files_up_to_the_limit(healthy, tmp_path):
    broken = [str(tmp_path / f"broken{i}.jpg") for i in range(7)]
    for file in broken:
        open(file, "wb").close()
    files = [file for pair in zip(broken, healthy, strict=False) for file in pair]
    assert [file for file, _ in find_unreadable(files)] == broken[:5]
    assert [file for file, _ in find_unreadable(files, limit=2)] == broken[:2]
    assert len(find_unreadable(files, limit=100)) == 7


def test_damage_that_the_ends_do_not_show_is_found_by_decoding(healthy, tmp_path):
    whole = (tmp_path / "image.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    ((file, why),) = find_unreadable(sorted([*healthy, str(tmp_path / "half.png")]))
    assert file == str(tmp_path / "half.png")
    assert "truncated" in why

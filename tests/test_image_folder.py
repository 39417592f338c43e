"""Lists of image files and their labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchvision

from dali_saliencymix.datasets.image_folder import list_image_folder


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


def test_a_part_of_a_folder_keeps_its_classes(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = list_image_folder(tmp_path)
    part = folder.take([2, 0, 2])
    assert [Path(file).name for file in part.files] == ["3.jpg", "1.jpg", "3.jpg"]
    assert part.labels == [1, 0, 1]
    assert (part.root, part.classes) == (folder.root, ["a", "b"])

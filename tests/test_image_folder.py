"""Lists of image files and their labels."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torchvision
from shared.rights import rights_of_a_user

from dali_saliencymix.datasets.image_folder import list_files, list_image_folder


def fill(root, *names: str) -> None:
    """Create empty files; a name that ends with a slash creates a folder."""
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
    assert "2 of 8 classes have no images here: empty, text" in warning
    assert warning.count("\n") == 1
    assert str(tmp_path) in warning


def test_without_nested_folders_the_order_of_the_files_is_torchvisions_too(tmp_path, capfd):
    fill(tmp_path, *(f"{name}/{file}.jpg" for name in ("b", "A", "c") for file in ("10", "9", "a b", "B", "é")))
    ours, theirs = list_image_folder(str(tmp_path)), torchvision.datasets.ImageFolder(tmp_path)
    assert list(zip(ours.files, ours.labels, strict=True)) == theirs.samples
    assert capfd.readouterr().err == ""


def test_hidden_files_and_hidden_folders_are_no_images_and_no_classes(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._1.jpg", ".ipynb_checkpoints/1.jpg", "b/1.jpg")
    fill(tmp_path, "a/.ipynb_checkpoints/1.jpg", "b/deep/.thumbnails/deeper/1.jpg")
    folder = list_image_folder(tmp_path)
    assert folder.classes == ["a", "b"]
    assert folder.files == [str(tmp_path / "a/1.jpg"), str(tmp_path / "b/1.jpg")]


def test_a_second_folder_takes_the_labels_of_the_first(tmp_path, capfd):
    fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/b/1.jpg")
    classes = list_image_folder(tmp_path / "train").classes
    val = list_image_folder(tmp_path / "val", classes=classes)
    assert val.classes == ["a", "b", "c"]
    assert val.labels == [1, 2]
    assert "1 of 3 classes have no images here: a" in capfd.readouterr().err


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


def test_paths_are_as_the_root_was_given(tmp_path, monkeypatch):
    fill(tmp_path, "a/deep/1.jpg", "b/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert list_image_folder(".").files == ["a/deep/1.jpg", "b/1.jpg"]
    assert list_image_folder("../" + tmp_path.name).files[1] == f"../{tmp_path.name}/b/1.jpg"


def test_links_to_files_and_to_folders_elsewhere_are_followed(tmp_path):
    fill(tmp_path, "store/x/1.jpg", "store/y/2.jpg", "store/3.jpg", "data/.cache/z/4.jpg", "data/c/5.jpg")
    data = tmp_path / "data"
    for link, target in {
        "a": "../store/x",
        "c/y": "../../store/y",
        "c/3.jpg": "../../store/3.jpg",
        "d": ".cache/z",
    }.items():
        (data / link).symlink_to(target)
    (tmp_path / "alias").symlink_to("data")
    folder = list_image_folder(tmp_path / "alias")
    names = [os.path.relpath(file, tmp_path / "alias") for file in folder.files]
    assert names == ["a/1.jpg", "c/3.jpg", "c/5.jpg", "c/y/2.jpg", "d/4.jpg"]
    assert folder.labels == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("link", "target", "other"),
    [
        ("c0/loop", "..", "data"),
        ("c0/loop", "../..", "data"),
        ("c0/loop", ".", "data"),
        ("c0/deep/loop", "../../../../above", "data"),
        ("c0/loop", "../c1", "data"),
        ("c2", "c1", "data"),
        ("c2", "..", "data"),
        ("c0/loop", "/", "data"),
        ("c1/again", "../../store", "data/c0/store"),
        ("c1/again", "../../store/x", "data/c0/store"),
    ],
)
def test_a_link_by_which_files_would_be_listed_twice_is_named(tmp_path, link, target, other):
    root = tmp_path / "above" / "data"
    fill(root, "c0/1.jpg", "c0/deep/2.jpg", "c1/1.jpg")
    fill(tmp_path / "above", "store/x/1.jpg")
    (tmp_path / "above" / "above").symlink_to(".")
    (root / "c0" / "store").symlink_to("../../store")
    (root / link).symlink_to(target)
    with pytest.raises(ValueError, match="this link leads to") as raised:
        list_image_folder(root)
    assert str(raised.value).startswith(f"{root / link}: ")
    assert f" shares files with {root.parent / other}; " in str(raised.value)


def test_folders_that_cannot_be_listed_are_named_and_not_taken_for_empty(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/deep/1.jpg", "b/1.jpg", "c/1.jpg")
    for closed in ("b", "a/deep", ""):
        folder = tmp_path / closed
        folder.chmod(0)
        try:
            with rights_of_a_user(), pytest.raises(PermissionError) as raised:
                list_image_folder(tmp_path)
        finally:
            folder.chmod(0o755)
        assert raised.value.filename == str(folder)
        assert "this folder cannot be listed: Permission denied" in str(raised.value)


def test_what_is_no_file_is_refused_and_a_link_to_nothing_is_for_the_reader(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    os.mkfifo(tmp_path / "a" / "pipe")  # not the name of an image
    for name, target in {
        "nothing.jpg": "none",
        "itself.jpg": "itself.jpg",
        "inside.jpg": "1.jpg/x",
        "none": "none",
    }.items():
        (tmp_path / "a" / name).symlink_to(target)
    assert [Path(file).name for file in list_image_folder(tmp_path).files[:-1]] == [
        *("1.jpg", "inside.jpg", "itself.jpg", "nothing.jpg"),
    ]
    odd = tmp_path / "b" / "odd.jpg"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(odd))  # a socket address is limited to 107 bytes
    for make in (lambda: None, lambda: os.mkfifo(odd), lambda: odd.symlink_to("/dev/zero")):
        make()
        with pytest.raises(ValueError, match="not a file but a pipe, a socket or a device") as raised:
            list_image_folder(tmp_path)
        assert str(raised.value).startswith(f"{odd}: ")
        odd.unlink()


def test_names_of_any_length_and_with_line_breaks_are_listed_and_those_that_are_no_text_refused(tmp_path):
    long = "x" * 251 + ".jpg"
    fill(tmp_path, f"a/{long}", "a/1\n2.jpg", "b\tc/1.jpg")
    assert sorted(Path(file).name for file in list_image_folder(tmp_path).files) == ["1\n2.jpg", "1.jpg", long]
    not_utf8 = b"caf\xe9".decode("utf-8", "surrogateescape")
    for name in (f"a/{not_utf8}.jpg", f"a/{not_utf8}/1.jpg", f"{not_utf8}/"):
        fill(tmp_path, name)
        with pytest.raises(ValueError, match=r"caf\\udce9.*: this name is not UTF-8"):
            list_image_folder(tmp_path)
        path = tmp_path / name
        (path.unlink if path.is_file() else path.rmdir)()
        if not_utf8 in path.parent.name:
            path.parent.rmdir()


def test_all_files_of_a_folder_are_listed_by_the_same_rules(tmp_path):
    fill(tmp_path, "a/1.txt", "a/.2.jpg", ".b/1.jpg", "3")
    assert list_files(tmp_path) == [str(tmp_path / "3"), str(tmp_path / "a" / "1.txt")]
    (tmp_path / "a" / "up").symlink_to("..")
    with pytest.raises(ValueError, match="this link leads to"):
        list_files(tmp_path)

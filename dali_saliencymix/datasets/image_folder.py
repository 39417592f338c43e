"""List the files and labels of an image folder with one folder per class.

The class order is that of torchvision's ``ImageFolder``: the sorted names of all class folders, empty ones included.
DALI's own reader leaves out empty folders, which shifts the labels of all classes after them.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes
    ----------
    root : Path
        The folder.
    classes : list of str
        Names of the classes; a label is an index into this list.
    files : list of str
        Paths of the images, sorted within each class, in the order of the classes.
    labels : list of int
        Label of each file.
    """

    root: Path
    classes: list[str]
    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> ImageFolder:
        """Return a folder of the same classes with the images at `indices`, in this order."""
        files, labels = [self.files[index] for index in indices], [self.labels[index] for index in indices]
        return ImageFolder(self.root, self.classes, files, labels)


def list_image_folder(root: str | Path, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """List the images below `root`, which holds one folder per class.

    Parameters
    ----------
    root : path
        Folder of class folders, which may have subfolders. Files and folders whose names begin with a dot, and files
        with extensions other than `EXTENSIONS`, are ignored. Links to files and folders are followed.
    classes : sequence of str, optional
        Class names in label order, from another folder of the same data set. By default, the sorted names of the
        class folders.

    Returns
    -------
    ImageFolder

    Raises
    ------
    FileNotFoundError
        If `root` does not exist, or holds no class folder or no image.
    NotADirectoryError
        If `root` is a file.
    OSError
        If a folder cannot be listed, because of its permissions or a disk error. The message names it.
    ValueError
        If `root` has a class folder that is not in `classes`; if a link leads to a folder that is already listed, or
        to a parent of one; if a file with the extension of an image is a pipe, a socket or a device; or if a name is
        not UTF-8, which DALI needs.
    """
    root = Path(root)
    walk = _Walk(root)
    try:
        folders = {entry.name: str(root / entry.name) for entry in walk.entries(root) if walk.is_folder(entry)}
    except FileNotFoundError as error:
        msg = f"{root}: no such folder"
        raise FileNotFoundError(msg) from error
    except NotADirectoryError as error:
        msg = f"{root}: not a folder"
        raise NotADirectoryError(msg) from error
    if not folders:
        msg = f"{root}: no class folders in it; it must hold one folder of images for each class"
        raise FileNotFoundError(msg)
    names = list(classes) if classes is not None else list(folders)
    unknown = sorted(set(folders) - set(names))
    if unknown:
        msg = f"{root}: class folder {unknown[0]!r} is not one of the {len(names)} known classes"
        raise ValueError(msg)

    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        images = sorted(walk.files_below(folders[name], _is_image_name)) if name in folders else []
        for path in (folders.get(name, ""), *images):
            _check_text(path)
        files += images
        labels += [label] * len(images)
        if not images:
            empty.append(name)
    if not files:
        msg = f"{root}: no images in its {len(folders)} class folders (looked for {' '.join(EXTENSIONS)})"
        raise FileNotFoundError(msg)
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        sys.stderr.write(f"warning: {root}: {len(empty)} of {len(names)} classes have no images here: {shown}\n")
    return ImageFolder(root, names, files, labels)


def list_files(root: str | Path) -> list[str]:
    """Return the sorted paths of all files below a folder.

    Hidden files and links are treated as in `list_image_folder`.

    Raises
    ------
    OSError, ValueError
        As for `list_image_folder`, whatever the extension of a file.
    """
    return sorted(_Walk(root).files_below(root, lambda name: True))


class _Walk:
    """Walks through the folders below `root` once. No link may lead to a folder that the walk reaches anyway."""

    def __init__(self, root: str | Path) -> None:
        # Folders whose files are listed, and all their parents: real paths, with the names under which they are listed.
        self._listed: dict[Path, str] = {}
        self._above: dict[Path, str] = {}
        self._add(Path(os.path.realpath(root)), str(root))

    def _add(self, target: Path, name: str) -> None:
        self._listed[target] = name
        for inside, parent in itertools.pairwise((target, *target.parents)):
            if inside.name.startswith("."):  # hidden from its parents
                break
            self._above.setdefault(parent, name)

    def _in_common(self, target: Path) -> str | None:
        """Return the name of a listed folder that shares files with `target`, or None."""
        for folder in (target, *target.parents):
            if folder in self._listed:
                return self._listed[folder]
            if folder.name.startswith("."):
                break
        return self._above.get(target)

    def entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder that are not hidden, sorted by name."""
        try:
            with os.scandir(folder) as found:
                return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda each: each.name)
        except OSError as error:
            why = f"this folder cannot be listed: {error.strerror}"
            raise OSError(error.errno, why, str(folder)) from error

    def is_folder(self, entry: os.DirEntry[str]) -> bool:
        """Return whether `entry` is a folder or a link to one; ValueError if a link would list files twice."""
        if not stat.S_ISDIR(_mode(entry)):
            return False
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if other := self._in_common(target):
                msg = (
                    f"{entry.path}: this link leads to {target}, which shares files with {other}; each image must be "
                    "listed only once, so remove the link"
                )
                raise ValueError(msg)
            self._add(target, entry.path)
        return True

    def files_below(self, folder: str | Path, is_wanted: Callable[[str], bool]) -> list[str]:
        """Return the paths of all files below a folder whose names satisfy `is_wanted`.

        Broken links are included; they are reported when the file is read.
        """
        files, folders = [], [folder]
        while folders:
            for entry in self.entries(folders.pop()):
                if self.is_folder(entry):
                    folders.append(entry.path)
                elif is_wanted(entry.name):
                    mode = _mode(entry)
                    if mode and not stat.S_ISREG(mode):
                        msg = f"{entry.path}: not a file but a pipe, a socket or a device; remove it"
                        raise ValueError(msg)
                    files.append(entry.path)
        return files


def _mode(entry: os.DirEntry[str]) -> int:
    """Return the file type bits of an entry, after following links; 0 for a broken link."""
    try:
        # Except for links, the listing of the folder holds the type, so millions of files need no `stat`.
        if entry.is_dir():
            return stat.S_IFDIR
        if entry.is_file():
            return stat.S_IFREG
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise


def _check_text(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        msg = f"{path!r}: this name is not UTF-8, which DALI needs; rename the file or its folder"
        raise ValueError(msg) from error


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)

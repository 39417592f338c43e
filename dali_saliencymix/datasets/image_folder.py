"""A folder of images with one folder per class: which files there are, and their labels.

The class order is that of torchvision's ``ImageFolder``: the sorted names of all class folders, empty ones included.
DALI's own reader leaves empty folders out, which shifts the label of every class behind them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        Paths of the images, class by class, sorted.
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
        """Return a folder of the same classes with the images at these places, in this order."""
        files, labels = [self.files[index] for index in indices], [self.labels[index] for index in indices]
        return ImageFolder(self.root, self.classes, files, labels)


def list_image_folder(root: str | Path, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """List the images below `root`, which holds one folder per class.

    Parameters
    ----------
    root : path
        Folder of class folders. Images may be in folders within these; hidden files and other endings are ignored.
    classes : sequence of str, optional
        Names of the classes in label order, from another folder of the same data set. By default the names of the
        class folders, sorted.

    Returns
    -------
    ImageFolder

    Raises
    ------
    FileNotFoundError
        If `root` does not exist, or holds no class folder or no image.
    NotADirectoryError
        If `root` is a file.
    ValueError
        If `root` has a class folder that is not in `classes`, or the name of a file is not UTF-8, which DALI needs.
    """
    root = Path(root)
    if not root.exists():
        msg = f"{root}: no such folder"
        raise FileNotFoundError(msg)
    if not root.is_dir():
        msg = f"{root}: not a folder"
        raise NotADirectoryError(msg)
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        msg = f"{root}: no class folders in it; there must be one folder of images for each class"
        raise FileNotFoundError(msg)
    names = list(classes) if classes is not None else found
    unknown = sorted(set(found) - set(names))
    if unknown:
        msg = f"{root}: class folder {unknown[0]!r} is not one of the {len(names)} known classes"
        raise ValueError(msg)

    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        images = _images_below(root / name)
        files += images
        labels += [label] * len(images)
        if not images:
            empty.append(name)
    if not files:
        msg = f"{root}: no images in its {len(found)} class folders (looked for {' '.join(EXTENSIONS)})"
        raise FileNotFoundError(msg)
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        sys.stderr.write(f"warning: {root}: {len(empty)} of {len(names)} classes have no image here: {shown}\n")
    return ImageFolder(root, names, files, labels)


def _images_below(folder: Path) -> list[str]:
    paths = []
    for directory, _, names in os.walk(folder, followlinks=True):
        paths += [os.path.join(directory, name) for name in names if _is_image_name(name)]
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            msg = f"{path!r}: this name is not UTF-8, which DALI needs; rename the file or its folder"
            raise ValueError(msg) from error
    return sorted(paths)


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")

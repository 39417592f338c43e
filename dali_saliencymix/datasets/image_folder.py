"""A folder of images with one folder per class: which files there are, their labels, and which of them are broken.

The class order is that of torchvision's ``ImageFolder``: the sorted names of all class folders, empty ones included.
DALI's own reader leaves empty folders out, which shifts the label of every class behind them.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# The first bytes of the formats above.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"P2", b"P3", b"P5", b"P6", b"BM", b"II*\0", b"MM\0*", b"RIFF")

_CHUNK = 1024  # files examined between two looks at the clock


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


def list_image_folder(root: str | Path, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """List the images below `root`, which holds one folder per class.

    Parameters
    ----------
    root : path
        Folder of class folders. Images may lie in folders within these; hidden files and other endings are passed over.
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


def find_unreadable(files: Sequence[str], *, limit: int = 5, seconds: float = 120.0) -> list[tuple[str, str]]:
    """Find files that no decoder will read, to name them after a decoder has failed without naming one.

    All files get a look at their first and last bytes, which is quick. If all of them look right, they are decoded
    with Pillow, one after the other for as long as `seconds` says. Damage that Pillow bears is not found.

    Parameters
    ----------
    files : sequence of str
        Paths of image files.
    limit : int
        Stop after this many finds.
    seconds : float
        Stop after this time, in seconds.

    Returns
    -------
    list of (str, str)
        Path and reason of each find, in the order of `files`.
    """
    from tqdm import tqdm  # this and Pillow are only needed once something has gone wrong

    start = time.monotonic()
    for examine in (why_unreadable, _why_not_decodable):
        found = []
        bar = tqdm(total=len(files), unit="file", desc="looking for it", leave=False, disable=None)  # on terminals only
        with ThreadPoolExecutor() as pool, bar:
            for begin in range(0, len(files), _CHUNK):
                chunk = files[begin : begin + _CHUNK]
                found += [(file, why) for file, why in zip(chunk, pool.map(examine, chunk), strict=True) if why]
                bar.update(len(chunk))
                if len(found) >= limit or time.monotonic() - start > seconds:
                    break
        if found:
            break
    return found[:limit]


def why_unreadable(file: str) -> str | None:
    """Return what is wrong with the first and last bytes of an image file, or None."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(16)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 2, 0))
            tail = stream.read(2)
    except OSError as error:
        return error.strerror or str(error)
    if not head:
        return "empty file"
    if not head.startswith(SIGNATURES):
        return "not an image"
    if head.startswith(b"\xff\xd8") and tail != b"\xff\xd9":
        return _why_not_decodable(file)
    return None


def _why_not_decodable(file: str) -> str | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return str(error)
    return None

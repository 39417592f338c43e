"""CIFAR-10 and CIFAR-100 in their original format: folders of pickles, read without running code from them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 32
# Of the training images of CIFAR-10, in grey levels 0..255; also used for CIFAR-100.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "labels",
        "batches.meta",
        "label_names",
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), ("test",), "fine_labels", "meta", "fine_label_names"),
}
DATASETS = tuple(_LAYOUTS)


@dataclass(frozen=True, eq=False)
class CifarImages:
    """The training or the test images of CIFAR.

    Attributes
    ----------
    images : ndarray of shape (N, 32, 32, 3), uint8
        RGB.
    labels : ndarray of shape (N,), int32
        Indices into `classes`.
    classes : list of str
        Names of the classes.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)


def read_cifar(root: str | Path, dataset: str) -> tuple[CifarImages, CifarImages]:
    """Read the training and the test images of CIFAR.

    Parameters
    ----------
    root : path
        The unpacked archive, ``cifar-10-batches-py`` or ``cifar-100-python``, or the folder that holds it.
    dataset : {"cifar10", "cifar100"}
        The data set. CIFAR-100 is read with its 100 fine classes.

    Returns
    -------
    train, test : CifarImages

    Raises
    ------
    FileNotFoundError
        If a file of the archive is missing. The message names it.
    ValueError
        If a file is damaged, is not a CIFAR file, or is a pickle of more than arrays and plain values.
    """
    layout = _LAYOUTS[dataset]
    root = Path(root)
    folder = root if (root / layout.meta).is_file() else root / layout.folder
    if not (folder / layout.meta).is_file():
        msg = f"{root}: no {dataset} here; it must hold the unpacked archive, a folder {layout.folder}"
        raise FileNotFoundError(msg)
    classes = _read_pickle(folder / layout.meta).get(layout.names)
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        msg = f"{folder / layout.meta}: not a file of {dataset}, it has no list {layout.names!r}"
        raise ValueError(msg)
    parts = []
    for names in (layout.train, layout.test):
        pairs = [_read_batch(folder / name, layout.labels, len(classes)) for name in names]
        images, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        parts.append(CifarImages(images, labels, classes))
    return parts[0], parts[1]


def _read_batch(path: Path, labels_key: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    entries = _read_pickle(path)
    data: Any = entries.get("data")
    ids: Any = entries.get(labels_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIZE**2:
        msg = f"{path}: not a file of CIFAR, its 'data' is not a uint8 array with {3 * SIZE**2} columns"
        raise ValueError(msg)
    whole = isinstance(ids, list) and len(ids) == len(data)
    if not whole or not all(type(label) is int and 0 <= label < num_classes for label in ids):
        msg = f"{path}: not a file of CIFAR, {labels_key!r} is not a list of {len(data)} labels in [0, {num_classes})"
        raise ValueError(msg)
    images = data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(ids, np.int32)


def _read_pickle(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        try:
            # Python 2 wrote the files. This encoding preserves the bytes of its strings, which also hold the pixels.
            entries = _PlainUnpickler(stream, encoding="latin1").load()
        except Exception as error:  # unpickling a damaged file can raise anything
            reason = str(error) if isinstance(error, _ForbiddenError) else "damaged, or not a pickle"
            msg = f"{path}: cannot be read: {reason}"
            raise ValueError(msg) from error
    if not isinstance(entries, dict):
        msg = f"{path}: not a file of CIFAR, it does not hold a dictionary"
        raise ValueError(msg)
    return entries


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle refers to something other than arrays and plain values."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain values only. Anything else could run arbitrary code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            msg = f"it refers to {module}.{name}, but only arrays and plain values are allowed"
            raise _ForbiddenError(msg)
        return _ALLOWED[module, name]


def _dtype(code: str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """Return the dtype of an old pickle, which has integers where NumPy now requires booleans."""
    return np.dtype(code, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 stores as text in pickles for Python 2."""
    if encoding != "latin1":
        msg = f"it refers to the codec {encoding}, but only latin1 is allowed"
        raise _ForbiddenError(msg)
    return text.encode("latin1")


# The function that pickles of arrays call. NumPy has moved it to another module since those files were written.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}

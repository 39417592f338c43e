"""Write a tiny CIFAR archive for tests, in pickles as Python 2 wrote them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

SIZE = 32


def write_cifar(root: Path, dataset: str, train: int = 40, test: int = 15, seed: int = 0) -> Path:
    """Write the archive's folder into `root` and return it; each class has a colour, each image noise and a square."""
    rng = np.random.default_rng(seed)
    if dataset == "cifar10":
        folder, classes = root / "cifar-10-batches-py", 10
        sizes = {f"data_batch_{number}": train // 5 for number in range(1, 6)} | {"test_batch": test}
        meta, names, labels_key = "batches.meta", "label_names", "labels"
    else:
        folder, classes = root / "cifar-100-python", 100
        sizes = {"train": train, "test": test}
        meta, names, labels_key = "meta", "fine_label_names", "fine_labels"
    folder.mkdir(parents=True)
    (folder / meta).write_bytes(python2_pickle({names: [f"kind {number}" for number in range(classes)]}))
    for name, count in sizes.items():
        labels = [number % classes for number in range(count)]
        images = rng.integers(60, 120, (count, SIZE, SIZE, 3))
        for image, label in zip(images, labels, strict=True):
            image += np.array([label % 4, label // 4 % 4, label // 16 % 4]) * 20
            y, x = rng.integers(2, SIZE - 8, 2)
            image[y : y + 6, x : x + 6] = rng.integers(200, 256, 3)
        rows = images.astype(np.uint8).transpose(0, 3, 1, 2).reshape(count, -1)
        content = {"data": rows, labels_key: labels, "filenames": [f"{number}.png" for number in range(count)]}
        (folder / name).write_bytes(python2_pickle(content))
    return folder


def python2_pickle(value: dict) -> bytes:
    """Pickle as Python 2 did with protocol 2: strings are bytes, and the data of an array are such a string."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(key) + _pickled(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    assert value.dtype == np.uint8
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(_pickled(side) for side in value.shape) + b"t"
    content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"

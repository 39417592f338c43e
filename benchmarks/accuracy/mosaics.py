"""Store CIFAR-10 in six image files of 17 MB, for a GPU host that has no network and accepts small transfers only.

    python -m benchmarks.accuracy.mosaics CIFAR OUT

Each file of the archive becomes a lossless WebP image, NAME.webp: 100 rows of 100 tiles of 32x32 pixels, row by row.
``labels.json`` holds ``{"classes": [names], NAME: [labels], ...}``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import program
from dali_saliencymix.datasets.cifar import SIZE, CifarImages, read_cifar
from dali_saliencymix.measure.results import read_json, replace_file

_SIDE = 100  # tiles
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_NAMES = (*_TRAIN, "test_batch")


def read_mosaics(folder: Path) -> tuple[CifarImages, CifarImages]:
    """Return the training and the test images."""
    labels = read_json(folder / "labels.json")
    parts = []
    for names in (_TRAIN, _NAMES[len(_TRAIN) :]):
        images = np.concatenate([_tiles(folder / f"{name}.webp") for name in names])
        ids = np.concatenate([np.array(labels.get(name, []), np.int32) for name in names])
        if len(ids) != len(images):
            msg = f"{folder / 'labels.json'}: must have a label for each of {len(images)} images, got {len(ids)}"
            raise ValueError(msg)
        parts.append(CifarImages(images, ids, labels["classes"]))
    return parts[0], parts[1]


def write_mosaics(source: Path, folder: Path) -> None:
    train, test = read_cifar(source, "cifar10")
    images, ids = (np.concatenate([getattr(part, name) for part in (train, test)]) for name in ("images", "labels"))
    size = _SIDE**2
    if len(images) != size * len(_NAMES):
        msg = f"{source}: must hold {size * len(_NAMES)} images, got {len(images)}"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"classes": train.classes}
    for number, name in enumerate(program.progress(_NAMES, unit="file")):
        own = slice(number * size, (number + 1) * size)
        tiles = images[own].reshape(_SIDE, _SIDE, SIZE, SIZE, 3).swapaxes(1, 2)
        mosaic = Image.fromarray(np.ascontiguousarray(tiles).reshape(_SIDE * SIZE, _SIDE * SIZE, 3))
        mosaic.save(folder / f"{name}.webp", lossless=True, quality=60)
        labels[name] = ids[own].tolist()
    replace_file(folder / "labels.json", json.dumps(labels))


def _tiles(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as mosaic:
        pixels = np.asarray(mosaic.convert("RGB"))
    if pixels.shape != (_SIDE * SIZE, _SIDE * SIZE, 3):
        msg = f"{path}: must be {_SIDE * SIZE} pixels high and wide, got {pixels.shape[0]} and {pixels.shape[1]}"
        raise ValueError(msg)
    return pixels.reshape(_SIDE, SIZE, _SIDE, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("cifar", type=Path, metavar="CIFAR", help="the unpacked archive, or the folder around it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the mosaics")
    options = parser.parse_args()
    write_mosaics(options.cifar, options.out)


if __name__ == "__main__":
    program.run(main)

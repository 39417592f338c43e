"""Make the JPEG files that loaders are measured on, if no folder of images is given.

    python -m benchmarks.data FOLDER --images 4000 --from DATA

The files have the sizes of ImageNet's, in most cases 500 pixels along the long side, and are made on all cores. With
``--from``, each is one of the photographs in DATA, slightly cropped, flipped at random and compressed again. Without
it, each is a mosaic of sample images. The size of the files is part of the conditions of a result.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import program
from benchmarks.machine import DEAF_TO_INTERRUPTS
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.datasets.sample_data import CLASSES, sample_jpeg
from dali_saliencymix.measure.environment import cores

_LONG_SIDE = 500
_QUALITY = 96  # makes the files about as large as ImageNet's


@contextlib.contextmanager
def images_of(options: argparse.Namespace) -> Iterator[ImageFolder]:
    """Yield the images in ``options.data``; if that is None, make 200 images and delete them afterwards."""
    if options.data is not None:
        yield list_image_folder(options.data)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), 200)
        yield list_image_folder(folder)


def described(folder: ImageFolder) -> dict[str, Any]:
    """Return the number of images, and the mean size in pixels and in kilobytes of up to 200 of them."""
    files = folder.files[:: -(-len(folder) // 200)]
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    width, height = np.mean(sizes, axis=0).round().astype(int).tolist()
    kilobytes = round(sum(Path(file).stat().st_size for file in files) / len(files) / 1000)
    return {"images": len(folder), "mean_size": f"{width}x{height}", "mean_kilobytes": kilobytes}


def make_images(folder: Path, count: int, source: Path | None = None) -> None:
    """Write `count` JPEG files into class folders, made from the images in `source` if it is given."""
    listed = list_image_folder(source) if source else None
    make = functools.partial(_make_image, folder=folder, listed=listed)
    with concurrent.futures.ProcessPoolExecutor(cores(), **DEAF_TO_INTERRUPTS) as pool:
        for _ in pool.map(make, range(count), chunksize=16):
            pass


def _make_image(number: int, folder: Path, listed: ImageFolder | None) -> None:
    rng = np.random.default_rng([7, number])
    if listed is None:
        name, image = CLASSES[number % len(CLASSES)], _mosaic(rng, number)
    else:
        chosen = number % len(listed)
        name, image = listed.classes[listed.labels[chosen]], _like(rng, Path(listed.files[chosen]))
    target = folder / name / f"{number:06d}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, "JPEG", quality=_QUALITY)


def _like(rng: np.random.Generator, file: Path) -> Image.Image:
    """Return a photograph cropped by up to 4 %, flipped horizontally at random, and of ImageNet's size."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    borders = (*rng.uniform(0, 0.02, 2), *rng.uniform(0.98, 1, 2))  # left, top, right, bottom
    image = image.crop([int(share * side) for share, side in zip(borders, 2 * image.size, strict=True)])
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if max(image.size) > _LONG_SIDE:
        image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    return image


def _mosaic(rng: np.random.Generator, number: int) -> Image.Image:
    short = int(rng.integers(330, 400))
    size = (_LONG_SIDE, short) if rng.random() < 0.7 else (short, _LONG_SIDE)
    image = Image.new("RGB", size)
    y = 0
    while y < size[1]:
        x, row = 0, size[1]
        while x < size[0]:
            sample = sample_jpeg("train", CLASSES[number % len(CLASSES)], int(rng.integers(1 << 30)))
            with Image.open(io.BytesIO(sample)) as tile:
                image.paste(tile, (x, y))
                x, row = x + tile.width, min(row, tile.height)
        y += row
    return image


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write class folders into")
    parser.add_argument("--images", type=program.positive, default=4000, help="number of files (default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, metavar="DATA", help="photographs to make the files from")
    options = parser.parse_args()
    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        msg = f"FOLDER must be empty or not exist, got {options.folder}"
        raise ValueError(msg)
    make_images(options.folder, options.images, options.source)
    program.say(", ".join(f"{name} {value}" for name, value in described(list_image_folder(options.folder)).items()))


if __name__ == "__main__":
    program.run(main)

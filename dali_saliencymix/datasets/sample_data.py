"""Generate a small image data set: JPEG files in class folders, with classes that a network can learn.

Each image has one salient object, a shape in the colour of its class, at a random position on a muted, textured
background. Image sizes and aspect ratios vary, and some images are grey.
"""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dali_saliencymix._checks import check_at_least

# Class name -> (radius of each corner of the shape, hue of the object in [0, 1]).
_CLASSES: dict[str, tuple[list[float], float]] = {
    "blue_star": ([1.0, 0.4] * 5, 0.62),
    "cyan_triangle": ([1.0] * 3, 0.50),
    "green_disc": ([0.9] * 48, 0.33),
    "magenta_cross": ([1.0, 0.45, 1.0] * 4, 0.86),
    "orange_hexagon": ([0.95] * 6, 0.08),
    "purple_flower": ([1.0, 0.92, 0.55, 0.92] * 5, 0.75),
    "red_square": ([1.0] * 4, 0.0),
    "yellow_bowtie": ([1.0, 0.25, 1.0, 1.0, 0.25, 1.0], 0.16),
}
CLASSES = tuple(_CLASSES)

_GREY_SHARE = 0.1
_SHORT_SIDE = (96, 161)  # pixels, half-open
_JPEG_QUALITY = 88


def make_sample_data(root: str | Path, *, train: int = 200, val: int = 40, seed: int = 0) -> None:
    """Write ``root/train`` and ``root/val``, each with one folder of JPEG files per class of `CLASSES`.

    The bytes of a file depend only on `seed`, on its split, class and number, and on the version of Pillow.

    Parameters
    ----------
    root : path
        Output folder, which is created if necessary. Existing files of the same names are replaced.
    train, val : int
        Images per class.
    seed : int
        Random seed, at least 0.

    Raises
    ------
    ValueError
        If `train` or `val` is not positive, or `seed` is negative.
    """
    check_at_least(train, "train", 1)
    check_at_least(val, "val", 1)
    check_at_least(seed, "seed", 0)
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = Path(root, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / f"{number:05d}.jpg").write_bytes(sample_jpeg(split, name, number, seed=seed))


def sample_jpeg(split: str, name: str, number: int, *, seed: int = 0) -> bytes:
    """Return the bytes of one JPEG file of the data set.

    Parameters
    ----------
    split : {"train", "val"}
        The split of the image.
    name : str
        The class of the image, one of `CLASSES`.
    number : int
        Number of the image within its class and split.
    seed : int
        Seed of the data set.

    Examples
    --------
    >>> sample_jpeg("train", "red_square", 0)[:3].hex()
    'ffd8ff'
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), CLASSES.index(name), number])
    short = int(rng.integers(*_SHORT_SIDE))
    long = int(short * rng.uniform(1.0, 1.6))
    height, width = (short, long) if rng.random() < 0.7 else (long, short)
    outline, hue = _CLASSES[name]
    colour = _object_colour(rng, hue)
    image = _with_object(rng, _background(rng, height, width, colour), outline, colour)
    if rng.random() < _GREY_SHARE:
        image = image.convert("L")
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _object_colour(rng: np.random.Generator, hue: float) -> tuple[int, int, int]:
    hsv = ((hue + rng.normal(0, 0.012)) % 1, rng.uniform(0.7, 1.0), rng.uniform(0.75, 1.0))
    red, green, blue = colorsys.hsv_to_rgb(*hsv)
    return int(255 * red), int(255 * green), int(255 * blue)


def _background(rng: np.random.Generator, height: int, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """Draw noise of several grain sizes over a muted colour that is darker or lighter than `colour`."""
    texture = np.zeros((height, width))
    for grain in (4, 8, 16, 48):
        coarse = rng.standard_normal((height // grain + 2, width // grain + 2)).astype(np.float32)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        texture += np.asarray(layer) * rng.uniform(0.3, 1.0)
    luma = float(np.dot(colour, (0.299, 0.587, 0.114)))
    contrast = rng.uniform(55, 90)
    muted = (luma - contrast if luma > 128 else luma + contrast) + rng.uniform(-18, 18, 3)
    pixels = muted + texture[..., None] * rng.uniform(4, 10) + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _with_object(
    rng: np.random.Generator, image: Image.Image, outline: list[float], colour: tuple[int, int, int]
) -> Image.Image:
    """Draw the shape with a random rotation and position, antialiased by drawing it at four times the size."""
    scale = 4
    radius = min(image.size) * rng.uniform(0.2, 0.34)
    centre_x = rng.uniform(0.9 * radius, image.width - 0.9 * radius)
    centre_y = rng.uniform(0.9 * radius, image.height - 0.9 * radius)
    angles = rng.uniform(0, 2 * np.pi) + np.arange(len(outline)) * 2 * np.pi / len(outline)
    distances = radius * np.asarray(outline)
    x, y = centre_x + distances * np.cos(angles), centre_y + distances * np.sin(angles)
    mask = Image.new("L", (image.width * scale, image.height * scale))
    ImageDraw.Draw(mask).polygon(list(zip(x * scale, y * scale, strict=True)), fill=255)
    image.paste(colour, mask=mask.resize(image.size, Image.Resampling.BOX))
    return image

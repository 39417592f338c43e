"""A small data set in the format of Pascal VOC: real JPEG and XML files, with distinguishable objects.

A test module gets the fixture with ``pytest_plugins = ["shared.voc_fixtures"]``. Nothing asserts: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"cat": (230, 40, 40), "bus": (40, 60, 230), "sheep": (240, 240, 240)}
WIDTH, HEIGHT = 80, 64
SETS = {("2007", "trainval"): 6, ("2012", "trainval"): 4, ("2007", "test"): 5}


def make_voc(root: Path, *, seed: int = 0) -> Path:
    """Write the sets that the paper uses, with a few images each, below ``root/VOCdevkit``; return `root`."""
    rng = np.random.default_rng(seed)
    for (year, image_set), count in SETS.items():
        folder = root / "VOCdevkit" / f"VOC{year}"
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        names = [f"{image_set}_{number:06d}" for number in range(count)]
        (folder / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            pixels, objects = picture(rng, difficult=number == 1)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            write_annotation(folder / "Annotations" / f"{name}.xml", objects)
    return root


def picture(rng: np.random.Generator, *, difficult: bool) -> tuple[np.ndarray, list[tuple]]:
    """Paint a rectangle on each half of a grey image; the second one is marked as difficult, or is missing."""
    pixels = rng.integers(90, 130, (HEIGHT, WIDTH, 3), np.uint8)
    objects = []
    for half in range(2 if difficult else int(rng.integers(1, 3))):
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        width, height = rng.integers(22, 36, 2)
        x = half * WIDTH // 2 + int(rng.integers(0, WIDTH // 2 - width + 1))
        y = int(rng.integers(0, HEIGHT - height + 1))
        pixels[y : y + height, x : x + width] = COLOURS[name]
        # VOC counts pixels from 1 and includes the last pixel of the object.
        objects.append((name, (x + 1, y + 1, x + width, y + height), difficult and half == 1))
    return pixels, objects


def write_annotation(path: Path, objects: list[tuple]) -> None:
    """Write an annotation with the same elements as VOC's."""
    root = ET.Element("annotation")
    size = ET.SubElement(root, "size")
    for name, value in (("width", WIDTH), ("height", HEIGHT), ("depth", 3)):
        ET.SubElement(size, name).text = str(value)
    for name, box, difficult in objects:
        entry = ET.SubElement(root, "object")
        ET.SubElement(entry, "name").text = name
        ET.SubElement(entry, "difficult").text = str(int(difficult))
        edges = ET.SubElement(entry, "bndbox")
        for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ET.SubElement(edges, edge).text = str(value)
    ET.ElementTree(root).write(path)


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    """A data set in the format of VOC. Tests must not change it."""
    return make_voc(tmp_path_factory.mktemp("voc"))

"""Pascal VOC for object detection: images with the boxes of their objects, in the order of a training or one by one."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torchvision.datasets import VOCDetection

# A detector's label of the first class is 1; 0 is the background.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Objects(NamedTuple):
    """What is in an image.

    Attributes
    ----------
    boxes : tensor of shape (M, 4), float32
        (x0, y0, x1, y1) in pixels, half-open: the pixels numbered from 1 to 3 in a VOC file are from 0 to 3 here.
    labels : tensor of shape (M,), int64
        1 to 20, as `CLASSES`.
    difficult : tensor of shape (M,), bool
        Objects that VOC leaves out of the score.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    difficult: torch.Tensor


class VocImages(torch.utils.data.Dataset[tuple[torch.Tensor, Objects]]):
    """Images of one or more sets of VOC; an index is (number of the image, whether to mirror it).

    Parameters
    ----------
    root : path
        Folder that holds ``VOCdevkit/VOC2007`` and so on, as VOC's archives unpack.
    sets : sequence of str
        Year and name of each set, as ``"2007:trainval"``.

    Raises
    ------
    ValueError
        If a set is not there or is empty, or one of its files is missing or says what cannot be. All annotations are
        read here.
    """

    def __init__(self, root: Path, sets: Sequence[str]) -> None:
        self.files: list[str] = []
        self.objects: list[Objects] = []
        for name in sets:
            year, _, image_set = name.partition(":")
            try:
                listed = VOCDetection(root, year=year, image_set=image_set)
            except (OSError, RuntimeError, ValueError) as error:
                msg = f"{root}: no set {name!r} of VOC there, such as 2007:trainval in VOCdevkit/VOC2007: {error}"
                raise ValueError(msg) from error
            self.files += listed.images
            self.objects += [read_annotation(file) for file in listed.annotations]
        missing = [file for file in self.files if not Path(file).is_file()]
        if missing or not self.files:
            msg = f"{missing[0]}: no such image" if missing else f"{root}: no images in {', '.join(sets)}"
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: tuple[int, bool]) -> tuple[torch.Tensor, Objects]:
        """Return an image (3, H, W), float32 in [0, 1], and its objects."""
        number, mirror = index
        try:
            pixels = torchvision.io.decode_image(self.files[number], torchvision.io.ImageReadMode.RGB)
        except RuntimeError as error:
            msg = f"{self.files[number]}: cannot be decoded: {error}"
            raise ValueError(msg) from None
        image, objects = pixels / 255, self.objects[number]
        if mirror:
            width = image.shape[2]
            x0, y0, x1, y1 = objects.boxes.unbind(dim=1)
            image, objects = image.flip(2), objects._replace(boxes=torch.stack((width - x1, y0, width - x0, y1), dim=1))
        return image, objects


def read_annotation(file: str) -> Objects:
    """Read the objects of one image from its XML file.

    Raises
    ------
    ValueError
        If the file is not there or no such XML, or an object has an unknown class or an empty box.
    """
    try:
        parsed = VOCDetection.parse_voc_xml(ET.parse(file).getroot())["annotation"]
        entries = [
            (
                entry["name"],
                [float(entry["bndbox"][edge]) for edge in ("xmin", "ymin", "xmax", "ymax")],
                entry.get("difficult", "0") == "1",
            )
            for entry in parsed["object"]
        ]
    except (OSError, ET.ParseError, KeyError, TypeError, ValueError) as error:
        msg = f"{file}: not an annotation of VOC: {error!r}"
        raise ValueError(msg) from error
    for name, (xmin, ymin, xmax, ymax), _ in entries:
        if name not in CLASSES:
            msg = f"{file}: class {name!r} is not one of VOC's"
            raise ValueError(msg)
        if not (1 <= xmin <= xmax and 1 <= ymin <= ymax):
            edges = f"x {xmin:g} to {xmax:g}, y {ymin:g} to {ymax:g}"
            msg = f"{file}: the box of a {name} must have 1 <= min <= max, got {edges}"
            raise ValueError(msg)
    boxes = torch.tensor([box for _, box, _ in entries], dtype=torch.float32).view(-1, 4)
    boxes[:, :2] -= 1
    labels = torch.tensor([1 + CLASSES.index(name) for name, *_ in entries], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([difficult for *_, difficult in entries], dtype=torch.bool))


class TrainingOrder:
    """The images of the batches of a training, each image once in each pass, half of them mirrored at random.

    Everything is drawn here and from the seed alone: batch i is the same wherever the training starts.

    Parameters
    ----------
    images : int
        How many there are.
    batch_size : int
        Images in a batch.
    seed : int
        Seed of order and mirroring.
    start, stop : int
        First batch, and the one that is not given any more.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int, start: int, stop: int) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        """Give the indices of each batch, for `VocImages`."""
        drawn_for, order, mirrored = -1, [0], [0]
        for batch in range(self._start, self._stop):
            indices = []
            for place in range(batch * self._batch_size, (batch + 1) * self._batch_size):
                epoch, number = divmod(place, self._images)
                if epoch != drawn_for:
                    generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                    order = torch.randperm(self._images, generator=generator).tolist()
                    mirrored = torch.randint(2, (self._images,), generator=generator).tolist()
                    drawn_for = epoch
                indices.append((order[number], bool(mirrored[number])))
            yield indices


def as_lists(batch: list[tuple[torch.Tensor, Objects]]) -> tuple[list[torch.Tensor], list[Objects]]:
    """Put a batch together without stacking it, as the images have different sizes."""
    return [image for image, _ in batch], [objects for _, objects in batch]


def training_target(objects: Objects, device: torch.device) -> dict[str, Any]:
    """Return what a detector of torchvision is trained on: the objects that are not difficult."""
    kept = ~objects.difficult
    return {"boxes": objects.boxes[kept].to(device), "labels": objects.labels[kept].to(device)}

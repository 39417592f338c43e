"""Pascal VOC for object detection: images with their objects, the order of training images, and average precision.

Average precision (AP) follows both of VOC's definitions. A detection is a true positive if it overlaps (intersection
over union of at least 0.5) with an object of its class that no detection with a higher score has matched. Further
detections of the same object are false positives. Objects marked as difficult are ignored: they are not counted as
missed, and their detections are neither true nor false positives. COCO's AP, which libraries offer under the same name,
differs: it uses 101 recall points, another matching, and no difficult objects.
"""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torchvision.datasets import VOCDetection
from torchvision.ops import box_iou

# Detectors use label 1 for the first class; 0 is the background.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MIN_OVERLAP = 0.5


class Objects(NamedTuple):
    """The objects in an image. Boxes are half-open: pixels 1 to 3 in a VOC file are the interval from 0 to 3 here."""

    boxes: torch.Tensor  # (M, 4) float32: x0, y0, x1, y1 in pixels
    labels: torch.Tensor  # (M,) int64: 1 to 20, in the order of CLASSES
    difficult: torch.Tensor  # (M,) bool: objects that VOC does not score


class Detections(NamedTuple):
    """The detections in an image."""

    boxes: torch.Tensor  # (D, 4) float32, as in Objects
    labels: torch.Tensor  # (D,) int64
    scores: torch.Tensor  # (D,) float32; only their order matters


class VocImages(torch.utils.data.Dataset[tuple[torch.Tensor, Objects]]):
    """Images of one or more VOC image sets. An index is (number of the image, whether to flip it).

    `root` holds ``VOCdevkit/VOC2007`` and so on, as unpacked from VOC's archives. An image set is named as in
    ``"2007:trainval"``. The constructor reads all annotations. ValueError if a set is missing or empty, or one of its
    files is missing or invalid.
    """

    def __init__(self, root: Path, sets: Sequence[str]) -> None:
        self.files: list[str] = []
        self.objects: list[Objects] = []
        for name in sets:
            year, _, image_set = name.partition(":")
            try:
                listed = VOCDetection(root, year=year, image_set=image_set)
            except (OSError, RuntimeError, ValueError) as error:
                msg = f"{root}: no VOC image set {name!r} there, such as 2007:trainval in VOCdevkit/VOC2007: {error}"
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
    """Read the objects of one image; ValueError for missing or invalid XML, an unknown class or an empty box."""
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
            msg = f"{file}: class {name!r} is not a class of VOC"
            raise ValueError(msg)
        if not (1 <= xmin <= xmax and 1 <= ymin <= ymax):
            edges = f"x {xmin:g} to {xmax:g}, y {ymin:g} to {ymax:g}"
            msg = f"{file}: the box of a {name} must have 1 <= min <= max, got {edges}"
            raise ValueError(msg)
    boxes = torch.tensor([box for _, box, _ in entries], dtype=torch.float32).view(-1, 4)
    boxes[:, :2] -= 1
    labels = torch.tensor([1 + CLASSES.index(name) for name, *_ in entries], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([difficult for *_, difficult in entries], dtype=torch.bool))


def training_order(
    images: int, *, batch_size: int, seed: int, start: int, stop: int
) -> Iterator[list[tuple[int, bool]]]:
    """Yield indices of `VocImages` for the batches from `start` to `stop`.

    Each image appears once per epoch, flipped with probability 1/2. All random numbers depend on the seed alone, so
    batch i is the same wherever the training starts.
    """

    def drawn(epoch: int) -> Iterator[tuple[int, bool]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(images, generator=generator).tolist()
        mirrored = torch.randint(2, (images,), generator=generator).tolist()
        return zip(order, map(bool, mirrored), strict=True)

    epoch, begun = divmod(start * batch_size, images)
    passes = itertools.chain.from_iterable(map(drawn, itertools.count(epoch)))
    indices = itertools.islice(passes, begun, None)
    for _ in range(start, stop):
        yield list(itertools.islice(indices, batch_size))


def as_lists(batch: list[tuple[torch.Tensor, Objects]]) -> tuple[list[torch.Tensor], list[Objects]]:
    """Collate a batch without stacking, as the images have different sizes."""
    return [image for image, _ in batch], [objects for _, objects in batch]


def training_target(objects: Objects, device: torch.device) -> dict[str, Any]:
    """Return the training target of a torchvision detector: the objects that are not difficult."""
    kept = ~objects.difficult
    return {"boxes": objects.boxes[kept].to(device), "labels": objects.labels[kept].to(device)}


class AveragePrecision(NamedTuple):
    """Average precision of one class, in percent; NaN for a class without objects."""

    eleven_point: float  # mean, over recalls 0, 0.1, ..., 1, of the best precision at that recall or higher
    area: float  # area under the curve of the best precision at each recall or higher, VOC's definition since 2010
    objects: int  # number of objects of the class that are not difficult


def average_precision(detections: Sequence[Detections], objects: Sequence[Objects], label: int) -> AveragePrecision:
    """Compute the average precision of a class from the detections and objects of each image, on the CPU."""
    count = sum(int(((each.labels == label) & ~each.difficult).sum()) for each in objects)
    if not count:
        return AveragePrecision(math.nan, math.nan, 0)
    outcomes: list[tuple[float, bool]] = []
    for found, there in zip(detections, objects, strict=True):
        outcomes += _outcomes(found, there, label)
    outcomes.sort(key=lambda outcome: -outcome[0])  # stable: ties stay in the order of the images

    # Precision after each true positive, that is, at a recall of 1, 2, ... of `count` objects.
    precisions: list[float] = []
    for rank, (_, right) in enumerate(outcomes, start=1):
        if right:
            precisions.append((len(precisions) + 1) / rank)
    best = precisions[:]
    for place in reversed(range(len(best) - 1)):
        best[place] = max(best[place], best[place + 1])
    # The first place whose recall, (place + 1) / count, reaches tenth / 10, in exact integer arithmetic.
    places = [max(-(-tenth * count // 10) - 1, 0) for tenth in range(11)]
    eleven_point = sum(best[place] for place in places if place < len(best)) / 11
    return AveragePrecision(100 * eleven_point, 100 * sum(best) / count, count)


def _outcomes(found: Detections, there: Objects, label: int) -> list[tuple[float, bool]]:
    """Return (score, is true positive) for each scored detection of a class in an image."""
    mine = found.labels == label
    scores, order = found.scores[mine].sort(descending=True, stable=True)
    present = there.labels == label
    boxes, difficult = there.boxes[present], there.difficult[present].tolist()
    if not len(boxes):
        return [(score, False) for score in scores.tolist()]
    overlaps, nearest = box_iou(found.boxes[mine][order], boxes).max(dim=1)
    outcomes = []
    taken = set()
    for score, overlap, number in zip(scores.tolist(), overlaps.tolist(), nearest.tolist(), strict=True):
        enough = overlap >= MIN_OVERLAP
        if enough and difficult[number]:
            continue
        outcomes.append((score, enough and number not in taken))
        if enough:
            taken.add(number)
    return outcomes

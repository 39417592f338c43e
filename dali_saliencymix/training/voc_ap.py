"""Average precision as Pascal VOC defines it, in both of its forms.

A detection is right if it overlaps (intersection over union of at least 0.5) with an object of its class that no
detection of a higher score has taken; every further detection of the same object is wrong. Objects marked as difficult
count for nothing: neither is one missed, nor is a detection of one right or wrong. COCO's measure, which libraries
offer under the same name, differs in all of this: 101 points of recall, another matching, no difficult objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.ops import box_iou

from dali_saliencymix.training.voc import Objects

MIN_OVERLAP = 0.5


class Detections(NamedTuple):
    """What a detector found in an image.

    Attributes
    ----------
    boxes : tensor of shape (D, 4), float32
        (x0, y0, x1, y1) in pixels, half-open.
    labels : tensor of shape (D,), int64
        Classes.
    scores : tensor of shape (D,), float32
        How sure it is; only their order counts.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor


class AveragePrecision(NamedTuple):
    """Average precision of one class, in percent; NaN for a class without objects.

    Attributes
    ----------
    eleven_point : float
        Mean over the recalls 0, 0.1, ..., 1 of the best precision at that recall or a higher one: VOC's until 2009.
    area : float
        Area under the best precision at each recall or a higher one: VOC's since 2010.
    objects : int
        Objects of the class that are not difficult.
    """

    eleven_point: float
    area: float
    objects: int


def average_precision(
    detections: Sequence[Detections], objects: Sequence[Objects], label: int, *, min_overlap: float = MIN_OVERLAP
) -> AveragePrecision:
    """Return the average precision of a class over a set of images.

    Parameters
    ----------
    detections, objects : sequence
        For each image what was found and what there is, on the CPU.
    label : int
        The class.
    min_overlap : float
        Least intersection over union of a right detection.
    """
    count = sum(int(((each.labels == label) & ~each.difficult).sum()) for each in objects)
    if not count:
        return AveragePrecision(math.nan, math.nan, 0)
    outcomes: list[tuple[float, bool]] = []
    for found, there in zip(detections, objects, strict=True):
        outcomes += _outcomes(found, there, label, min_overlap)
    outcomes.sort(key=lambda outcome: -outcome[0])  # stable: equal scores stay in the order of the images

    # Precision after each detection that adds to the recall, that is for recalls of 1, 2, ... of `count` objects.
    precisions: list[float] = []
    for rank, (_, right) in enumerate(outcomes, start=1):
        if right:
            precisions.append((len(precisions) + 1) / rank)
    best = precisions[:]
    for place in reversed(range(len(best) - 1)):
        best[place] = max(best[place], best[place + 1])
    # The first place whose recall, (place + 1) / count, reaches tenth / 10; in whole numbers, which do not round.
    places = [max(-(-tenth * count // 10) - 1, 0) for tenth in range(11)]
    eleven_point = sum(best[place] for place in places if place < len(best)) / 11
    return AveragePrecision(100 * eleven_point, 100 * sum(best) / count, count)


def _outcomes(found: Detections, there: Objects, label: int, min_overlap: float) -> list[tuple[float, bool]]:
    """Return score and rightness of the detections of a class in an image that count."""
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
        enough = overlap >= min_overlap
        if enough and difficult[number]:
            continue
        outcomes.append((score, enough and number not in taken))
        if enough:
            taken.add(number)
    return outcomes

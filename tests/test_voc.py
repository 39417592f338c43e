"""VOC's annotations and order of images, and its average precision compared with a count by the definition."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from shared.voc_fixtures import COLOURS, HEIGHT, SETS, WIDTH, write_annotation

from dali_saliencymix.training.voc import (
    CLASSES,
    Detections,
    Objects,
    VocImages,
    average_precision,
    read_annotation,
    training_order,
)

pytest_plugins = ["shared.voc_fixtures"]


def objects_of(*boxes, labels=None, difficult=None) -> Objects:
    count = len(boxes)
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels or [1] * count, dtype=torch.int64),
        torch.tensor(difficult or [False] * count, dtype=torch.bool),
    )


def detections_of(*entries, labels=None) -> Detections:
    boxes = torch.tensor([box for box, _ in entries], dtype=torch.float32).view(-1, 4)
    scores = torch.tensor([score for _, score in entries], dtype=torch.float32)
    return Detections(boxes, torch.tensor(labels or [1] * len(entries), dtype=torch.int64), scores)


def test_boxes_hold_exactly_the_pixels_of_their_objects(voc):
    images = VocImages(voc, ["2007:trainval", "2012:trainval"])
    assert len(images) == SETS["2007", "trainval"] + SETS["2012", "trainval"]
    for number in range(len(images)):
        for mirror in (False, True):
            image, objects = images[number, mirror]
            assert image.shape == (3, HEIGHT, WIDTH)
            assert 0 <= image.min() < image.max() <= 1
            for box, label in zip(objects.boxes.int().tolist(), objects.labels.tolist(), strict=True):
                colour = torch.tensor(COLOURS[CLASSES[label - 1]])[:, None, None] / 255
                like = (image - colour).abs().amax(dim=0) < 0.15  # except JPEG artefacts at the edges
                x0, y0, x1, y1 = box
                assert like[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].float().mean() > 0.97
                around = like.clone()
                around[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
                half = slice(0, WIDTH // 2) if x0 < WIDTH // 2 else slice(WIDTH // 2, WIDTH)
                assert around[:, half].float().mean() < 0.02


def test_the_first_pixel_is_number_one_in_a_file_and_zero_here(tmp_path):
    write_annotation(tmp_path / "box.xml", [("cat", (1, 3, 10, 12), False)])
    assert read_annotation(str(tmp_path / "box.xml")).boxes.tolist() == [[0, 2, 10, 12]]  # 10 x 10 pixels


def test_difficult_objects_are_marked(voc):
    images = VocImages(voc, ["2007:trainval"])
    marked = [objects.difficult.tolist() for objects in images.objects]
    assert marked[1] == [False, True]
    assert not any(any(each) for number, each in enumerate(marked) if number != 1)


def test_an_image_may_be_without_objects(tmp_path):
    write_annotation(tmp_path / "empty.xml", [])
    objects = read_annotation(str(tmp_path / "empty.xml"))
    assert objects.boxes.shape == (0, 4)
    assert objects.labels.shape == objects.difficult.shape == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([("cat", (5, 5, 4, 9), False)], r"box of a cat must have 1 <= min <= max, got x 5 to 4, y 5 to 9"),
        ([("cat", (0, 5, 4, 9), False)], r"must have 1 <= min <= max, got x 0 to 4"),
        ([("unicorn", (1, 1, 4, 9), False)], r"class 'unicorn' is not a class of VOC"),
        ("<annotation><object><name>cat</name></object></annotation>", "not an annotation of VOC"),
        ("not XML", "not an annotation of VOC"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, content, message):
    path = tmp_path / "wrong.xml"
    path.write_text(content) if isinstance(content, str) else write_annotation(path, content)
    with pytest.raises(ValueError, match=rf"wrong\.xml: .*{message}"):
        read_annotation(str(path))


def test_each_pass_gives_every_image_once_in_another_order():
    def order(start, stop, seed=3):
        return list(training_order(7, batch_size=3, seed=seed, start=start, stop=stop))

    batches = order(0, 14)
    flat = [index for batch in batches for index in batch]
    passes = [flat[begin : begin + 7] for begin in range(0, 42, 7)]
    assert all(sorted(number for number, _ in each) == list(range(7)) for each in passes)
    assert len({tuple(number for number, _ in each) for each in passes}) == 6
    mirrored = Counter(mirror for _, mirror in flat)
    assert min(mirrored[True], mirrored[False]) > 10
    assert order(5, 14) == batches[5:]  # starting in the middle of a pass
    assert order(0, 14, seed=4) != batches


def test_average_precision_by_hand():
    """Five objects, of which one is difficult; right, wrong, double, ignored, right, wrong: precisions 1, 1/2."""
    objects = [
        objects_of((0, 0, 10, 10), (20, 0, 30, 10), difficult=[False, True]),
        objects_of((0, 0, 10, 10), (50, 50, 60, 60)),
        objects_of((0, 0, 10, 10), labels=[2]),
        objects_of((0, 0, 40, 40)),
    ]
    detections = [
        detections_of(((0, 0, 10, 10), 0.9), ((0, 1, 10, 11), 0.7), ((20, 0, 30, 10), 0.6), ((20, 0, 30, 9), 0.55)),
        detections_of(((0, 0, 10, 5), 0.5)),  # an overlap of exactly one half is enough
        detections_of(((0, 0, 10, 10), 0.8)),  # an object of another class
        detections_of(),
    ]
    found = average_precision(detections, objects, 1)
    # Right at ranks 1 and 4 of those that count; 4 objects: recalls 1/4 and 2/4 with precisions 1 and 2/4.
    assert found.objects == 4
    assert found.area == pytest.approx(100 * (1 / 4 * 1 + 1 / 4 * 1 / 2))
    assert found.eleven_point == pytest.approx(100 * (3 * 1 + 3 * 1 / 2) / 11)  # recalls 0, .1, .2 and .3, .4, .5


def test_a_class_without_objects_has_no_average_precision():
    objects = [objects_of((0, 0, 9, 9), difficult=[True])]
    found = average_precision([detections_of(((0, 0, 9, 9), 0.5))], objects, 1)
    assert math.isnan(found.area)
    assert math.isnan(found.eleven_point)
    assert found.objects == 0
    assert average_precision([detections_of()], [objects_of((0, 0, 9, 9))], 1).area == 0


def overlap(first, second) -> Fraction:
    """Return the exact intersection over union of integer boxes."""
    first, second = ([int(edge) for edge in box] for box in (first, second))
    sides = [min(first[k + 2], second[k + 2]) - max(first[k], second[k]) for k in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return Fraction(int(common), int(sum(areas) - common))


def count_at_threshold(detections, objects, label, threshold):
    """Return right and wrong detections among those of at least this score, matched from scratch."""
    right = wrong = 0
    for found, there in zip(detections, objects, strict=True):
        boxes = [b for b, c in zip(there.boxes.int().tolist(), there.labels.tolist(), strict=True) if c == label]
        difficult = there.difficult[there.labels == label].tolist()
        kept = [
            box
            for box, c, score in zip(*(part.tolist() for part in found), strict=True)
            if c == label and score >= threshold
        ]
        matches = Counter()
        for box in kept:
            overlaps = [overlap(box, other) for other in boxes]
            best = max(overlaps, default=Fraction(0))
            if best < Fraction(1, 2):
                wrong += 1
            elif not difficult[overlaps.index(best)]:
                matches[overlaps.index(best)] += 1
        right += len(matches)
        wrong += sum(matches.values()) - len(matches)
    return right, wrong


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_that_of_the_definition(seed):
    """Precision and recall at every threshold from scratch, in fractions; integer boxes on a coarse grid."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    scores = iter(rng.permutation(400) / 400)
    for _ in range(12):
        count = int(rng.integers(0, 5))
        corners = rng.integers(0, 12, (count, 2))
        boxes = np.hstack([corners, corners + rng.integers(3, 9, (count, 2))])
        labels = rng.integers(1, 3, count)
        objects.append(
            objects_of(*boxes.tolist(), labels=labels.tolist(), difficult=(rng.random(count) < 0.3).tolist()),
        )
        entries, classes = [], []
        for box, label in zip(boxes, labels, strict=True):
            for _ in range(int(rng.integers(0, 4))):
                moved = box + rng.integers(-1, 2, 4)
                entries.append((moved.tolist(), next(scores)))
                classes.append(int(label))
        for corner in rng.integers(0, 12, (int(rng.integers(0, 3)), 2)):
            entries.append(([*corner.tolist(), *(corner + 4).tolist()], next(scores)))
            classes.append(int(rng.integers(1, 3)))
        detections.append(detections_of(*entries, labels=classes))
    for label in (1, 2):
        total = sum(int(((each.labels == label) & ~each.difficult).sum()) for each in objects)
        assert total > 0
        thresholds = sorted({score for each in detections for score in each.scores.tolist()})
        points = [count_at_threshold(detections, objects, label, threshold) for threshold in thresholds]
        curve = [(Fraction(right, total), Fraction(right, right + wrong)) for right, wrong in points if right + wrong]

        def best(recall, curve=curve):
            return max((precision for reached, precision in curve if reached >= recall), default=Fraction(0))

        eleven_point = sum(best(Fraction(tenth, 10)) for tenth in range(11)) / 11
        area = sum(best(Fraction(step, total)) for step in range(1, total + 1)) / total
        found = average_precision(detections, objects, label)
        assert 0 < area < 1
        assert found.objects == total
        assert found.area == pytest.approx(100 * float(area))
        assert found.eleven_point == pytest.approx(100 * float(eleven_point))

"""The oracle: SaliencyMix as loops over pixels, written from the papers, sharing no code with the package.

Slow and exact: integers and fractions wherever the method has them, float64 elsewhere. One image (H, W, 3) or one map
(h, w) at a time, NumPy arrays in, NumPy arrays or plain numbers out.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def reflected(index: int, size: int) -> int:
    """Return the index that stands in for one outside [0, size): mirrored at the centre of the border pixel."""
    while not 0 <= index < size:
        if size == 1:
            return 0
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def luma(image: np.ndarray) -> np.ndarray:
    """Grey levels with the weights of Rec. 601, in units of 2**-15 that add up to one, rounded half up."""
    one = 2**15
    red, green = round(0.299 * one), round(0.587 * one)
    blue = one - red - green
    grey = np.zeros(image.shape[:2], np.int64)
    for y, x in np.ndindex(grey.shape):
        r, g, b = (int(image[y, x, channel]) for channel in range(3))
        grey[y, x] = math.floor(Fraction(red * r + green * g + blue * b, one) + Fraction(1, 2))
    return grey


# Fine-grained saliency (Montabone and Soto 2010, as OpenCV has it)


def blur(grey: np.ndarray) -> np.ndarray:
    """3x3 Gaussian 1-2-1, rounded half up."""
    height, width = grey.shape
    weights = {-1: 1, 0: 2, 1: 1}
    blurred = np.zeros_like(grey)
    for y, x in np.ndindex(grey.shape):
        total = 0
        for dy, row_weight in weights.items():
            for dx, column_weight in weights.items():
                value = int(grey[reflected(y + dy, height), reflected(x + dx, width)])
                total += row_weight * column_weight * value
        blurred[y, x] = (total + 8) // 16
    return blurred


def fine_grained(image: np.ndarray) -> np.ndarray:
    """Saliency in 0..255 as integers; OpenCV's map is this over 255."""
    grey = blur(blur(luma(image)))
    height, width = grey.shape
    on, off = np.zeros_like(grey), np.zeros_like(grey)
    for n in (12, 24, 48, 28, 56, 112):
        for y, x in np.ndindex(grey.shape):
            rows = range(max(y - n + 1, 0), min(y + n, height - 1) + 1)
            columns = range(max(x - n + 1, 0), min(x + n, width - 1) + 1)
            centre = int(grey[y, x])
            others = len(rows) * len(columns) - 1
            total = int(grey[rows.start : rows.stop, columns.start : columns.stop].sum()) - centre
            difference = centre - Fraction(total, others)
            on[y, x] += math.floor(max(difference, 0))
            off[y, x] += math.floor(max(-difference, 0))
    scaled = [255 * part // max(int(part.max()), 1) for part in (on, off)]
    return (scaled[0] + scaled[1]) % 256


# Spectral residual (Hou and Zhang 2007, with OpenCV's order of steps)


def weighted_mean(values: np.ndarray, weights: list[float]) -> np.ndarray:
    """Filter with the same weights, which sum to 1, along rows and columns."""
    reach = len(weights) // 2
    for axis in (0, 1):
        filtered = np.zeros_like(values)
        for i in range(values.shape[axis]):
            for offset, weight in enumerate(weights, start=-reach):
                neighbour = values.take(reflected(i + offset, values.shape[axis]), axis=axis)
                filtered.swapaxes(0, axis)[i] += weight * neighbour
        values = filtered
    return values


def spectral_residual(grey: np.ndarray) -> np.ndarray:
    """Saliency of grey levels (h, w) that have been brought to the size of the map."""
    if grey.min() == grey.max():
        return np.zeros(grey.shape)
    spectrum = np.fft.fft2(grey.astype(np.float64))
    log_amplitude = np.log(np.abs(spectrum) + 1)
    residual = log_amplitude - weighted_mean(log_amplitude, [1 / 3] * 3)
    modulus = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum))))
    gaussian = [math.exp(-(i**2) / (2 * 8**2)) for i in range(-2, 3)]
    squared = weighted_mean(modulus, [weight / sum(gaussian) for weight in gaussian]) ** 2
    return squared / squared.max()


# Geometry


def peak(saliency_map: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Most salient pixel (y, x): of equal ones the nearest to the image's centre, then the first in reading order."""
    rows, columns = saliency_map.shape
    best: tuple[float, Fraction] | None = None
    found = (Fraction(0), Fraction(0))
    for i, j in np.ndindex(rows, columns):
        value = float(saliency_map[i, j])
        value = -math.inf if math.isnan(value) else value
        if best is not None and value < best[0]:
            continue
        y, x = (i + Fraction(1, 2)) * height / rows, (j + Fraction(1, 2)) * width / columns
        distance = (y - Fraction(height, 2)) ** 2 + (x - Fraction(width, 2)) ** 2
        if best is None or value > best[0] or distance < best[1]:
            best, found = (value, distance), (y, x)
    return math.floor(found[0]), math.floor(found[1])


def span(centre: int, size: int, lam: float, box: str) -> tuple[int, int]:
    """Start and stop of a box along one axis of `size` pixels."""
    side = int(size * math.sqrt(1 - lam))
    if box == "clip":  # the released code
        return max(centre - side // 2, 0), min(centre + side // 2, size)
    start = centre - side // 2
    while start < 0:
        start += 1
    while start + side > size:
        start -= 1
    return start, start + side


def box_at(centre: tuple[int, int], lam: float, height: int, width: int, box: str) -> tuple[int, int, int, int]:
    """Box (y0, x0, y1, x1) around a centre (y, x)."""
    (y0, y1), (x0, x1) = span(centre[0], height, lam, box), span(centre[1], width, lam, box)
    return y0, x0, y1, x1


# Whole batches


def mix(
    images: np.ndarray, source_index: np.ndarray, boxes: list[tuple[int, int, int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixed images, lam and boxes, pixel by pixel."""
    count, height, width, _ = images.shape
    mixed = np.zeros_like(images)
    lam = np.zeros(count, np.float32)
    for i, (y0, x0, y1, x1) in enumerate(boxes):
        kept = 0
        for y, x in np.ndindex(height, width):
            inside = y0 <= y < y1 and x0 <= x < x1
            mixed[i, y, x] = images[source_index[i] if inside else i, y, x]
            kept += not inside
        lam[i] = kept / (height * width)
    return mixed, lam, np.array(boxes)


def saliencymix(
    images: np.ndarray, source_index: np.ndarray, lam: np.ndarray, maps: list[np.ndarray], box: str, per_batch: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix `images`, whose saliency maps are `maps`."""
    size = images.shape[1:3]
    centres = [peak(maps[source], *size) for source in source_index]
    return _mix_at(images, source_index, lam, centres, box, per_batch)


def cutmix(
    images: np.ndarray, source_index: np.ndarray, lam: np.ndarray, centre: np.ndarray, box: str, per_batch: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix `images` around centres given as fractions of height and width."""
    height, width = images.shape[1:3]
    last = (height - 1, width - 1)  # a centre of 1 belongs to the last pixel
    centres = [
        (min(math.floor(float(y) * height), last[0]), min(math.floor(float(x) * width), last[1])) for y, x in centre
    ]
    return _mix_at(images, source_index, lam, centres, box, per_batch)


def _mix_at(images, source_index, lam, centres, box, per_batch):
    height, width = images.shape[1:3]
    boxes = [box_at(c, float(share), height, width, box) for c, share in zip(centres, lam, strict=True)]
    if per_batch:
        boxes = [boxes[0] for _ in boxes]
    return mix(images, source_index, boxes)


def soft_labels(labels: np.ndarray, source_labels: np.ndarray, lam: np.ndarray, num_classes: int) -> np.ndarray:
    """Class probabilities in float32, weight by weight."""
    rows = np.zeros((len(labels), num_classes), np.float32)
    for row, label, source_label, share in zip(rows, labels, source_labels, lam.astype(np.float32), strict=True):
        row[label] += share
        row[source_label] += np.float32(1) - share
    return rows

"""The oracle: SaliencyMix as loops over pixels, written from the papers, without code of the package.

It is slow and exact: it computes with integers and fractions where the method has them, and with float64 elsewhere. The
functions take one image (H, W, 3) or one map (h, w) as a NumPy array, and return NumPy arrays or plain numbers.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def reflected(index: int, size: int) -> int:
    """Return the index in [0, size) for an index outside it, by reflection at the centre of the border pixel."""
    while not 0 <= index < size:
        if size == 1:
            return 0
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def luma(image: np.ndarray) -> np.ndarray:
    """Return grey levels with the weights of Rec. 601, in units of 2**-15 that sum to 1, rounded half up."""
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
    """Return saliency as integers in 0..255; OpenCV's map is this divided by 255."""
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


def filtered(values: np.ndarray, weights: list[float], axis: int) -> np.ndarray:
    """Filter with weights, which sum to 1, along rows or columns."""
    reach = len(weights) // 2
    result = np.zeros_like(values)
    for i in range(values.shape[axis]):
        for offset, weight in enumerate(weights, start=-reach):
            neighbour = values.take(reflected(i + offset, values.shape[axis]), axis=axis)
            result.swapaxes(0, axis)[i] += weight * neighbour
    return result


def weighted_mean(values: np.ndarray, weights: list[float]) -> np.ndarray:
    """Filter with the same weights along rows and columns."""
    return filtered(filtered(values, weights, 0), weights, 1)


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


# Phase spectrum (Guo, Ma and Zhang 2008)


def gaussian(sigma: float, reach: int) -> list[float]:
    """Return the weights of a Gaussian at -reach .. reach, which sum to 1."""
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)]
    return [weight / sum(weights) for weight in weights]


def blurred(values: np.ndarray, sigma_of_side: float, sigmas: int) -> np.ndarray:
    """Blur with a Gaussian in proportion to each side, truncated at a number of sigmas, to the nearest pixel."""
    for axis in (0, 1):
        sigma = sigma_of_side * values.shape[axis]
        values = filtered(values, gaussian(sigma, round(sigmas * sigma)), axis)
    return values


def phase_spectrum(grey: np.ndarray) -> np.ndarray:
    """Saliency of grey levels (h, w) that have been brought to the size of the map."""
    spectrum = np.fft.fft2(grey.astype(np.float64))
    power = np.zeros(grey.shape)
    if grey.min() == grey.max():
        return power
    for bin_ in np.ndindex(grey.shape):
        if abs(spectrum[bin_]) < 1e-10 * abs(spectrum[0, 0]):
            spectrum[bin_] = 0
        else:
            spectrum[bin_] /= abs(spectrum[bin_])
    power = np.abs(np.fft.ifft2(spectrum)) ** 2
    for axis in (0, 1):
        if grey.shape[axis] > 2:
            power.swapaxes(0, axis)[0] = 0
            power.swapaxes(0, axis)[-1] = 0
    saliency_map = blurred(power, 1 / 8, 3)
    return saliency_map / saliency_map.max()


# Colours as CIE L*a*b*


def _white_and_primaries() -> tuple[np.ndarray, np.ndarray]:
    """Return X, Y, Z of white D65, and as columns those of sRGB's red, green and blue, which sum to it."""
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    chromaticities = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
    primaries = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities]).T
    return white, primaries * np.linalg.solve(primaries, white)


def lab(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """L*, a*, b* of 8-bit sRGB."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in map(int, colour)]
    white, primaries = _white_and_primaries()
    relative = primaries @ linear / white
    delta = 6 / 29
    f = [t ** (1 / 3) if t > delta**3 else t / (3 * delta**2) + 4 / 29 for t in relative]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def lab_planes(image: np.ndarray) -> list[np.ndarray]:
    """Return L* of an image (h, w, 3) in which all pixels are grey, and L*, a*, b* of any other image."""
    planes = [np.zeros(image.shape[:2]) for _ in range(3)]
    for y, x in np.ndindex(image.shape[:2]):
        for plane, value in zip(planes, lab(image[y, x]), strict=True):
            plane[y, x] = value
    is_grey = all(len(set(map(int, pixel))) == 1 for pixel in image.reshape(-1, 3))
    return planes[:1] if is_grey else planes


# Image signature (Hou, Harel and Koch 2012)


def cosine(size: int, frequency: int, position: int) -> float:
    """Return one basis function of the orthonormal DCT-II."""
    scale = math.sqrt((1 if frequency == 0 else 2) / size)
    return scale * math.cos(math.pi * frequency * (2 * position + 1) / (2 * size))


def image_signature(image: np.ndarray) -> np.ndarray:
    """Saliency of an image (h, w, 3) that has been brought to the size of the map."""
    height, width = image.shape[:2]
    saliency_map = np.zeros((height, width))
    if all(image[..., channel].min() == image[..., channel].max() for channel in range(3)):
        return saliency_map
    rows, columns = (
        [np.array([cosine(size, frequency, position) for position in range(size)]) for frequency in range(size)]
        for size in (height, width)
    )
    for plane in lab_planes(image):
        signature = np.zeros((height, width))
        for row in rows:
            for column in columns:
                wave = np.outer(row, column)
                coefficient = (plane * wave).sum()
                if abs(coefficient) > 1e-9 * np.sqrt((plane**2).sum()):
                    signature += math.copysign(1, coefficient) * wave
        saliency_map += signature**2 / 3
    saliency_map = blurred(saliency_map, 0.045, 4)
    saliency_map -= saliency_map.min()
    return saliency_map / saliency_map.max()


# Frequency-tuned (Achanta et al. 2009)


def frequency_tuned(image: np.ndarray) -> np.ndarray:
    """Saliency of an image (H, W, 3)."""
    saliency_map = np.zeros(image.shape[:2])
    if all(image[..., channel].min() == image[..., channel].max() for channel in range(3)):
        return saliency_map
    for plane in lab_planes(image):
        saliency_map += (weighted_mean(plane, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]) - plane.mean()) ** 2
    saliency_map = np.sqrt(saliency_map)
    if saliency_map.max() < 1e-9:  # the blur removes the whole pattern
        return np.zeros_like(saliency_map)
    return saliency_map / saliency_map.max()


# Geometry


def peak(saliency_map: np.ndarray, height: int, width: int, least: bool = False) -> tuple[int, int]:
    """Return the most (or least) salient pixel.

    Of equal ones it is the nearest to the image's centre, then the first row by row. NaN is chosen only if all are NaN.
    """
    rows, columns = saliency_map.shape
    best: tuple[float, Fraction] | None = None
    found = (Fraction(0), Fraction(0))
    for i, j in np.ndindex(rows, columns):
        value = float(saliency_map[i, j]) * (-1 if least else 1)
        value = -math.inf if math.isnan(value) else value
        if best is not None and value < best[0]:
            continue
        y, x = (i + Fraction(1, 2)) * height / rows, (j + Fraction(1, 2)) * width / columns
        distance = (y - Fraction(height, 2)) ** 2 + (x - Fraction(width, 2)) ** 2
        if best is None or value > best[0] or distance < best[1]:
            best, found = (value, distance), (y, x)
    return math.floor(found[0]), math.floor(found[1])


def span(centre: int, size: int, lam: float, box: str) -> tuple[int, int]:
    """Return start and stop of a box along one axis of `size` pixels."""
    side = int(size * math.sqrt(1 - lam))
    if box == "clip":  # the released code
        return max(centre - side // 2, 0), min(centre + side // 2, size)
    return moved_inside(centre - side // 2, side, size)


def moved_inside(start: int, side: int, size: int) -> tuple[int, int]:
    while start < 0:
        start += 1
    while start + side > size:
        start -= 1
    return start, start + side


def box_at(centre: tuple[int, int], lam: float, height: int, width: int, box: str) -> tuple[int, int, int, int]:
    """Box (y0, x0, y1, x1) around a centre (y, x)."""
    (y0, y1), (x0, x1) = span(centre[0], height, lam, box), span(centre[1], width, lam, box)
    return y0, x0, y1, x1


def pixel_at(fractions: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Return the pixel (y, x) at fractions of the image; a fraction of 1 is the last pixel."""
    y, x = (float(fraction) for fraction in fractions)
    return min(math.floor(y * height), height - 1), min(math.floor(x * width), width - 1)


# Whole batches

Box = tuple[int, int, int, int]


def mix(
    images: np.ndarray, source_index: np.ndarray, boxes: list[Box], source_boxes: list[Box] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return mixed images, lam, boxes and source boxes, pixel by pixel; empty boxes are all 0."""
    count, height, width, _ = images.shape
    source_boxes = boxes if source_boxes is None else source_boxes
    mixed = np.zeros_like(images)
    lam = np.zeros(count, np.float32)
    shown = np.zeros((2, count, 4), int)
    for i, ((y0, x0, y1, x1), (v0, u0, v1, u1)) in enumerate(zip(boxes, source_boxes, strict=True)):
        kept = 0
        for y, x in np.ndindex(height, width):
            inside = y0 <= y < y1 and x0 <= x < x1
            place = (source_index[i], y - y0 + v0, x - x0 + u0) if inside else (i, y, x)
            mixed[i, y, x] = images[place]
            kept += not inside
        lam[i] = kept / (height * width)
        if kept < height * width:
            shown[:, i] = (y0, x0, y1, x1), (v0, u0, v1, u1)
    return mixed, lam, *shown


def saliencymix_boxes(
    size, source_index, lam, maps, point, *, source, destination, box, per_batch
) -> tuple[list[Box], list[Box]]:
    """Return boxes in receivers and sources, from the maps of all images."""
    boxes, source_boxes = [], []
    for i, giver in enumerate(source_index):
        centre = peak(maps[giver], *size, least=source == "non_salient")
        taken = box_at(centre, float(lam[i]), *size, box)
        put = taken
        if destination != "corresponding":
            if destination == "random":
                centre = pixel_at(point[i], *size)
            else:
                centre = peak(maps[i], *size, least=destination == "non_salient")
            sides = (taken[2] - taken[0], taken[3] - taken[1])
            (y0, y1), (x0, x1) = (
                moved_inside(centre[axis] - sides[axis] // 2, sides[axis], size[axis]) for axis in (0, 1)
            )
            put = (y0, x0, y1, x1)
        boxes.append(put)
        source_boxes.append(taken)
    if per_batch:
        boxes, source_boxes = ([some[0]] * len(some) for some in (boxes, source_boxes))
    return boxes, source_boxes


def saliencymix(
    images,
    source_index,
    lam,
    maps,
    box="fit",
    per_batch=False,
    source="salient",
    destination="corresponding",
    point=None,
):
    """Mix `images`, whose saliency maps are `maps`."""
    options = {"source": source, "destination": destination, "box": box, "per_batch": per_batch}
    return mix(images, source_index, *saliencymix_boxes(images.shape[1:3], source_index, lam, maps, point, **options))


def saliency_in(saliency_map: np.ndarray, box: Box, height: int, width: int) -> tuple[Fraction, Fraction]:
    """Return the saliency inside a box and of the whole map, over cells of the image's height and width."""
    rows, columns = saliency_map.shape
    y0, x0, y1, x1 = map(int, box)
    lowest = min(0, min(Fraction(float(value)) for value in saliency_map.ravel()))
    inside, whole = Fraction(0), Fraction(0)
    for i, j in np.ndindex(rows, columns):
        value = Fraction(float(saliency_map[i, j])) - lowest
        whole += value
        covered_rows = min(Fraction(y1 * rows, height), i + 1) - max(Fraction(y0 * rows, height), i)
        covered_columns = min(Fraction(x1 * columns, width), j + 1) - max(Fraction(x0 * columns, width), j)
        inside += value * max(covered_rows, Fraction(0)) * max(covered_columns, Fraction(0))
    return inside, whole


def weight_by_saliency(
    own_map: np.ndarray, box: Box, source_map: np.ndarray, source_box: Box, height: int, width: int
) -> float:
    """Return the weight of the receiver's label: kept / (kept + pasted), or by area if that is undefined."""
    y0, x0, y1, x1 = map(int, box)
    by_area = 1 - Fraction((y1 - y0) * (x1 - x0), height * width)
    (inside, whole), (taken, of_source) = (
        saliency_in(saliency_map, edges, height, width)
        for saliency_map, edges in ((own_map, box), (source_map, source_box))
    )
    if whole == 0 or of_source == 0:
        return float(by_area)
    kept, pasted = 1 - inside / whole, taken / of_source
    return float(kept / (kept + pasted) if kept + pasted else by_area)


def cutmix(images, source_index, lam, point, box, per_batch):
    """Mix `images` around points given as fractions of height and width."""
    size = images.shape[1:3]
    boxes = [box_at(pixel_at(p, *size), float(share), *size, box) for p, share in zip(point, lam, strict=True)]
    return mix(images, source_index, [boxes[0]] * len(boxes) if per_batch else boxes)


def mixup(images, source_index, lam, per_batch=False):
    """Blend in float64; any order of rounding is within one grey level of the result."""
    lam = np.full_like(lam, lam[0]) if per_batch else lam
    mixed = np.zeros(images.shape)
    for i, share in enumerate(lam):
        mixed[i] = float(share) * images[i] + (1 - float(share)) * images[source_index[i]]
    return mixed, lam


def soft_labels(labels: np.ndarray, source_labels: np.ndarray, lam: np.ndarray, num_classes: int) -> np.ndarray:
    """Return class probabilities in float32, computed weight by weight."""
    rows = np.zeros((len(labels), num_classes), np.float32)
    for row, label, source_label, share in zip(rows, labels, source_labels, lam.astype(np.float32), strict=True):
        row[label] += share
        row[source_label] += np.float32(1) - share
    return rows

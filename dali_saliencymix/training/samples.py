"""Draw training batches as the network receives them, with the classes and weights of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE, _SMALLEST_WIDTH = 4, 13, 150  # pixels


def save_samples(
    path: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    source_labels: torch.Tensor,
    lam: torch.Tensor,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 16,
) -> None:
    """Save a picture of the first `count` normalised images of a training batch, with their classes and weights."""
    pixels = images[:count].float().cpu()
    shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))
    pixels = (255 * (pixels * scale + shift)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    height, width = pixels.shape[1:3]
    columns = math.ceil(len(pixels) ** 0.5)
    rows = -(-len(pixels) // columns)
    # Small images are enlarged by an integer factor, so that their pixels stay visible.
    zoom = max(_SMALLEST_WIDTH // width, 1)
    cell_width, cell_height = width * zoom + _MARGIN, height * zoom + _MARGIN + 2 * _LINE
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    samples = zip(pixels.numpy(), labels.tolist(), source_labels.tolist(), lam.tolist(), strict=False)
    for number, (picture, label, source_label, weight) in enumerate(samples):
        left = _MARGIN + number % columns * cell_width
        top = _MARGIN + number // columns * cell_height
        enlarged = Image.fromarray(picture).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        for line, words in enumerate(caption(classes[label], classes[source_label], weight)):
            draw.text((left, top + height * zoom + line * _LINE), words, fill="black", font=font)
    sheet.save(path)


def caption(label: str, source_label: str, lam: float) -> list[str]:
    """Return one or two lines with the classes of a sample and their weights, that of the receiver first.

    Examples
    --------
    >>> caption("cat", "dog", 0.75)
    ['0.75 cat', '0.25 dog']
    >>> caption("cat", "dog", 1.0)
    ['1.00 cat']
    """
    return [f"{lam:.2f} {label}", *([f"{1 - lam:.2f} {source_label}"] if lam < 1 else [])]

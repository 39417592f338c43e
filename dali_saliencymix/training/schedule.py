"""What changes in the course of a training, as pure functions of progress: learning rate, image size, mixing."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SIZE_AT_EPOCH = re.compile(r"([1-9]\d*)@(\d+)")


def learning_rate(
    epoch: float,
    *,
    base: float,
    epochs: int,
    scheduler: str = "cosine",
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Return the learning rate at a point of training.

    Parameters
    ----------
    epoch : float
        Epochs done, with fraction, in [0, epochs).
    base : float
        The rate after the warm-up.
    epochs : int
        Length of the training.
    scheduler : {"cosine", "step"}
        From `base` to 0 along half a cosine, or times `gamma` at each of `milestones`.
    warmup_epochs : float
        For so many epochs the rate rises linearly from 0 to `base`.
    milestones : sequence of float
        Epochs at which ``"step"`` lowers the rate, rising.
    gamma : float
        Factor of each such step.

    Examples
    --------
    >>> learning_rate(2.5, base=0.4, epochs=100, warmup_epochs=5)
    0.2
    >>> round(learning_rate(160, base=0.1, epochs=300, scheduler="step", milestones=(75, 150, 225)), 6)
    0.001
    """
    if epoch < warmup_epochs:
        return base * epoch / warmup_epochs
    if scheduler == "step":
        return float(base * gamma ** bisect_right(milestones, epoch))
    return base * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


class Phase(NamedTuple):
    """Epochs whose training images are made in the same way.

    Attributes
    ----------
    begin : int
        The first of these epochs, counted from 0.
    crop_size : int
        Height and width of the images.
    mixing : bool
        Whether images are mixed.
    """

    begin: int
    crop_size: int
    mixing: bool


def phase_at(
    epoch: int, *, epochs: int, crop_size: int, progressive_size: Sequence[str] = (), mix_off_epochs: int = 0
) -> Phase:
    """Return the phase that an epoch belongs to.

    Parameters
    ----------
    epoch : int
        Counted from 0.
    epochs : int
        Length of the training.
    crop_size : int
        Size of the images until `progressive_size` names another one.
    progressive_size : sequence of str
        ``"SIZE@EPOCH"`` in the order of the epochs: the size from that epoch on.
    mix_off_epochs : int
        There is no mixing in so many epochs at the end.

    Examples
    --------
    >>> phase_at(7, epochs=16, crop_size=224, progressive_size=["128@0", "160@6"], mix_off_epochs=2)
    Phase(begin=6, crop_size=160, mixing=True)
    >>> phase_at(15, epochs=16, crop_size=224, progressive_size=["128@0", "160@6"], mix_off_epochs=2)
    Phase(begin=14, crop_size=160, mixing=False)
    """
    begin, mixing = 0, True
    for change in progressive_size:
        size, start = map(int, change.split("@"))
        if epoch >= start:
            begin, crop_size = start, size
    if epoch >= epochs - mix_off_epochs:
        begin, mixing = max(begin, epochs - mix_off_epochs), False
    return Phase(begin, crop_size, mixing)


def accumulation_group(step: int, steps: int, size: int) -> range:
    """Return the steps whose gradients make the update that a step is a part of.

    The last group of an epoch is smaller where `size` does not divide its `steps`: no gradient goes from one epoch to
    the next.

    Examples
    --------
    >>> [len(accumulation_group(step, 5, 2)) for step in range(5)]
    [2, 2, 2, 2, 1]
    """
    begin = step - step % size
    return range(begin, min(begin + size, steps))

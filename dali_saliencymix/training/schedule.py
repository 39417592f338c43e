"""Learning rate as a pure function of progress."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


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

"""Medians of few and noisy windows, each with the interval that it can be trusted in.

A figure is a series of windows of the same length; the n-th windows of two series were measured one after the other,
so that their difference or ratio is taken within a round, where what else the machine does hits both of them.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_WINDOWS = 5  # no range of fewer values holds the median with this probability
COVERAGE = 0.9


@dataclass(frozen=True)
class Interval:
    """A median and the range that it lies in.

    Attributes
    ----------
    median, low, high : float
        With ``low <= median <= high``, in the unit of the values.
    count : int
        Number of values.
    """

    median: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Return the median of a series with an interval for it, from the order of the values alone.

    Parameters
    ----------
    values : sequence of float
        At least one finite value.

    Returns
    -------
    Interval
        From the k-th smallest to the k-th largest value, with the largest k for which this range holds the median
        of what was sampled with a probability of at least `COVERAGE`, whatever its distribution; k is 1 where no
        range does, which is so for fewer than 5 values.

    Raises
    ------
    ValueError
        If there are no values, or one is not finite.

    Notes
    -----
    The interval of the sign test: each value is as likely below the median as above it, so the number of values below
    is binomial. One value in nine may be an outlier to either side without any effect.

    Examples
    --------
    >>> interval([10.0, 11.0, 12.0, 13.0, 99.0, 12.0, 11.0, 12.0, 1.0])
    Interval(median=12.0, low=10.0, high=13.0, count=9)
    """
    ordered = sorted(values)
    if not ordered or not all(math.isfinite(value) for value in ordered):
        msg = f"values must be at least one finite number, got {list(values)}"
        raise ValueError(msg)
    count = len(ordered)
    rank = 1
    while 2 * (rank + 1) <= count and 1 - 2 * _binomial_below(rank, count) >= COVERAGE:
        rank += 1
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[count - rank], count)


def _binomial_below(rank: int, count: int) -> float:
    """Probability of at most `rank` heads in `count` fair throws."""
    return sum(math.comb(count, heads) for heads in range(rank + 1)) / 2**count


def rate(milliseconds: Interval, images: int) -> Interval:
    """Return images per second from milliseconds per batch of `images`.

    Examples
    --------
    >>> rate(Interval(100.0, 80.0, 200.0, 9), 64)
    Interval(median=640.0, low=320.0, high=800.0, count=9)
    """
    low, median, high = (1000 * images / value for value in (milliseconds.high, milliseconds.median, milliseconds.low))
    return Interval(median, low, high, milliseconds.count)

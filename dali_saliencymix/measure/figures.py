"""Figures from few and noisy values: a median with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_ROUNDS = 5  # with fewer values, no range contains the median with a probability of COVERAGE
COVERAGE = 0.9


@dataclass(frozen=True)
class Interval:
    """A median and its confidence interval.

    Attributes
    ----------
    median : float
        Median, in the unit of the values.
    low : float
        Lower end of the confidence interval.
    high : float
        Upper end of the confidence interval.
    count : int
        Number of values.
    """

    median: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Return the median of a series with a distribution-free confidence interval.

    Parameters
    ----------
    values : sequence of float
        At least one finite value.

    Returns
    -------
    Interval
        The range from the k-th smallest to the k-th largest value. k is the largest number for which this range
        contains the median of the sampled distribution with a probability of at least `COVERAGE`. With fewer than
        `LEAST_ROUNDS` values, no k is large enough, and the range is that of all values.

    Raises
    ------
    ValueError
        If there are no values, or a value is not finite.

    Notes
    -----
    This is the interval of the sign test: each value is equally likely to be below or above the median, so the number
    of values below it is binomial. With nine values, one outlier on each side has no effect on the range.

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
    """Return the probability of at most `rank` heads in `count` tosses of a fair coin."""
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


def figure(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return a figure for a result file: `interval`, the smallest and the largest value, and the number of values.

    Examples
    --------
    >>> figure([4.0, 1.0, 3.0, 2.0, 5.0])
    {'median': 3.0, 'low': 1.0, 'high': 5.0, 'min': 1.0, 'max': 5.0, 'rounds': 5}
    """
    found = interval(values)
    parts = {"median": found.median, "low": found.low, "high": found.high, "min": min(values), "max": max(values)}
    return {**{name: significant(value, digits) for name, value in parts.items()}, "rounds": len(values)}


def significant(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def is_figure(found: object) -> bool:
    """Return whether a part of a result is a figure, as returned by `figure`."""
    return isinstance(found, Mapping) and {"median", "min", "max"} <= found.keys()


def bounds(found: Mapping[str, float]) -> tuple[float, float]:
    """Return the range of a figure; for older results, the quartiles or the smallest and largest value."""
    return (
        found.get("low", found.get("q1", found.get("min", math.nan))),
        found.get("high", found.get("q3", found.get("max", math.nan))),
    )


def figures(result: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Yield all figures of a result with their paths."""
    if is_figure(result):
        yield path, result  # type: ignore[misc]
    elif isinstance(result, Mapping):
        for name, part in result.items():
            yield from figures(part, (*path, name))


def ratios(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return figures of the ratio of each variant to `reference`; ratios are taken within rounds."""
    if reference not in values:
        return {}
    return {
        name: figure([one / other for one, other in zip(own, values[reference], strict=False)])
        for name, own in values.items()
    }


def apart(before: Mapping[str, float], after: Mapping[str, float]) -> bool | None:
    """Return whether two figures differ by more than noise, that is, whether their ranges do not overlap.

    Returns
    -------
    bool or None
        None if one of the two has fewer than `LEAST_ROUNDS` rounds.

    Examples
    --------
    >>> apart(figure([1, 2, 3, 2, 1]), figure([4, 5, 6, 5, 4]))
    True
    """
    rounds = [found.get("rounds", found.get("windows", LEAST_ROUNDS)) for found in (before, after)]
    if min(rounds) < LEAST_ROUNDS:
        return None
    (low, high), (new_low, new_high) = bounds(before), bounds(after)
    return new_low > high or new_high < low


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one flat dictionary, with dots between the names.

    Examples
    --------
    >>> flat({"versions": {"numpy": "2"}, "cores": 2})
    {'versions.numpy': '2', 'cores': 2}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(
    before: Mapping[str, Any], after: Mapping[str, Any], ignored: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the conditions that differ between two results, with both values.

    Names that start with a string in `ignored` are left out.

    Examples
    --------
    >>> differing({"cores": 2, "date": "today"}, {"cores": 4}, ("date",))
    {'cores': (2, 4)}
    """
    old, new = flat(before), flat(after)
    names = [name for name in {**old, **new} if not name.startswith(ignored)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}

"""Interleaved rounds: variants are measured in turns, so that background load affects all of them equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence


def in_turns(
    variants: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    seconds: float = math.inf,
    least: int = 1,
    warm_up: bool = True,
    failed: Callable[[str, Exception], None] | None = None,
    longest: Callable[[float], float] = lambda seconds: seconds,
) -> Iterator[dict[str, list[float]]]:
    """Call each variant once a round, and yield all values so far after each round that counts.

    The order rotates by one each round and is reversed every second time: a fixed order would favour the variant
    that follows a light one.

    Parameters
    ----------
    variants : mapping from str to callable
        Each returns one value when called.
    rounds : int
        Most rounds that count.
    seconds : float
        No round begins that would probably end later than this, counted from the first call.
    least : int
        Rounds that count however long they take.
    warm_up : bool
        Whether the first round does not count.
    failed : callable, optional
        Is given the name and the exception of a variant that raises, which is left out from there on. By default the
        exception ends the measurement.
    longest : callable
        Returns the longest of the times of all processes that measure together: they have to do the same rounds.
    """
    alive = dict(variants)
    values: dict[str, list[float]] = {name: [] for name in alive}
    start = time.perf_counter()
    for number in range(0 if warm_up else 1, rounds + 1):
        done = number if warm_up else number - 1
        passed = longest(time.perf_counter() - start)
        if number > least and passed * (done + 1) / done > seconds:
            return
        for name in order_of_round(list(alive), number):
            try:
                value = alive[name]()
            except Exception as error:  # whatever it is: the others can be measured all the same
                if failed is None:
                    raise
                del alive[name], values[name]
                failed(name, error)
                continue
            if number:
                values[name].append(value)
        if number:
            yield values


def order_of_round(names: Sequence[str], number: int) -> list[str]:
    """Return the order in which variants take their turns in a round."""
    start = number % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order

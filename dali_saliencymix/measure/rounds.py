"""Interleaved rounds: each round measures all variants, so that background load affects all of them equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from dali_saliencymix.measure.processes import longest


def in_turns(
    variants: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    seconds: float = math.inf,
    least: int = 1,
    warm_up: bool = True,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[dict[str, list[float]]]:
    """Call each variant once per round, and yield all values so far after each round that counts.

    All processes do the same rounds, and each of them must call this.

    The order rotates by one in each round and is reversed in every second one, because a fixed order would favour a
    variant that follows a light one.

    Parameters
    ----------
    variants : mapping from str to callable
        Each variant returns one value when called.
    rounds : int
        Maximum number of rounds that count.
    seconds : float
        Time limit from the first call. No round starts that would probably exceed it.
    least : int
        Minimum number of rounds that count, regardless of `seconds`.
    warm_up : bool
        Whether to start with a round that does not count.
    failed : callable, optional
        Called with the name and the exception of a variant that raises; the variant is then left out. By default, the
        exception ends the measurement.

    Yields
    ------
    dict
        The values of each variant, one for each round that counts.
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
            except Exception as error:  # the other variants can still be measured
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
    """Return the order of the variants in a round."""
    start = number % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order

"""Exchange values between the processes of a run. With a single process, PyTorch is not needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_group: Any = None  # of torch.distributed; None for a single process


def use_group(group: Any) -> None:
    """Set the process group of PyTorch over which values are gathered; None for this process alone."""
    global _group
    _group = group


def are_several() -> bool:
    """Return whether values are gathered over a process group."""
    return _group is not None


def gather(value: T) -> list[T]:
    """Return the values of all processes by rank; all processes must call this.

    Examples
    --------
    >>> gather(3)
    [3]
    """
    if _group is None:
        return [value]
    distributed = sys.modules["torch"].distributed
    values: list[Any] = [None] * distributed.get_world_size(_group)
    distributed.all_gather_object(values, value, group=_group)
    return values


def sum_of_counts(counts: list[int]) -> list[int]:
    """Return the sums of integers over all processes, without waiting for a GPU; all processes must call this."""
    if _group is None:
        return [int(count) for count in counts]
    torch = sys.modules["torch"]
    total = torch.tensor(counts, dtype=torch.int64)
    torch.distributed.all_reduce(total, group=_group)
    sums: list[int] = total.tolist()
    return sums


def agree(value: T, choose: Callable[[list[T]], T]) -> T:
    """Return one value for all processes, chosen from the values of all; all processes must call this."""
    return choose(gather(value))


def longest(seconds: float) -> float:
    """Return the longest time of all processes, so that all do the same; positive even if the clock has not advanced.

    All processes must call this.
    """
    return agree(max(seconds, 1e-6), max)


def slowest_by_round(gathered: list[dict[str, list[float]]]) -> dict[str, tuple[float, ...]]:
    """Return the times of the slowest process in each round, by name."""
    return {
        name: tuple(max(times) for times in zip(*(each[name] for each in gathered), strict=True))
        for name in gathered[0]
    }


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error means that the connection to another process is lost."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)):
        return True
    return isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|Connection (closed|reset)", str(error)) is not None

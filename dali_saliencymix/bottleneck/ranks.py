"""The processes that measure together; most often there is one, and then nothing here needs torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def _distributed() -> bool:
    torch = sys.modules.get("torch")  # without torch there is no process group either
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def gather(value: T) -> list[T]:
    """Return the values of all processes by rank; all have to call this.

    Examples
    --------
    >>> gather(3)
    [3]
    """
    if not _distributed():
        return [value]
    from dali_saliencymix.training.distributed import gather_from_processes

    return gather_from_processes(value)


def agree(value: T, choose: Callable[[list[T]], T]) -> T:
    """Return one value for all processes, chosen from theirs.

    Examples
    --------
    >>> agree(3, max)
    3
    """
    return choose(gather(value))


def meet() -> None:
    """Wait for all processes."""
    gather(None)


def is_lost(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    if not _distributed():
        return False
    from dali_saliencymix.training.distributed import is_lost_connection

    return is_lost_connection(error)


def rank() -> int:
    """Return the number of this process."""
    return sys.modules["torch"].distributed.get_rank() if _distributed() else 0


def count() -> int:
    """Return the number of processes."""
    return sys.modules["torch"].distributed.get_world_size() if _distributed() else 1

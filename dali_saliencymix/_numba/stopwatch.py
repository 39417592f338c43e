"""How long this process has compiled kernels; imported without Numba."""

from __future__ import annotations

import time

# Seconds up to now, and since when kernels are being compiled: one object, so that a reader in another thread never
# sees half of a change.
_state: tuple[float, float | None] = (0.0, None)


def compile_seconds() -> float:
    """Return the wall time that this process has spent compiling kernels, in seconds; never less than before.

    It is 0.0 where all kernels came from the cache, and where Numba is not installed.
    """
    total, since = _state
    return total if since is None else total + time.monotonic() - since


def start() -> None:
    """Begin to count. Numba compiles in one thread at a time."""
    global _state
    _state = _state[0], time.monotonic()


def stop() -> None:
    """Count no more until the next start."""
    global _state
    _state = compile_seconds(), None

"""Time that this process has spent compiling kernels. Can be imported without Numba."""

from __future__ import annotations

import time

# Seconds of finished compilations, and the start time of the current one: one tuple, so that a reader in another thread
# never sees a partial update.
_state: tuple[float, float | None] = (0.0, None)


def compile_seconds() -> float:
    """Return the wall time that this process has spent compiling kernels, in seconds; it never decreases.

    It is 0.0 if all kernels came from the cache, or if Numba is not installed.
    """
    total, since = _state
    return total if since is None else total + time.monotonic() - since


def start() -> None:
    """Start counting. Numba compiles in one thread at a time."""
    global _state
    _state = _state[0], time.monotonic()


def stop() -> None:
    """Stop counting until the next start."""
    global _state
    _state = compile_seconds(), None

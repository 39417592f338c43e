"""Compiles functions with Numba, and keeps them on the disk for the next process where that is possible.

Numba alone raises an error where it finds no folder that it can write, as in an installation that is read-only for a
user without a home, and where its files cannot be written or read: on a full disk, of another user, damaged.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba.core.caching import FunctionCache


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for the types that it is called with, to work without the GIL and to divide as NumPy does."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        compiled._cache = _Cache(function)  # as `cache=True` does, but that Numba's own one raises errors
    except RuntimeError:
        _say_that_nothing_is_kept("there is no folder that can be written for what it has compiled")
    return compiled


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """The files of a compiled function, without which it works all the same."""

    def load_overload(self, *arguments: Any) -> Any:
        with self._or_without_files():
            try:
                return super().load_overload(*arguments)
            except OSError:
                raise
            except Exception:  # a damaged file: there is no telling what unpickling it raises
                self.flush()
        return None

    def save_overload(self, *arguments: Any) -> None:
        with self._or_without_files():
            super().save_overload(*arguments)

    @contextlib.contextmanager
    def _or_without_files(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.disable()
            _say_that_nothing_is_kept(f"{self.cache_path}: {error.strerror}")


@functools.cache
def _say_that_nothing_is_kept(why: str) -> None:
    sys.stderr.write(
        f"warning: Numba compiles for this process alone, which takes some seconds: {why}; "
        "set NUMBA_CACHE_DIR to a folder that can be written\n"
    )

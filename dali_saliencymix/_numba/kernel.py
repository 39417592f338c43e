"""Compilation of functions by Numba, with a cache on disk if possible.

Numba's own cache raises an error if it finds no writable folder, for example in a read-only installation for a user
without a home folder. It also raises one if its files cannot be written or read, for example if the disk is full, or
if the files are damaged or belong to another user. Kernels compiled here work without a cache in these cases.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache

from dali_saliencymix._array import Array
from dali_saliencymix._errors import line_of, naming, try_writing
from dali_saliencymix._numba import stopwatch

_NO_FOLDER = "there is no writable folder for the cache"
_ROOM = 2**20  # bytes; more than any kernel needs


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for the types that it is called with, without the GIL and with NumPy's division semantics."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        compiled._cache = _Cache(function)  # in place of `cache=True`, which raises errors
    except RuntimeError:
        _say_that_nothing_is_kept(_NO_FOLDER)
    return compiled


def as_input(array: Array) -> Array:
    """Return a read-only array of one of two Numba types, C-contiguous or not, since each type needs a compilation."""
    odd = array.flags.fnc or not array.flags.aligned  # of other types, too rare for a compilation
    view = array.copy(order="C") if odd else array.view()
    view.flags.writeable = False
    return view


def folder_for(compiled: Any) -> str:
    """Return the cache folder of a kernel; raise an OSError if there is none, or if it has no room."""
    folder = compiled._cache.cache_path
    if folder is None:
        raise OSError(_NO_FOLDER)
    try_writing(folder, _ROOM)
    return str(folder)


class _GivenFolder(FunctionCache._impl_class._locator_classes[0]):  # type: ignore[misc]  # Numba has no types
    """Locator for the folder in NUMBA_CACHE_DIR, even if it is read-only, as in a container image."""

    def ensure_cache_path(self) -> None:
        if not any(Path(self.get_cache_path()).glob("*.nbi")):
            super().ensure_cache_path()


class _Files(FunctionCache._impl_class):  # type: ignore[misc]
    _locator_classes = (_GivenFolder, *FunctionCache._impl_class._locator_classes[1:])


class _Cache(FunctionCache):  # type: ignore[misc]
    """Cache of a compiled function that works without files if they cannot be used."""

    _impl_class = _Files

    def load_overload(self, *arguments: Any) -> Any:
        with self._or_without_files():
            try:
                return super().load_overload(*arguments)
            except OSError:
                raise
            except Exception:  # unpickling a damaged file can raise anything
                self.flush()
        return None

    def save_overload(self, *arguments: Any) -> None:
        with self._or_without_files():
            super().save_overload(*arguments)

    @contextlib.contextmanager
    def _or_without_files(self) -> Iterator[None]:
        try:
            with naming(self.cache_path):
                yield
        except OSError as error:
            self.disable()
            _say_that_nothing_is_kept(line_of(error, expected=True))


@functools.cache
def _say_that_nothing_is_kept(why: str) -> None:
    sys.stderr.write(
        f"warning: Numba cannot cache its kernels, so each process compiles them, which takes some seconds: {why}; "
        "set NUMBA_CACHE_DIR to a writable folder\n"
    )


def check_all_kept() -> None:
    """Raise an OSError if a compiled kernel could not be cached."""
    if _say_that_nothing_is_kept.cache_info().currsize:
        msg = "compiled, but not cached: see the warning above"
        raise OSError(msg)


class Compilations(event.Listener):  # type: ignore[misc]
    """Listener that announces the first compilation and measures compile times; compilations of kernels may nest."""

    def __init__(self) -> None:
        self.silent = os.environ.get("RANK", "0") != "0"  # with torchrun, only rank 0 reports
        self._depth = 0

    def on_start(self, started: event.Event) -> None:
        compiled = started.data["dispatcher"]
        if _is_kernel(compiled):
            if not self._depth:
                self._say_once(compiled)
                stopwatch.start()
            self._depth += 1

    def on_end(self, ended: event.Event) -> None:
        if _is_kernel(ended.data["dispatcher"]):
            self._depth -= 1
            if not self._depth:
                stopwatch.stop()

    def _say_once(self, compiled: Any) -> None:
        if self.silent or _say_that_nothing_is_kept.cache_info().currsize:
            return
        self.silent = True
        try:
            folder = folder_for(compiled)
        except OSError as error:
            _say_that_nothing_is_kept(line_of(error, expected=True))
        else:
            sys.stderr.write(
                f"Numba compiles kernels: up to half a minute of processor time, once; it caches them in {folder}; "
                'to compile them in advance, run "python -m dali_saliencymix compile"\n'
            )


def _is_kernel(compiled: Any) -> bool:
    return (compiled.py_func.__module__ or "").startswith("dali_saliencymix._numba.")


compilations = Compilations()
event.register("numba:compile", compilations)

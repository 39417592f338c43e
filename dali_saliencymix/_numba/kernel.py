"""Compiles functions with Numba, and keeps them on the disk for the next process where that is possible.

Numba alone raises an error where it finds no folder that it can write, as in an installation that is read-only for a
user without a home, and where its files cannot be written or read: on a full disk, of another user, damaged.
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

_NO_FOLDER = "there is no folder that can be written for what it has compiled"
_ROOM = 2**20  # bytes: more than any kernel takes


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for the types that it is called with, to work without the GIL and to divide as NumPy does."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        compiled._cache = _Cache(function)  # as `cache=True` does, but that Numba's own one raises errors
    except RuntimeError:
        _say_that_nothing_is_kept(_NO_FOLDER)
    return compiled


def as_input(array: Array) -> Array:
    """Return an array that a kernel reads as one of two types, C-contiguous or not: it is compiled for each type."""
    odd = array.flags.fnc or not array.flags.aligned  # other types, too rare to be compiled for
    view = array.copy(order="C") if odd else array.view()
    view.flags.writeable = False
    return view


def folder_for(compiled: Any) -> str:
    """Return the folder that a kernel is kept in; OSError if there is none, or none that has room for it."""
    folder = compiled._cache.cache_path
    if folder is None:
        raise OSError(_NO_FOLDER)
    try_writing(folder, _ROOM)
    return str(folder)


class _GivenFolder(FunctionCache._impl_class._locator_classes[0]):  # type: ignore[misc]  # Numba has no types
    """The folder that NUMBA_CACHE_DIR names, also where it can only be read, as that of a container's image may be."""

    def ensure_cache_path(self) -> None:
        if not any(Path(self.get_cache_path()).glob("*.nbi")):
            super().ensure_cache_path()


class _Files(FunctionCache._impl_class):  # type: ignore[misc]
    _locator_classes = (_GivenFolder, *FunctionCache._impl_class._locator_classes[1:])


class _Cache(FunctionCache):  # type: ignore[misc]
    """The files of a compiled function, without which it works all the same."""

    _impl_class = _Files

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
            with naming(self.cache_path):
                yield
        except OSError as error:
            self.disable()
            _say_that_nothing_is_kept(line_of(error, expected=True))


@functools.cache
def _say_that_nothing_is_kept(why: str) -> None:
    sys.stderr.write(
        f"warning: Numba compiles for this process alone, which takes some seconds: {why}; "
        "set NUMBA_CACHE_DIR to a folder that can be written\n"
    )


def check_all_kept() -> None:
    """Raise an OSError if something that was compiled could not be kept."""
    if _say_that_nothing_is_kept.cache_info().currsize:
        msg = "compiled, but not kept: see the warning above"
        raise OSError(msg)


class Compilations(event.Listener):  # type: ignore[misc]
    """Says that kernels are compiled, the first time, and takes the time; kernels may call others."""

    def __init__(self) -> None:
        self.silent = os.environ.get("RANK", "0") != "0"  # one process of torchrun is enough
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
                f"Numba compiles kernels: up to half a minute of processor time, once; it keeps them in {folder}; "
                '"python -m dali_saliencymix compile" does it in advance\n'
            )


def _is_kernel(compiled: Any) -> bool:
    return (compiled.py_func.__module__ or "").startswith("dali_saliencymix._numba.")


compilations = Compilations()
event.register("numba:compile", compilations)

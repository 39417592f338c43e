"""Error reports of the programs: the last line on stderr says what went wrong.

Errors of the types in `EXPECTED` come from options, files, disks, memory and missing packages. Their messages are
self-explanatory, so the traceback is printed only with ``--traceback``, an option of every program. Any other error is
a bug in this project or in a library, so its traceback is always printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from dali_saliencymix.packages import MissingPackageError

EXPECTED: tuple[type[BaseException], ...] = (MissingPackageError, MemoryError, OSError, ValueError)

_PACKAGE = Path(__file__).parent
_FLAG = "--traceback"


def add_traceback(parser: argparse._ActionsContainer) -> None:
    """Add the option ``--traceback`` to a command line."""
    parser.add_argument(_FLAG, action="store_true", help="print the traceback of an error")


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Return whether a command line contains ``--traceback``; parsing it, which may fail, is not needed."""
    return _FLAG in arguments


def printable(text: str) -> str:
    r"""Return a text as one line, with escapes for characters that are not printable, such as those in file names.

    Examples
    --------
    >>> print(printable("a\nb/café.jpg"))
    a\nb/café.jpg
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def line_of(error: BaseException, *, expected: bool) -> str:
    """Return the message of an error as one line; if it is not `expected`, also its type and where it was raised.

    Examples
    --------
    >>> line_of(FileNotFoundError(2, "No such file or directory", "a.json"), expected=True)
    'a.json: No such file or directory'
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        text = f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    elif "Original Traceback (most recent call last)" in text:  # from a worker of PyTorch's DataLoader
        text = text.strip().splitlines()[-1]
    elif isinstance(error, MemoryError):
        text = f"out of memory: {text}" if text else "out of memory"
    if not expected:
        text = f"unexpected {type(error).__name__}: {' '.join(text.split())}, {_place(error)}"
    return printable(text or type(error).__name__)


def _place(error: BaseException) -> str:
    """Return the innermost frame of this project in the traceback, or else the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE.parent)] or frames
    return f"at {Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else "at an unknown place"


def write_error(error: BaseException, prog: str, *, expected: bool, with_traceback: bool) -> None:
    """Write an error to stderr; `expected` is as for `line_of`."""
    _give_up_stdout_if_closed()
    if with_traceback or not expected:
        traceback.print_exception(error)
    sys.stderr.write(f"{prog}: error: {line_of(error, expected=expected)}\n")
    sys.stderr.flush()


def prepare_stdout() -> None:
    """Make stdout print characters that it cannot encode as escapes instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Flush stdout while an error can still be reported; an OSError names stdout."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add this path to any OSError: the error for a full disk contains no file name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def try_writing(folder: str | Path, size: int) -> None:
    """Raise an OSError that names the folder if a file of `size` bytes cannot be written there; leave no file."""
    with naming(folder), tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(size))


def _give_up_stdout_if_closed() -> None:
    """Prevent a second error at exit, when Python flushes a stdout that can no longer be written."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""What a program says that something went wrong in: one line on stderr, the last one.

Errors of the types in `EXPECTED` are those of options, files, disks, memory and packages that are not installed, and
their texts say it all: the traceback stands above the line only with ``--traceback``, which every program has. Any
other error is a fault of this project or of a library, so its traceback is always there.
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
    parser.add_argument(_FLAG, action="store_true", help="with an error, show where it comes from")


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for tracebacks: known before it is parsed, which may fail."""
    return _FLAG in arguments


def printable(text: str) -> str:
    r"""Return a text on one line, with escapes for what cannot be printed, as names of files may hold it.

    Examples
    --------
    >>> print(printable("a\nb/café.jpg"))
    a\nb/café.jpg
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def line_of(error: BaseException, *, expected: bool) -> str:
    """Return what went wrong, on one line; of an error that is not `expected`, also its type and where it was raised.

    Examples
    --------
    >>> line_of(FileNotFoundError(2, "No such file or directory", "a.json"), expected=True)
    'a.json: No such file or directory'
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        text = f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    elif "Original Traceback (most recent call last)" in text:  # of a worker of PyTorch's DataLoader
        text = text.strip().splitlines()[-1]
    elif isinstance(error, MemoryError):
        text = f"out of memory: {text}" if text else "out of memory"
    if not expected:
        text = f"unexpected {type(error).__name__}: {' '.join(text.split())}, {_place(error)}"
    return printable(text or type(error).__name__)


def _place(error: BaseException) -> str:
    """Return where an error comes from: the last line of this project on the way there, or else the last one."""
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
    """Have names that are no text printed with escapes, in place of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write what is left for stdout, while an error can still be told of; an OSError names stdout."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have an OSError name this file or folder: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def try_writing(folder: str | Path, size: int) -> None:
    """Raise an OSError that names the folder if no file of so many bytes can be written there; none stays."""
    with naming(folder), tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(size))


def _give_up_stdout_if_closed() -> None:
    """Keep Python from a second error at its end, over what stdout does not take."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

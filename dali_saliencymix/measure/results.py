"""Read and write result files (JSON); a file is either written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dali_saliencymix._errors import naming, try_writing
from dali_saliencymix._json import finite


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error on one line of limited length.

    Examples
    --------
    >>> one_line(KeyError("images"))
    "KeyError: 'images'"
    """
    text = shortened(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shortened(text: str) -> str:
    """Return a text on one line of limited length."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: it has either its old or its new content. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise an OSError if `replace_file` could not write a file; creates missing folders, but not the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        try_writing(path.parent, 1)


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result with `replace_file`. Numbers that are not finite become null.

    Raises
    ------
    OSError
        If the file cannot be written; the error names `path`.
    """
    replace_file(Path(path), json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a result.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file does not contain a JSON object.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:  # RecursionError: lists nested too deeply
        msg = f"{path}: not a JSON file"
        raise ValueError(msg) from error
    if not isinstance(result, dict):
        msg = f"{path}: must hold a JSON object, got a {type(result).__name__}"
        raise ValueError(msg)
    return result

"""Checkpoints: dictionaries of tensors and plain values in files that are whole or not there."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` holds the old one or the new one whole, whatever happens.

    Parameters
    ----------
    checkpoint : dict
        Tensors, numbers, strings, bytes, and lists, tuples and dictionaries of these.
    path : path
        File to write; its folder has to exist.

    Raises
    ------
    OSError
        If the file cannot be written; it names `path`.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    # First into memory: writing to a full disk, PyTorch would raise an error that says nothing of the disk.
    serialised = io.BytesIO()
    torch.save(checkpoint, serialised)
    try:
        with open(partial, "wb") as stream:
            stream.write(serialised.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, entries: Sequence[str] = ("model",)) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code from it.

    Parameters
    ----------
    path : path
        File to read.
    entries : sequence of str
        What it has to hold.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no checkpoint of this project, is not whole, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such checkpoint"
        raise FileNotFoundError(msg)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no telling what unpickling a damaged file raises
        # Its own message is not passed on: it advises to run the file's code.
        msg = f"{path}: damaged, or not a checkpoint of tensors and plain values"
        raise ValueError(msg) from error
    missing = [entry for entry in entries if not isinstance(checkpoint, dict) or entry not in checkpoint]
    if missing:
        msg = f"{path}: not a checkpoint of this project, it has no entry {missing[0]!r}"
        raise ValueError(msg)
    return checkpoint


def find_checkpoint(resume: str, output_dir: str | Path) -> Path | None:
    """Return the file that `resume` means: a path, or with ``"auto"`` the last one in `output_dir` if there is one."""
    if resume != "auto":
        return Path(resume)
    last = Path(output_dir) / LAST
    return last if last.exists() else None

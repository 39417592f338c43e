"""Checkpoints: dictionaries of tensors and plain values in files that are whole or not there."""

from __future__ import annotations

import os
import pickle
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
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code from it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no checkpoint of this project, is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such checkpoint"
        raise FileNotFoundError(msg)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        msg = f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})"
        raise ValueError(msg) from error
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        msg = f"{path}: not a checkpoint of this project, it has no entry 'model'"
        raise ValueError(msg)
    return checkpoint


def find_checkpoint(resume: str, output_dir: str | Path) -> Path | None:
    """Return the file that `resume` means: a path, or with ``"auto"`` the last one in `output_dir` if there is one."""
    if resume != "auto":
        return Path(resume)
    last = Path(output_dir) / LAST
    return last if last.exists() else None

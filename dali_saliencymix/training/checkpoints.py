"""Checkpoints: dictionaries of tensors and plain values in files that are whole or not there.

A run writes ``checkpoint_e003_s001200.pt``, which is named after its place: whole epochs, and steps in the next one.
`LAST` and `BEST` are further names of such a file, hard links where the file system has them.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"

_NUMBERED = re.compile(r"checkpoint_e(\d+)_s(\d+)\.pt")


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
    # First into memory: writing to a full disk, PyTorch would raise an error that says nothing of the disk.
    serialised = io.BytesIO()
    torch.save(checkpoint, serialised)
    with _replacing(Path(path)) as partial, open(partial, "wb") as stream:
        stream.write(serialised.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


def save_progress(
    checkpoint: dict[str, Any], output_dir: str | Path, *, epoch: int, step: int, keep: int = 1, best: bool = False
) -> Path:
    """Write a checkpoint under the name of its place, name it `LAST` too, and remove what is older.

    Parameters
    ----------
    checkpoint : dict
        As for `save_checkpoint`.
    output_dir : path
        Folder to write to.
    epoch, step : int
        Whole epochs, and steps in the epoch after these.
    keep : int
        Number of files to keep, this one included. One that is `BEST` stays under that name.
    best : bool
        Whether to name it `BEST` too.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OSError
        If a file cannot be written; it names the file. Those that were there stay.
    """
    folder = Path(output_dir)
    path = folder / f"checkpoint_e{epoch:03d}_s{step:06d}.pt"
    save_checkpoint(checkpoint, path)
    for name in (LAST, BEST) if best else (LAST,):
        _name_too(path, folder / name)
    for left in folder.glob("checkpoint_*.partial"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    # Files from beyond this place are those of a run that went on from an older checkpoint: they are left alone.
    older = sorted(((place, file) for place, file in _numbered(folder) if place <= (epoch, step)), reverse=True)
    for _, file in older[keep:]:
        file.unlink(missing_ok=True)
    return path


def _name_too(path: Path, name: Path) -> None:
    with _replacing(name) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which then takes the place of `path`, or goes away if something fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name is on the disk too
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _numbered(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return the places and paths of the checkpoints that are named after their place."""
    matches = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob("checkpoint_e*_s*.pt"))
    return [((int(match[1]), int(match[2])), path) for match, path in matches if match]


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
        # PyTorch writes the check sums of a ZIP file and does not look at them: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no telling what unpickling a damaged file raises
        # Its own message is not passed on: it advises to run the file's code.
        msg = f"{path}: damaged, or not a checkpoint of tensors and plain values"
        raise ValueError(msg) from error
    if damaged:
        msg = f"{path}: damaged, the check sum of {damaged} is wrong"
        raise ValueError(msg)
    missing = [entry for entry in entries if not isinstance(checkpoint, dict) or entry not in checkpoint]
    if missing or checkpoint is None:
        msg = f"{path}: not a checkpoint of this project, it has no entry {missing[0]!r}"
        raise ValueError(msg)
    return checkpoint


def find_checkpoint(
    resume: str, output_dir: str | Path, passed_over: Callable[[str], None] = lambda _: None
) -> Path | None:
    """Return the file that `resume` means.

    Parameters
    ----------
    resume : str
        A path, or ``"auto"`` for the whole checkpoint in `output_dir` that is furthest in the training.
    output_dir : path
        Folder to look into.
    passed_over : callable
        Is given one line for each file that is not whole and was passed over.

    Returns
    -------
    Path or None
        None with ``"auto"`` where there is no checkpoint yet.

    Raises
    ------
    ValueError
        If there are checkpoints and none of them is whole.
    """
    if resume != "auto":
        return Path(resume)
    folder = Path(output_dir)
    candidates = [folder / LAST] if (folder / LAST).is_file() else []
    candidates += [
        path for _, path in sorted(_numbered(folder), reverse=True) if not any(map(path.samefile, candidates))
    ]
    furthest: tuple[tuple[int, int], Path] | None = None
    for path in candidates:
        try:
            checkpoint = load_checkpoint(path, ("model", "epoch"))
        except (ValueError, OSError) as error:
            passed_over(f"warning: passed over a checkpoint that is not whole: {error}")
            continue
        place = (checkpoint["epoch"], checkpoint.get("step", 0))
        if furthest is None or place > furthest[0]:
            furthest = place, path
    if candidates and furthest is None:
        msg = f"{folder}: none of its {len(candidates)} checkpoints is whole; name another with --resume PATH"
        raise ValueError(msg)
    return furthest[1] if furthest else None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each entry that is not what it was: ``"batch_size was 8, is now 6"``.

    Entries that are in one of both only count as None in the other.
    """
    names = [*now, *(name for name in was if name not in now)]
    return [f"{name} was {was.get(name)}, is now {now.get(name)}" for name in names if was.get(name) != now.get(name)]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators that a training step can draw from: PyTorch's and Python's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the random generators to what `random_state` has returned, in this process or another one."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

"""Save checkpoints atomically, and resume from them. A checkpoint is a dictionary of tensors and plain values.

A run writes files such as ``checkpoint_e003_s001200.pt``, named after their position: 3 complete epochs and 1200 steps
in the next one. `LAST` and `BEST` are further names of such files, hard links if the file system supports them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import random
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dali_saliencymix._errors import naming
from dali_saliencymix.loaders.options import DataOptions, defaults_of
from dali_saliencymix.measure.results import one_line
from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.options import EvaluationOptions, RunOptions, TrainingOptions
from dali_saliencymix.training.run_log import say, warn

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"

_TYPES: dict[str, type] = {"model": dict, "config": dict, "classes": list, "best_top1": float}
_TYPES |= dict.fromkeys(("epoch", "step", "restarts", "iteration"), int)
_NUMBERED = re.compile(r"checkpoint_e(\d+)_s(\d+)\.pt")


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically: whatever happens, `path` holds either the old or the new one completely.

    It may hold tensors, numbers, strings, bytes, and lists, tuples and dictionaries of these. An OSError names `path`.
    """
    # First into memory, because PyTorch's error for a full disk does not mention the disk.
    serialised = io.BytesIO()
    torch.save(checkpoint, serialised)
    with _replacing(Path(path)) as partial, open(partial, "wb") as stream:
        stream.write(serialised.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


def save_progress(checkpoint: dict[str, Any], folder: Path, *, keep: int = 1, best: bool = False) -> None:
    """Write a checkpoint named after its position, link it as `LAST`, and remove old files.

    The newest `keep` files are kept. With `best`, the file is also linked as `BEST`, a name under which it stays. An
    OSError names the file that cannot be written; existing files stay.
    """
    epoch, step = checkpoint["epoch"], checkpoint["step"]
    path = folder / f"checkpoint_e{epoch:03d}_s{step:06d}.pt"
    save_checkpoint(checkpoint, path)
    for name in (LAST, BEST) if best else (LAST,):
        _name_too(path, folder / name)
    for left in folder.glob("checkpoint_*.partial"):  # of a process that was killed while writing
        left.unlink(missing_ok=True)
    # Files of later positions exist if the run resumed from an older checkpoint. They are kept.
    older = sorted(((place, file) for place, file in _numbered(folder) if place <= (epoch, step)), reverse=True)
    for _, file in older[keep:]:
        file.unlink(missing_ok=True)


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
    """Yield a temporary path, which replaces `path` at the end, or is removed after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # sync the new name, too
            finally:
                os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _numbered(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return the positions and paths of the checkpoints that are named after their position."""
    matches = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob("checkpoint_e*_s*.pt"))
    return [((int(match[1]), int(match[2])), path) for match, path in matches if match]


def read_tensors(path: str | Path, *types: type, verify: bool = True) -> Any:
    """Load a file of ``torch.save`` onto the CPU, without running any code from it.

    Without `verify`, no checksums are compared and tensors are memory-mapped, which is fast. FileNotFoundError if the
    file does not exist; ValueError if it is damaged, or holds anything other than tensors, plain values, and objects of
    `types` whose attributes are these.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such checkpoint"
        raise FileNotFoundError(msg)
    damaged = None
    try:
        # PyTorch writes the checksums of a ZIP file but does not verify them: a flipped bit would end up in a weight.
        # Files from before PyTorch 1.6 are not ZIP files.
        zipped = zipfile.is_zipfile(path)
        if zipped and verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        with torch.serialization.safe_globals([*types]):
            lazily = zipped and not verify
            saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # unpickling a damaged file can raise anything
        # PyTorch's message is not passed on, since it advises running the code of the file.
        msg = f"{path}: damaged, or not a checkpoint of tensors and plain values"
        raise ValueError(msg) from error
    if damaged:
        msg = f"{path}: damaged, the checksum of {damaged} is wrong"
        raise ValueError(msg)
    return saved


def load_checkpoint(path: str | Path, entries: Sequence[str] = ("model",), *, verify: bool = True) -> dict[str, Any]:
    """Load a checkpoint, which must hold `entries`.

    Raises the errors of `read_tensors`, and ValueError if the file is not a checkpoint of this project.
    """
    checkpoint = read_tensors(path, verify=verify)
    missing = [entry for entry in entries if not isinstance(checkpoint, dict) or entry not in checkpoint]
    if missing:
        msg = f"{path}: not a checkpoint of this project, it has no entry {missing[0]!r}"
        raise ValueError(msg)
    for entry, kind in _TYPES.items():
        if not isinstance(checkpoint.get(entry, kind()), kind):
            got = f"must be a {kind.__name__}, got a {type(checkpoint[entry]).__name__}"
            msg = f"{path}: not a checkpoint of this project, its entry {entry!r} {got}"
            raise ValueError(msg)
        if kind is int and not 0 <= checkpoint.get(entry, 0) < 2**31:
            msg = f"{path}: not a checkpoint of this project, its entry {entry!r} must be in [0, 2**31)"
            raise ValueError(msg)
    return checkpoint


@contextlib.contextmanager
def taken_from(path: str | Path | None) -> Iterator[None]:
    """Convert errors while a checkpoint is restored to a ValueError that names its `path`.

    Wrong content raises errors of many types: in PyTorch, in DALI, and for missing entries.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        msg = f"{path}: this run cannot resume from its content: {one_line(error)}"
        raise ValueError(msg) from error


def find_checkpoint(resume: str, output_dir: str | Path) -> Path | None:
    """Return the checkpoint that `resume` means: a path, or with ``"auto"`` the most advanced one in `output_dir`.

    None if there is no checkpoint yet. Damaged files are skipped with a warning; ValueError if all are damaged.
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
            warn(f"warning: skipped a damaged checkpoint: {error}")
            continue
        place = (checkpoint["epoch"], checkpoint.get("step", 0))
        if furthest is None or place > furthest[0]:
            furthest = place, path
    if candidates and furthest is None:
        msg = f"{folder}: all of its {len(candidates)} checkpoints are damaged; name another with --resume PATH"
        raise ValueError(msg)
    return furthest[1] if furthest else None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each entry that differs, such as ``"batch_size was 8, is now 6"``.

    An entry that is in only one of the mappings counts as None in the other.
    """
    names = [*now, *(name for name in was if name not in now)]
    return [f"{name} was {was.get(name)}, is now {now.get(name)}" for name in names if was.get(name) != now.get(name)]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of PyTorch's and Python's random generators, which training steps may use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the random generators from the value of `random_state`, of this process or another one."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# The options that determine the batches. A resumed run must keep them.
DATA_OPTIONS = (
    *("dataset", "train_list", "batch_size", "seed", "train_crop_size", "min_crop_area", "hflip_prob", "crop_padding"),
    *("auto_augment", "ra_magnitude", "color_jitter", "random_erase", "mean", "std"),
    *("progressive_size", "mix_off_epochs"),
    *("mix", "mix_alpha", "mix_prob", "preset", "saliency", "source", "destination", "box", "per_batch"),
    "label_weight",
)


# Options that do not affect the training, and those of the data set, whose changes the fingerprint shows.
_OTHER_OPTIONS = {
    *("config", "data", "data_backend", "train_dir", "val_dir", "workers", "prefetch"),
    *(each.name for group in (RunOptions, EvaluationOptions) for each in dataclasses.fields(group)),
}


def changed_options(
    before: Mapping[str, Any], config: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[str]:
    """Describe which options differ from those `before`, which a checkpoint holds; see `differences`.

    Both mappings hold options by the names of their flags. The options `names` are compared; by default, all that
    affect the training but not its batches. A resumed run may change these, and uses the new values.
    """
    if names is None:
        names = [name for name in config if name not in {*DATA_OPTIONS, *_OTHER_OPTIONS, "world_size"}]
    names = [name for name in names if name in before]
    return differences({name: before[name] for name in names}, {name: config[name] for name in names})


def find_resume(run: RunOptions) -> Path | None:
    """Return the checkpoint that --resume means, if there is one; ValueError if the run would overwrite another one."""
    last = run.output_dir / LAST
    resume = find_checkpoint(run.resume, run.output_dir) if run.resume else None
    if run.evaluate:
        return resume
    takes_over = run.resume == "auto" or (resume is not None and last.exists() and last.samefile(resume))
    if last.exists() and not run.no_checkpoints and not takes_over:
        msg = f"{last}: would be overwritten; give --resume auto or another --output-dir"
        raise ValueError(msg)
    if run.resume and resume is None:
        say(f"no {last} yet: starting from {run.pretrained or 'scratch'}")
    return resume


def check_model(path: Path | None, saved: Mapping[str, Any], *, arch: str, classes: Sequence[str], root: Path) -> None:
    """Require that a checkpoint has the network and the classes of the run, whose images are in `root`."""
    if saved["config"]["arch"] != arch:
        was = saved["config"]["arch"]
        msg = f"{path}: holds a {was}: --arch must be {was}, got {arch!r}"
        raise ValueError(msg)
    if saved["classes"] != classes:
        pairs = itertools.zip_longest(saved["classes"], classes)
        was, now = next(pair for pair in pairs if pair[0] != pair[1])
        msg = f"{path}: its classes are not those of {root}: it has {was!r} where the data have {now!r}"
        raise ValueError(msg)


def _defaults(dataset: str) -> dict[str, Any]:
    """Return defaults of the data options, for checkpoints from before an option existed."""
    values = {each.name: each.default for each in dataclasses.fields(DataOptions)} | defaults_of(dataset)
    values["label_weight"] = MixOptions.label_weight
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changed_data(
    path: Path | None,
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    options: TrainingOptions,
) -> list[str]:
    """Describe what affects the batches and has changed since a checkpoint; ValueError without --restart-epoch.

    `config` holds the options by the names of their flags, and ``world_size``. `fingerprint` is that of the data set.
    """
    # The end of mixing depends on the end of the training.
    names = (*DATA_OPTIONS, "world_size", *(("epochs",) if options.schedule.mix_off_epochs else ()))
    was = {**_defaults(saved["config"]["dataset"]), **saved["config"]}
    before = {name: was[name] for name in names} | saved["data"]
    present = {name: config[name] for name in names} | dict(fingerprint)
    changed = differences(before, present)
    if changed and not options.run.restart_epoch:
        again = f"--restart-epoch resumes with them from the beginning of epoch {saved['epoch'] + 1}"
        msg = f"{path}: cannot resume with changed data: {'; '.join(changed)}; {again}"
        raise ValueError(msg)
    return changed


def check_optimizer(path: Path | None, saved: Mapping[str, Any], *, opt: str) -> None:
    """Require that a checkpoint holds the state of the run's optimiser; old checkpoints without a name hold SGD's."""
    if (was := saved["config"].get("opt", "sgd")) != opt:
        msg = f"{path}: holds the state of {was}; give --opt {was}"
        raise ValueError(msg)

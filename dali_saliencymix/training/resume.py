"""Which checkpoint a run resumes from, and whether its model and its data are still those of the checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dali_saliencymix.training import checkpoints, logs
from dali_saliencymix.training.options import RunOptions, TrainingOptions

# The options that decide which batches a run sees: a run that resumes has to keep them.
DATA_OPTIONS = (
    *("dataset", "train_list", "batch_size", "seed", "train_crop_size", "min_crop_area", "hflip_prob", "crop_padding"),
    *("color_jitter", "progressive_size", "mix_off_epochs"),
    *("mix", "mix_alpha", "mix_prob", "preset", "saliency", "source", "destination", "box", "per_batch"),
)


def find_resume(run: RunOptions) -> Path | None:
    """Return the checkpoint that --resume means, if there is one, and refuse what would overwrite another run."""
    last = run.output_dir / checkpoints.LAST
    resume = checkpoints.find_checkpoint(run.resume, run.output_dir, logs.warn) if run.resume else None
    if run.evaluate:
        if resume is None:
            msg = f"{last}: no such checkpoint"
            raise ValueError(msg)
        return resume
    takes_over = run.resume == "auto" or (resume is not None and last.exists() and last.samefile(resume))
    if last.exists() and not run.no_checkpoints and not takes_over:
        msg = f"{last}: would be overwritten; give --resume auto or another --output-dir"
        raise ValueError(msg)
    if run.resume and resume is None:
        logs.say(f"no {last} yet: starting anew")
    return resume


def check_model(path: Path | None, saved: Mapping[str, Any], *, arch: str, classes: Sequence[str], root: Path) -> None:
    """Require the network and the classes of a checkpoint to be those of the run, whose images are in `root`."""
    if saved["config"]["arch"] != arch:
        msg = f"{path}: holds a {saved['config']['arch']}, which --arch has to say, got {arch!r}"
        raise ValueError(msg)
    if saved["classes"] != classes:
        pairs = itertools.zip_longest(saved["classes"], classes)
        was, now = next(pair for pair in pairs if pair[0] != pair[1])
        msg = f"{path}: its classes are not those of {root}: there was {was!r}, there is {now!r}"
        raise ValueError(msg)


def changed_data(
    path: Path | None,
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    options: TrainingOptions,
) -> list[str]:
    """Return what decides the batches and has changed since a checkpoint, in words; refuse it without --restart-epoch.

    Parameters
    ----------
    path, saved
        The checkpoint.
    config : mapping
        Options of the run by the names of their flags, and ``world_size``.
    fingerprint : mapping
        Of its data set.
    options : TrainingOptions
        The options in their groups.
    """
    # Where mixing ends depends on where the training ends.
    names = (*DATA_OPTIONS, "world_size", *(("epochs",) if options.schedule.mix_off_epochs else ()))
    before = {name: saved["config"][name] for name in names} | saved["data"]
    present = {name: config[name] for name in names} | dict(fingerprint)
    changed = checkpoints.differences(before, present)
    if changed and not options.run.restart_epoch:
        anew = f"--restart-epoch goes on with them from the beginning of epoch {saved['epoch'] + 1}"
        msg = f"{path}: cannot go on with other data: {'; '.join(changed)}; {anew}"
        raise ValueError(msg)
    return changed

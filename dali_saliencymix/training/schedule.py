"""Schedules as pure functions of the training progress: learning rate, image size, mixing, accumulation."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from typing import NamedTuple

from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.training.options import ScheduleOptions


def learning_rate(epoch: float, schedule: ScheduleOptions, *, base: float) -> float:
    """Return the learning rate after `epoch` epochs, which may be fractional; `base` is the rate after the warm-up.

    Examples
    --------
    >>> learning_rate(2.5, ScheduleOptions(epochs=100, lr_warmup_epochs=5), base=0.4)
    0.2
    >>> round(learning_rate(160, ScheduleOptions(lr_scheduler="step", lr_milestones=(75, 150, 225)), base=0.1), 6)
    0.001
    """
    warmup = schedule.lr_warmup_epochs
    if epoch < warmup:
        return base * epoch / warmup
    if schedule.lr_scheduler == "step":
        return float(base * schedule.lr_gamma ** bisect_right(sorted(schedule.lr_milestones), epoch))
    return base * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (schedule.epochs - warmup)))


class Phase(NamedTuple):
    """Consecutive epochs with the same image size and mixing."""

    begin: int  # the first of these epochs, counted from 0
    crop_size: int  # height and width of the images
    mixing: bool

    def applied_to(self, options: DataOptions) -> DataOptions:
        """Return the options with the image size and mixing of this phase."""
        return replace(options, train_crop_size=self.crop_size, mix=options.mix if self.mixing else None)


def phase_at(epoch: int, schedule: ScheduleOptions, *, crop_size: int) -> Phase:
    """Return the phase of an epoch; `crop_size` is the image size until `schedule.progressive_size` changes it.

    Examples
    --------
    >>> schedule = ScheduleOptions(epochs=16, progressive_size=("128@0", "160@6"), mix_off_epochs=2)
    >>> phase_at(7, schedule, crop_size=224)
    Phase(begin=6, crop_size=160, mixing=True)
    >>> phase_at(15, schedule, crop_size=224)
    Phase(begin=14, crop_size=160, mixing=False)
    """
    begin, mixing = 0, True
    for change in schedule.progressive_size:
        size, start = map(int, change.split("@"))
        if epoch >= start:
            begin, crop_size = start, size
    without = schedule.epochs - schedule.mix_off_epochs
    if epoch >= without:
        begin, mixing = max(begin, without), False
    return Phase(begin, crop_size, mixing)


def accumulation_group(step: int, steps: int, size: int) -> range:
    """Return the steps whose gradients are accumulated in the same update as those of `step`.

    The last group of an epoch is smaller if `size` does not divide `steps`, since gradients are not accumulated across
    epochs.

    Examples
    --------
    >>> [len(accumulation_group(step, 5, 2)) for step in range(5)]
    [2, 2, 2, 2, 1]
    """
    begin = step - step % size
    return range(begin, min(begin + size, steps))

"""Schedules of a training run: learning rate, image size, mixing, and the steps of each update."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.options import ScheduleOptions
from dali_saliencymix.training.schedule import Phase, accumulation_group, learning_rate, phase_at

POINTS = np.linspace(0, 90, 901)[:-1]


def rate(point: float, *, base: float = 0.4, **options) -> float:
    return learning_rate(point, ScheduleOptions(epochs=90, **options), base=base)


def rates(**options) -> np.ndarray:
    return np.array([rate(point, **options) for point in POINTS])


def test_the_cosine_is_pytorchs():
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for epoch in range(90):
        assert rate(epoch) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_the_cosine_falls_from_the_base_rate_to_nothing():
    values = rates()
    assert values[0] == 0.4
    assert (np.diff(values) < 0).all()
    assert rate(45) == pytest.approx(0.2)
    assert 0 <= rate(90 - 1e-9) < 1e-9


@pytest.mark.parametrize("scheduler", ["cosine", "step"])
def test_the_warm_up_is_a_straight_line_that_ends_at_the_base_rate(scheduler):
    values = rates(lr_warmup_epochs=5, lr_scheduler=scheduler, lr_milestones=(30, 60))
    np.testing.assert_allclose(values[:50], 0.4 * POINTS[:50] / 5)
    before, after = (rate(5 + shift, lr_warmup_epochs=5, lr_scheduler=scheduler) for shift in (-1e-9, 0))
    assert after == 0.4
    assert before == pytest.approx(after, rel=1e-6)


def test_after_the_warm_up_the_cosine_fills_what_is_left():
    half_way = rate(5 + 85 / 2, lr_warmup_epochs=5)
    assert half_way == pytest.approx(0.2)
    assert rate(90 - 1e-6, lr_warmup_epochs=5) < 1e-9


def test_steps_come_at_the_milestones_and_not_before():
    values = rates(lr_scheduler="step", lr_milestones=(60, 30, 80), lr_gamma=0.1)
    expected = 0.4 * 0.1 ** ((POINTS >= 30).astype(int) + (POINTS >= 60) + (POINTS >= 80))
    np.testing.assert_allclose(values, expected)
    assert rate(math.nextafter(30, 0), lr_scheduler="step", lr_milestones=(30,)) == 0.4


def test_the_rate_scales_with_the_base():
    assert rate(20, base=0.8) == 2 * rate(20, base=0.4)


def phases(epochs: int, **options) -> list[Phase]:
    schedule = ScheduleOptions(epochs=epochs, **options)
    return [phase_at(epoch, schedule, crop_size=224) for epoch in range(epochs)]


def test_without_options_there_is_one_phase():
    assert set(phases(9)) == {Phase(0, 224, True)}


def test_sizes_hold_from_their_epoch_to_the_next_one():
    found = phases(8, progressive_size=["128@0", "160@3", "192@5"])
    assert [phase.crop_size for phase in found] == [128] * 3 + [160] * 2 + [192] * 3
    assert [phase.begin for phase in found] == [0] * 3 + [3] * 2 + [5] * 3
    found = phases(4, progressive_size=["256@2"])
    assert [(phase.begin, phase.crop_size) for phase in found] == [(0, 224)] * 2 + [(2, 256)] * 2


def test_mixing_ends_before_the_last_epochs_in_a_phase_of_its_own():
    assert phases(5, mix_off_epochs=2) == [Phase(0, 224, True)] * 3 + [Phase(3, 224, False)] * 2
    assert phases(2, mix_off_epochs=2) == [Phase(0, 224, False)] * 2
    found = phases(6, progressive_size=["128@0", "160@4"], mix_off_epochs=3)
    assert found == [Phase(0, 128, True)] * 3 + [Phase(3, 128, False)] + [Phase(4, 160, False)] * 2


def test_a_phase_changes_the_size_and_the_mixing_of_the_batches():
    options = DataOptions(mix=MixOptions(prob=0.5), batch_size=3)
    assert Phase(0, 224, True).applied_to(options) == options
    assert Phase(4, 128, False).applied_to(options) == DataOptions(mix=None, batch_size=3, train_crop_size=128)


@pytest.mark.parametrize(("steps", "size"), [(12, 1), (12, 4), (13, 4), (3, 4), (1, 1)])
def test_groups_of_accumulated_steps_divide_an_epoch(steps, size):
    groups = [accumulation_group(step, steps, size) for step in range(steps)]
    assert all(step in group for step, group in enumerate(groups))
    assert [step for group in dict.fromkeys(groups) for step in group] == list(range(steps))
    lengths = [len(group) for group in dict.fromkeys(groups)]
    assert lengths == [size] * (steps // size) + [steps % size] * (steps % size > 0)

"""The monitor, with a simulated clock."""

from __future__ import annotations

import itertools

import pytest

from dali_saliencymix.bottleneck import Monitor


class Clock:
    """A clock that only the tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(waits, steps, **options) -> tuple[Monitor, list[str]]:
    """Return a monitor of batches that came after `waits` seconds each and were used for `steps` seconds each."""
    clock, said = Clock(), []
    monitor = Monitor(clock=clock, say=said.append, **options)

    def loader():
        for wait in waits:
            clock.now += wait
            yield None

    for _, step in zip(monitor.watch(loader()), steps, strict=False):
        clock.now += step
    return monitor, said


def test_figures_are_those_of_the_steps_without_the_first():
    monitor, _ = watched([100.0, 1.0, 1.0, 1.0], [3.0] * 4, batch_size=8)
    assert monitor.steps == 4
    assert monitor.data_wait_share == pytest.approx(0.25)
    assert monitor.data_wait_ms == pytest.approx(1000)
    assert monitor.step_ms == pytest.approx(4000)
    assert monitor.images_per_second == pytest.approx(2.0)
    assert monitor.summary() == {
        "data_wait_share": monitor.data_wait_share,
        "data_wait_ms": monitor.data_wait_ms,
        "step_ms": monitor.step_ms,
        "images_per_second": monitor.images_per_second,
    }


def test_only_the_last_steps_count():
    monitor, _ = watched([5.0] * 20 + [1.0] * 10, [1.0] * 30, window=10)
    assert monitor.data_wait_share == pytest.approx(0.5)
    assert monitor.steps == 30


def test_the_share_of_an_epoch_counts_all_its_steps_and_no_other():
    clock = Clock()
    monitor = Monitor(clock=clock)
    for wait in (3.0, 1.0):
        for _ in range(2):
            clock.now += 50.0  # between epochs
            monitor.start()
            for _ in range(4):
                monitor.ask()
                clock.now += wait
                monitor.arrived()
                clock.now += 1.0
            assert (monitor.waited, monitor.seconds) == (4 * wait, 4 * (wait + 1))
            assert monitor.epoch_wait_share == wait / (wait + 1)


def test_before_the_second_step_nothing_is_known():
    monitor, _ = watched([1.0], [1.0], batch_size=4)
    assert set(monitor.summary().values()) == {None}
    assert monitor.own_cost_share() is None


def test_without_a_batch_size_there_is_no_rate():
    monitor, _ = watched([1.0] * 5, [1.0] * 5)
    assert monitor.images_per_second is None
    assert monitor.step_ms == pytest.approx(2000)


def test_a_starving_step_is_said_once_and_points_at_the_tool():
    monitor, said = watched([1.0] * 100, [1.0] * 100, patience=10.0)
    assert monitor.warned
    assert len(said) == 1
    assert "50%" in said[0]
    assert "1000.0 of 2000.0 ms" in said[0]
    assert "python -m dali_saliencymix bottleneck" in said[0]
    assert "\n" not in said[0]


def test_a_short_time_of_starving_is_not_said():
    # Twice eight seconds, which stay in the window for three more, with enough good steps in between to end the first.
    waits = [1.0] * 4 + [0.0] * 40 + [1.0] * 4 + [0.0] * 40
    _, said = watched(waits, [1.0] * len(waits), patience=12.0, window=4)
    assert said == []


def test_a_loader_that_keeps_up_is_not_blamed():
    _, said = watched([0.19] * 1000, [0.81] * 1000, patience=1.0)
    assert said == []


def test_the_line_can_be_moved():
    _, said = watched([0.19] * 1000, [0.81] * 1000, patience=1.0, warn_share=0.18)
    assert len(said) == 1


def test_hooks_count_the_wait_and_the_step_and_nothing_else():
    clock = Clock()
    monitor = Monitor(clock=clock, batch_size=6)
    for wait in (100.0, 1.0, 1.0):  # the first batch includes the start of the loader
        monitor.ask()
        clock.now += 50.0  # a validation, after which the loop takes the next batch
        monitor.ask()
        clock.now += wait
        monitor.arrived()
        clock.now += 3.0
        monitor.ended()
        clock.now += 1000.0  # a checkpoint
    assert (monitor.steps, monitor.data_wait_share, monitor.step_ms) == (3, 0.25, 4000.0)
    assert monitor.images_per_second == pytest.approx(1.5)
    for out_of_turn in (monitor.arrived, monitor.ended):
        out_of_turn()
    assert (monitor.steps, monitor.share_of_all) == (3, 0.25)


def test_the_verdict_is_on_all_steps():
    monitor, _ = watched([5.0, *[2.0] * 10, *[0.0] * 10], [8.0] * 21, window=5)
    assert monitor.data_wait_share == 0
    assert monitor.share_of_all == pytest.approx(20 / 180)
    assert monitor.verdict() == (
        "data wait 11% of the time (1000.0 of 9000.0 ms per step, measured on the host): the loader keeps up"
    )
    monitor, _ = watched([5.0, 2.0], [8.0] * 2)
    assert monitor.verdict() == (
        "data wait 20% of the time (2000.0 of 10000.0 ms per step, measured on the host): the loader is too slow; on "
        "a GPU this is an upper bound. What to do about it: python -m dali_saliencymix bottleneck --help"
    )
    assert Monitor().verdict() == "data wait: not measured: there was no step after the first of an epoch"


def test_the_warning_goes_to_stderr_by_default(capsys):
    clock = Clock()
    monitor = Monitor(clock=clock, patience=1.0)
    for _ in range(10):
        monitor.record(1.0, 2.0)
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: the training waits for its data")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_batches_come_through_as_they_are_and_epochs_add_up():
    monitor = Monitor()
    for epoch in range(3):
        assert list(monitor.watch(iter([epoch, "x"]))) == [epoch, "x"]
    assert monitor.steps == 6


def test_what_a_loader_raises_comes_through():
    def broken():
        yield 1
        msg = "no more disk"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="no more disk"):
        list(Monitor().watch(broken()))


def test_sums_do_not_drift():
    monitor = Monitor(window=3)
    for wait in itertools.islice(itertools.cycle([1e6, 1e-6, 0.1]), 30_001):
        monitor.record(wait, wait + 1.0)
    for _ in range(3):
        monitor.record(0.25, 1.0)
    assert monitor.data_wait_share == pytest.approx(0.25, abs=1e-4)


def test_its_own_cost_is_measured():
    monitor, _ = watched([1.0] * 5, [1.0] * 5)
    assert monitor.own_cost_ms() > 0
    assert monitor.own_cost_share() > 0


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"batch_size": 0}, {"warn_share": 0.0}, {"warn_share": 1.5}, {"patience": 0.0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Monitor(**options)

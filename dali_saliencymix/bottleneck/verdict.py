"""From measured times to a verdict: a pure function, which reads no clock and no file.

All times are milliseconds per batch. The series of one measurement have one value for each round; those of `cold_ms`
have their own count. Gaps are taken within rounds and judged by `measure.figures.interval`: where the range of the
deciding gap contains the limit, the verdict is INCONCLUSIVE and names the gap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dali_saliencymix.measure.figures import LEAST_ROUNDS, Interval, interval

Series = tuple[float, ...]  # milliseconds per batch, by round

PASS_STALL = 0.10  # a utilisation of 90 % passes, as in MLPerf Storage
CRITICAL_STALL = 0.20

CATEGORIES = ("read", "decode", "prep", "mix", "iterator")
_CATEGORY_VERDICTS = {"read": "DISK-BOUND", "decode": "DECODE-BOUND", "prep": "CPU-PREP-BOUND", "mix": "MIX-BOUND"}
LOADER_ALONE = "LOADER-ALONE"  # no verdict was asked for

_NEXT = {
    "GPU-BOUND": "Leave the loader as it is: only a faster step makes the training faster (--amp, --channels-last, "
    "a smaller network). A lighter loader would save CPU, not time.",
    "COMPUTE-BOUND": "Leave the loader as it is: only a faster training step makes the training faster. The step runs "
    "on a CPU: a GPU is the first thing to try.",
    "DISK-BOUND": "Put the files on faster storage or into memory, read fewer and larger files (WebDataset, TFRecord), "
    "or raise the reader's prefetch_queue_depth and num_threads where the storage answers slowly but in parallel.",
    "DECODE-BOUND": "Give the decoding more: DALI threads (-j), on a GPU hw_decoder_load (see the what-ifs); or less "
    "to do: store the images at the size that the training needs.",
    "CPU-PREP-BOUND": "Give the preparation more DALI threads (-j), move it to the GPU, or drop the operator that "
    "costs most in the table.",
    "MIX-BOUND": "Take a cheaper saliency detector (spectral_residual), mix fewer samples (--mix-prob), or mix on the "
    "GPU.",
    "LOADER-BOUND": "Give the loader more workers or threads, and look inside it with its own profiler: this tool "
    "cannot cut it into stages. --pipeline module:function takes a DALI pipeline apart.",
    "CONTENTION": "The parts are fast enough, but not together. Where they share a CPU, lower -j or torch's threads "
    "until both fit; where they share a GPU, move work to the CPU or the JPEG engine (hw_decoder_load); if the loader "
    "makes nothing in advance, let it (prefetch).",
    LOADER_ALONE: "Compare its rate with what the training needs, or measure it together with a training step.",
    "STRAGGLER": "Look at that process's machine, disk and CPU affinity: all others wait for it in every step.",
    "INCONCLUSIVE": "Measure again on a quieter machine, or longer: --seconds 300 takes longer windows.",
}
VERDICTS = tuple(_NEXT)
OF_A_PART = tuple(_CATEGORY_VERDICTS.values())  # those that name a part of the loader
# Of these, the verdicts that another setting of the loader can change.
OF_THE_LOADER = (*(name for name in OF_A_PART if name != "DISK-BOUND"), "LOADER-BOUND", LOADER_ALONE)
_NEXT_PARTS_OPEN = (
    "Give the loader more threads (-j), on a GPU hw_decoder_load (see the what-ifs). A quieter machine or a longer "
    "measurement tells its parts apart: --seconds 300."
)
# Where the stall itself says nothing, and the waits decide.
_NEXT_KEEPS_UP = (
    "Leave the loader as it is. Whether it slows the step down, on a CPU that they share above all, is told by a "
    "quieter machine or a longer measurement: --seconds 300."
)


@dataclass(frozen=True)
class Stage:
    """What a part of the loader adds to the time of a batch in each round; may be negative by noise."""

    name: str
    category: str  # of CATEGORIES: which verdict it leads to
    ms: Series


@dataclass(frozen=True)
class RankFigures:
    """What one of several processes has measured, as in `Figures`."""

    step_ms: Series | None
    loader_ms: Series | None


@dataclass(frozen=True)
class Figures:
    """All that a verdict depends on. What was not measured is None.

    Attributes
    ----------
    step_ms : tuple of float, optional
        The training step alone, on a constant batch.
    loader_ms : tuple of float, optional
        The loader alone, files in memory.
    end_ms : tuple of float, optional
        Loader and step together.
    stages : tuple of Stage, optional
        What the loader's time is made of; None if it cannot be cut.
    cold_ms : tuple of float, optional
        The loader alone, with files that are not in memory.
    reading_ms : tuple of float, optional
        Reading alone, with files that are not in memory; None if the loader cannot be cut.
    storage_measured : bool
        Whether reading from storage was measured, with the files' absence from memory checked.
    reads_cold : bool
        Whether the training will read from storage in every epoch: more data than memory.
    device : {"cuda", "cpu"}
        Where the step runs.
    ranks : tuple of RankFigures
        Of all processes where there are several; the figures above are then those of the slowest process per round.
    waits : tuple of float, optional
        Share of the time of `end_ms`, 0 to 1, for which the host waited for batches: at least as long as the step did.
    """

    step_ms: Series | None = None
    loader_ms: Series | None = None
    end_ms: Series | None = None
    stages: tuple[Stage, ...] | None = None
    cold_ms: Series | None = None
    reading_ms: Series | None = None
    storage_measured: bool = False
    reads_cold: bool = False
    device: str = "cpu"
    ranks: tuple[RankFigures, ...] = ()
    waits: Series | None = None


@dataclass(frozen=True)
class Verdict:
    """What holds the training back.

    Attributes
    ----------
    name : str
        One of `VERDICTS`.
    why : str
        One sentence.
    next_step : str
        What to do first.
    stall : Interval or None
        Share of the time, 0 to 1, by which the training is slower than its step alone; negative values are noise.
    clash : Interval or None
        Share of the time, 0 to 1, by which the training is slower than the slower one of loader and step alone, files
        in memory: what the two cost each other. Negative values are noise.
    contention : {"no", "yes", "open"} or None
        Whether that is more than 10 %, a question apart from which of the two is slower; ``"open"`` where the windows
        differ too much to say. None where they were not measured together.
    """

    name: str
    why: str
    next_step: str
    stall: Interval | None
    clash: Interval | None = None
    contention: str | None = None


def decide(figures: Figures) -> Verdict:
    """Say what holds the training back, or why that cannot be said.

    Parameters
    ----------
    figures : Figures
        As measured.

    Returns
    -------
    Verdict

    Raises
    ------
    ValueError
        If series that belong together differ in length, a time is not positive, or a category is unknown.

    Notes
    -----
    The stall is ``1 - step / end``. Below 10 % the step is the bottleneck. Otherwise the stalled time is divided
    between the loader, ``max(loader - step, 0)``, and what the two cost each other, ``max(end - max(loader, step),
    0)``; the larger part names the verdict, CONTENTION for the second one. The loader's part goes to the category of
    stages that costs most, and is LOADER-BOUND where that one cannot be told. Reading counts as DISK-BOUND only where
    storage was measured.

    Where the stall or its parts cannot be told by these, direct evidence decides: a step that waits for its batches for
    less than 10 % of the time, with a loader that alone is faster, is the bottleneck; a loader is it that alone is
    slower, by more than 10 % in the median, and for which the step waits for more than 10 % of the time. Whether the
    two slow each other down as well is then a question of its own, `Verdict.contention`.

    Examples
    --------
    >>> figures = Figures(step_ms=(10.0,) * 5, loader_ms=(40.0, 41.0, 40.5, 40.2, 40.1), end_ms=(41.0,) * 5)
    >>> decide(figures).name
    'LOADER-BOUND'
    """
    _check(figures)
    verdict = _decide(figures)
    loader, step, end = figures.loader_ms, figures.step_ms, figures.end_ms
    if verdict.stall is None or loader is None or step is None or end is None:
        return verdict
    clash = interval([1 - max(p, g) / e for e, p, g in zip(end, loader, step, strict=True)])
    contention = "yes" if verdict.name == "CONTENTION" else _contention(clash, loader, step, end)
    return dataclasses.replace(verdict, clash=clash, contention=contention)


def _contention(clash: Interval, loader: Series, step: Series, end: Series) -> str:
    """Say whether loader and step slow each other down, or that this is open."""
    if clash.high < PASS_STALL:
        return "no"
    return "yes" if clash.low > PASS_STALL and _slower_than_apart(loader, step, end) else "open"


def _slower_than_apart(loader: Series, step: Series, end: Series) -> bool:
    """Return whether both together are slower than each alone at its slowest.

    Not within the rounds alone: where all figures jump about, some series of rounds looks like a clash by chance.
    """
    return interval(end).low > max(interval(loader).high, interval(step).high)


def _decide(figures: Figures) -> Verdict:
    step, loader, end = figures.step_ms, figures.loader_ms, figures.end_ms
    if step is None and end is None and loader is not None and len(loader) >= LEAST_ROUNDS:
        return _verdict(LOADER_ALONE, f"No training step was asked for: the loader alone needs {_ms(loader)} a batch.")
    measured = {"the step alone": step, "the loader alone": loader, "both together": end}
    missing = [what for what, series in measured.items() if series is None or len(series) < LEAST_ROUNDS]
    if step is None or loader is None or end is None or missing:
        why = f"Too little was measured to say: that takes {LEAST_ROUNDS} windows of {' and of '.join(missing)}."
        return _verdict("INCONCLUSIVE", why, next_step="Give the tool a --step and more --seconds.")
    stall = interval([1 - g / e for g, e in zip(step, end, strict=True)])
    if straggler := _straggler(figures, stall):
        return straggler
    if figures.cold_ms and figures.reads_cold and figures.storage_measured:
        return _decide_with_storage(figures, stall, interval(figures.cold_ms), step, loader, end)
    verdict = _decide_warm(figures, stall, step, loader, end)
    if figures.reads_cold and verdict.name in {"GPU-BOUND", "COMPUTE-BOUND"}:
        why = (
            "The loader keeps up while the files are in memory, but they do not all fit, and storage was not measured."
        )
        next_step = "Measure storage: see the report for why that was not possible here."
        return _verdict("INCONCLUSIVE", why, stall, next_step)
    return verdict


def _verdict(name: str, why: str, stall: Interval | None = None, next_step: str | None = None) -> Verdict:
    return Verdict(name, why, next_step or _NEXT[name], stall)


def _decide_warm(figures: Figures, stall: Interval, step: Series, loader: Series, end: Series) -> Verdict:
    bound_by_step = "GPU-BOUND" if figures.device == "cuda" else "COMPUTE-BOUND"
    if stall.high < PASS_STALL:
        why = f"The training runs at {_percent(1 - stall.median)} of the speed of its step alone: the loader keeps up."
        return _verdict(bound_by_step, why, stall)

    # The parts of the stalled time, in each round.
    slow = [p - g for p, g in zip(loader, step, strict=True)]
    clash = [e - max(p, g) for e, p, g in zip(end, loader, step, strict=True)]
    more = interval([max(a, 0) - max(b, 0) for a, b in zip(slow, clash, strict=True)])
    if stall.low >= PASS_STALL:
        if more.high < 0 and interval(clash).low > 0 and _slower_than_apart(loader, step, end):
            apart = max(median(loader), median(step))
            why = (
                f"Together a batch takes {_ms(end)}, although the loader alone needs {_ms(loader)} and the step alone "
                f"{_ms(step)}: they hold each other up by {_ms(max(median(end) - apart, 0))}."
            )
            return _verdict("CONTENTION", why, stall)
        if more.low > 0:
            return _loader_verdict(figures, stall, step, loader)

    waits = interval(figures.waits) if figures.waits else None
    faster = interval([g / p for p, g in zip(loader, step, strict=True)])
    if waits and waits.high < PASS_STALL and faster.low > 1:
        why = (
            f"The step waits for its batches for {_percent(waits.median)} of the time, and the loader alone is "
            f"{faster.median:.1f} times as fast: it keeps up."
        )
        return _verdict(bound_by_step, why, stall, _NEXT_KEEPS_UP)
    if waits and waits.low > PASS_STALL and faster.high < 1 and faster.median < 1 - PASS_STALL:
        return _loader_verdict(figures, stall, step, loader, waits)
    if stall.low < PASS_STALL:
        why = (
            f"The stall is {_range(stall)}, on both sides of the {_percent(PASS_STALL)} line: the windows differ too "
            "much to say whether the loader keeps up."
        )
        return _verdict("INCONCLUSIVE", why, stall)
    why = (
        f"There is a stall of {_range(stall)}, but the loader's lack of speed ({_gap(slow)} a batch) and what the "
        f"two cost each other ({_gap(clash)}) cannot be told apart within the spread."
    )
    return _verdict("INCONCLUSIVE", why, stall)


def _decide_with_storage(
    figures: Figures, warm_stall: Interval, cold: Interval, step_ms: Series, loader_ms: Series, end_ms: Series
) -> Verdict:
    """Decide for a training that reads from storage, where `cold` is the time of the loader then."""
    step, loader, end = interval(step_ms), interval(loader_ms), interval(end_ms)
    if cold.high < max(end.low, step.low / (1 - PASS_STALL)):  # it keeps up with what holds the training back anyway
        return _decide_warm(figures, warm_stall, step_ms, loader_ms, end_ms)
    stall = Interval(
        1 - step.median / cold.median, 1 - step.high / cold.low, 1 - step.low / cold.high, min(step.count, cold.count)
    )
    other = max(loader.high, step.high, end.high)
    slows = stall.low >= PASS_STALL and cold.low > other
    # Storage is the slowest of all, or it adds more than what is slow already.
    slowest = figures.reading_ms is not None and interval(figures.reading_ms).low > other
    adds, before = cold.low - other, max(end.high - step.low, 0)
    if slows and (slowest or adds > before):
        why = (
            f"The data do not fit into memory, and from storage a batch takes {_ms(cold.median)}, against "
            f"{_ms(end.median)} with the files in memory and {_ms(step.median)} for the step alone."
        )
        return _verdict("DISK-BOUND", why, stall)
    if stall.low >= PASS_STALL and not slowest and cold.high - min(loader.low, end.low) < end.low - step.high:
        # Whatever storage adds, what is slow without it costs more.
        verdict = _decide_warm(figures, warm_stall, step_ms, loader_ms, end_ms)
        if verdict.name not in {"GPU-BOUND", "COMPUTE-BOUND"}:
            return verdict if verdict.name == "INCONCLUSIVE" else dataclasses.replace(verdict, stall=stall)
    if not slows:
        unsure = "whether the storage keeps up" if stall.low < PASS_STALL else "how much of the stall the storage costs"
        why = (
            f"From storage a batch takes {_ms(cold.low)} to {_ms(cold.high)}, from memory up to {_ms(end.high)}: "
            f"within the spread it cannot be said {unsure}."
        )
        return _verdict("INCONCLUSIVE", why, stall)
    why = (
        f"Storage ({_ms(cold.median)} a batch) and the rest ({_ms(end.median)} with the files in memory) both hold the "
        "training back, and neither clearly more."
    )
    return _verdict("INCONCLUSIVE", why, stall)


def _loader_verdict(
    figures: Figures, stall: Interval, step: Series, loader: Series, waits: Interval | None = None
) -> Verdict:
    """Say which part of a loader that is too slow costs most; `waits` are named where they decide that it is."""
    slow = f"The loader alone needs {_ms(loader)} a batch, the step {_ms(step)}"
    if waits:
        slow += f", which waits for its batches for {_percent(waits.median)} of the time"
    if not figures.stages:
        return _verdict("LOADER-BOUND", f"{slow}; it could not be cut into stages.", stall)
    costs = {
        category: [sum(values) for values in zip(*series, strict=True)]
        for category in CATEGORIES
        if (series := [stage.ms for stage in figures.stages if stage.category == category])
    }
    first, *others = sorted(costs, key=lambda category: -median(costs[category]))
    for other in others:
        if interval([a - b for a, b in zip(costs[first], costs[other], strict=True)]).low <= 0:
            why = (
                f"{slow}; which of the loader's most expensive parts costs most, {first} ({_gap(costs[first])}) or "
                f"{other} ({_gap(costs[other])}), cannot be told within the spread."
            )
            return _verdict("LOADER-BOUND", why, stall, _NEXT_PARTS_OPEN)
    if interval(costs[first]).low <= 0:
        why = f"{slow}; the cost of each of the loader's stages is below the noise."
        return _verdict("LOADER-BOUND", why, stall, _NEXT_PARTS_OPEN)
    share = median([a / b for a, b in zip(costs[first], loader, strict=True)])
    named = " and ".join(stage.name for stage in figures.stages if stage.category == first)
    why = f"{slow}; {_percent(min(share, 1))} of the loader's time goes to {named}."
    name = _CATEGORY_VERDICTS.get(first, "LOADER-BOUND")
    if name == "DISK-BOUND" and not figures.storage_measured:
        why = f"{why[:-1]}, and whether that is the storage was not measured."
        return _verdict("LOADER-BOUND", why, stall, "Measure the storage: the report says why it was not measured.")
    return _verdict(name, why, stall)


def _straggler(figures: Figures, stall: Interval) -> Verdict | None:
    """Find a process whose own work, its loader or its step, is clearly slower than that of the others."""
    own = []
    for rank in figures.ranks:
        if rank.step_ms is None or rank.loader_ms is None:
            return None
        own.append([max(pair) for pair in zip(rank.step_ms, rank.loader_ms, strict=True)])
    if len(own) < 2:
        return None
    slowest = max(range(len(own)), key=lambda rank: median(own[rank]))
    # The middle of the others in the same round; with two processes that is the other one.
    others = [median(times) for times in zip(*(own[:slowest] + own[slowest + 1 :]), strict=True)]
    lag = interval([1 - other / mine for other, mine in zip(others, own[slowest], strict=True)])
    if lag.low < PASS_STALL or lag.count < LEAST_ROUNDS:
        return None
    rank = figures.ranks[slowest]
    what = "loader" if median(rank.loader_ms or ()) >= median(rank.step_ms or ()) else "step"
    why = (
        f"Process {slowest} of {len(own)} needs {_ms(own[slowest])} a batch for its own {what}, the others "
        f"{_ms(others)}: all of them go at its pace."
    )
    return _verdict("STRAGGLER", why, stall)


def _check(figures: Figures) -> None:
    together = {"step_ms": figures.step_ms, "loader_ms": figures.loader_ms, "end_ms": figures.end_ms}
    for number, rank in enumerate(figures.ranks):
        together |= {f"ranks[{number}].step_ms": rank.step_ms, f"ranks[{number}].loader_ms": rank.loader_ms}
    for name, series in {**together, "cold_ms": figures.cold_ms, "reading_ms": figures.reading_ms}.items():
        if not all(value > 0 for value in series or ()):
            msg = f"{name} must be positive times, got {series}"
            raise ValueError(msg)
    together |= {f"stages[{stage.name!r}].ms": stage.ms for stage in figures.stages or ()}
    together["waits"] = figures.waits
    counts = {name: len(series) for name, series in together.items() if series is not None}
    if len(set(counts.values())) > 1:
        msg = f"all series must have one value for each round, got {counts}"
        raise ValueError(msg)
    for stage in figures.stages or ():
        if stage.category not in CATEGORIES:
            msg = f"category must be one of {', '.join(CATEGORIES)}, got {stage.category!r}"
            raise ValueError(msg)
    if figures.stages == ():
        msg = "stages must be None where the loader was not cut, got ()"
        raise ValueError(msg)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _range(stall: Interval) -> str:
    return f"{100 * stall.median:.0f} % ({100 * stall.low:.0f} to {100 * stall.high:.0f})"


def _ms(value: float | Sequence[float]) -> str:
    """Return a time, or the median of several, in words."""
    value = value if isinstance(value, (int, float)) else median(value)
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _gap(values: Sequence[float]) -> str:
    gap = interval(values)
    return f"{gap.median:.1f} ms, {gap.low:.1f} to {gap.high:.1f}"

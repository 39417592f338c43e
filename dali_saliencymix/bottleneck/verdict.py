"""Compute a verdict from measured times. `decide` is a pure function: it reads no clock and no file.

All times are milliseconds per batch. A series has one value for each round; `cold_ms` and `reading_ms` have their own
number of values. Differences are taken within rounds and judged by `measure.figures.interval`. If the range of the
deciding difference contains the limit, the verdict is INCONCLUSIVE and names that difference.
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
LOADER_ALONE = "LOADER-ALONE"  # there is no step to compare with

_NEXT = {
    "GPU-BOUND": "Keep the loader as it is: only a faster step speeds up the training (--amp, --channels-last, a "
    "smaller network). A cheaper loader would save CPU time, but no training time.",
    "COMPUTE-BOUND": "Keep the loader as it is: only a faster step speeds up the training. The step runs on a CPU: try "
    "a GPU first.",
    "DISK-BOUND": "Put the files on faster storage or into memory, or read fewer and larger files (WebDataset, "
    "TFRecord). If the storage is slow for each read but serves many at once, raise the reader's prefetch_queue_depth "
    "and num_threads.",
    "DECODE-BOUND": "Speed up decoding with more DALI threads (-j) or, on a GPU, another hw_decoder_load (see the "
    "what-ifs). Or store the images at the size that the training needs.",
    "CPU-PREP-BOUND": "Use more DALI threads (-j), move the preprocessing to the GPU, or drop the most expensive "
    "operator in the table.",
    "MIX-BOUND": "Use a cheaper saliency detector (spectral_residual), mix fewer samples (--mix-prob), or mix on the "
    "GPU.",
    "LOADER-BOUND": "Use more workers or threads, and profile the loader with its own tools: this tool cannot split it "
    "into stages. It can split a DALI pipeline: --pipeline module:function.",
    "CONTENTION": "Loader and step are fast enough alone, but not together. If they share a CPU, lower -j or PyTorch's "
    "threads until both fit. If they share a GPU, move work to the CPU or to the hardware JPEG decoder "
    "(hw_decoder_load). If the loader does not prefetch, enable prefetching.",
    LOADER_ALONE: "Compare its rate with what the training needs, or measure it together with a training step.",
    "STRAGGLER": "Check the machine, the disk and the CPU affinity of that process: all others wait for it in every "
    "step.",
    "INCONCLUSIVE": "Measure again on a quieter machine, or for longer: --seconds 300.",
}
VERDICTS = tuple(_NEXT)
OF_A_PART = tuple(_CATEGORY_VERDICTS.values())  # those that name a stage of the loader
# Verdicts that another setting of the loader can change.
OF_THE_LOADER = (*(name for name in OF_A_PART if name != "DISK-BOUND"), "LOADER-BOUND", LOADER_ALONE)
_NEXT_PARTS_OPEN = (
    "Use more threads (-j) or, on a GPU, another hw_decoder_load (see the what-ifs). To tell the stages apart, measure "
    "on a quieter machine or for longer: --seconds 300."
)
# For a stall that is undecided, where the waits decide.
_NEXT_KEEPS_UP = (
    "Keep the loader as it is. To find out whether it slows the step down, for example on a shared CPU, measure on a "
    "quieter machine or for longer: --seconds 300."
)


@dataclass(frozen=True)
class Stage:
    """The time that a stage of the loader adds to a batch in each round; noise can make it negative."""

    name: str
    category: str  # one of CATEGORIES, which determines the verdict
    ms: Series


@dataclass(frozen=True)
class RankFigures:
    """Times that one of several processes measured for itself, as in `Figures`."""

    step_ms: Series | None
    loader_ms: Series | None


@dataclass(frozen=True)
class Figures:
    """The input of `decide`. Figures that were not measured are None.

    Attributes
    ----------
    step_ms : tuple of float, optional
        The training step alone, on a constant batch.
    loader_ms : tuple of float, optional
        The loader alone, files in memory.
    end_ms : tuple of float, optional
        Loader and step together.
    stages : tuple of Stage, optional
        Stages of the loader; None if it cannot be split.
    cold_ms : tuple of float, optional
        The loader alone, with files that are not in memory.
    reading_ms : tuple of float, optional
        Reading alone, with files that are not in memory; None if the loader cannot be split.
    storage_measured : bool
        Whether storage was measured, with a check that the files were not in memory.
    reads_cold : bool
        Whether the training reads from storage in every epoch, because the data do not fit into memory.
    device : {"cuda", "cpu"}
        Where the step runs.
    ranks : tuple of RankFigures
        One for each process if there are several; the figures above are then those of the slowest process per round.
    waits : tuple of float, optional
        Share of `end_ms`, 0 to 1, in which the host waited for batches: an upper bound of the wait of the step.
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

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return max(len(self.ranks), 1)


@dataclass(frozen=True)
class Verdict:
    """The bottleneck of a training.

    Attributes
    ----------
    name : str
        One of `VERDICTS`.
    why : str
        The reason, in one sentence.
    next_step : str
        What to do next.
    stall : Interval or None
        Share of the time, 0 to 1, by which the training is slower than its step alone; negative values are noise.
    clash : Interval or None
        Share of the time, 0 to 1, that loader and step cost each other: by which the training is slower than the
        slower one of the two alone, with files in memory. Negative values are noise.
    contention : {"no", "yes", "open"} or None
        Whether `clash` is more than 10 %; ``"open"`` if the windows differ too much to decide. Independent of which of
        the two is slower. None if the two were not measured together.
    """

    name: str
    why: str
    next_step: str
    stall: Interval | None
    clash: Interval | None = None
    contention: str | None = None


def decide(figures: Figures) -> Verdict:
    """Return the bottleneck of a training, or INCONCLUSIVE with the reason.

    Parameters
    ----------
    figures : Figures
        The measured times.

    Returns
    -------
    Verdict

    Raises
    ------
    ValueError
        If series of the same rounds differ in length, a time is not positive, or a category is unknown.

    Notes
    -----
    The stall is ``1 - step / end``. Below 10 %, the step is the bottleneck. Otherwise the stalled time has two parts:
    the slow loader, ``max(loader - step, 0)``, and the contention of loader and step, ``max(end - max(loader, step),
    0)``. If contention is the larger part, the verdict is CONTENTION. If the loader is the larger part, the verdict
    names the most expensive category of its stages, or is LOADER-BOUND if no category is clearly the most expensive.
    Reading leads to DISK-BOUND only if storage was measured.

    If noise hides the stall or its parts, the waits decide. The step is the bottleneck if it waits for data less than
    10 % of the time and the loader alone is faster. The loader is the bottleneck if the step waits for data more than
    10 % of the time and the loader alone is slower, by more than 10 % in the median. In both cases,
    `Verdict.contention` says whether the two also slow each other down.

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
    contention = "open"
    if verdict.name == "CONTENTION" or (clash.low > PASS_STALL and _slower_than_apart(loader, step, end)):
        contention = "yes"
    elif clash.high < PASS_STALL:
        contention = "no"
    return dataclasses.replace(verdict, clash=clash, contention=contention)


def _slower_than_apart(loader: Series, step: Series, end: Series) -> bool:
    """Return whether the range of both together is slower than the ranges of loader and step alone.

    Differences within rounds are not enough: with noisy figures, they can look like contention by chance.
    """
    return interval(end).low > max(interval(loader).high, interval(step).high)


def _decide(figures: Figures) -> Verdict:
    step, loader, end = figures.step_ms, figures.loader_ms, figures.end_ms
    if step is None and end is None and loader is not None and len(loader) >= LEAST_ROUNDS:
        return _verdict(LOADER_ALONE, f"There is no training step: the loader alone needs {_ms(loader)} per batch.")
    measured = {"the step alone": step, "the loader alone": loader, "both together": end}
    missing = [what for what, series in measured.items() if series is None or len(series) < LEAST_ROUNDS]
    if step is None or loader is None or end is None or missing:
        why = f"A verdict needs {LEAST_ROUNDS} windows of {' and of '.join(missing)}."
        return _verdict("INCONCLUSIVE", why, next_step="Measure with a step (--step) and for longer (--seconds).")
    stall = interval([1 - g / e for g, e in zip(step, end, strict=True)])
    if straggler := _straggler(figures, stall):
        return straggler
    if figures.cold_ms and figures.reads_cold and figures.storage_measured:
        return _decide_with_storage(figures, stall, interval(figures.cold_ms), step, loader, end)
    verdict = _decide_warm(figures, stall, step, loader, end)
    if figures.reads_cold and verdict.name in {"GPU-BOUND", "COMPUTE-BOUND"}:
        why = "The loader keeps up with files in memory, but they do not all fit there, and storage was not measured."
        next_step = "Measure storage: the report says why it was not measured."
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
                f"Together, a batch takes {_ms(end)}, although the loader alone needs {_ms(loader)} and the step alone "
                f"{_ms(step)}: they cost each other {_ms(max(median(end) - apart, 0))}."
            )
            return _verdict("CONTENTION", why, stall)
        if more.low > 0:
            return _loader_verdict(figures, stall, step, loader)

    waits = interval(figures.waits) if figures.waits else None
    faster = interval([g / p for p, g in zip(loader, step, strict=True)])
    if waits and waits.high < PASS_STALL and faster.low > 1:
        why = (
            f"The step waits for data {_percent(waits.median)} of the time, and the loader alone is "
            f"{faster.median:.1f} times as fast as the step: the loader keeps up."
        )
        return _verdict(bound_by_step, why, stall, _NEXT_KEEPS_UP)
    if waits and waits.low > PASS_STALL and faster.high < 1 and faster.median < 1 - PASS_STALL:
        return _loader_verdict(figures, stall, step, loader, waits)
    if stall.low < PASS_STALL:
        why = (
            f"The range of the stall, {_range(stall)}, contains the limit of {_percent(PASS_STALL)}: noise hides "
            "whether the loader keeps up."
        )
        return _verdict("INCONCLUSIVE", why, stall)
    why = (
        f"There is a stall of {_range(stall)}, but noise hides whether the slow loader ({_gap(slow)} per batch) or "
        f"contention ({_gap(clash)}) costs more."
    )
    return _verdict("INCONCLUSIVE", why, stall)


def _decide_with_storage(
    figures: Figures, warm_stall: Interval, cold: Interval, step_ms: Series, loader_ms: Series, end_ms: Series
) -> Verdict:
    """Return the verdict for a training that reads from storage; `cold` is the time of the loader from storage."""
    step, loader, end = interval(step_ms), interval(loader_ms), interval(end_ms)
    if cold.high < max(end.low, step.low / (1 - PASS_STALL)):  # storage is not the limit
        return _decide_warm(figures, warm_stall, step_ms, loader_ms, end_ms)
    stall = Interval(
        1 - step.median / cold.median, 1 - step.high / cold.low, 1 - step.low / cold.high, min(step.count, cold.count)
    )
    other = max(loader.high, step.high, end.high)
    slows = stall.low >= PASS_STALL and cold.low > other
    # Storage is the slowest part, or adds more time than was lost without it.
    slowest = figures.reading_ms is not None and interval(figures.reading_ms).low > other
    adds, before = cold.low - other, max(end.high - step.low, 0)
    if slows and (slowest or adds > before):
        why = (
            f"The training reads from storage, and from there a batch takes {_ms(cold.median)}, against "
            f"{_ms(end.median)} with the files in memory and {_ms(step.median)} for the step alone."
        )
        return _verdict("DISK-BOUND", why, stall)
    if stall.low >= PASS_STALL and not slowest and cold.high - min(loader.low, end.low) < end.low - step.high:
        # Storage adds less time than was lost without it, whatever the noise.
        verdict = _decide_warm(figures, warm_stall, step_ms, loader_ms, end_ms)
        if verdict.name not in {"GPU-BOUND", "COMPUTE-BOUND"}:
            return verdict if verdict.name == "INCONCLUSIVE" else dataclasses.replace(verdict, stall=stall)
    if not slows:
        unsure = "whether storage keeps up" if stall.low < PASS_STALL else "how much of the stall is due to storage"
        why = (
            f"From storage a batch takes {_ms(cold.low)} to {_ms(cold.high)}, from memory up to {_ms(end.high)}: "
            f"noise hides {unsure}."
        )
        return _verdict("INCONCLUSIVE", why, stall)
    why = (
        f"Storage ({_ms(cold.median)} per batch) and the rest ({_ms(end.median)} with the files in memory) both limit "
        "the training, neither of them clearly more."
    )
    return _verdict("INCONCLUSIVE", why, stall)


def _loader_verdict(
    figures: Figures, stall: Interval, step: Series, loader: Series, waits: Interval | None = None
) -> Verdict:
    """Return the verdict for a slow loader, with its most expensive stages; `waits` is given if the waits decided."""
    slow = f"The loader alone needs {_ms(loader)} per batch, the step {_ms(step)}"
    if waits:
        slow += f", which waits for data {_percent(waits.median)} of the time"
    if not figures.stages:
        return _verdict("LOADER-BOUND", f"{slow}; the loader could not be split into stages.", stall)
    costs = {
        category: [sum(values) for values in zip(*series, strict=True)]
        for category in CATEGORIES
        if (series := [stage.ms for stage in figures.stages if stage.category == category])
    }
    first, *others = sorted(costs, key=lambda category: -median(costs[category]))
    for other in others:
        if interval([a - b for a, b in zip(costs[first], costs[other], strict=True)]).low <= 0:
            why = (
                f"{slow}; noise hides whether {first} ({_gap(costs[first])}) or {other} ({_gap(costs[other])}) is the "
                "most expensive part of the loader."
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
        why = f"{why[:-1]}, but storage was not measured."
        return _verdict("LOADER-BOUND", why, stall, "Measure storage: the report says why it was not measured.")
    return _verdict(name, why, stall)


def _straggler(figures: Figures, stall: Interval) -> Verdict | None:
    """Return a STRAGGLER verdict if the loader or the step of one process is clearly slower than the others'."""
    own = []
    for rank in figures.ranks:
        if rank.step_ms is None or rank.loader_ms is None:
            return None
        own.append([max(pair) for pair in zip(rank.step_ms, rank.loader_ms, strict=True)])
    if len(own) < 2:
        return None
    slowest = max(range(len(own)), key=lambda rank: median(own[rank]))
    # Median of the others in the same round.
    others = [median(times) for times in zip(*(own[:slowest] + own[slowest + 1 :]), strict=True)]
    lag = interval([1 - other / mine for other, mine in zip(others, own[slowest], strict=True)])
    if lag.low < PASS_STALL or lag.count < LEAST_ROUNDS:
        return None
    rank = figures.ranks[slowest]
    what = "loader" if median(rank.loader_ms or ()) >= median(rank.step_ms or ()) else "step"
    why = (
        f"Process {slowest} of {len(own)} needs {_ms(own[slowest])} per batch for its own {what}, the others need "
        f"{_ms(others)}: all processes run at its speed."
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
        msg = "stages must be None if the loader was not split, got ()"
        raise ValueError(msg)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _range(stall: Interval) -> str:
    return f"{100 * stall.median:.0f} % ({100 * stall.low:.0f} to {100 * stall.high:.0f})"


def _ms(value: float | Sequence[float]) -> str:
    """Return a time, or the median of several, as text."""
    value = value if isinstance(value, (int, float)) else median(value)
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _gap(values: Sequence[float]) -> str:
    gap = interval(values)
    return f"{gap.median:.1f} ms, {gap.low:.1f} to {gap.high:.1f}"

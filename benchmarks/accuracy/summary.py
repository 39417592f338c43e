"""Summarise the runs of a study: means over seeds, paired differences between arms, and their intervals."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.accuracy.arms import ARMS, REFERENCE
from benchmarks.program import markdown_table
from dali_saliencymix.measure.environment import counted

COVERAGE = 0.95
NOT_RUN = "not run"

Runs = Sequence[Mapping[str, Any]]

# By column head; all are in percent, and more is better unless the head says otherwise.
METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "top-1, last epoch": lambda run: run["top1_last"],
    "top-1, best epoch": lambda run: run["top1_best"],
    "calibration error (lower is better)": lambda run: run["ece"],
    "top-1 under FGSM 2/255": lambda run: run["fgsm_top1"]["2/255"],
    "top-1 under FGSM 8/255": lambda run: run["fgsm_top1"]["8/255"],
}
MAIN = "top-1, last epoch"

# What changes from the second arm to the first. The mixed area can change too: see `docs/accuracy.md`.
CONTRASTS = {
    "CutMix instead of no mixing": ("cutmix", "none"),
    "Boxes around random points moved inside the image instead of clipped, so larger": ("random peak", "cutmix"),
    "Peaks of `fine_grained` in another image instead of random points": ("shuffled peaks", "random peak"),
    "Peaks of `fine_grained` instead of random points": ("saliencymix paper", "random peak"),
    "Peaks of `fine_grained` in the source itself instead of another image": ("saliencymix paper", "shuffled peaks"),
    "Peaks of `spectral_residual` instead of random points": ("saliencymix default", "random peak"),
    "Labels weighted by saliency instead of area": ("saliency labels", "saliencymix default"),
    "Correct saliency instead of that of the released code, and so larger boxes": (
        "saliencymix released-code",
        "as released",
    ),
    "The released code instead of CutMix as published": ("as released", "cutmix per batch"),
    "CutMix with a box for each sample instead of each batch": ("cutmix", "cutmix per batch"),
}


class Mean(NamedTuple):
    """A mean over seeds with its interval, which is infinite for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> str:
        """Position of the interval: ``"+"`` above 0, ``"-"`` below 0, ``"0"`` if it contains 0."""
        return "+" if self.low > 0 else "-" if self.high < 0 else "0"


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return the mean of values and its confidence interval from Student's t distribution; None without values.

    Examples
    --------
    >>> found = mean_of([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 2), round(found.high, 2), found.sign
    (2.0, -0.48, 4.48, '0')
    """
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Mean(mean, -math.inf, math.inf, count)
    half = float(stats.t.ppf((1 + COVERAGE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Mean(mean, mean - half, mean + half, count)


def by_seed(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """Return a metric of an arm by seed; of two runs with the same seed, the first counts."""
    found: dict[int, float] = {}
    for run in runs:
        if run["arm"] == arm:
            found.setdefault(run["seed"], METRICS[metric](run))
    return found


def level(runs: Runs, arm: str, metric: str = MAIN) -> Mean | None:
    """Return the mean of an arm, or None if it was not run."""
    return mean_of(list(by_seed(runs, arm, metric).values()))


def differences(runs: Runs, arm: str, other: str, metric: str = MAIN) -> list[float]:
    """Return `arm` minus `other` for each seed that both have."""
    own, others = by_seed(runs, arm, metric), by_seed(runs, other, metric)
    return [own[seed] - others[seed] for seed in own if seed in others]


def difference(runs: Runs, arm: str, other: str, metric: str = MAIN) -> Mean | None:
    """Return the mean of `differences`, or None if there are none."""
    return mean_of(differences(runs, arm, other, metric))


# ---- tables and a plot -----------------------------------------------------------------------------------------------


def arms_table(runs: Runs) -> str:
    """Return the accuracy of all arms, and the difference to that of `REFERENCE`."""
    rows = []
    for name, arm in ARMS.items():
        found = level(runs, name)
        minus = "" if name == REFERENCE else _difference_cell(difference(runs, name, REFERENCE))
        rows.append([f"`{name}`", arm.about, found.seeds if found else 0, _level_cell(found), minus])
    head = ["arm", "what it does", "seeds", f"{MAIN}, %", f"minus `{REFERENCE}`"]
    return f"{markdown_table(head, rows)}\n\n{_READING}"


def measures_table(runs: Runs) -> str:
    """Return the other metrics of all arms."""
    metrics = [metric for metric in METRICS if metric != MAIN]
    rows = [[f"`{name}`", *(_level_cell(level(runs, name, metric)) for metric in metrics)] for name in ARMS]
    return markdown_table(["arm", *(f"{metric}, %" for metric in metrics)], rows)


def contrasts_table(runs: Runs) -> str:
    """Return the differences of `CONTRASTS`."""
    rows = []
    for question, (arm, other) in CONTRASTS.items():
        cells = [_difference_cell(difference(runs, arm, other, metric)) for metric in METRICS]
        rows.append([question, f"`{arm}` - `{other}`", *cells])
    return markdown_table(["what differs", "arms", *METRICS], rows)


TABLES = {"arms": arms_table, "measures": measures_table, "contrasts": contrasts_table}

_READING = (
    "Means over seeds; in brackets, the 95 % confidence interval of the mean from Student's t distribution. "
    "Differences are in percentage points, paired by seed: + or - if their interval excludes 0, 0 if it contains 0. "
    f"`{REFERENCE}` mixes less than the arms that move boxes inside the image, because its boxes are clipped at the "
    "border."
)


def _level_cell(found: Mean | None) -> str:
    if found is None:
        return NOT_RUN
    return f"{found.mean:.2f}" + (f" ({found.low:.2f} to {found.high:.2f})" if found.seeds > 1 else "")


def _difference_cell(found: Mean | None) -> str:
    if found is None:
        return NOT_RUN
    return f"{found.mean:+.2f}" + (f" ({found.low:+.2f} to {found.high:+.2f}) {found.sign}" if found.seeds > 1 else "")


def conditions(runs: Runs) -> str:
    """Return the conditions of a study: devices, settings, versions, time, commands and commits."""
    settings = runs[0]["settings"]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(run[name]) for run in runs))

    width = f" of width {settings['width']}" if settings["width"] else ""
    commands = dict.fromkeys(f"`{run['command']}`" for run in runs)
    seconds = sorted(run["seconds"] for run in runs)
    spread = f" ({seconds[0]:.0f} to {seconds[-1]:.0f})" if len(runs) > 1 else ""
    commits = ", ".join(dict.fromkeys(short_commit(run) for run in runs))
    augmented = "cropped and flipped" if settings["augment"] else "not augmented"
    return (
        f"{counted(len(runs), 'runs')} of a {settings['network']}{width} on {all_of('device')} ({all_of('cpu')}), "
        f"{all_of('date')}: "
        f"{settings['epochs']} epochs of {settings['images']} images, batch {settings['batch_size']}, learning "
        f"rate {settings['lr']:g}, weight decay {settings['weight_decay']:g}, mixing probability {settings['prob']:g}, "
        f"{augmented}, {settings['precision']}; evaluated every "
        f"{settings['evaluate_every']} epochs. A run took {statistics.median(seconds):.0f} s"
        f"{spread}. {versions_of(runs[-1])}; commit {commits}. {', '.join(commands)}"
    )


def versions_of(conditions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())


def short_commit(conditions: Mapping[str, Any]) -> str:
    """Return the first digits of the commit, with the suffix for files that differ from it."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]{33}", r"\1", str(conditions["commit"]))


def plot(runs: Runs) -> Any:
    """Draw the differences to `REFERENCE`: a point for each seed, and the mean with its interval."""
    from matplotlib.figure import Figure

    points = {name: differences(runs, name, REFERENCE) for name in ARMS if name != REFERENCE}
    points = {name: found for name, found in points.items() if found}
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(points)), layout="constrained")
    axes = figure.subplots()
    for row, of_seeds in enumerate(points.values()):
        found = mean_of(of_seeds)
        axes.plot(of_seeds, [row + 0.18] * len(of_seeds), ".", color="tab:gray", markersize=4)
        sides = [[found.mean - found.low], [found.high - found.mean]] if found.seeds > 1 else None
        axes.errorbar(found.mean, row, xerr=sides, fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel(f"top-1 of the last epoch minus that of {REFERENCE}, percentage points")
    axes.grid(visible=True, axis="x", alpha=0.3)
    return figure

"""Write the tables and plots of results into the pages that ask for them, so that no number is copied by hand.

    python -m benchmarks.render            updates the pages and docs/plots
    python -m benchmarks.render --check    changes nothing; exit status 1 if something is out of date

A page asks for a result with a comment. The text between it and the next ``<!-- end of result -->`` is replaced:

    <!-- table: pipeline NAME.json -->              also: train, scale, and ops with a place, such as
    <!-- table: ops NAME.json "224 px, batch 128" -->
    <!-- table: checks NAME.json TESTS.json SANITIZE.json -->
    <!-- table: accuracy NAME.jsonl arms -->        also: measures, contrasts
    <!-- conditions: NAME.json -->                  a sentence: device, versions, sizes, rounds, command
    <!-- plot: pipeline NAME.json -->               also: scale, and accuracy NAME.jsonl

The files are in benchmarks/results. A cell is a median or mean with a range in brackets; the line below the table says
which.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import program
from benchmarks.accuracy import summary
from benchmarks.accuracy.study import read_runs
from benchmarks.program import markdown_table
from dali_saliencymix.measure.environment import counted
from dali_saliencymix.measure.figures import bounds, figures
from dali_saliencymix.measure.results import read_json

PAGES = tuple(program.ROOT / page for page in ("README.md", "benchmarks/README.md", "docs/accuracy.md"))
PLOTS = program.ROOT / "docs" / "plots"

_END = "<!-- end of result -->"
_MARK = "<!-- (table|conditions|plot):"
_MARKED = re.compile(rf"({_MARK} (.*?) -->\n).*?({re.escape(_END)})", re.DOTALL)


# ---- tables ----------------------------------------------------------------------------------------------------------


def variants_table(result: dict[str, Any], first: str, columns: dict[str, tuple[str, ...]]) -> str:
    """Return a row for each loader; `columns` maps the head of a column to the path of its figures in the result."""
    by_path = dict(figures(result))
    columns = {head: path for head, path in columns.items() if path[0] in result}
    rows = [
        [f"`{name}`", *(cell(by_path.get((path[0], name, *path[1:]))) for path in columns.values())]
        for name in result["images_per_second"]
    ]
    return figure_table(result, [first, *columns], rows)


_PIPELINE_COLUMNS = {"images/s": ("images_per_second",), "relative to `none`": ("relative_to_none",)}
_TRAIN_COLUMNS = {
    "images/s": ("images_per_second",),
    "loader alone, images/s": ("loader_images_per_second",),
    "relative to a constant batch": ("relative_to_constant_batch",),
    "relative to `none`": ("relative_to_none",),
    "operator call, ms": ("operator_call_ms", "wall"),
    "GIL held per batch, ms": ("lock_held_ms_per_batch",),
}


def ops_table(result: dict[str, Any], place: str) -> str:
    """Return the milliseconds of each step by implementation, and the rate of our best one relative to a copy."""
    if place not in result["milliseconds_per_batch"]:
        msg = f"place must be one of {list(result['milliseconds_per_batch'])}, got {place!r}"
        raise ValueError(msg)
    steps = result["milliseconds_per_batch"][place]
    columns = list(dict.fromkeys(name for found in steps.values() for name in found))
    rows = []
    for step, found in steps.items():
        ours = [found[name] for name in ("gpu kernel", "cupy", "cpu kernel", "numpy") if name in found]
        share = f"{ours[0]['share_of_copy_rate']:.1%}" if ours else ""
        rows.append([step, *(cell(found.get(name)) for name in columns), share])
    return figure_table(result, ["step, ms per batch", *columns, "share of the copy rate"], rows)


def scale_table(result: dict[str, Any]) -> str:
    """Return the first and last point of each curve, and where it is linear."""
    rows = []
    for axis, found in result["curves"].items():
        for name, points in found["points"].items():
            at = sorted(points, key=float)
            ends = [f"{cell(points[point])} at {point}" for point in (at[0], at[-1])]
            where = [f"{kind.replace('_', ' ')} {x:g}" for kind, x in found["linear"][name].items()]
            rows.append([axis.replace("_", " "), f"`{name}`", found["unit"], *ends, ", ".join(where)])
    return figure_table(result, ["axis", "detector", "unit", "first point", "last point", "linear"], rows)


def figure_table(result: Mapping[str, Any], head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of figures and a line that says what their ranges are: older results have quartiles."""
    kinds = {next((kind for kind in _RANGES if kind in found), "min") for _, found in figures(result)}
    ranges = " or ".join(_RANGES[kind] for kind in _RANGES if kind in kinds)
    return f"{markdown_table(head, rows)}\n\nMedians; in brackets, {ranges}."


def opencv_table(result: dict[str, Any]) -> str:
    """Return how the detectors compare with OpenCV's: shares of images in percent, and the largest difference."""
    head = ["detector", "equal maps", "largest difference", "same peak", "peak of mixing within a pixel"]
    rows = []
    for name, found in result["against_opencv"].items():
        shares = [f"{found[part]:.1%}" for part in ("equal_maps", "same_peak", "peak_of_mixing_within_a_pixel")]
        rows.append([f"`{name}`", shares[0], number(found["largest_difference"]), *shares[1:]])
    return markdown_table(head, rows)


def checks_table(result: dict[str, Any], tests: str, sanitized: str) -> str:
    """Return the outcomes of `benchmarks.gpu_checks`, of the tests for a GPU and of compute-sanitizer."""
    counts, tools = read(tests)["counts"], read(sanitized)["tools"]
    errors = [f"{tool} {'did not end' if tools[tool]['errors'] is None else tools[tool]['errors']}" for tool in tools]
    rows = [
        ["tests marked `gpu`", ", ".join(f"{count} {outcome}" for outcome, count in counts.items())],
        ["errors found by compute-sanitizer", ", ".join(errors)],
    ]
    runs = {name: run for part in result["parts"] for name, run in part.get("runs", {}).items()}
    for name, run in runs.items():
        ended = f"exit status {run['exit_status']}, " if run["exit_status"] else ""
        losses = ", ".join(number(loss) for loss in run["losses"])
        rows.append([f"training: {name}", f"{ended}{run['steps']} steps, mean loss of each epoch: {losses}"])
    last = {part["check"]: part for part in result["parts"]}
    for check, rows_of in _ROWS.items():
        if check in last:
            rows += rows_of(last[check])
    return markdown_table(["check", "outcome"], rows)


def _killed_rows(found: dict[str, Any]) -> list[list[str]]:
    weights = "not compared"
    if "largest_difference_of_weights" in found:
        weights = f"differ by up to {number(found['largest_difference_of_weights'])} from an uninterrupted run's"
    steps = f"{found['killed_after']} of {found['unbroken']['steps']} steps"
    return [[f"training killed after {steps} and resumed", f"weights {weights}"]]


def _validation_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for backend, answers in found["backends"].items():
        text = f"top-1 {number(answers['top1'])} % of {answers['images']} photographs"
        for name in [name for name in answers if name.startswith("compared_with_")]:
            other = answers[name]
            logits, spread = other["largest_difference_of_logits"], other["standard_deviation_of_logits"]
            pixels = number(_GREY_LEVELS * other["mean_difference_of_pixels"])
            backend_name = name.removeprefix("compared_with_")
            text += f"; compared with `{backend_name}`: {other['other_answers']} predictions differ"
            text += f", logits differ by up to {number(logits)} ({number(logits / spread)} standard deviations)"
            text += f", pixels by {pixels} grey levels on average"
        rows.append([f"validation by `{backend}`", text])
    return rows


def _memory_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, readings in found["over_batches"].items():
        then, now = readings[len(readings) // 3], readings[-1]
        used = [f"{what} {then[key]:,.0f} and {now[key]:,.0f} MB" for what, key in _MEMORY.items() if key in now]
        rows.append([f"memory after {then['batches']} and {now['batches']} batches, route {name}", ", ".join(used)])
    for name, peaks in found.get("peak_relative_to_batch", {}).items():
        shown = ", ".join(f"{_ROUTES[route]} {number(peak)}" for route, peak in peaks.items())
        rows.append([f"GPU memory of a {name}, relative to the batch", shown])
    used = found["one_large_image"]["afterwards"]
    rows.append(["memory with an image of 9000x9000", f"GPU {used['gpu_mb']:,.0f} MB"])
    return rows


def _ends_rows(found: dict[str, Any]) -> list[list[str]]:
    return [["programs that exit without releasing a pipeline", f"{found['ended_well']} of {found['programs']}"]]


_RANGES = {
    "low": "the 90 % confidence interval of the median (the full range with fewer than five rounds)",
    "q1": "the middle half of the rounds",
    "min": "the full range of the rounds",
}
_GREY_LEVELS = 57  # in one standard deviation of ImageNet's pixels
_MEMORY = {"GPU": "gpu_mb", "resident": "resident_mb"}
_ROWS = {"killed": _killed_rows, "validation": _validation_rows, "memory": _memory_rows, "ends": _ends_rows}
_ROUTES = {"gpu kernel": "kernels", "cupy": "array operations"}


TABLES = {
    "accuracy": lambda result, table: summary.TABLES[table](result["runs"]),
    "checks": checks_table,
    "opencv": opencv_table,
    "pipeline": functools.partial(variants_table, first="loader", columns=_PIPELINE_COLUMNS),
    "train": functools.partial(variants_table, first="training behind", columns=_TRAIN_COLUMNS),
    "ops": ops_table,
    "scale": scale_table,
}


def conditions_text(result: dict[str, Any]) -> str:
    """Return the conditions of a result as text."""
    if result.get("benchmark") == "gpu_checks":
        return _checks_conditions(result["parts"])
    if result.get("benchmark") == "accuracy":
        return summary.conditions(result["runs"])
    found = result["conditions"]
    parts = [found["device"], *([found["date"]] if "date" in found else [])]
    if found.get("cuda"):
        parts += [f"CUDA {found['cuda']}", f"{found['machine']['cores']} cores"]
    if "batch_size" in found:
        parts.append(f"batch {found['batch_size']}")
    if "workers" in found:
        parts.append(f"{found['workers']} loader threads or processes")
    if "images" in found:
        size = f" of {found['mean_size']} pixels and {found['mean_kilobytes']} kB" if "mean_size" in found else ""
        parts.append(f"{found['images']} images{size}")
    rounds = [one["rounds"] for _, one in figures(result) if "rounds" in one] or [found["rounds"]]
    parts.append(" to ".join(map(str, sorted({min(rounds), max(rounds)}))) + " rounds")
    if given := found.get("machine", {}).get("cores_given_to_two_processes"):
        parts.append(f"two busy processes did the work of {given} cores")
    reasons: dict[str, list[str]] = {}
    for name, why in result.get("not_measured", {}).items():
        reasons.setdefault(why, []).append(name)
    missing = ""
    for why, (first, *others) in reasons.items():
        missing += f" Not measured: {first}{f' and {len(others)} more' if others else ''} ({why})."
    return f"{', '.join(parts)}. {summary.versions_of(found)}. `{found['command']}`{_runs(result)}{missing}"


def _checks_conditions(parts: list[dict[str, Any]]) -> str:
    shown = [f"`{part['conditions']['command']}` at {summary.short_commit(part['conditions'])}" for part in parts]
    found = parts[-1]["conditions"]
    machine = f"{found['device']}, driver {found['driver']}, CUDA {found['cuda']}, {found['machine']['cores']} cores"
    return f"{machine}, {found['date']}. {summary.versions_of(found)}. {'; '.join(dict.fromkeys(shown))}."


def _runs(result: dict[str, Any]) -> str:
    """Return where and when each part was measured if the result comes from several runs."""
    shown = []
    for part in result.get("parts", []):
        conditions = part["conditions"]
        on = f"{conditions['device']} on {conditions['date']}, commit {summary.short_commit(conditions)}"
        shown.append(f"{counted(len(part['measured']), 'figures')} on {on}")
    return f" Measured in {len(shown)} runs: {'; '.join(shown)}." if shown else ""


def cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    low, high = bounds(figure)
    return f"{number(figure['median'])} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Return a number with three digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- plots -----------------------------------------------------------------------------------------------------------


def pipeline_plot(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rates = result["images_per_second"]
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(rates)), layout="constrained")
    axes = figure.subplots()
    medians, errors = with_errors(rates.values())
    axes.barh(list(rates), medians, xerr=errors, color="tab:blue", ecolor="black", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel("images/s")
    return figure


def scale_plot(result: dict[str, Any]) -> Any:
    """Draw all curves, one plot for each axis, on logarithmic scales."""
    from matplotlib.figure import Figure

    curves = result["curves"]
    figure = Figure(figsize=(3.4 * len(curves), 3), layout="constrained")
    for axes, (axis, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, points in found["points"].items():
            at = sorted(points, key=float)
            medians, errors = with_errors(points[point] for point in at)
            axes.errorbar([float(point) for point in at], medians, yerr=errors, marker="o", ms=3, label=name)
        if axis != "hw_decoder_load":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.set(xlabel=axis.replace("_", " "), ylabel=found["unit"])
        axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def with_errors(found: Iterable[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return the medians of figures, and the lengths of the error bars to either side."""
    medians, ranges = zip(*((one["median"], bounds(one)) for one in found), strict=True)
    sides = [[abs(end[side] - median) for median, end in zip(medians, ranges, strict=True)] for side in (0, 1)]
    return list(medians), sides


PLOT_KINDS = {
    "accuracy": lambda result: summary.plot(result["runs"]),
    "pipeline": pipeline_plot,
    "scale": scale_plot,
}


def plot_of(kind: str, file: str, *, draw: bool) -> tuple[Path, bool]:
    """Return the file of a plot and whether it is up to date; draw it if it is not and `draw` is true.

    Versions of Matplotlib draw slightly different files, so a plot contains the hash of its result, which is compared.
    """
    result = program.RESULTS / file
    path = PLOTS / f"{kind}-{result.stem}.svg"
    mark = f"<!-- made of {file}, sha256 {hashlib.sha256(result.read_bytes()).hexdigest()} -->\n"
    if path.exists() and path.read_text().endswith(mark):
        return path, True
    if draw:
        import matplotlib as mpl

        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
            PLOT_KINDS[kind](read(file)).savefig(path, metadata={"Date": None})
        lines = [line.rstrip() for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n" + mark)
    return path, draw


# ---- pages -----------------------------------------------------------------------------------------------------------


def rendered(page: Path, *, draw: bool) -> tuple[str, list[str]]:
    """Return the up-to-date text of a page, and which of its plots are out of date."""
    stale = []

    def replaced(match: re.Match[str]) -> str:
        begin, what, arguments, end = match.groups()
        words = shlex.split(arguments)
        kinds: dict[str, Any] = {"table": TABLES, "plot": PLOT_KINDS, "conditions": {}}[what]
        if kinds and words[0] not in kinds:
            msg = f"{page.name}: {what} must be one of {', '.join(kinds)}, got {words[0]!r}"
            raise ValueError(msg)
        try:
            if what == "conditions":
                made = conditions_text(read(words[0]))
            elif what == "table":
                made = kinds[words[0]](read(words[1]), *words[2:])
            else:
                path, current = plot_of(words[0], words[1], draw=draw)
                if not current:
                    stale.append(str(path.relative_to(program.ROOT)))
                made = f"![{words[0]}: {Path(words[1]).stem}]({os.path.relpath(path, page.parent)})"
        except (IndexError, KeyError, TypeError) as error:  # missing arguments, or a result of another kind
            msg = f"{page.name}: {begin.strip()} must name a result of its kind: {error!r}"
            raise ValueError(msg) from error
        return f"{begin}{made}\n{end}"

    text = page.read_text()
    asked, answered = len(re.findall(_MARK, text)), len(_MARKED.findall(text))
    if asked != answered:  # the text between a mark and the end of another one would be lost
        msg = f"{page.name}: each result must have its own {_END}, got {asked} results and {answered} with an end"
        raise ValueError(msg)
    return _MARKED.sub(replaced, text), stale


def read(file: str) -> dict[str, Any]:
    """Return the result in a file of benchmarks/results."""
    path = program.RESULTS / file
    return {"benchmark": "accuracy", "runs": read_runs(path)} if path.suffix == ".jsonl" else read_json(path)


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE", help="default: all with results")
    options = parser.parse_args()
    old = []
    for page in options.pages:
        text, stale = rendered(page.absolute(), draw=not options.check)
        old += stale
        if text != page.read_text():
            old.append(page.name)
            if not options.check:
                page.write_text(text)
                sys.stdout.write(f"{page}: updated\n")
    if options.check and old:
        msg = f"out of date: {', '.join(old)}; run python -m benchmarks.render"
        raise ValueError(msg)


if __name__ == "__main__":
    program.run(main)

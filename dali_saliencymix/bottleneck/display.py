"""Format a report, or a comparison of two, as text. The module `page` formats a report as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dali_saliencymix.bottleneck.verdict import LOADER_ALONE, OF_THE_LOADER
from dali_saliencymix.measure.environment import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix.bottleneck.report import Report

RATE_NAMES = {
    "step": "step alone (G)",
    "loader": "loader alone (P)",
    "storage": "storage (F)",
    "loader_from_storage": "loader from storage",
    "end_to_end": "end to end (E)",
}


def report_text(report: Report) -> str:
    """Return a report as text: the verdict first, then the tables."""
    verdict, conditions = report["verdict"], report["conditions"]
    lines = [verdict["name"], f"  {verdict['why']}", f"  Next: {verdict['next']}", *_change_lines(report), ""]
    if stall := stall_lines(report):
        lines += [*stall, ""]
    lines += [*_rate_lines(report), "", *_stage_lines(report)]
    if report["ranks"]:
        names = _measured_of(report, "step", "loader")
        lines += ["", f"{'process':<26}" + "".join(f"{name + ' images/s':>18}" for name in names)]
        for each in report["ranks"]:
            rates = [each[name]["images_per_second"] for name in names]
            shown = [number_text(rate["median"]) if rate else "not measured" for rate in rates]
            lines.append(f"{each['rank']:<26}" + "".join(f"{rate:>18}" for rate in shown))
    host = conditions["host"]
    step = "".join(f"{name} " for name in _measured_of(report, "step"))
    processes = counted(conditions["processes"], "processes")
    where = host["device"] if host["cuda"] else f"CPU with {host['cores']} cores"
    lines += [
        *("", *_what_if_lines(report), *_tune_lines(report), ""),
        f"{conditions['source']}; batches of {conditions['images_per_batch']}; "
        f"{processes}, {step}on {where}, load average {host['load_average']:.1f}",
        *(f"Note: {line}." for line in conditions.get("notes", ())),
        "Figures are medians of interleaved windows; brackets: 90 % confidence interval of the median.",
    ]
    return "\n".join(lines)


def _measured_of(report: Report, *names: str) -> list[str]:
    """Return these names of rates, without those that need a step if only the loader was measured."""
    alone = report["verdict"]["name"] == LOADER_ALONE
    return [name for name in names if not (alone and name in ("step", "end_to_end"))]


def stall_lines(report: Report) -> list[str]:
    """Return lines about stall, utilisation and contention; none if only the loader was measured."""
    stall = report["stall"]
    if report["verdict"]["name"] == LOADER_ALONE:
        return []
    if stall is None:
        return ["stall: not measured"]
    passes = {True: "passes", False: "does not pass", None: "undecided, within the noise"}[report["passes"]]
    lines = [
        f"stall {_spread(stall)}, {stall['band']} (warning from 10 %, critical from 20 %)",
        f"utilisation of the step {_percent(min(report['utilisation'], 1))}: {passes} (90 % passes)",
    ]
    warm = ", with the files in memory" if report["storage"]["training_reads_from_storage"] else ""
    if waits := report["waits"]:
        lines.append(f"the step waits for data {_spread(waits)} of the time, measured on the host{warm}")
    contention = report["contention"]
    if contention["answer"] != "no" and report["verdict"]["name"] != "CONTENTION":
        answer = "also contention" if contention["answer"] == "yes" else "contention is undecided"
        low, high = contention["low"], contention["high"]
        lost = _spread(contention) if low > 0 else f"at most {_percent(high)}"
        lines.append(f"{answer}: loader and step cost each other {lost} of the time per batch{warm}")
    return lines


def _rate_lines(report: Report) -> list[str]:
    lines = [f"{'':<26}{'images/s':>10}{'':>20}{'ms/batch':>10}"]
    for key in _measured_of(report, *RATE_NAMES):
        name, figure = RATE_NAMES[key], report["rates"][key]
        if figure["images_per_second"] is None:
            lines.append(f"{name:<26}{'-':>10}  not measured: {figure['not_measured']}")
            continue
        speed, ms = figure["images_per_second"], figure["ms_per_batch"]
        lines.append(f"{name:<26}{_median_and_range(speed)}{number_text(ms['median']):>10}")
    prediction = report["prediction"]
    if prediction:
        lines.append(
            f"{'predicted, min(G, P)':<26}{_median_and_range(prediction['images_per_second'])}{'':>10}  "
            f"E took {_longer(prediction['end_to_end_takes_longer_by'])}"
        )
    if report["storage"]["training_reads_from_storage"]:
        if prediction:
            speed = prediction["from_storage_images_per_second"]
            found = _median_and_range(speed) if speed else f"{'-':>10}  not measured"
            lines.append(f"{'predicted from storage':<26}{found}")
        lines.append("G, P and E are with files in memory, but the training reads from storage (--cache).")
    return lines


def _stage_lines(report: Report) -> list[str]:
    if report["stages"] is None:
        return [f"stages of the loader: not measured ({report['stages_note']})"]
    of_step = "".join(f"{'of the step':>13}" for _ in _measured_of(report, "step"))
    lines = [f"{'stage':<26}{'added ms':>10}{'':>20}{'share':>8}{'images/s so far':>18}{of_step}"]
    for row in report["stages"]:
        against = "" if row["against_step"] is None else f"{_times(row['against_step']):>13}"
        lines.append(
            f"{row['name']:<26}{_median_and_range(row['added_ms'])}{_percent(row['share']['median']):>8}"
            f"{number_text(row['until_here_images_per_second']['median']):>18}{against}"
            f"{'  below noise' if row['below_noise'] else ''}"
        )
    total = report["stages_sum"]
    lines.append(
        f"{'sum of the stages':<26}{number_text(total['sum_ms']):>10}{'':>20}{_percent(total['ratio']):>8}"
        f"  of the loader's {number_text(total['loader_ms'])} ms"
    )
    return lines


def _change_lines(report: Report) -> list[str]:
    """Return lines about the change that makes the loader faster, if the loader is the bottleneck."""
    change = report["change"]
    if change is None:
        rows = report["tune"]["trials"] if report["tune"] else report["what_ifs"]
        measured = any(row.get("change") and row["setting"] != "batch_size" for row in rows)
        none = "  Change: no other setting made the loader faster beyond the noise"
        return [none] if measured and report["verdict"]["name"] in OF_THE_LOADER else []
    speed = change["loader_changes"]
    where = "options of train.py and of this tool" if change["of_train_py"] else "arguments of the pipeline function"
    lines = [f"  Change: {change['words']} ({where}): the loader alone is {_ratio(speed)} as fast"]
    return lines if change["command"] is None else [*lines, f"    {change['command']}"]


def _what_if_lines(report: Report) -> list[str]:
    """Return lines of the what-ifs, without settings that this loader does not have."""
    rows = [row for row in report["what_ifs"] if "text" in row or row["then"] is not None]
    if not rows:
        return [] if report["tune"] or report["what_ifs"] else ["what if: not measured: not requested"]
    cold = report["storage"]["training_reads_from_storage"]
    lines = ["what if (other settings: with files in memory)" if cold else "what if"]
    for row in rows:
        if "text" in row:
            lines.append(f"  {row['kind']:<12} {row['text']}")
        else:
            lines.append(_setting_line(row, row["kind"]))
    return lines


def _setting_line(row: dict[str, Any], kind: str) -> str:
    tried = f"{row['what']} {row['now']} -> {row['then']}"
    if row["change"] is None:
        return f"  {'-':<12} {tried}: not measured: {row['not_measured']}"
    return f"  {kind:<12} {tried}: {_change(row)}"


def _tune_lines(report: Report) -> list[str]:
    """Return lines about the trials of a search and its result."""
    tune = report["tune"]
    if tune is None:
        return []
    lines = ["", "tune (the loader alone, each setting interleaved with the best before it)"]
    lines += [_setting_line(row, "kept" if row["kept"] else "not kept") for row in tune["trials"]]
    confirmed = tune["confirmed"]
    if tune["is_better"]:
        lines.append(f"  {'best':<12} {tune['words']}, against the present setting: {_change(confirmed)}")
    else:
        why = "no trial was faster beyond the noise" if tune["trials"] else "no other setting was tried"
        if any(row["kept"] for row in tune["trials"]):
            why = "the settings kept during the search were not better in the final comparison"
        lines.append(f"  {'best':<12} {tune['words']}, the present setting: {why}")
    lines.append(f"  {'ended':<12} {tune['stopped']}")
    if "file" in tune:
        lines.append(f"  {'written to':<12} {tune['file']}")
    return lines


def _ratio(spread: dict[str, float]) -> str:
    return f"{_times(spread['median'])} ({_times(spread['low'])[:-1]} to {_times(spread['high'])[:-1]})"


def _change(found: dict[str, Any]) -> str:
    """Return the change of the loader's rate as text, without the two rates if they differ only by noise."""
    change = found["change"]
    ratio = _ratio(change)
    if change["low"] <= 1 <= change["high"]:
        return f"{ratio}, within the noise"
    speed, before = (found[key]["median"] for key in ("loader_images_per_second", "now_images_per_second"))
    return f"{ratio}, {number_text(speed)} images/s against {number_text(before)}, interleaved"


def _longer(spread: dict[str, float]) -> str:
    """Return by how much something took longer, as text."""
    low, median, high = (spread[key] for key in ("low", "median", "high"))
    if round(100 * low) <= 0 <= round(100 * high):  # as they are displayed
        return f"equally long, within the noise ({_percent(low)} to {_percent(high)})"
    if low > 0:
        return f"{_percent(median)} longer ({_percent(low)} to {_percent(high)})"
    return f"{_percent(-median)} less ({_percent(-high)} to {_percent(-low)})"


def _spread(share: dict[str, float]) -> str:
    return f"{_percent(share['median'])} ({_percent(share['low'])} to {_percent(share['high'])})"


def _times(ratio: float) -> str:
    """Return a ratio with three digits, or with all digits before the decimal point."""
    digits = 2 if abs(ratio) < 9.995 else 1 if abs(ratio) < 99.95 else 0
    return f"{ratio:,.{digits}f}x"


def _median_and_range(spread: dict[str, float]) -> str:
    between = f"({number_text(spread['low'])} to {number_text(spread['high'])})"
    return f"{number_text(spread['median']):>10} {between:>19}"


def number_text(value: float) -> str:
    """Return a number with the number of digits used in all tables and charts."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{_tenths(value):.1f}"


def _tenths(value: float) -> float:
    return round(value, 1) + 0.0  # no -0.0


def _percent(share: float) -> str:
    return f"{round(100 * share) + 0:.0f} %"


def comparison_text(found: dict[str, Any]) -> str:
    """Return a comparison as text."""
    sure = {None: "  not measured in both", True: "  more than noise", False: "  within the noise"}
    was, now = found["verdicts"]
    lines = [f"{was} -> {now}" if was != now else f"{was} (unchanged)", ""]
    if found["conditions"]:
        lines.append("measured under different conditions:")
        lines += [f"  {key}: {was} -> {now}" for key, (was, now) in found["conditions"].items()]
    else:
        lines.append("measured under the same conditions")
    forms: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("rates", "images/s", "ratio", lambda change: f"{_times(change):>10}"),
        ("stages", "added ms", "difference", lambda change: f"{_tenths(change):>+10.1f}"),
    )
    for part, title, kind, form in forms:
        if found[part]:
            lines += ["", f"{title:<24}{'before':>12}{'after':>12}"]
        for name, row in found[part].items():
            ends = "".join(
                f"{'-':>12}" if row[end] is None else f"{_tenths(row[end]['median']):>12,.1f}"
                for end in ("before", "after")
            )
            change = "" if row[kind] is None else form(row[kind])
            lines.append(f"{name.replace('_', ' '):<24}{ends}{change}{sure[row['more_than_noise']]}")
    stall = found["stall"]
    if stall["difference"] is not None:
        before, after = (_percent(stall[key]["median"]) for key in ("before", "after"))
        lines += ["", f"stall {before} -> {after}{sure[stall['more_than_noise']]}"]
    return "\n".join(lines)

"""A report as text for the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dali_saliencymix.bottleneck.verdict import LOADER_ALONE

if TYPE_CHECKING:
    from dali_saliencymix.bottleneck.report import Report


def report_text(report: Report) -> str:
    """Return a report for the screen: the verdict first, then tables."""
    verdict = report["verdict"]
    lines = [verdict["name"], f"  {verdict['why']}", f"  Next: {verdict['next']}", ""]
    if stall := stall_lines(report):
        lines += [*stall, ""]
    lines += [*_rate_lines(report), "", *_stage_lines(report)]
    if report["ranks"]:
        names = _measured_of(report, "step", "loader")
        lines += ["", f"{'process':<26}" + "".join(f"{name + ' images/s':>18}" for name in names)]
        lines += [
            f"{each['rank']:<26}" + "".join(f"{_rate_of(each[name]):>18}" for name in names) for each in report["ranks"]
        ]
    lines += ["", *_what_if_lines(report)]
    conditions = report["conditions"]
    lines += ["", f"{conditions['source']}; batches of {conditions['images_per_batch']}; {_machine(report)}"]
    lines += [f"Note: {line}." for line in conditions.get("measured_instead", ())]
    lines.append("Figures are medians of windows that took turns; in brackets the range that holds the median at 90 %.")
    return "\n".join(lines)


def _measured_of(report: Report, *names: str) -> list[str]:
    """Return these names of rates, but those that need a training step where there was to be none."""
    alone = report["verdict"]["name"] == LOADER_ALONE
    return [name for name in names if not (alone and name in ("step", "end_to_end"))]


def _machine(report: Report) -> str:
    conditions = report["conditions"]
    machine = conditions["host"]
    where = machine["gpu"] or f"CPU with {machine['cores']} cores"
    step = "".join(f"{name} " for name in _measured_of(report, "step"))
    return f"{conditions['processes']} process(es), {step}on {where}, load average {machine['load_average']:.1f}"


def stall_lines(report: Report) -> list[str]:
    """Return the stall and the utilisation in words; nothing where there was to be no training step."""
    stall = report["stall"]
    if report["verdict"]["name"] == LOADER_ALONE:
        return []
    if stall is None:
        return ["stall: not measured"]
    passes = {True: "passes", False: "does not pass", None: "whether it passes is within the spread"}[report["passes"]]
    return [
        f"stall {_percent(stall['median'])} ({_percent(stall['low'])} to {_percent(stall['high'])}), "
        f"{stall['band']} (warning from 10 %, critical from 20 %)",
        f"utilisation of the step {_percent(report['utilisation'])}: {passes} (90 % passes)",
    ]


_RATE_NAMES = {
    "step": "step alone (G)",
    "loader": "loader alone (P)",
    "storage": "storage (F)",
    "loader_from_storage": "loader from storage",
    "end_to_end": "end to end (E)",
}


def _rate_lines(report: Report) -> list[str]:
    rates = report["rates"]
    lines = [f"{'':<26}{'images/s':>10}{'':>20}{'ms/batch':>10}"]
    for key in _measured_of(report, *_RATE_NAMES):
        name, figure = _RATE_NAMES[key], rates[key]
        if figure["images_per_second"] is None:
            lines.append(f"{name:<26}{'-':>10}  not measured: {figure['not_measured']}")
            continue
        speed, ms = figure["images_per_second"], figure["ms_per_batch"]
        lines.append(f"{name:<26}{_number(speed['median']):>10}{_range_of(speed):>20}{_number(ms['median']):>10}")
    prediction = report["prediction"]
    if prediction:
        speed, longer = prediction["images_per_second"], prediction["end_to_end_takes_longer_by"]
        lines.append(
            f"{'predicted, min(G, P)':<26}{_number(speed['median']):>10}{_range_of(speed):>20}"
            f"{'':>10}  E took {_percent(longer['median'])} longer ({_percent(longer['low'])} to "
            f"{_percent(longer['high'])})"
        )
    if report["storage"]["training_reads_from_storage"]:
        if prediction:
            speed = prediction["from_storage_images_per_second"]
            found = f"{_number(speed['median']):>10}{_range_of(speed):>20}" if speed else f"{'-':>10}  not measured"
            lines.append(f"{'predicted from storage':<26}{found}")
        lines.append("G, P and E are with the files in memory, where the training will not find them all (--cache).")
    return lines


def _stage_lines(report: Report) -> list[str]:
    if report["stages"] is None:
        return [f"stages of the loader: not measured ({report['stages_note']})"]
    of_step = "".join(f"{'of the step':>13}" for _ in _measured_of(report, "step"))
    lines = [f"{'stage':<26}{'added ms':>10}{'':>20}{'share':>8}{'images/s so far':>18}{of_step}"]
    for row in report["stages"]:
        added = row["added_ms"]
        noise = "  below noise" if row["below_noise"] else ""
        against = "" if row["against_step"] is None else f"{row['against_step']:>12.2f}x"
        lines.append(
            f"{row['name']:<26}{_number(added['median']):>10}{_range_of(added):>20}"
            f"{_percent(row['share']['median']):>8}{_number(row['until_here_images_per_second']['median']):>18}"
            f"{against}{noise}"
        )
    total = report["stages_sum"]
    lines.append(
        f"{'sum of the stages':<26}{_number(total['sum_ms']):>10}{'':>20}{_percent(total['ratio']):>8}"
        f"  of the loader's {_number(total['loader_ms'])} ms"
    )
    return lines


def _what_if_lines(report: Report) -> list[str]:
    lines = ["what if"]
    if report["storage"]["training_reads_from_storage"]:
        lines = ["what if (other settings: with the files in memory)"]
    for row in report["what_ifs"]:
        if "text" in row:
            lines.append(f"  {row['kind']:<10} {row['text']}")
        elif row["change"] is None:
            then = "" if row["then"] is None else f" {row['then']}"
            lines.append(f"  {'-':<10} {row['what']}{then}: not measured: {row['not_measured']}")
        else:
            speed, change = row["loader_images_per_second"], row["change"]
            sure = "" if change["low"] > 1 or change["high"] < 1 else ", within the noise"
            lines.append(
                f"  {row['kind']:<10} {row['what']} {row['now']} -> {row['then']}: loader {_number(speed['median'])} "
                f"images/s, {change['median']:.2f}x ({change['low']:.2f} to {change['high']:.2f}){sure}"
            )
    return lines if len(lines) > 1 else ["what if: not measured: was not asked for"]


def _rate_of(figure: dict[str, Any]) -> str:
    speed = figure["images_per_second"]
    return "not measured" if speed is None else _number(speed["median"])


def _range_of(spread: dict[str, float]) -> str:
    return f"({_number(spread['low'])} to {_number(spread['high'])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

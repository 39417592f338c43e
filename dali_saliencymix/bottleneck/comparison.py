"""Two reports side by side: what changed, and whether it is more than noise."""

from __future__ import annotations

from typing import Any

from dali_saliencymix.bottleneck.report import Report

# Changes from run to run, or are figures themselves.
_PASSED_OVER = ("seconds_taken", "command", "host.load_average", "steps_in_a_window", "memory_bytes", "epochs_begun")


def compare(before: Report, after: Report) -> dict[str, Any]:
    """Compare two reports.

    Parameters
    ----------
    before, after : dict
        Reports of `measure_source` or `load_report`.

    Returns
    -------
    dict
        ``verdicts``: the two names. ``conditions``: for each that differs, its two values. ``rates`` and ``stages``:
        for each figure its two spreads and its `change`, the ratio of the medians for rates and the difference in
        milliseconds for stages; `more_than_noise` is true if the two ranges have nothing in common, and None where
        one of them was not measured. ``stall``: the same in shares.
    """
    rates = {
        name: _changed(before["rates"][name]["images_per_second"], after["rates"][name]["images_per_second"], "ratio")
        for name in before["rates"]
        if name in after["rates"]
    }
    stages = {}
    rows = [{row["name"]: row["added_ms"] for row in report["stages"] or ()} for report in (before, after)]
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        stages[name] = _changed(rows[0].get(name), rows[1].get(name), "difference")
    flat = [_flat(report["conditions"]) for report in (before, after)]
    conditions = {
        key: [flat[0].get(key), flat[1].get(key)]
        for key in dict.fromkeys([*flat[0], *flat[1]])
        if flat[0].get(key) != flat[1].get(key) and not key.startswith(_PASSED_OVER)
    }
    return {
        "verdicts": [before["verdict"]["name"], after["verdict"]["name"]],
        "conditions": conditions,
        "rates": rates,
        "stages": stages,
        "stall": _changed(before["stall"], after["stall"], "difference"),
    }


def _changed(before: dict[str, Any] | None, after: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    change = more = None
    if before is not None and after is not None:
        change = after["median"] / before["median"] if kind == "ratio" else after["median"] - before["median"]
        more = after["low"] > before["high"] or after["high"] < before["low"]
    return {"before": before, "after": after, kind: change, "more_than_noise": more}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def comparison_text(found: dict[str, Any]) -> str:
    """Return a comparison for the screen."""
    was, now = found["verdicts"]
    lines = [f"{was} -> {now}" if was != now else f"{was}, as before", ""]
    if found["conditions"]:
        lines.append("measured under different conditions:")
        lines += [f"  {key}: {was} -> {now}" for key, (was, now) in found["conditions"].items()]
    else:
        lines.append("measured under the same conditions")
    lines += ["", f"{'images/s':<24}{'before':>12}{'after':>12}"]
    for name, row in found["rates"].items():
        shown = "" if row["ratio"] is None else f"{row['ratio']:>9.2f}x"
        lines.append(f"{name.replace('_', ' '):<24}{_median(row['before'])}{_median(row['after'])}{shown}{_sure(row)}")
    if found["stages"]:
        lines += ["", f"{'added ms':<24}{'before':>12}{'after':>12}"]
        for name, row in found["stages"].items():
            shown = "" if row["difference"] is None else f"{row['difference']:>+10.1f}"
            lines.append(f"{name:<24}{_median(row['before'])}{_median(row['after'])}{shown}{_sure(row)}")
    stall = found["stall"]
    if stall["difference"] is not None:
        before, after = (100 * stall[key]["median"] for key in ("before", "after"))
        lines += ["", f"stall {before:.0f} % -> {after:.0f} %{_sure(stall)}"]
    return "\n".join(lines)


def _median(spread: dict[str, Any] | None) -> str:
    return f"{'-':>12}" if spread is None else f"{spread['median']:>12,.1f}"


def _sure(row: dict[str, Any]) -> str:
    sure = row["more_than_noise"]
    return "  not measured in both" if sure is None else "  more than noise" if sure else "  within the noise"

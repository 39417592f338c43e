"""Compare two results of the same benchmark, and say which figures changed by more than they spread.

    python -m benchmarks.compare BEFORE.json AFTER.json

A change counts where the middle halves of the two figures, from the first to the third quartile over the rounds, do not
overlap (for results without quartiles: the whole ranges). Under five rounds nothing is said. What the machine did
between the two runs is not part of either spread: where it matters, run both again in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.record import LEAST_ROUNDS


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """Say whether a figure changed by more than the spread."""
    if min(before.get("rounds", LEAST_ROUNDS), after.get("rounds", LEAST_ROUNDS)) < LEAST_ROUNDS:
        return "too few rounds to tell"
    (low, high), (new_low, new_high) = (
        (figure.get("q1", figure["min"]), figure.get("q3", figure["max"])) for figure in (before, after)
    )
    if new_low > high:
        return "MORE"
    return "LESS" if new_high < low else "within the spread"


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the comparison as lines, conditions that differ first."""
    kinds = [result.get("benchmark") for result in (before, after)]
    if kinds[0] != kinds[1]:
        msg = f"the two results must be of one benchmark, got {kinds[0]!r} and {kinds[1]!r}"
        raise ValueError(msg)
    differing = conditions_that_differ(before, after)
    lines = [f"{name}: {was!r} -> {now!r}" for name, (was, now) in differing.items()]
    old, new = dict(measure.figures(before)), dict(measure.figures(after))
    both = [path for path in old if path in new]
    if not both:
        msg = "the two results have no figure in common"
        raise ValueError(msg)
    width = max(len(" / ".join(path)) for path in both)
    for path in both:
        was, now = old[path]["median"], new[path]["median"]
        change = f"{now / was - 1:+8.1%}" if was > 0 else " " * 8
        lines.append(f"{' / '.join(path):<{width}}  {was:>9g} -> {now:<9g} {change}  {verdict(old[path], new[path])}")
    for text, paths, others in (("only before", old, new), ("only after", new, old)):
        lines += [f"{text}: {' / '.join(path)}" for path in paths if path not in others]
    return lines


def conditions_that_differ(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs in the conditions of two results but for commit, command and date, which are there to."""
    old, new = (_flat(result.get("conditions", {})) for result in (before, after))
    names = [name for name in {**old, **new} if name not in ("commit", "command", "date")]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _flat(conditions: dict[str, Any]) -> dict[str, Any]:
    """Return conditions with those inside of others, such as versions, at the top."""
    flat = {}
    for name, value in conditions.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def read(path: Path) -> dict[str, Any]:
    """Return a result."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        msg = f"{path}: is no result of a benchmark: {error}"
        raise ValueError(msg) from error
    if not isinstance(result, dict):
        msg = f"{path}: is no result of a benchmark, which has names for its parts, but a {type(result).__name__}"
        raise ValueError(msg)
    return result


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    options = parser.parse_args()
    sys.stdout.write("\n".join(compared(read(options.before), read(options.after))) + "\n")


if __name__ == "__main__":
    measure.run(main)

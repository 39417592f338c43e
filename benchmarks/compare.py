"""Compare two results of one benchmark, and list which figures changed by more than noise.

    python -m benchmarks.compare BEFORE.json AFTER.json

A figure changed if its two ranges do not overlap. A range is the 90 % confidence interval of the median, as
`dali_saliencymix.measure` computes it; in older results it is the middle half of the rounds, or all of them. With fewer
than five rounds there is no verdict. The ranges do not cover changes of the machine between the two runs: if they
matter, run both again, interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import program
from dali_saliencymix.measure.figures import apart, differing, figures
from dali_saliencymix.measure.results import read_json

# Conditions that differ between any two results.
_NOT_COMPARED = ("commit", "command", "date", "machine.load_average")


def verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return in words whether a figure changed by more than noise."""
    more_than_noise = apart(before, after)
    if more_than_noise is None:
        return "too few rounds to tell"
    if not more_than_noise:
        return "within the noise"
    return "MORE" if after["median"] > before["median"] else "LESS"


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the lines of the comparison, starting with the conditions that differ."""
    kinds = [result.get("benchmark") for result in (before, after)]
    if kinds[0] != kinds[1]:
        msg = f"the two results must be of one benchmark, got {kinds[0]!r} and {kinds[1]!r}"
        raise ValueError(msg)
    conditions = differing(before.get("conditions", {}), after.get("conditions", {}), _NOT_COMPARED)
    lines = [f"{name}: {was!r} -> {now!r}" for name, (was, now) in conditions.items()]
    old, new = ({" / ".join(path): found for path, found in figures(result)} for result in (before, after))
    both = [name for name in old if name in new]
    if not both:
        msg = "the two results have no figure in common"
        raise ValueError(msg)
    for name in both:
        was, now = old[name]["median"], new[name]["median"]
        change = f"{now / was - 1:+8.1%}" if was > 0 else " " * 8
        lines.append(f"{name:<{max(map(len, both))}}  {was:>9g} -> {now:<9g} {change}  {verdict(old[name], new[name])}")
    for text, names, others in (("only before", old, new), ("only after", new, old)):
        lines += [f"{text}: {name}" for name in names if name not in others]
    return lines


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    options = parser.parse_args()
    sys.stdout.write("\n".join(compared(read_json(options.before), read_json(options.after))) + "\n")


if __name__ == "__main__":
    program.run(main)

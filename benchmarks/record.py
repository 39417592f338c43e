"""A result in the making: measured in groups of variants, in one run or in several, and written after every round.

Each group is measured beside a reference, so that a figure can come twice. Of two figures with one name the one of more
rounds stays, the first one where they have equally many. A run that continues another one adds to ``"parts"`` its
conditions, which are device, date, versions, command and commit, and the names of the figures that it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import measure

LEAST_ROUNDS = 5  # with fewer a figure is one that is missing, or as many as are asked for

# What may differ between two parts of a result.
_OF_A_PART = {
    "date",
    "command",
    "commit",
    "machine",
    "versions",
    "cuda",
    "driver",
    "rounds",
    "variants",
    "not_measured",
}


class Record:
    """A result, and the file that it is in.

    Parameters
    ----------
    benchmark : str
        Name of the benchmark.
    conditions : dict
        What the result depends on: see `benchmarks.machine.conditions`.
    options : argparse.Namespace
        Of `benchmarks.measure.parser_of_rounds`.

    Attributes
    ----------
    result : dict
        What has been measured by now.
    not_measured : dict
        Reasons by the name of what was not measured; variants that fail are to be added.
    unavailable : set of str
        Names of variants that lack a package: measuring again would not help.

    Raises
    ------
    ValueError
        If the result to continue is of another benchmark, device or options.
    """

    def __init__(self, benchmark: str, conditions: dict[str, Any], options: argparse.Namespace) -> None:
        self._output = options.output
        self._least = min(options.rounds, LEAST_ROUNDS)
        self._end = time.monotonic() + options.seconds
        self._conditions = conditions
        self._earlier: list[dict[str, Any]] = []
        self._measured: set[tuple[str, ...]] = set()
        self._asked: dict[str, tuple[str, ...]] = {}
        self._ended = False  # before, groups may be left that nobody has asked for yet
        self.not_measured: dict[str, str] = {}
        self.unavailable: set[str] = set()
        self.result: dict[str, Any] = {"benchmark": benchmark, "conditions": conditions}
        if options.go_on and self._output is not None and self._output.exists():
            self._continue(json.loads(self._output.read_text()))
        self._before = self.result

    def _continue(self, earlier: dict[str, Any]) -> None:
        if earlier["benchmark"] != self.result["benchmark"]:
            msg = f"--continue: {self._output} is a result of {earlier['benchmark']}, not {self.result['benchmark']}"
            raise ValueError(msg)
        # As they come out of a file: lists in the place of tuples.
        now = json.loads(json.dumps(self._conditions))
        for name in {**earlier["conditions"], **now}:
            values = [found.get(name) for found in (earlier["conditions"], now)]
            if name not in _OF_A_PART and values[0] != values[1]:
                msg = f"--continue: {self._output} was measured with {name} {values[0]!r}, this run has {values[1]!r}"
                raise ValueError(msg)
        everything = [" / ".join(path) for path, _ in measure.figures(earlier)]
        self._earlier = earlier.pop("parts", [{"conditions": earlier["conditions"], "measured": everything}])
        for name in ("not_measured", "complete"):
            earlier.pop(name, None)
        self.result = earlier

    def lacks(self, *path: str) -> bool:
        """Tell whether a figure, or every figure of a part of the result, is missing, or one has too few rounds."""
        found: Any = self.result
        for name in path:
            found = found.get(name, {})
        rounds = [figure["rounds"] for _, figure in measure.figures(found)]
        return not rounds or min(rounds) < self._least

    def lacking(self, section: str, names: Iterable[str]) -> list[str]:
        """Return which variants have no figure yet in a section of the result; all of them have to have one."""
        return [name for name in names if self.ask_for(name, section, name)]

    def ask_for(self, name: str, *path: str) -> bool:
        """Say that a variant has to have a figure; tell whether it lacks it."""
        self._asked[name] = path
        return self.lacks(*path)

    def seconds_left(self) -> float:
        """Return the time that is left to measure in; what begins later is not measured."""
        return self._end - time.monotonic()

    def begin_group(self) -> None:
        """Begin a group of variants."""
        self._before = self.result

    def add(self, found: Mapping[str, Any]) -> None:
        """Put what the group has given by now in the place of what it gave before, and write."""
        self.result = _merged(self._before, found)
        theirs = dict(measure.figures(found))
        self._measured |= {path for path, figure in measure.figures(self.result) if theirs.get(path) is figure}
        self.write()

    def leave_out(self, name: str, error: Exception) -> None:
        """Say that a variant cannot be measured."""
        if isinstance(error, ImportError):
            self.unavailable.add(name)
        measure.leave_out(name, error, self.not_measured)

    def write(self) -> None:
        """Write the result, and what it lacks."""
        measure.write(self._whole(), self._output)

    def end(self) -> None:
        """Write the result, and show it."""
        for name, path in self._asked.items():
            if self.lacks(*path) and self.seconds_left() < 0:
                self.not_measured.setdefault(name, "no time was left for it, or for all of its rounds")
        self._ended = True
        self.write()
        measure.show(self._whole())

    def _whole(self) -> dict[str, Any]:
        missing = [name for name, path in self._asked.items() if self.lacks(*path) and name not in self.unavailable]
        whole = {**self.result, "not_measured": self.not_measured, "complete": self._ended and not missing}
        if self._earlier:
            now = {" / ".join(path) for path in self._measured}
            earlier = [
                {**part, "measured": [name for name in part["measured"] if name not in now]} for part in self._earlier
            ]
            whole["parts"] = [*earlier, {"conditions": self._conditions, "measured": sorted(now)}]
        return whole


def _merged(old: Any, new: Any) -> Any:
    """Return two results as one: see the module's description."""
    if measure.is_figure(old) and measure.is_figure(new):
        return new if new.get("rounds", math.inf) > old.get("rounds", 0) else old
    if isinstance(old, Mapping) and isinstance(new, Mapping) and not measure.is_figure(new):
        return {**old, **{name: _merged(old[name], part) if name in old else part for name, part in new.items()}}
    return new

"""Record a result: measured in groups of variants, in one run or in several, and written after every round.

Each group includes the reference, so a figure can be measured twice. Of two figures with the same name the one with
more rounds is kept, or the first one if they have equally many. A run that continues another one adds to ``"parts"``
its conditions (device, date, versions, command and commit) and the names of the figures that it measured. If a variant
cannot be measured, the others still are; it is listed with the reason under ``"not_measured"``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks import machine, program
from dali_saliencymix.measure.figures import LEAST_ROUNDS, differing, figure, figures, is_figure
from dali_saliencymix.measure.results import one_line, read_json
from dali_saliencymix.measure.rounds import in_turns

# What may differ between two parts of a result.
_OF_A_PART = ("date", "command", "commit", "machine", "versions", "cuda", "driver", "rounds", "variants")

Values = Mapping[str, Sequence[float]]
_Made = TypeVar("_Made")


def figures_of(values: Values) -> dict[str, dict[str, float]]:
    """Return the figure of each variant."""
    return {name: figure(of_rounds) for name, of_rounds in values.items()}


class Record:
    """A result and its file.

    Parameters
    ----------
    benchmark : str
        Name of the benchmark.
    options : argparse.Namespace
        Options that include those of `benchmarks.program.ROUNDS`.
    **conditions
        Conditions of the result in addition to `benchmarks.machine.conditions`.

    Attributes
    ----------
    result : dict
        The result so far.
    not_measured : dict
        The reason for each name that was not measured.
    """

    def __init__(self, benchmark: str, options: argparse.Namespace, **conditions: Any) -> None:
        self._output, self._rounds = options.output, options.rounds
        self._conditions = machine.conditions(options) | conditions
        self._end = time.monotonic() + options.seconds
        self._earlier: list[dict[str, Any]] = []
        self._measured: set[tuple[str, ...]] = set()
        self._asked: dict[str, tuple[str, ...]] = {}
        self._unavailable: set[str] = set()  # variants that lack a package; another attempt would not help
        self._ended = False  # until the end, there may be groups that have not been asked for
        self.not_measured: dict[str, str] = {}
        self.result: dict[str, Any] = {"benchmark": benchmark, "conditions": self._conditions}
        if options.go_on and self._output is not None and self._output.exists():
            self._continue(read_json(self._output))

    def _continue(self, earlier: dict[str, Any]) -> None:
        was, is_now = earlier.get("benchmark"), self.result["benchmark"]
        if was != is_now:
            msg = f"--continue: {self._output} is a result of {was}, not {is_now}"
            raise ValueError(msg)
        now = json.loads(json.dumps(self._conditions))  # turns tuples into lists, as in the file
        for name, (was, is_now) in differing(earlier["conditions"], now, _OF_A_PART).items():
            msg = f"--continue: {self._output} was measured with {name} {was!r}, this run has {is_now!r}"
            raise ValueError(msg)
        everything = [" / ".join(path) for path, _ in figures(earlier)]
        self._earlier = earlier.pop("parts", [{"conditions": earlier["conditions"], "measured": everything}])
        for name in ("not_measured", "complete"):
            earlier.pop(name, None)
        self.result = earlier

    def _lacks(self, path: tuple[str, ...]) -> bool:
        """Tell whether a part of the result has no figure, or one with too few rounds."""
        found: Any = self.result
        for name in path:
            found = found.get(name, {})
        rounds = [one["rounds"] for _, one in figures(found)]
        return not rounds or min(rounds) < min(self._rounds, LEAST_ROUNDS)

    def ask_for(self, name: str, *path: str) -> bool:
        """Register a variant that needs a figure; return whether it lacks it."""
        self._asked[name] = path
        return self._lacks(path)

    def seconds_left(self) -> float:
        """Return the seconds that are left to measure; nothing starts after that."""
        return self._end - time.monotonic()

    def groups(self, section: str, groups: Iterable[Sequence[str]], reference: str) -> Iterator[list[str]]:
        """Yield the names to measure in each group that lacks a figure in a section, with the reference first."""
        for group in groups:
            lacking = [name for name in group if self.ask_for(name, section, name)]
            if lacking and self.seconds_left() > 0:
                yield list(dict.fromkeys([reference, *lacking]))
                gc.collect()  # pipelines are in reference cycles

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Run a block that may fail; an error is recorded under `name`, and the run continues."""
        try:
            yield
        except Exception as error:
            self.leave_out(name, error)

    def made(self, names: Iterable[str], make: Callable[[str], _Made]) -> dict[str, _Made]:
        """Return ``make(name)`` for each name; names for which it fails are recorded with the reason."""
        found = {}
        for name in names:
            with self.attempt(name):
                found[name] = make(name)
        return found

    def measure(
        self,
        variants: Mapping[str, Callable[[], float]],
        result_of: Callable[[dict[str, list[float]]], Mapping[str, Any]],
        *,
        share: float = 1.0,
        where: str = "",
    ) -> None:
        """Measure variants, interleaved, for a share of the time that is left; add the result after each round."""
        if not variants:
            return
        before, seconds = self.result, share * self.seconds_left()

        def failed(name: str, error: Exception) -> None:
            self.leave_out(where + name, error)

        turns = in_turns(variants, self._rounds, seconds=seconds, failed=failed)
        for values in program.progress(turns, total=self._rounds, unit="round", leave=False):
            self._put(before, result_of(values))

    def add(self, found: Mapping[str, Any]) -> None:
        """Add a part of the result and write the file."""
        self._put(self.result, found)

    def _put(self, before: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Merge the current figures of a group into the result before that group, and write the file."""
        self.result = _merged(before, found)
        theirs = dict(figures(found))
        self._measured |= {path for path, one in figures(self.result) if theirs.get(path) is one}
        self._write()

    def leave_out(self, name: str, error: Exception) -> None:
        """Record why a variant cannot be measured, and free its memory."""
        if isinstance(error, ImportError):
            self._unavailable.add(name)
        self.not_measured[name] = one_line(error)
        program.say(f"not measured: {name}: {self.not_measured[name]}")
        error.__traceback__ = None  # it refers to the variant's pipelines
        gc.collect()

    def end(self) -> None:
        """Write the result and print it."""
        for name, path in self._asked.items():
            if self._lacks(path) and self.seconds_left() < 0:
                self.not_measured.setdefault(name, "no time was left for it or for all of its rounds")
        self._ended = True
        program.show(self._write())

    def _write(self) -> dict[str, Any]:
        """Write the whole result, including what is missing, and return it."""
        missing = [name for name, path in self._asked.items() if self._lacks(path) and name not in self._unavailable]
        whole = {**self.result, "not_measured": self.not_measured, "complete": self._ended and not missing}
        if self._earlier:
            now = {" / ".join(path) for path in self._measured}
            kept = [[name for name in part["measured"] if name not in now] for part in self._earlier]
            earlier = [{**part, "measured": names} for part, names in zip(self._earlier, kept, strict=True)]
            whole["parts"] = [*earlier, {"conditions": self._conditions, "measured": sorted(now)}]
        program.write(whole, self._output)
        return whole


def _merged(old: Any, new: Any) -> Any:
    """Merge two results; see the docstring of the module."""
    if is_figure(old) and is_figure(new):
        return new if new.get("rounds", math.inf) > old.get("rounds", 0) else old
    if isinstance(old, Mapping) and isinstance(new, Mapping) and not is_figure(new):
        return {**old, **{name: _merged(old[name], part) if name in old else part for name, part in new.items()}}
    return new

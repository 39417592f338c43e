"""What all benchmarks share: variants that take turns, the spread of a figure, its conditions, results as JSON.

A figure is ``{"median", "q1", "q3", "min", "max", "rounds"}`` over rounds that measure every variant once each.
A variant that cannot be measured does not end the others: it is listed with the reason under ``"not_measured"``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# ---- figures ---------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, quartiles, least and largest of `values`, to `digits` significant digits, and their number."""
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    found = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {**{name: significant(value, digits) for name, value in found.items()}, "rounds": len(values)}


def significant(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def is_figure(found: object) -> bool:
    """Tell whether a part of a result is a figure."""
    return isinstance(found, dict) and {"median", "min", "max"} <= found.keys()


def ratios(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return each variant's ratio to `reference`, taken within the rounds, as figures."""
    if reference not in values:
        return {}
    return {
        name: figure([one / other for one, other in zip(own, values[reference], strict=False)])
        for name, own in values.items()
    }


# ---- rounds ----------------------------------------------------------------------------------------------------------


def in_turns(
    variants: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    seconds: float = math.inf,
    not_measured: dict[str, str] | None = None,
) -> Iterator[dict[str, list[float]]]:
    """Call every variant once a round, and give the values so far after each round but the first, which warms up.

    The order moves on by one each round and is turned round every second time: a fixed order would favour whoever
    comes after a light one. A variant that raises is left out from there on, and `not_measured` says why. No round
    begins after `seconds`, but for the first that counts.
    """
    alive = dict(variants)
    values: dict[str, list[float]] = {name: [] for name in alive}
    deadline = time.monotonic() + seconds
    for number in progress(range(rounds + 1), unit="round", leave=False):
        if number > 1 and time.monotonic() > deadline:
            return
        for name in order_of_round(list(alive), number):
            try:
                value = alive[name]()
            except Exception as error:  # whatever it is: the others can be measured all the same
                if not_measured is None:
                    raise
                del alive[name], values[name]
                leave_out(name, error, not_measured)
                continue
            if number:
                values[name].append(value)
        if number:
            yield values


def leave_out(name: str, error: Exception, not_measured: dict[str, str]) -> None:
    """Say that a variant cannot be measured, and why; free what it held."""
    not_measured[name] = one_line(error)
    say(f"not measured: {name}: {not_measured[name]}")
    error.__traceback__ = None  # it holds on to the variant's pipelines
    gc.collect()


def order_of_round(names: Sequence[str], number: int) -> list[str]:
    """Return the order in which variants take their turns in a round."""
    start = number % len(names) if names else 0
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


class Timed:
    """Milliseconds of a call on arrays, as often repeated as it takes for a few milliseconds.

    On a GPU the time is that between two CUDA events on the current stream, with work enqueued in between and nothing
    waited for; the first call of the object, which compiles and allocates, is not timed. If `call` is a `Graph` the
    time is that of one of the calls in it.
    """

    def __init__(self, call: Callable[[], object], *, gpu: bool, least_ms: float = 5.0) -> None:
        self._call, self._gpu, self._least_ms = call, gpu, least_ms
        self._repeats = 0
        self._calls = call.calls if isinstance(call, Graph) else 1

    def __call__(self) -> float:
        """Return the milliseconds of one call."""
        if self._repeats:
            return self._measured(self._repeats)
        self._call()
        once = self._measured(1)
        self._repeats = min(1000, math.ceil(self._least_ms / max(once, 1e-3)))
        return once

    def _measured(self, repeats: int) -> float:
        if not self._gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                self._call()
            return (time.perf_counter() - start) * 1000 / repeats
        import cupy

        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.get_current_stream().synchronize()
        first.record()
        for _ in range(repeats):
            self._call()
        last.record()
        last.synchronize()
        return cupy.cuda.get_elapsed_time(first, last) / (repeats * self._calls)


class Graph:
    """Calls on CuPy arrays, captured as a CUDA graph when first called: the work of the GPU without that of the host.

    Parameters
    ----------
    call : callable
        Enqueues work on the current stream and waits for nothing.
    calls : int
        How often the graph contains it.
    """

    def __init__(self, call: Callable[[], object], calls: int) -> None:
        self._call, self.calls = call, calls
        self._graph: Any = None

    def __call__(self) -> None:
        """Replay the graph on the current stream."""
        if self._graph is None:
            self._capture()
        self._graph.launch()

    def _capture(self) -> None:
        import cupy

        self._pool = cupy.cuda.MemoryPool()  # what the graph writes to must not become anybody else's memory
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()  # the inputs were made on another stream
        with cupy.cuda.using_allocator(self._pool.malloc), stream:
            self._call()
            stream.synchronize()
            stream.begin_capture()
            try:
                for _ in range(self.calls):
                    self._call()
            finally:
                graph = stream.end_capture()
        self._graph = graph


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_bandwidth(*, gpu: bool, megabytes: int, rounds: int = 5) -> dict[str, float]:
    """Return the gigabytes per second that copying a large array moves, those read and those written added."""
    if gpu:
        import cupy as xp
    else:
        xp = np
    source = xp.ones(megabytes * 2**20 // 8, xp.float64)
    target = xp.zeros_like(source)
    timed = Timed(lambda: xp.copyto(target, source), gpu=gpu, least_ms=20)
    return figure([2 * source.nbytes / timed() / 1e6 for _ in range(rounds)])


# ---- programs --------------------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("-o", "--output", type=output_file, metavar="JSON", help="file to write, anew after each round")
    made.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help="default: a GPU if there is one")
    return made


def parser_of_rounds(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have whose variants take turns."""
    made = parser(description)
    made.add_argument("--rounds", type=positive, default=9, help="rounds that count (default: %(default)s)")
    time_is_up = "begin no round after this time, but one"
    made.add_argument("--seconds", type=positive_number, default=math.inf, help=time_is_up)
    lacking = "measure only what the file of -o lacks, on the same device and with the same options, and add it"
    made.add_argument("--continue", dest="go_on", action="store_true", help=lacking)
    return made


def positive(text: str) -> int:
    """Return a positive integer: the type of an option."""
    if not text.isdigit() or int(text) == 0:
        msg = f"must be a positive integer, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def positive_number(text: str) -> float:
    """Return a number above 0: the type of an option."""
    return _number_in(text, "above 0", lambda number: number > 0)


def share(text: str) -> float:
    """Return a number from 0 to 1: the type of an option."""
    return _number_in(text, "from 0 to 1", lambda number: 0 <= number <= 1)


def _number_in(text: str, rule: str, holds: Callable[[float], bool]) -> float:
    with contextlib.suppress(ValueError):
        if holds(number := float(text)):
            return number
    msg = f"must be a number {rule}, got {text!r}"
    raise argparse.ArgumentTypeError(msg)


def output_file(text: str) -> Path:
    """Return the path of a file that can be written: the type of an option. An hour later would be late to find out."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _unfinished(path).touch()
        _unfinished(path).unlink()
    except OSError as error:
        msg = f"must be a file that can be written, got {text!r}: {type(error).__name__}"
        raise argparse.ArgumentTypeError(msg) from error
    return path


def write(result: Mapping[str, Any], output: Path | None) -> None:
    """Write a result; whoever reads the file finds a whole one, also while it is written anew."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        _unfinished(output).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        _unfinished(output).replace(output)


def _unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


def run(main: Callable[[], None]) -> None:
    """Run a program; what goes wrong becomes one line and exit status 1.

    Python's garbage collector runs between variants only. It ends DALI pipelines that nobody uses any more, and in a
    thread that DALI calls a Python operator in, that can wait for ever: see `tests/conftest.py`.
    """
    gc.disable()
    try:
        main()
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line of bounded length."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    """Return a text in one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def say(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(line + "\n")


def progress(iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
    """Show a bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, disable=None, **options)


def show(result: Mapping[str, Any]) -> None:
    """Write the figures of a result to stdout, one a line, and what was not measured.

    Raises
    ------
    RuntimeError
        If there is no figure: nothing could be measured.
    """
    for path, found in figures(result):
        low, high = found.get("q1", found["min"]), found.get("q3", found["max"])
        sys.stdout.write(f"{' / '.join(path):<78} {found['median']:>10g}   ({low:g} to {high:g})\n")
    for name, reason in result.get("not_measured", {}).items():
        sys.stdout.write(f"not measured: {name}: {reason}\n")
    if not any(figures(result)):
        msg = "nothing could be measured"
        raise RuntimeError(msg)


def figures(result: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Give all figures of a result with their paths."""
    if is_figure(result):
        yield path, result  # type: ignore[misc]
    elif isinstance(result, dict):
        for name, part in result.items():
            yield from figures(part, (*path, name))

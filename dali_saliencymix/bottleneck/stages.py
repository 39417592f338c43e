"""Split a DALI pipeline into stages: measure shorter pipelines ("cuts"), each with one more of its operators.

DALI has no timers for its operators. Each cut is a new definition of the pipeline that outputs what its first operators
pass to the remaining ones. The cost of an operator is the time that it adds to a batch. This is less than its own time
if DALI overlaps it with others.

Operators of this package carry the name of their stage, see `dali_saliencymix._dali.python_operator.Stage`. This module
names other operators after their schema.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dali_saliencymix.datasets.image_folder import list_files
from dali_saliencymix.measure.windows import MeasurementError, in_one_line

MOST_STAGES = 9

# Operators on a few numbers per sample belong to the stage of the next operator on images.
_SMALL = (
    *("Constant", "Cast", "Stack", "Cat", "Reshape", "Squeeze", "ExpandDims", "Reinterpret", "Copy", "MakeContiguous"),
    *("random__", "Beta", "CoinFlip", "Uniform", "Normal", "Choice", "BatchPermutation", "PermuteBatch"),
    *("PeekImageShape", "RandomCropGenerator", "Shape", "GetProperty", "Arithmetic", "OneHot", "reductions__"),
    *("conditional__", "Lookup", "Reinterpret", "TensorSubscript", "Subscript", "transforms__"),
)


@dataclass(frozen=True)
class Cut:
    """A pipeline up to one of its operators."""

    name: str  # of the stage that it adds to the previous cut
    category: str  # one of `verdict.CATEGORIES`
    make: Callable[[], Any]  # returns the pipeline, which is not built


def cut_pipeline(define: Callable[[], Any]) -> list[Cut]:
    """Return the cuts of a pipeline, one after each operator that processes images.

    The cuts are in the order of the graph; the last one is the whole pipeline. A mixing operator of this package has
    two cuts: one with a saliency detector that costs nothing, and one with the real detector.

    `define` returns the same DALI pipeline at each call, new and not built.

    Raises
    ------
    MeasurementError
        If the pipeline cannot be split.
    """
    operators = _operators(_graph_outputs(define))
    ends: list[_End] = []
    for count, operator in enumerate(operators, start=1):
        schema = _schema(operator)
        if schema.lstrip("_").startswith(_SMALL) or getattr(getattr(operator, "stage", None), "small", False):
            continue
        end = _End(*_described(operator, schema), count)
        if ends and ends[-1].category == end.category == "read":
            ends.pop()
        ends.append(end)
    if not ends:
        msg = "the pipeline has no operator that processes images"
        raise MeasurementError(msg)
    ends[-1] = ends[-1]._replace(operators=len(operators))
    cuts = []
    for name, category, count in _with_unique_names(_fewer(ends)):
        if name == "saliency":  # a mixing operator of this package
            pasting = _searching(operators)[0].name
            cuts.append(Cut(pasting, "mix", functools.partial(_shortened, define, count, with_saliency=False)))
        cuts.append(Cut(name, category, functools.partial(_shortened, define, count)))
    # The last cut is the original pipeline, including operators that do not lead to the images.
    cuts[-1] = replace(cuts[-1], make=define)
    return cuts


class _End(NamedTuple):
    """The end of a stage."""

    name: str
    category: str
    operators: int  # up to here


def reader_files(define: Callable[[], Any]) -> list[str] | None:
    """Return the files that the readers of a pipeline read, from the arguments of the readers; None if unknown."""
    readers = [op for op in _operators(_graph_outputs(define)) if _schema(op).startswith("readers__")]
    return sorted({file for op in readers for file in _listed(getattr(op._op, "_init_args", {}))}) or None


def _listed(arguments: dict[str, Any]) -> list[str]:
    for name in ("files", "paths", "path"):
        given = arguments.get(name)
        if given:
            root = arguments.get("file_root") or ""
            return [os.path.join(root, str(file)) for file in ([given] if isinstance(given, str) else given)]
    if arguments.get("file_list"):
        root = arguments.get("file_root") or os.path.dirname(arguments["file_list"])
        with open(arguments["file_list"], encoding="utf-8") as lines:
            return [os.path.join(root, line.rsplit(None, 1)[0]) for line in lines if line.strip()]
    if arguments.get("file_root"):
        return list_files(arguments["file_root"])
    return []


def _graph_outputs(define: Callable[[], Any]) -> list[Any]:
    """Return the output nodes of a new pipeline."""
    with in_one_line("the pipeline cannot be defined"):
        return _outputs_of(define())


def _outputs_of(pipeline: Any) -> list[Any]:
    if getattr(pipeline, "_built", False):
        msg = "the pipeline is already built; the function must return a new pipeline at each call, not built"
        raise MeasurementError(msg)
    outputs = getattr(pipeline, "_graph_out", None)
    if not outputs:
        with in_one_line("the pipeline's graph cannot be seen"), pipeline:
            outputs = pipeline.define_graph()
    nodes = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    return [node for node in nodes if getattr(node, "source", None) is not None]


def _inputs(operator: Any) -> Iterator[Any]:
    for given in operator.inputs:
        yield from given if isinstance(given, list) else [given]


def _operators(outputs: Sequence[Any]) -> list[Any]:
    """Return all operators that the outputs depend on, each after its inputs."""
    found: dict[int, Any] = {}

    def visit(operator: Any) -> None:
        if id(operator) not in found:
            for node in _inputs(operator):
                visit(node.source)
            found[id(operator)] = operator

    for node in outputs:
        visit(node.source)
    # Readers come first, also those that only read labels used at the end: they form one stage.
    operators = list(found.values())
    first = [operator for operator in operators if _reads(operator) and not operator.inputs]
    return first + [operator for operator in operators if not any(operator is reader for reader in first)]


def _searching(operators: list[Any]) -> list[Any]:
    """Return the stages of operators of this package that compute saliency."""
    stages = (getattr(operator, "stage", None) for operator in operators)
    return [stage for stage in stages if stage and stage.leave_out_saliency]


def _schema(operator: Any) -> str:
    return str(getattr(operator._op, "schema_name", None) or type(operator._op).__name__)


def _reads(operator: Any) -> bool:
    return _schema(operator).lower().startswith(("readers__", "externalsource"))


def _described(operator: Any, schema: str) -> tuple[str, str]:
    """Return the name and the category of an operator that processes images."""
    lower = schema.lower()
    if stage := getattr(operator, "stage", None):  # only operators of this package have one
        return "saliency" if stage.leave_out_saliency else stage.name, "mix"
    if _reads(operator):
        return "read", "read"
    if lower.startswith(("decoders__", "imagedecoder", "experimental__decoders__")):
        return "decode", "decode"
    if lower.startswith(("resize", "randomresizedcrop")):
        return "resize", "prep"
    if lower == "cropmirrornormalize":
        return "normalise", "prep"
    if "pythonfunction" in lower or "jaxfunction" in lower:
        return _described_python(operator), "prep"
    return schema, "prep"


def _described_python(operator: Any) -> str:
    """Return a name for a Python operator of the user, from the function that DALI has wrapped."""
    function = getattr(operator._op, "function", None)
    inner = inspect.getclosurevars(function).nonlocals.get("function") if inspect.isfunction(function) else function
    name = getattr(inner, "__name__", None) or getattr(getattr(inner, "func", None), "__name__", None)
    return f"python function {name}" if name else "python function"


def _fewer(ends: list[_End]) -> list[_End]:
    """Join neighbours of the same category, the last ones first, until there are at most `MOST_STAGES`."""
    while len(ends) > MOST_STAGES:
        alike = [
            (number, first, second)
            for number, (first, second) in enumerate(itertools.pairwise(ends))
            if first.category == second.category and "saliency" not in (first.name, second.name)
        ]
        if not alike:
            break
        number, first, second = alike[-1]
        name = f"{first.name.partition(' to ')[0]} to {second.name.rpartition(' to ')[2]}"
        ends[number : number + 2] = [second._replace(name=name)]
    return ends


def _with_unique_names(ends: list[_End]) -> list[_End]:
    counts: Counter[str] = Counter()
    unique = []
    for end in ends:
        counts[end.name] += 1
        unique.append(end._replace(name=f"{end.name} {counts[end.name]}") if counts[end.name] > 1 else end)
    return unique


def _shortened(define: Callable[[], Any], count: int, *, with_saliency: bool = True) -> Any:
    """Return a new pipeline of the first `count` operators."""
    with in_one_line("the pipeline cannot be defined"):
        pipeline = define()
    outputs = _outputs_of(pipeline)
    operators = _operators(outputs)
    for stage in () if with_saliency else _searching(operators):
        stage.leave_out_saliency()
    kept = {id(operator) for operator in operators[:count]}
    used = [node for operator in operators[count:] for node in _inputs(operator)] + outputs
    pipeline._sinks = []  # sinks, such as debugging outputs, would keep the operators that are cut off
    pipeline.set_outputs(*{node.name: node for node in used if id(node.source) in kept}.values())
    return pipeline

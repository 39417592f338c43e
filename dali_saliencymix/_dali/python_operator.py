"""Python functions in a pipeline: whole batches in, whole batches out.

DALI has two operators for that. ``fn.python_function`` deals in lists of samples, which are made, copied and taken
apart with the GIL held; `bridge` turns them into batches. The other one is there for DALI's JAX plugin and needs
no JAX: it passes a batch as it is in memory, and takes the result without a copy. It is not documented, so
it serves only with the versions of DALI in which it was tried. Both give the same batches.

DALI calls the functions in a thread of its own. What they raise reaches the user as text inside DALI's own error.
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import nvidia.dali
from nvidia.dali import fn, ops, python_function_plugin
from nvidia.dali.pipeline import Pipeline

from dali_saliencymix._array import LentStream
from dali_saliencymix._dali import bridge
from dali_saliencymix._threads import limited_to
from dali_saliencymix.packages import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nvidia.dali.pipeline import DataNode

    from dali_saliencymix._array import Array

    Batches = tuple[Array, ...]

_WHOLE_BATCHES_TRIED = ("2.4.",)

_CACHE_LINE = 64  # bytes
_MOST_FREE = 4  # buffers: more are not in use at a time in a steady training


@dataclass(frozen=True)
class Stage:
    """What an operator of this package is in a graph: the attribute `stage` of its nodes' ``source``, to measure it."""

    name: str  # what it does, without the saliency
    # Makes the operator use a detector that costs nothing, for good; None where it has no detector.
    leave_out_saliency: Callable[[], None] | None = None
    small: bool = False  # it works on a few numbers a sample, and counts with the next operator


def python_operator(
    function: Callable[..., Batches],
    *inputs: DataNode,
    name: str,
    stage: Stage,
    num_outputs: int = 1,
    layouts: Sequence[str] = (),
    rules: Sequence[str | None] = (bridge.OF_IMAGES,),
) -> Any:
    """Put ``function(*batches) -> batches``, a tuple of `num_outputs`, into the pipeline that is being defined.

    Batches are arrays (N, ...) on the device of the inputs; `layouts` are those of the first outputs. `name` is what
    errors call the operator, where DALI lets it have a name, and `rules` what they say where samples of an input have
    different shapes, one for each input; None where they never have. On a CPU `function` may use as many threads as the
    pipeline has. Those of the pipeline wait meanwhile: DALI runs no two operators of the CPU at a time.
    """
    device = inputs[0].device
    if device == "gpu":
        require("cupy", by="mixing on a GPU")
    pipeline = Pipeline.current()
    limited = functools.partial(_limited, pipeline.num_threads, function)
    options: dict[str, Any] = {"num_outputs": num_outputs, "device": device}
    # DALI's debug mode knows the functions of `nvidia.dali.fn` only.
    debugged = getattr(pipeline, "_debug_on", False)
    if whole_batches_work() and not debugged:
        options["output_layouts"] = [*layouts, *[""] * (num_outputs - len(layouts))]
        if device == "cpu":
            # DALI refuses samples of different shapes in words that name JAX: these come before it does.
            shapes = [node.shape() for node, rule in zip(inputs, rules, strict=True) if rule]
            checked = _whole_batches(functools.partial(_only_one_shape, list(filter(None, rules))), name)(*shapes)
            inputs = (*inputs, marked(checked, Stage("shapes", small=True)))
            limited = functools.partial(_without_last, limited)
        nodes = marked(_whole_batches(limited, name, **options)(*inputs), stage)
        # CuPy's pool may reuse a buffer once DALI or its user releases it, while they may still read it on streams of
        # their own. DALI's copy, on this one, is the one to keep.
        return nodes if device == "cpu" else fn.copy(nodes)
    if layouts:
        options["output_layouts"] = list(layouts)
    on_samples = functools.partial(bridge.on_samples, limited, rules=rules)
    nodes = fn.python_function(*inputs, function=on_samples, batch_processing=True, **options)
    return nodes if debugged else marked(nodes, stage)


def marked(nodes: Any, stage: Stage) -> Any:
    """Return nodes of one operator, and say what it is in a graph."""
    first = nodes[0] if isinstance(nodes, list | tuple) else nodes
    first.source.stage = stage  # the operator, which all of its outputs share
    return nodes


def to_device(device: str, node: DataNode) -> DataNode:
    """Return `node`, copied to the GPU if that is the device; never back from there."""
    return node.gpu() if device == "gpu" and node.device == "cpu" else node


def whole_batches_work() -> bool:
    """Tell whether DALI is of a version in which its operator for whole batches was tried."""
    return nvidia.dali.__version__.startswith(_WHOLE_BATCHES_TRIED)


def _without_last(function: Callable[..., Batches], *arrays: Array) -> Batches:
    return function(*arrays[:-1])


def _only_one_shape(rules: Sequence[str], *inputs: Array) -> Batches:
    """Require equal rows of the shapes of each input, (N, axes); return something, for another operator to wait for."""
    for rule, shapes in zip(rules, inputs, strict=True):
        if (shapes != shapes[0]).any():
            bridge.check_one_shape(map(tuple, shapes.tolist()), rule)
    return (np.zeros(len(inputs[0]), np.uint8),)


def _whole_batches(function: Callable[..., Batches], name: str, **options: Any) -> Any:
    """Return DALI's operator for whole batches that calls `function`."""
    options = {"device": "cpu", **options}
    return _whole_batch_function()(function, _module="dali_saliencymix.fn", _display_name=name, **options)


@functools.cache
def _whole_batch_function() -> Any:
    base: Any = ops.python_op_factory("_JaxFunction", "_JaxFunction", "_JaxFunction", generated=False)

    class WholeBatchFunction(base):  # type: ignore[misc]  # DALI makes the class while the program runs
        def __init__(self, function: Callable[..., Batches], *, device: str, **options: Any) -> None:
            on_tensors = _on_tensors if device == "cpu" else _on_gpu_tensors
            self.function = functools.partial(on_tensors, function)  # DALI knows nothing but its address
            super().__init__(function_id=id(self.function), device=device, **options)

    return WholeBatchFunction


def _on_tensors(function: Callable[..., Batches], *tensors: Any) -> tuple[Any, ...]:
    arrays = [python_function_plugin.DLTensorToArray(tensor.__dlpack__(stream=None)) for tensor in tensors]
    # NumPy exports no read-only array.
    return tuple(np.require(_dense(array), requirements="W").__dlpack__() for array in function(*arrays))


def _on_gpu_tensors(function: Callable[..., Batches], stream: int, *tensors: Any) -> tuple[Any, ...]:
    import cupy

    lent = cupy.cuda.Stream.from_external(LentStream(stream))
    return bridge.in_lasting_thread(lent, cupy, _on_cupy_tensors, function, tensors)


def _on_cupy_tensors(function: Callable[..., Batches], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    import cupy

    outputs = function(*map(cupy.from_dlpack, tensors))
    return tuple(_dense(array).__dlpack__(stream=-1) for array in outputs)  # -1: DALI reads it on this very stream


def _dense(array: Array) -> Array:
    """Return a C-contiguous array with the strides of one, also where an axis is 1 long: DALI looks at them."""
    strides = tuple(array.itemsize * math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    return array if array.strides == strides else array.copy()


def _limited(num_threads: int, function: Callable[..., Batches], *arrays: Array) -> Batches:
    with limited_to(num_threads):
        return function(*arrays)


class Buffers:
    """Arrays in host memory that are reused once nothing refers to them.

    DALI holds a batch for as long as it or its user needs it. A new array of that size costs as much as filling it: the
    kernel has to clear its pages first.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array that is C-contiguous, begins with a line of the cache, and is not initialised."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.nbytes != size + _CACHE_LINE:
            buffer = np.empty(size + _CACHE_LINE, np.uint8)
        start = -buffer.ctypes.data % _CACHE_LINE
        # A view of an array holds on to the first one that has memory of its own, or memory that is no array's.
        lent = np.frombuffer(buffer.data[start : start + size], dtype)
        weakref.finalize(lent, self._give_back, buffer).atexit = False
        return lent.reshape(shape)

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(buffer)

"""Python functions on whole batches as operators of a DALI pipeline.

DALI has two operators for Python functions. ``fn.python_function`` passes lists of samples, which it creates, copies
and unpacks while holding the GIL; `bridge` converts them to batches. The other operator belongs to DALI's JAX plugin
but does not need JAX. It passes whole batches to the function and takes whole batches back, without copies. It is
undocumented, so it is used only with the DALI versions on which it was tested. Both operators produce the same batches.

DALI calls the functions in its own thread. The message of an exception becomes part of DALI's error message.
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
_MOST_FREE = 4  # buffers; training never has more in use at a time


@dataclass(frozen=True)
class Stage:
    """Description of an operator for measurements: the attribute `stage` of the ``source`` of its nodes."""

    name: str  # what the operator does, apart from saliency
    # Permanently replaces the detector by one of negligible cost; None if the operator has no detector.
    leave_out_saliency: Callable[[], None] | None = None
    small: bool = False  # processes a few numbers per sample, and is measured with the next operator


def python_operator(
    function: Callable[..., Batches],
    *inputs: DataNode,
    name: str,
    stage: Stage,
    num_outputs: int = 1,
    layouts: Sequence[str] = (),
    rules: Sequence[str | None] = (bridge.OF_IMAGES,),
) -> Any:
    """Add the operator ``function(*batches) -> batches``, with `num_outputs` outputs, to the current pipeline.

    Batches are arrays (N, ...) on the device of the inputs. `layouts` are those of the first outputs. `name` is the
    operator's name in error messages, if DALI supports one. `rules` has one entry per input: the error message for
    samples of different shapes, or None if shapes cannot differ. On a CPU, `function` may use as many threads as the
    pipeline has. The pipeline's own threads are idle meanwhile, because DALI runs CPU operators one at a time.
    """
    device = inputs[0].device
    if device == "gpu":
        require("cupy", by="mixing on a GPU")
    pipeline = Pipeline.current()
    limited = functools.partial(_limited, pipeline.num_threads, function)
    options: dict[str, Any] = {"num_outputs": num_outputs, "device": device}
    # DALI's debug mode supports only the functions of `nvidia.dali.fn`.
    debugged = getattr(pipeline, "_debug_on", False)
    if whole_batches_work() and not debugged:
        options["output_layouts"] = [*layouts, *[""] * (num_outputs - len(layouts))]
        if device == "cpu":
            # DALI's own error for samples of different shapes mentions JAX, so check the shapes first.
            shapes = [node.shape() for node, rule in zip(inputs, rules, strict=True) if rule]
            checked = _whole_batches(functools.partial(_only_one_shape, list(filter(None, rules))), name)(*shapes)
            inputs = (*inputs, marked(checked, Stage("shapes", small=True)))
            limited = functools.partial(_without_last, limited)
        nodes = marked(_whole_batches(limited, name, **options)(*inputs), stage)
        # CuPy's pool may reuse a buffer once DALI or the user releases it, although another stream may still read it.
        # Return DALI's copy instead, which is made on this stream.
        return nodes if device == "cpu" else fn.copy(nodes)
    if layouts:
        options["output_layouts"] = list(layouts)
    on_samples = functools.partial(bridge.on_samples, limited, rules=rules)
    nodes = fn.python_function(*inputs, function=on_samples, batch_processing=True, **options)
    return nodes if debugged else marked(nodes, stage)


def marked(nodes: Any, stage: Stage) -> Any:
    """Attach `stage` to the operator of `nodes`; return `nodes`."""
    first = nodes[0] if isinstance(nodes, list | tuple) else nodes
    first.source.stage = stage  # all outputs of an operator share their source
    return nodes


def to_device(device: str, node: DataNode) -> DataNode:
    """Return `node`, copied to the GPU if `device` is ``"gpu"``; never copy from the GPU to the CPU."""
    return node.gpu() if device == "gpu" and node.device == "cpu" else node


def whole_batches_work() -> bool:
    """Return whether the operator for whole batches was tested with the installed version of DALI."""
    return nvidia.dali.__version__.startswith(_WHOLE_BATCHES_TRIED)


def _without_last(function: Callable[..., Batches], *arrays: Array) -> Batches:
    return function(*arrays[:-1])


def _only_one_shape(rules: Sequence[str], *inputs: Array) -> Batches:
    """Require equal rows in the shapes (N, axes) of each input; return a dummy output for operators to depend on."""
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

    class WholeBatchFunction(base):  # type: ignore[misc]  # DALI creates the class at run time
        def __init__(self, function: Callable[..., Batches], *, device: str, **options: Any) -> None:
            on_tensors = _on_tensors if device == "cpu" else _on_gpu_tensors
            self.function = functools.partial(on_tensors, function)  # DALI stores only its address
            super().__init__(function_id=id(self.function), device=device, **options)

    return WholeBatchFunction


def _on_tensors(function: Callable[..., Batches], *tensors: Any) -> tuple[Any, ...]:
    arrays = [python_function_plugin.DLTensorToArray(tensor.__dlpack__(stream=None)) for tensor in tensors]
    # NumPy cannot export read-only arrays through DLPack.
    return tuple(np.require(_dense(array), requirements="W").__dlpack__() for array in function(*arrays))


def _on_gpu_tensors(function: Callable[..., Batches], stream: int, *tensors: Any) -> tuple[Any, ...]:
    import cupy

    lent = cupy.cuda.Stream.from_external(LentStream(stream))
    return bridge.in_lasting_thread(lent, cupy, _on_cupy_tensors, function, tensors)


def _on_cupy_tensors(function: Callable[..., Batches], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    import cupy

    outputs = function(*map(cupy.from_dlpack, tensors))
    return tuple(_dense(array).__dlpack__(stream=-1) for array in outputs)  # -1: no sync, DALI reads on this stream


def _dense(array: Array) -> Array:
    """Return a C-contiguous array with canonical strides, also for axes of length 1: DALI checks the strides."""
    strides = tuple(array.itemsize * math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    return array if array.strides == strides else array.copy()


def _limited(num_threads: int, function: Callable[..., Batches], *arrays: Array) -> Batches:
    with limited_to(num_threads):
        return function(*arrays)


class Buffers:
    """Pool of arrays in host memory. An array is reused once nothing refers to it.

    DALI keeps a batch for as long as it or its user needs it. Allocating an array of that size takes as long as filling
    it, because the operating system has to clear its pages first.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an uninitialised C-contiguous array that is aligned to a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.nbytes != size + _CACHE_LINE:
            buffer = np.empty(size + _CACHE_LINE, np.uint8)
        start = -buffer.ctypes.data % _CACHE_LINE
        # NumPy collapses chains of views: a view refers to the array at the end of the chain. `frombuffer` makes `lent`
        # that array for all its views, so it lives as long as any of them.
        lent = np.frombuffer(buffer.data[start : start + size], dtype)
        weakref.finalize(lent, self._give_back, buffer).atexit = False
        return lent.reshape(shape)

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(buffer)

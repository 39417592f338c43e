"""Between DALI's ``fn.python_function``, which deals in lists of samples, and functions on batch arrays.

On a GPU DALI calls these functions with CuPy's current stream set to the operator's.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dali_saliencymix._array import Array, Namespace, array_namespace, is_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


# What must have one shape, and what to do: `{}` are the shapes that there are.
OF_IMAGES = "all images of a batch must have one shape, got {}; put fn.resize in front"


def check_one_shape(shapes: Iterable[tuple[int, ...]], rule: str = OF_IMAGES) -> None:
    """Require the samples of a batch to have one shape; `rule` says so in words."""
    different = sorted(set(shapes))
    if len(different) > 1:
        raise ValueError(rule.format(f"{len(different)}: {', '.join(map(str, different[:4]))}"))


def as_batch(samples: Sequence[Array], rule: str = OF_IMAGES) -> Array:
    """Return samples of one shape as one array (N, ...), without a copy where they are evenly spaced in memory.

    The result may be a view that does not keep the samples alive: hold on to them while it is in use.
    """
    check_one_shape((sample.shape for sample in samples), rule)
    first = samples[0]
    xp = array_namespace(first)
    pointers = _pointers(samples, xp)
    step = pointers[1] - pointers[0] if len(samples) > 1 else first.nbytes
    contiguous = all(sample.flags.c_contiguous for sample in samples)
    evenly = contiguous and step >= first.nbytes and pointers == [pointers[0] + step * i for i in range(len(samples))]
    if not evenly:
        return xp.stack(samples)
    return xp.lib.stride_tricks.as_strided(first, (len(samples), *first.shape), (step, *first.strides))


def as_samples(batch: Array) -> list[Array]:
    """Return the samples of a batch array as a list of arrays, also where a sample is a single number."""
    return [batch[i, ...] for i in range(len(batch))]


def on_samples(
    function: Callable[..., tuple[Array, ...]], *inputs: Sequence[Array], rules: Sequence[str | None]
) -> tuple[list[Array], ...]:
    """Apply ``function(*batches) -> batches`` to lists of samples of one shape, as `rules` say; return such lists."""
    xp = array_namespace(inputs[0][0])
    if is_host(xp):
        return _on_batches(function, inputs, rules)
    stream = xp.cuda.get_current_stream()
    try:
        return in_lasting_thread(stream, xp, _on_batches, function, inputs, rules)
    except BaseException:
        # DALI lends its stream to this one of CuPy, which would destroy it in the end, and takes it back only after a
        # call that returns. A destroyed one would come back in some later pipeline.
        stream.ptr = 0
        raise


def in_lasting_thread(stream: Any, xp: Namespace, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called on a CuPy stream and the current device in a thread of its own.

    DALI calls from threads whose state in Python ends with each call, and with it what CuPy keeps for a thread: plans
    of FFTs and the handle of cuBLAS. To create these for every batch takes time, and to end them waits for all work on
    the GPU, that of the training too. A thread serves one stream, since a plan has memory that two must not share.
    """
    device = xp.cuda.runtime.getDevice()

    def call() -> Any:
        with xp.cuda.Device(device), stream:
            return function(*args)

    return _thread_for(device, stream.ptr).submit(call).result()


@functools.cache
def _thread_for(device: int, stream: int) -> ThreadPoolExecutor:
    del device, stream  # only the key
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="dali_saliencymix_gpu")


def _on_batches(function: Callable[..., Any], inputs: Any, rules: Sequence[str | None]) -> tuple[list[Array], ...]:
    batches = [as_batch(samples, rule or OF_IMAGES) for samples, rule in zip(inputs, rules, strict=True)]
    return tuple(as_samples(batch) for batch in function(*batches))


def _pointers(samples: Sequence[Array], xp: Namespace) -> list[int]:
    if is_host(xp):
        return [sample.__array_interface__["data"][0] for sample in samples]
    return [sample.data.ptr for sample in samples]

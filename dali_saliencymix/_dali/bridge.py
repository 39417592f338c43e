"""Adapter between DALI's ``fn.python_function``, which passes lists of samples, and functions on batch arrays.

On a GPU, DALI calls these functions with CuPy's current stream set to the stream of the operator.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dali_saliencymix._array import Array, Namespace, array_namespace, is_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


# Message for samples of different shapes: `{}` stands for the shapes.
OF_IMAGES = "all images of a batch must have one shape, got {}; resize or crop all images to one size first"


def check_one_shape(shapes: Iterable[tuple[int, ...]], rule: str = OF_IMAGES) -> None:
    """Require the samples of a batch to have one shape; `rule` is the error message."""
    different = sorted(set(shapes))
    if len(different) > 1:
        raise ValueError(rule.format(f"{len(different)} shapes: {', '.join(map(str, different[:4]))}"))


def as_batch(samples: Sequence[Array], rule: str = OF_IMAGES) -> Array:
    """Return samples of one shape as one array (N, ...), without a copy if they are evenly spaced in memory.

    The result may be a view that does not keep the samples alive, so the caller must keep a reference to them.
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
    """Return the samples of a batch as a list of arrays; scalar samples become arrays of shape ()."""
    return [batch[i, ...] for i in range(len(batch))]


def on_samples(
    function: Callable[..., tuple[Array, ...]], *inputs: Sequence[Array], rules: Sequence[str | None]
) -> tuple[list[Array], ...]:
    """Apply ``function(*batches) -> batches`` to lists of samples of one shape; `rules` are the error messages."""
    xp = array_namespace(inputs[0][0])
    if is_host(xp):
        return _on_batches(function, inputs, rules)
    stream = xp.cuda.get_current_stream()
    try:
        return in_lasting_thread(stream, xp, _on_batches, function, inputs, rules)
    except BaseException:
        # DALI puts its own stream into this CuPy object and removes it only if the call returns. After an exception the
        # object would destroy DALI's stream when it is deleted, and a later pipeline could use the destroyed stream.
        stream.ptr = 0
        raise


def in_lasting_thread(stream: Any, xp: Namespace, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called on a CuPy stream and the current device in a persistent thread.

    DALI calls Python from threads whose Python thread state ends with each call. CuPy's per-thread objects, the FFT
    plans and the cuBLAS handle, end with it. Creating them for every batch takes time, and destroying them waits for
    all work on the GPU, including the training step. Each thread serves one stream, because FFT plans have work areas
    that two streams must not share.
    """
    device = xp.cuda.runtime.getDevice()

    def call() -> Any:
        with xp.cuda.Device(device), stream:
            return function(*args)

    return _thread_for(device, stream.ptr).submit(call).result()


@functools.cache
def _thread_for(device: int, stream: int) -> ThreadPoolExecutor:
    del device, stream  # only the cache key
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="dali_saliencymix_gpu")


def _on_batches(function: Callable[..., Any], inputs: Any, rules: Sequence[str | None]) -> tuple[list[Array], ...]:
    batches = [as_batch(samples, rule or OF_IMAGES) for samples, rule in zip(inputs, rules, strict=True)]
    return tuple(as_samples(batch) for batch in function(*batches))


def _pointers(samples: Sequence[Array], xp: Namespace) -> list[int]:
    if is_host(xp):
        return [sample.__array_interface__["data"][0] for sample in samples]
    return [sample.data.ptr for sample in samples]

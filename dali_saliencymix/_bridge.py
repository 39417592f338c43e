"""Between DALI's Python operator, which deals in lists of samples, and functions on batch arrays.

DALI calls these functions in a thread of its own, on a GPU with CuPy's current stream set to the operator's.
Whatever they raise reaches the user as text inside DALI's own error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dali_saliencymix._array import Array, array_namespace, is_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dali_saliencymix.core import Mixed


def as_batch(samples: Sequence[Array]) -> Array:
    """Return samples of one shape as one array (N, ...), without copying where they lie at even distances.

    The result may be a view that does not keep the samples alive: hold on to them while it is in use.

    Raises
    ------
    ValueError
        If the samples differ in shape.
    """
    first = samples[0]
    shapes = {sample.shape for sample in samples}
    if len(shapes) > 1:
        shown = ", ".join(str(shape) for shape in sorted(shapes)[:4])
        msg = f"all images of a batch must have one shape, got {len(shapes)}: {shown}; put fn.resize in front"
        raise ValueError(msg)
    xp = array_namespace(first)
    pointers = [_pointer(sample) for sample in samples]
    step = pointers[1] - pointers[0] if len(samples) > 1 else first.nbytes
    contiguous = all(sample.flags.c_contiguous for sample in samples)
    evenly = contiguous and step >= first.nbytes and pointers == [pointers[0] + step * i for i in range(len(samples))]
    if not evenly:
        return xp.stack(samples)
    return xp.lib.stride_tricks.as_strided(first, (len(samples), *first.shape), (step, *first.strides))


def as_samples(batch: Array) -> list[Array]:
    """Return the samples of a batch array as a list of arrays, also where a sample is a single number."""
    return [batch[i, ...] for i in range(len(batch))]


def mix_samples(
    mix: Callable[[Array, Array], Mixed], images: Sequence[Array], params: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Apply ``mix(images, params)`` to the samples of a batch; return the samples of images and of lam."""
    mixed = mix(as_batch(images), as_batch(params))
    return as_samples(mixed.images), as_samples(mixed.lam)


def map_samples(function: Callable[[Array], Array], samples: Sequence[Array]) -> list[Array]:
    """Apply ``function(batch) -> batch`` to the samples of a batch; return the samples of the result."""
    return as_samples(function(as_batch(samples)))


def _pointer(array: Array) -> int:
    if is_host(array_namespace(array)):
        return array.__array_interface__["data"][0]
    return array.data.ptr

"""Between PyTorch's tensors and arrays of NumPy or CuPy: through DLPack, without copies, on one stream."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import dlpack

from dali_saliencymix._array import LentStream
from dali_saliencymix.packages import require

if TYPE_CHECKING:
    from dali_saliencymix._array import Array


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy or CuPy array, without a copy."""
    return (_cupy() if tensor.is_cuda else np).from_dlpack(tensor.detach())


def to_tensor(array: Array) -> torch.Tensor:
    """Return a NumPy or CuPy array as a tensor, without a copy unless no tensor can be like it."""
    read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    # A tensor cannot run backwards through memory: PyTorch ends the process when it is handed such an array.
    backwards = any(stride < 0 for stride in array.strides)
    return dlpack.from_dlpack(array.copy() if read_only or backwards else array)


def on_the_device_of(images: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device == images.device:
        return tensor
    # From pinned memory the copy does not stall the stream.
    return tensor.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else tensor.to(images.device)


def on_torch_s_stream(images: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Let CuPy compute where PyTorch does, so that neither has to wait for the other."""
    if not images.is_cuda:
        return contextlib.nullcontext()
    cupy, contexts = _cupy(), contextlib.ExitStack()
    contexts.enter_context(cupy.cuda.Device(images.device.index))
    lent = LentStream(torch.cuda.current_stream(images.device).cuda_stream)
    contexts.enter_context(cupy.cuda.Stream.from_external(lent))
    return contexts


def torch_on_the_stream_of(images: Array) -> contextlib.AbstractContextManager[Any]:
    """Let PyTorch compute where CuPy does: on DALI's stream, inside a pipeline."""
    if isinstance(images, np.ndarray):
        return contextlib.nullcontext()
    stream, device = _cupy().cuda.get_current_stream().ptr, images.device.id
    if not stream:  # the default one, of which PyTorch would make a new one
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))  # type: ignore[no-untyped-call]


def _cupy() -> Any:
    require("cupy", by="mixing on a GPU")
    import cupy

    return cupy

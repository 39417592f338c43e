"""Zero-copy conversion between PyTorch tensors and NumPy or CuPy arrays through DLPack, on a shared stream."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import dlpack

from dali_saliencymix._array import LentStream
from dali_saliencymix.packages import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dali_saliencymix._array import Array


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy or CuPy array, without a copy."""
    return (_cupy() if tensor.is_cuda else np).from_dlpack(tensor.detach())


def to_tensor(array: Array) -> torch.Tensor:
    """Return a NumPy or CuPy array as a tensor; copy only read-only arrays and those with negative strides."""
    read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    # Tensors do not support negative strides: PyTorch aborts the process when it imports such an array.
    backwards = any(stride < 0 for stride in array.strides)
    return dlpack.from_dlpack(array.copy() if read_only or backwards else array)


def on_the_device_of(images: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device == images.device:
        return tensor
    # A copy from pinned memory does not block the host.
    return tensor.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else tensor.to(images.device)


@contextlib.contextmanager
def on_torch_s_stream(images: torch.Tensor) -> Iterator[None]:
    """Use PyTorch's current stream as that of CuPy, so that the libraries need no synchronisation."""
    if not images.is_cuda:
        yield
        return
    cuda = _cupy().cuda
    lent = LentStream(torch.cuda.current_stream(images.device).cuda_stream)
    with cuda.Device(images.device.index), cuda.Stream.from_external(lent):
        yield


def torch_on_the_stream_of(images: Array) -> contextlib.AbstractContextManager[Any]:
    """Use CuPy's current stream as that of PyTorch; inside a pipeline it is DALI's stream."""
    if isinstance(images, np.ndarray):
        return contextlib.nullcontext()
    stream, device = _cupy().cuda.get_current_stream().ptr, images.device.id
    if not stream:  # the default stream, for which ExternalStream would create a new one
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))  # type: ignore[no-untyped-call]


def _cupy() -> Any:
    require("cupy", by="mixing on a GPU")
    import cupy

    return cupy

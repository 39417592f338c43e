"""Saliency detection by a PyTorch network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dali_saliencymix._checks import check_at_least, kind_of
from dali_saliencymix._tensors import to_array, to_tensor, torch_on_the_stream_of
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dali_saliencymix._array import Array


class NetworkSaliency:
    """Wrap a PyTorch network as a detector, for the argument `saliency` of all mixing functions.

    Parameters
    ----------
    network : torch.nn.Module
        Takes normalised images (N, 3, H, W) float32, contiguous, and returns maps (N, h, w) or (N, 1, h, w), larger
        where more salient. It must be on the device on which images are mixed, and in evaluation mode.
    mean, std : sequence of float
        Mean and standard deviation of each channel, for pixels in 0..1; by default ImageNet's.
    size : int, optional
        Height and width to which images are resized for the network; by default they are not resized.

    Raises
    ------
    ValueError
        If an option is invalid.
    TypeError
        When called, if the network does not return a tensor.

    Notes
    -----
    The ablation of the SaliencyMix paper includes such a network, BASNet at 224x224.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from dali_saliencymix import saliencymix
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.Sigmoid()).eval()
    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> NetworkSaliency(network)(images).shape
    (2, 30, 30)
    >>> mixed = saliencymix(images, np.array([1, 0]), np.full(2, 0.75), saliency=NetworkSaliency(network))
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size: int | None = None,
    ) -> None:
        if size is not None:
            check_at_least(size, "size", 1)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                msg = f"{name} must have 3 numbers, one for each channel, got {len(values)}"
                raise ValueError(msg)
        self._network = network
        self._mean, self._std, self._size = tuple(mean), tuple(std), size

    @torch.inference_mode()
    def __call__(self, images: Array) -> Array:
        """Return the maps (N, h, w) float32 of images (N, H, W, C) uint8, in their array library."""
        with torch_on_the_stream_of(images):
            pixels = to_tensor(images).permute(0, 3, 1, 2).float().div(255)
            if self._size is not None:
                size = (self._size, self._size)
                pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
            # Python numbers, since tensors of mean and std would need a copy to the GPU, which makes the host wait.
            channels = zip(pixels.expand(-1, 3, -1, -1).unbind(1), self._mean, self._std, strict=True)
            maps = self._network(torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1))
            if not isinstance(maps, torch.Tensor):
                msg = f"network must return a tensor of shape (N, h, w) or (N, 1, h, w), got {kind_of(maps)}"
                raise TypeError(msg)
            return to_array((maps.squeeze(1) if maps.ndim == 4 else maps).float())

"""Separable filters for small maps, (N, h, w) float32, with the border mirrored at the centres of the outermost pixels.

Two matrix products filter a batch of small maps in fewer steps than sums of shifted copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant
from dali_saliencymix._tables import gaussian_weights

if TYPE_CHECKING:
    from collections.abc import Callable


def filtered(maps: Array, matrix: Callable[[int], np.ndarray]) -> Array:
    """Filter (N, h, w) float32 `maps` along rows and columns by the matrices ``matrix(h)`` and ``matrix(w)``."""
    xp = array_namespace(maps)
    _, height, width = maps.shape
    return constant(xp, matrix, height) @ maps @ constant(xp, matrix, width).T


def filtered_narrowly(maps: Array, weights: tuple[float, ...]) -> Array:
    """Filter float32 `maps` along columns and rows by symmetric `weights`, given from the centre outwards.

    The maps must have a mirrored margin as wide as the reach of the filter. The result, (N, h, w), has no margin.

    The order of sums and products is fixed, and the kernels use the same order. For up to five weights this takes no
    longer than two matrix products on a CPU.
    """
    xp = array_namespace(maps)
    for axis in (1, 2):
        reach = len(weights) - 1
        size = maps.shape[axis] - 2 * reach
        shifted = [maps[:, i : i + size] if axis == 1 else maps[:, :, i : i + size] for i in range(2 * reach + 1)]
        maps = shifted[reach] * xp.float32(weights[0])
        for i in range(1, reach + 1):
            maps += (shifted[reach - i] + shifted[reach + i]) * xp.float32(weights[i])
    return maps


def with_margin(size: int, reach: int) -> np.ndarray:
    """Return the indices of the pixels with a mirrored margin of `reach` pixels at both ends: (size + 2 * reach,)."""
    return np.pad(np.arange(size), reach, mode="reflect")


def gaussian_matrix(size: int, sigma: float, reach: int) -> np.ndarray:
    """Return the (size, size) float32 matrix that applies a Gaussian truncated at `reach` pixels."""
    matrix, mirrored = np.zeros((size, size)), with_margin(size, reach)
    for offset, weight in enumerate(gaussian_weights(sigma, reach)):
        matrix[np.arange(size), mirrored[offset : offset + size]] += weight
    return matrix.astype(np.float32)

"""Separable filters of small maps, (N, h, w) float32, with the border mirrored at the centres of its pixels.

Maps are small and many: two matrix products filter a batch in fewer steps than sums over shifted copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant

if TYPE_CHECKING:
    from collections.abc import Callable


def filtered(maps: Array, matrix: Callable[[int], np.ndarray]) -> Array:
    """Filter (N, h, w) float32 `maps` along rows and columns by the matrices ``matrix(h)`` and ``matrix(w)``."""
    xp = array_namespace(maps)
    _, height, width = maps.shape
    return constant(xp, matrix, height) @ maps @ constant(xp, matrix, width).T


def filter_matrix(size: int, weights: np.ndarray) -> np.ndarray:
    """Return the (size, size) float32 matrix that applies an odd number of `weights`."""
    matrix = np.zeros((size, size))
    reach = len(weights) // 2
    mirrored = np.pad(np.arange(size), reach, mode="reflect")
    for offset, weight in enumerate(weights):
        matrix[np.arange(size), mirrored[offset : offset + size]] += weight
    return matrix.astype(np.float32)


def gaussian_matrix(size: int, sigma: float, reach: int) -> np.ndarray:
    """Return the matrix that applies a Gaussian cut off at `reach` pixels."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return filter_matrix(size, weights / weights.sum())

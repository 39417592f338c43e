"""Constants and tables shared by array functions and kernels, as NumPy arrays or Python numbers."""

from __future__ import annotations

import numpy as np

# Rec. 601 luma weights in units of 2**-15, for RGB order. They give the grey levels of OpenCV's cvtColor for all 2**24
# colours.
RED, GREEN, BLUE, SHIFT = 9798, 19235, 3735, 15

# fine_grained: half the side of the square surrounds, in pixels, for images of any size.
SURROUNDS = (12, 24, 28, 48, 56, 112)

# spectral_residual: maximum height and width of the maps.
MAP_SIZE = 64


def gaussian_weights(sigma: float, reach: int) -> np.ndarray:
    """Return the weights of a Gaussian truncated at `reach` pixels, (2 * reach + 1,), with sum 1."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


# spectral_residual: weights of the symmetric filters along one axis, from the centre outwards.
MEAN = (1 / 3, 1 / 3)
GAUSSIAN = tuple(float(weight) for weight in gaussian_weights(8.0, 2)[2:])


def _tap_centres(size: int, reduced: int) -> np.ndarray:
    return (np.arange(reduced) + 0.5) * (size / reduced) - 0.5


def tap_indices(size: int, reduced: int) -> np.ndarray:
    """Return the index of the lower neighbour of each sample of a reduction, then of the upper: (2 * reduced,)."""
    lower = np.floor(_tap_centres(size, reduced)).astype(np.int64)
    return np.concatenate([lower, lower + 1]).clip(0, size - 1)


def tap_weights(size: int, reduced: int) -> np.ndarray:
    """Return the weight of each upper neighbour in units of 1/256: (reduced,) int32."""
    centres = _tap_centres(size, reduced)
    return np.rint((centres - np.floor(centres)) * 256).astype(np.int32)


def closeness_to_centre(map_height: int, map_width: int, height: int, width: int) -> np.ndarray:
    """Return the rank of each cell of a map by distance to the centre, the nearest highest: (h, w) int32, unique."""
    y = (np.arange(map_height) + 0.5) / map_height * height - height / 2
    x = (np.arange(map_width) + 0.5) / map_width * width - width / 2
    distance = np.round(y[:, None] ** 2 + x**2, 6)  # so that symmetric cells tie despite rounding
    order = np.argsort(distance, axis=None, kind="stable")
    closeness = np.empty(order.size, np.int32)
    closeness[order] = np.arange(order.size, 0, -1)
    return closeness.reshape(distance.shape)


def scaling(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return the mean and 1 / std of each channel: (2, C) float32."""
    return np.stack([np.asarray(mean), 1 / np.asarray(std, np.float64)]).astype(np.float32)

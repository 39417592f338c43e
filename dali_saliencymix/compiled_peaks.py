"""The search for peaks as a kernel that Numba compiles for the CPU; imported only where Numba is installed."""

from __future__ import annotations

import numba
import numpy as np

from dali_saliencymix._array import Array

_kernel = numba.njit(nogil=True, cache=True, error_model="numpy")


def most_salient(maps: Array, closeness: Array) -> Array:
    """Return the index of the largest value of each map (N, h, w) float32, flat; of several that with most `closeness`.

    A pixel that is NaN is taken for minus infinity.
    """
    found = np.empty(len(maps), np.int64)
    _most_salient(maps, closeness, found)
    return found


@_kernel
def _most_salient(maps, closeness, found):  # type: ignore[no-untyped-def]
    count, height, width = maps.shape
    tops = np.empty(width, np.float32)  # of the columns: side by side they use the vector units
    for i in range(count):
        _tops_of_columns(maps[i], tops)
        top = tops.max()
        best = 0
        for x in range(width):
            if tops[x] == top:
                for y in range(height):
                    # Anything that is not over minus infinity is NaN or minus infinity itself.
                    is_top = maps[i, y, x] == top or (top == -np.inf and not maps[i, y, x] > top)
                    if is_top and closeness[y, x] > best:
                        best = closeness[y, x]
                        found[i] = y * width + x


@_kernel
def _tops_of_columns(saliency_map, tops):  # type: ignore[no-untyped-def]
    height, width = saliency_map.shape
    tops[:] = -np.inf
    for y in range(height):
        for x in range(width):
            tops[x] = saliency_map[y, x] if saliency_map[y, x] > tops[x] else tops[x]

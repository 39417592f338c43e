"""Peaks and boxes: `dali_saliencymix.boxes` in CUDA.

All arrays are CuPy arrays. Maps are (N, h, w) float32, peaks (N, 2) int32 as (y, x), and boxes (N, 4) int32 as
(y0, x0, y1, x1), half-open.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, constant
from dali_saliencymix._cuda.launch import GIVEN, Launch, blocks_for, index_with_step, int32_rows, prepared, with_step
from dali_saliencymix._tables import closeness_to_centre

_LAM_DTYPES = (np.dtype("float32"), np.dtype("float64"))


def saliency_peaks(saliency_map: Array, height: int, width: int, *, least: bool = False) -> Array:
    """Return the result of `dali_saliencymix.saliency_peaks` for float32 maps."""
    xp = array_namespace(saliency_map)
    peaks = xp.empty((len(saliency_map), 2), xp.int32)
    _saliency_peaks(xp, saliency_map.shape, height, width, least)(xp.ascontiguousarray(saliency_map), peaks)
    return peaks


@prepared
def _saliency_peaks(xp: Namespace, shape: tuple[int, int, int], height: int, width: int, least: bool) -> Launch:
    count, map_height, map_width = shape
    sizes = map_height, map_width, height, width
    arguments = (GIVEN, *cell_tables(xp, *sizes), *sizes, int(least), GIVEN)
    return Launch(xp, "peaks_and_boxes:saliency_peaks", count, 1024, *arguments)


def boxes_at_peaks(
    peaks: Array,
    source_index: Array,
    lam: Array,
    height: int,
    width: int,
    *,
    box: str = "fit",
    centres: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the boxes in the receivers and in the sources, and the kept share of each receiver, (N,) float32.

    The result is bit-identical to ``boxes_at(peaks[source_index], lam, height, width, box=box)``, then, with `centres`,
    ``boxes_moved_to``, then ``kept_fraction``. Empty boxes are all 0. Without `centres`, both boxes are the same array.
    An index outside the batch wraps around. If `lam` is outside [0, 1], the box is empty or the whole image.
    """
    xp = array_namespace(peaks)
    count = len(peaks)
    boxes = xp.empty((count, 4), xp.int32)
    source_boxes = None if centres is None else xp.empty((count, 4), xp.int32)
    kept = xp.empty((count,), xp.float32)
    if count:
        if lam.dtype not in _LAM_DTYPES:
            lam = lam.astype(xp.float32)
        lam, lam_step = with_step(lam, (lam.dtype,), lam.dtype.itemsize)
        source_index, index_step = index_with_step(source_index)
        launch = _boxes_at_peaks(xp, count, height, width, box, lam.dtype, lam_step, index_step)
        launch(int32_rows(peaks, xp), source_index, lam, int32_rows(centres, xp), boxes, source_boxes, kept)
    return boxes, boxes if source_boxes is None else source_boxes, kept


@prepared
def _boxes_at_peaks(
    xp: Namespace,
    count: int,
    height: int,
    width: int,
    box: str,
    lam_dtype: np.dtype[Any],
    lam_step: int,
    index_step: int,
) -> Launch:
    kernel = f"peaks_and_boxes:boxes_at_peaks_{lam_dtype.name}"
    asked = (count, height, width, int(box == "fit"))
    arguments = (GIVEN, GIVEN, index_step, GIVEN, lam_step, GIVEN, *asked, GIVEN, GIVEN, GIVEN)
    return Launch(xp, kernel, blocks_for(count, 128), 128, *arguments)


def cell_tables(xp: Namespace, map_height: int, map_width: int, height: int, width: int) -> tuple[Array, Array]:
    """Return the tables of ``Cells``: the closeness of each cell of a map to the centre, and the cells by distance."""
    size = map_height, map_width, height, width
    return constant(xp, closeness_to_centre, *size), constant(xp, _cells_by_distance, *size)


def _cells_by_distance(map_height: int, map_width: int, height: int, width: int) -> np.ndarray:
    closeness = closeness_to_centre(map_height, map_width, height, width).ravel()
    cells = np.empty(closeness.size, np.int32)
    cells[closeness.size - closeness] = np.arange(closeness.size)
    return cells

"""A whole mix in kernels: detector and peaks, boxes, pasting. `dali_saliencymix.saliencymix` in CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._array import Array
from dali_saliencymix._cuda.boxes import boxes_at_peaks, saliency_peaks
from dali_saliencymix._cuda.mixing import paste_boxes
from dali_saliencymix._cuda.saliency import fine_grained_peaks, spectral_residual_peaks
from dali_saliencymix.boxes import points_at
from dali_saliencymix.boxes import saliency_peaks as peaks_of_maps
from dali_saliencymix.placement import SOURCES, checked_maps
from dali_saliencymix.saliency import get_detector

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix.placement import Placement
    from dali_saliencymix.saliency import Detector


def saliencymix(
    images: Array,
    source_index: Array,
    lam: Array,
    placement: Placement,
    peaks: Array | None,
    point: Array | None,
    paste: Callable[..., Array] = paste_boxes,
) -> tuple[Array, Array, Array, Array]:
    """Return images, lam, boxes and source boxes as `dali_saliencymix.saliencymix` does, of checked arguments.

    Parameters
    ----------
    images, source_index, lam, peaks, point
        As for `dali_saliencymix.saliencymix`; CuPy arrays.
    placement : Placement
        Options, without ``per_batch``.
    paste : callable
        `paste_boxes` of here, or what else makes the mixed images.

    Notes
    -----
    With `spectral_residual` or `fine_grained` no map is ever in memory: 3 and 7 launches. Other detectors make their
    maps in array operations. Maps of `spectral_residual` come through another FFT, so near ties can be decided
    otherwise; all else has the same bits.
    """
    size = images.shape[1:3]

    def peaks_at(which: str) -> Array:
        if peaks is not None:
            return peaks
        return _peaks(images, placement.saliency, least=which == "non_salient")

    own = peaks_at(placement.source)
    centres = None
    if placement.destination == "random":
        centres = points_at(point, *size)
    elif placement.destination in SOURCES:
        centres = own if placement.destination == placement.source else peaks_at(placement.destination)
    boxes, source_boxes, kept = boxes_at_peaks(own, source_index, lam, *size, box=placement.box, centres=centres)
    other_place = None if centres is None else source_boxes
    return paste(images, source_index, boxes, source_boxes=other_place), kept, boxes, source_boxes


def _peaks(images: Array, saliency: str | Detector, *, least: bool) -> Array:
    size = images.shape[1:3]
    if saliency == "spectral_residual":
        return spectral_residual_peaks(images, *size, least=least)
    if saliency == "fine_grained":
        return fine_grained_peaks(images, least=least)
    maps = checked_maps(get_detector(saliency), images)
    find = saliency_peaks if maps.dtype == np.float32 else peaks_of_maps
    return find(maps, *size, least=least)

"""From saliency maps to boxes: integer geometry on whole batches.

A peak is (y, x) in image pixels. A box is (y0, x0, y1, x1) in image pixels, half-open. Both are int32. `lam` is the
weight of the receiver, so a box covers the share 1 - lam of it.

Each public function checks its arguments and calls an internal function that does not, as `dali_saliencymix.mix` does.
"""

from __future__ import annotations

import functools

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant, is_host
from dali_saliencymix._checks import (
    check_array,
    check_boxes,
    check_choice,
    check_fractions,
    check_lam,
    check_maps,
    check_points,
)
from dali_saliencymix._routes import route_of
from dali_saliencymix._tables import closeness_to_centre
from dali_saliencymix._threads import in_chunks
from dali_saliencymix.options import BOXES

_CHUNK = 16  # number of maps that fit into a core's cache
_WORTH_A_THREAD = 2**20  # pixels: waking a thread takes as long as searching a quarter of them


def saliency_peaks(
    saliency_map: Array, height: int, width: int, *, least: bool = False, algorithm: str = "auto"
) -> Array:
    """Return the most salient pixel of each image, or the least salient one.

    Parameters
    ----------
    saliency_map : ndarray of shape (N, h, w), real
        Saliency maps; larger is more salient. NaN is chosen only if all values of a map are NaN.
    height, width : int
        Size of the images that the maps belong to.
    least : bool
        If true, return the least salient pixel instead.
    algorithm : {"auto", "array", "kernel"}
        Array operations or a kernel. There are kernels for float32 maps: in CUDA on a GPU, and, for the maximum only,
        compiled by Numba on a CPU. Both algorithms return the same pixels. ``"auto"`` selects the kernel on a GPU, and
        on a CPU if Numba is installed.

    Returns
    -------
    ndarray of shape (N, 2), int32
        (y, x) in image pixels: the centre of the extreme cell of the map. Ties go to the cell nearest to the centre of
        the image; of equally near cells, to the first in row-major order.

    Notes
    -----
    The paper's released code takes the first maximum in row-major order, which biases the boxes towards the top of the
    image.

    Examples
    --------
    >>> import numpy as np
    >>> saliency_peaks(np.eye(4, dtype=np.float32)[None], 8, 8).tolist()
    [[3, 3]]
    """
    xp = check_maps(saliency_map)
    if saliency_map.dtype.kind not in "biuf":
        msg = f"saliency_map must be of real dtype, got {saliency_map.dtype}"
        raise TypeError(msg)
    return find_peaks(saliency_map, height, width, least=least, route=route_of(algorithm, xp))


def find_peaks(saliency_map: Array, height: int, width: int, *, least: bool = False, route: str = "array") -> Array:
    """Return what `saliency_peaks` returns, without checks; use the kernel of `route` if it supports the maps."""
    xp = array_namespace(saliency_map)
    route = route if saliency_map.dtype == np.float32 else "array"
    if route == "cuda":
        from dali_saliencymix import _cuda

        return _cuda.saliency_peaks(saliency_map, height, width, least=least)
    _, map_height, map_width = saliency_map.shape
    closeness = constant(xp, closeness_to_centre, map_height, map_width, height, width)
    find = functools.partial(_extreme, closeness=closeness, least=least)
    if not is_host(xp):
        peak = find(saliency_map)
    elif route == "numba" and not least:
        from dali_saliencymix._numba import pixels

        find = functools.partial(pixels.most_salient, closeness=closeness)
        peak = in_chunks(find, saliency_map, max(_WORTH_A_THREAD // (map_height * map_width), 1))
    else:
        peak = in_chunks(find, saliency_map, _CHUNK)
    return xp.take(constant(xp, _centres, map_height, map_width, height, width), peak, axis=0)


def _centres(map_height: int, map_width: int, height: int, width: int) -> np.ndarray:
    """Return the pixel (y, x) at the centre of each cell of a map, in row-major order: (h * w, 2) int32."""
    cells = np.stack(np.divmod(np.arange(map_height * map_width), map_width), axis=1)
    return ((2 * cells + 1) * (height, width) // (2 * map_height, 2 * map_width)).astype(np.int32)


def _extreme(saliency_map: Array, *, closeness: Array, least: bool) -> Array:
    """Return the flat index of the maximum or minimum of each map; ties go to the largest `closeness`."""
    xp = array_namespace(saliency_map)
    count = len(saliency_map)
    extremum = (saliency_map.min if least else saliency_map.max)(axis=(1, 2), keepdims=True)
    # The extremum is NaN if any pixel is. Testing it first saves two passes over all pixels on a CPU.
    if saliency_map.dtype.kind == "f" and (not is_host(xp) or np.isnan(extremum).any()):
        saliency_map = xp.fmin(saliency_map, xp.inf) if least else xp.fmax(saliency_map, -xp.inf)
        extremum = (saliency_map.min if least else saliency_map.max)(axis=(1, 2), keepdims=True)
    extreme = saliency_map == extremum
    if not is_host(xp) or np.count_nonzero(extreme) > count:  # there are ties
        extreme = xp.where(extreme, closeness, 0)
    return extreme.reshape(count, -1).argmax(axis=1)


def boxes_at(peaks: Array, lam: Array, height: int, width: int, *, box: str = "fit") -> Array:
    """Return boxes around `peaks` that cover the share 1 - `lam` of the image.

    Parameters
    ----------
    peaks : ndarray of shape (N, 2), int32
        (y, x), inside the image.
    lam : ndarray of shape (N,), floating
        Share of the image to keep, in [0, 1].
    height, width : int
        Size of the images.
    box : {"fit", "clip"}
        Treatment of boxes that cross the border of the image. Boxes have the size floor(H s) x floor(W s) with
        s = sqrt(1 - lam). ``"fit"`` moves a box inside and keeps its size, as in the paper. ``"clip"`` cuts it at the
        border, as in the released code, and rounds the sides of all boxes down to even numbers.

    Returns
    -------
    ndarray of shape (N, 4), int32
        (y0, x0, y1, x1). If a side is shorter than one pixel (two with ``"clip"``), the box is empty.

    Notes
    -----
    Uddin et al., "SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization", ICLR 2021,
    section 3.2; the side follows Yun et al., "CutMix", ICCV 2019, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> peaks, lam = np.array([[0, 5]], np.int32), np.array([0.75], np.float32)
    >>> boxes_at(peaks, lam, 8, 8).tolist()
    [[0, 3, 4, 7]]
    >>> boxes_at(peaks, lam, 8, 8, box="clip").tolist()
    [[0, 3, 2, 7]]
    """
    check_choice(box, "box", BOXES)
    xp = check_array(peaks, "peaks")
    check_points(peaks, "peaks", xp, len(peaks), height, width)
    check_lam(lam, xp, len(peaks))
    return place_boxes(peaks, lam, height, width, box=box)


def place_boxes(peaks: Array, lam: Array, height: int, width: int, *, box: str) -> Array:
    """Return what `boxes_at` returns, without checks."""
    xp = array_namespace(peaks)
    size = constant(xp, _size, height, width)
    # float64 on every device, so that the floor does not depend on the device.
    side = (size * xp.sqrt(xp.subtract(1, lam, dtype=xp.float64))[:, None]).astype(xp.int32)
    if box == "fit":
        start = xp.clip(peaks - side // 2, 0, size - side)
        stop = start + side
    else:
        start = xp.clip(peaks - side // 2, 0, size)
        stop = xp.clip(peaks + side // 2, 0, size)
    return xp.concatenate([start, stop], axis=1).astype(xp.int32, copy=False)


def boxes_moved_to(boxes: Array, centres: Array, height: int, width: int) -> Array:
    """Return boxes of the same sizes around other points, moved inside the image where they cross its border.

    Parameters
    ----------
    boxes : ndarray of shape (N, 4), int32
        Boxes inside the image.
    centres : ndarray of shape (N, 2), int32
        (y, x), inside the image.
    height, width : int
        Size of the images.

    Returns
    -------
    ndarray of shape (N, 4), int32
        (y0, x0, y1, x1).

    Examples
    --------
    >>> import numpy as np
    >>> boxes_moved_to(np.array([[0, 3, 4, 7]]), np.array([[7, 4]]), 8, 8).tolist()
    [[4, 2, 8, 6]]
    """
    xp = check_array(boxes, "boxes")
    check_boxes(boxes, "boxes", xp, len(boxes), height, width)
    check_points(centres, "centres", xp, len(boxes), height, width)
    return move_boxes(boxes, centres, height, width)


def move_boxes(boxes: Array, centres: Array, height: int, width: int) -> Array:
    """Return what `boxes_moved_to` returns, without checks."""
    xp = array_namespace(boxes)
    side = boxes[:, 2:] - boxes[:, :2]
    start = xp.clip(centres - side // 2, 0, constant(xp, _size, height, width) - side)
    return xp.concatenate([start, start + side], axis=1).astype(xp.int32, copy=False)


def points_at(fractions: Array, height: int, width: int) -> Array:
    """Return the pixels at the given fractions of the height and the width of an image.

    Parameters
    ----------
    fractions : ndarray of shape (N, 2), floating
        (y, x) in [0, 1]; uniform fractions give uniform pixels.
    height, width : int
        Size of the images.

    Returns
    -------
    ndarray of shape (N, 2), int32
        (y, x); a fraction of 1 gives the last pixel.

    Examples
    --------
    >>> import numpy as np
    >>> points_at(np.array([[0.0, 1.0]]), 8, 8).tolist()
    [[0, 7]]
    """
    xp = check_array(fractions, "fractions")
    check_fractions(fractions, "fractions", xp, len(fractions))
    return scale_points(fractions, height, width)


def scale_points(fractions: Array, height: int, width: int) -> Array:
    """Return what `points_at` returns, without checks."""
    xp = array_namespace(fractions)
    size = constant(xp, _size, height, width)
    return xp.clip((fractions * size).astype(xp.int32), 0, size - 1)


def kept_fraction(boxes: Array, height: int, width: int) -> Array:
    """Return the share of each image outside its box: `lam` after pasting.

    Parameters
    ----------
    boxes : ndarray of shape (N, 4), int32
        Boxes inside the image.
    height, width : int
        Size of the images.

    Returns
    -------
    ndarray of shape (N,), float32
        1 - area / (H * W).

    Examples
    --------
    >>> import numpy as np
    >>> kept_fraction(np.array([[0, 3, 2, 7]]), 8, 8).tolist()
    [0.875]
    """
    xp = check_array(boxes, "boxes")
    check_boxes(boxes, "boxes", xp, len(boxes), height, width)
    return lam_of_boxes(boxes, height, width)


def lam_of_boxes(boxes: Array, height: int, width: int) -> Array:
    """Return what `kept_fraction` returns, without checks."""
    xp = array_namespace(boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides[:, 0] * sides[:, 1]
    return (1 - area / (height * width)).astype(xp.float32)


def lam_of_saliency(
    maps: Array, receivers: Array, boxes: Array, sources: Array, source_boxes: Array, height: int, width: int
) -> Array:
    """Return the weight of each receiver by saliency, kept / (kept + pasted): (N,) float32.

    `kept` is the share of the receiver's saliency outside its box. `pasted` is the share of the source's saliency
    inside its box. `receivers` and `sources` are indices into `maps` (M, h, w), one per pair. A map with negative
    values is shifted by its minimum, and values that are not finite count as not salient. If a map of the pair is
    zero everywhere, or both shares are 0, the weight is by area.
    """
    xp = array_namespace(maps)
    kept, _, known = _shares_of_saliency(maps, receivers, boxes, height, width)
    _, pasted, source_known = _shares_of_saliency(maps, sources, source_boxes, height, width)
    known &= source_known & (kept + pasted > 0)
    weight = kept / xp.where(known, kept + pasted, 1)
    return xp.where(known, weight, lam_of_boxes(boxes, height, width)).astype(xp.float32)


def _shares_of_saliency(maps: Array, index: Array, boxes: Array, height: int, width: int) -> tuple[Array, Array, Array]:
    """Return the shares of the saliency of ``maps[index]`` outside and inside each box, and whether they are defined.

    A map is constant inside each of its cells. Cells that the edge of a box cuts count in proportion to the covered
    area.
    """
    xp = array_namespace(maps)
    _, map_height, map_width = maps.shape
    rows = _covered(boxes[:, ::2], height, map_height)
    columns = _covered(boxes[:, 1::2], width, map_width)

    def parts(chunk: Array | slice) -> Array:
        values = _not_negative(maps[index[chunk]])
        of_rows = xp.stack([rows[chunk], 1 - rows[chunk]], axis=1)
        of_columns = xp.stack([columns[chunk], 1 - columns[chunk]], axis=2)
        return of_rows @ values @ of_columns

    found = in_chunks(parts, np.arange(len(index)), _CHUNK) if is_host(xp) else parts(slice(None))
    # Only sums of values >= 0: a difference could leave a rounding error in place of 0.
    inside = found[:, 0, 0]
    outside = found[:, 0, 1] + found[:, 1, 0] + found[:, 1, 1]
    whole = inside + outside
    known = (whole > 0) & (whole < xp.inf)
    whole = xp.where(known, whole, 1)
    return outside / whole, inside / whole, known


def _covered(edges: Array, size: int, cells: int) -> Array:
    """Return the fraction of each cell between two edges, for `cells` cells over `size` pixels: (N, cells) float64."""
    xp = array_namespace(edges)
    reached = xp.clip(edges[:, :, None] * cells / size - xp.arange(cells), 0, 1)
    return reached[:, 1] - reached[:, 0]


def _not_negative(maps: Array) -> Array:
    """Return maps (N, h, w) as float64 >= 0: shifted by a negative minimum, with 0 for values that are not finite."""
    xp = array_namespace(maps)
    values = maps.astype(xp.float64)
    finite = xp.isfinite(values)
    if is_host(xp) and finite.all() and values.min() >= 0:  # true of all detectors of this package
        return values
    values = xp.where(finite, values, 0)
    lowest = xp.minimum(values.min(axis=(1, 2), keepdims=True), 0)
    return xp.where(finite, values - lowest, 0)


def _size(height: int, width: int) -> np.ndarray:
    return np.array([height, width], np.int32)

"""Mixing functions on batches of arrays, without DALI and without randomness.

Each image of a batch, the receiver, is mixed with another image of the batch, its source.

Images are (N, H, W, C) uint8, in NumPy or CuPy. All other arrays of a call belong to the same library. With CuPy, all
work is enqueued on the current stream, and no function waits for the GPU. CuPy caches FFT plans per thread, and each
plan has one work area: use one stream per thread, or synchronise the streams.

This module checks the arguments, once, and chooses between array functions and kernels. The functions that it calls do
not check their arguments.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant, is_host
from dali_saliencymix._checks import check_fractions, check_mixing, check_per_image, check_points, check_range
from dali_saliencymix._routes import route_of
from dali_saliencymix._tables import MAP_SIZE
from dali_saliencymix.boxes import find_peaks, lam_of_boxes, lam_of_saliency, move_boxes, place_boxes, scale_points
from dali_saliencymix.options import MODES, SOURCES, MixOptions, check_with_peaks
from dali_saliencymix.pixels import blend, paste
from dali_saliencymix.saliency import saliency_maps

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix.saliency import Detector

    Paste = Callable[..., Array]


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The mixed images, a new array. If `paste` was given, its return value.
    lam : ndarray of shape (N,), float32
        Weight of each receiver's label. Where a box was pasted, it is exactly the share of the pixels outside the box;
        with ``label_weight="saliency"``, the weight by saliency.
    boxes : ndarray of shape (N, 4), int32
        Where the patch is in each mixed image: (y0, x0, y1, x1), half-open. All 0 where nothing was pasted.
    source_boxes : ndarray of shape (N, 4), int32
        Where the patch was cut out of the source.
    """

    images: Array
    lam: Array
    boxes: Array
    source_boxes: Array


def saliencymix(
    images: Array,
    source_index: Array,
    lam: Array,
    *,
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: Array | None = None,
    point: Array | None = None,
    label_weight: str = "area",
    algorithm: str = "auto",
    paste: Paste | None = None,
) -> Mixed:
    """Cut the most salient patch out of each image's source and paste it into the image.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        RGB images, or grey images with C = 1. Not modified.
    source_index : ndarray of shape (N,), integer
        The source of image `i`, the receiver, is ``images[source_index[i]]``. On a GPU the values are not checked.
    lam : ndarray of shape (N,), floating
        Share of each receiver to keep, in [0, 1]; with 1 the image is not changed.
    preset : {"default", "paper", "released-code"}
        Values of the options that are None. ``"default"`` is ``saliency="spectral_residual"``, ``source="salient"``,
        ``destination="corresponding"``, ``box="fit"`` and ``per_batch=False``. ``"paper"`` differs in
        ``saliency="fine_grained"``. ``"released-code"`` differs from ``"paper"`` in ``box="clip"`` and
        ``per_batch=True``.
    saliency : str or callable, optional
        Name of a detector in `DETECTORS`, or a function from images (N, H, W, C) uint8 to maps (N, h, w), larger
        where more salient. On a CPU it is called only with the images whose maps are needed.
    source : {"salient", "non_salient"}, optional
        Cut the patch around the most or the least salient pixel of the source.
    destination : {"corresponding", "salient", "non_salient", "random"}, optional
        Paste the patch at the same place, around the most or the least salient pixel of the receiver, or around
        `point`.
    box : {"fit", "clip"}, optional
        If a box crosses the border of the source, ``"fit"`` moves it inside and ``"clip"`` cuts it at the border; see
        `boxes_at`. Unless the destination is ``"corresponding"``, the patch then keeps its size and is moved inside the
        receiver.
    per_batch : bool, optional
        If true, ``lam[0]`` and the boxes of image 0 and its source are used for all images.
    peaks : ndarray of shape (N, 2), integer, optional
        Most salient pixel (y, x) of each image, if already known; replaces `saliency`.
    point : ndarray of shape (N, 2), floating, optional
        Fractions (y, x) of height and width, in [0, 1], usually drawn uniformly. Required with
        ``destination="random"``; omit it otherwise.
    label_weight : {"area", "saliency"}
        Meaning of the returned `lam`. ``"area"`` is the share of the pixels outside the box. ``"saliency"`` is
        ``kept / (kept + pasted)``, where `kept` is the share of the receiver's saliency outside its box and `pasted` is
        the share of the source's saliency inside its box; see the notes. ``"saliency"`` cannot be combined with
        `peaks`.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or kernels for the steps that have one; see `fine_grained`.
    paste : callable, optional
        Function ``(images, source_index, boxes, source_boxes=) -> images`` that produces the mixed images from the
        boxes, such as `paste_normalised` with its options bound. By default `paste_boxes`.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes). `lam` is recomputed from the boxes, according to `label_weight`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name, for example if images are not uint8, or if
        arguments contradict each other.

    Notes
    -----
    Uddin et al., "SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization", ICLR 2021.
    The combinations of source and destination are those of its section 3.4, plus salient to random, which an earlier
    version of the released code used. The paper found salient to corresponding best.

    With ``label_weight="saliency"``, a map is constant inside each of its cells, and cells that the edge of a box cuts
    count in proportion to the covered area. A map with negative values is shifted by its minimum. Pixels that are not
    finite count as not salient. If the map of the receiver or of the source is zero everywhere, or both shares are 0,
    the weight is by area. `lam` is 1 where nothing was pasted. With `per_batch` all images share one box, but the
    weight of each label comes from the maps of that image and its source. The published code of SaliencyMixPlus
    (SS-hj/SaliencyMixPlus, 2024) weights labels in the same way, with saliency from input gradients.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    >>> mixed = saliencymix(images, np.array([1, 2, 3, 0]), np.full(4, 0.75, np.float32))
    >>> mixed.lam.tolist()
    [0.75, 0.75, 0.75, 0.75]

    With labels weighted by saliency: the patch contains all bright pixels of the source, and one third of the
    receiver's bright pixels are kept, so `lam` is (1/3) / (1/3 + 1). By area it would be 0.75.

    >>> images = np.zeros((2, 8, 8, 1), np.uint8)
    >>> images[0, 2:4, 3:6] = images[1, 3:5, 3:5] = 200
    >>> def brightness(images):
    ...     return images[..., 0]
    >>> arguments = (images, np.array([1, 0]), np.array([0.75, 1]))
    >>> mixed = saliencymix(*arguments, saliency=brightness, label_weight="saliency")
    >>> mixed.boxes[0].tolist(), mixed.lam.tolist()
    ([1, 1, 5, 5], [0.25, 1.0])
    """
    options = MixOptions(
        preset=preset,
        saliency=saliency,
        source=source,
        destination=destination,
        box=box,
        per_batch=per_batch,
        label_weight=label_weight,
        algorithm=algorithm,
    )
    check_with_peaks(options, peaks, saliency)
    if (point is None) is (options.destination == "random"):
        rule = "be given with" if point is None else "be left out without"
        msg = f"point must {rule} destination='random', got destination={options.destination!r}"
        raise ValueError(msg)
    return apply(options, images, source_index, lam, point=point, peaks=peaks, paste=paste)


def cutmix(
    images: Array,
    source_index: Array,
    lam: Array,
    point: Array,
    *,
    box: str = "clip",
    per_batch: bool = False,
    paste: Paste | None = None,
) -> Mixed:
    """Cut a patch around a given point out of each image's source and paste it at the same place.

    Parameters
    ----------
    images, source_index, lam, per_batch, paste
        As for `saliencymix`.
    point : ndarray of shape (N, 2), floating
        Centre of each box as fractions (y, x) of height and width, in [0, 1]. CutMix draws them uniformly.
    box : {"fit", "clip"}
        As for `saliencymix`. CutMix uses ``"clip"``.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes). `lam` is recomputed from the boxes.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name.

    Notes
    -----
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019, but
    with one box and one weight per sample.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.arange(2, dtype=np.uint8).repeat(64).reshape(2, 8, 8, 1)
    >>> mixed = cutmix(images, np.array([1, 0]), np.array([0.75, 1.0]), np.full((2, 2), 0.5))
    >>> mixed.boxes.tolist(), mixed.lam.tolist()
    ([[2, 2, 6, 6], [0, 0, 0, 0]], [0.75, 1.0])
    """
    options = MixOptions(modes={"cutmix": 1.0}, box=box, per_batch=per_batch)
    return apply(options, images, source_index, lam, point=point, paste=paste)


def mixup(
    images: Array, source_index: Array, lam: Array, *, per_batch: bool = False, paste: Paste | None = None
) -> Mixed:
    """Blend each image with its source: `lam` times the image plus 1 - `lam` times the source.

    Parameters
    ----------
    images, source_index
        As for `saliencymix`.
    lam : ndarray of shape (N,), floating
        Weight of each receiver, in [0, 1].
    per_batch : bool
        If true, ``lam[0]`` is used for all images.
    paste : callable, optional
        Function with the signature given for `saliencymix`, called with the blended images and empty boxes. For
        example, `paste_normalised` flips and normalises them.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes). `lam` holds the given weights, and the boxes are all 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or value.

    Notes
    -----
    See `blend_images`.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.array([0, 100], np.uint8).reshape(2, 1, 1, 1)
    >>> mixed = mixup(images, np.array([1, 0]), np.array([0.75, 0.5], np.float32))
    >>> mixed.images.ravel().tolist(), mixed.lam.tolist()
    ([25, 50], [0.75, 0.5])
    """
    options = MixOptions(modes={"mixup": 1.0}, per_batch=per_batch)
    return apply(options, images, source_index, lam, paste=paste)


def mix(
    images: Array,
    source_index: Array,
    lam: Array,
    mode: Array,
    point: Array,
    *,
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: Array | None = None,
    label_weight: str = "area",
    algorithm: str = "auto",
    paste: Paste | None = None,
) -> Mixed:
    """Mix each image with its own mode: saliencymix, cutmix or mixup.

    Parameters
    ----------
    images, source_index, lam
        As for `saliencymix`.
    mode : ndarray of shape (N,), integer
        Index into `MODES`: 0 for saliencymix, 1 for cutmix, 2 for mixup. On a GPU the values are not checked, and an
        image with any other value is not changed.
    point : ndarray of shape (N, 2), floating
        Fractions (y, x) of height and width, in [0, 1], usually drawn uniformly: the centre of each cutmix box, and of
        each saliencymix patch with ``destination="random"``.
    preset, saliency, source, destination, box, peaks, label_weight, algorithm
        As for `saliencymix`, and only for samples of that mode. cutmix always clips its boxes and weights its labels by
        area.
    per_batch : bool, optional
        If true, ``lam[0]``, ``mode[0]`` and the boxes of image 0 and its source are used for all images.
    paste : callable, optional
        As for `mixup`: called with the mixed images and empty boxes.

    Returns
    -------
    Mixed
        Named tuple (images, lam, boxes, source_boxes). `lam` is recomputed from the boxes where one was pasted.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, value or name, or arguments contradict each other.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    >>> lam, point = np.full(3, 0.75, np.float32), np.full((3, 2), 0.5)
    >>> mixed = mix(images, np.array([1, 2, 0]), lam, np.array([0, 1, 2]), point)
    >>> mixed.boxes[1:].tolist()
    [[8, 8, 24, 24], [0, 0, 0, 0]]
    """
    options = MixOptions(
        preset=preset,
        saliency=saliency,
        source=source,
        destination=destination,
        box=box,
        per_batch=per_batch,
        label_weight=label_weight,
        algorithm=algorithm,
    )
    check_with_peaks(options, peaks, saliency)
    return apply(options, images, source_index, lam, mode, point, peaks=peaks, paste=paste)


def apply(
    options: MixOptions,
    images: Array,
    source_index: Array,
    lam: Array,
    mode: Array | None = None,
    point: Array | None = None,
    *,
    peaks: Array | None = None,
    paste: Paste | None = None,
) -> Mixed:
    """Mix a batch according to `options`. All mixing functions and operators call this function.

    The arrays are those of `mix` and `saliencymix`. Without `mode`, `options` must have exactly one mode. A `point`
    that the mode does not use is ignored.
    """
    xp = check_mixing(images, source_index, lam)
    count = len(images)
    if mode is not None:
        check_per_image(mode, "mode", xp, count, "iu")
        check_range(mode, "mode", 0, len(MODES) - 1, f"in [0, {len(MODES)}), which are {', '.join(MODES)}")
    elif options.mode is None:
        msg = f"mode must be given where there are several modes: {', '.join(options.modes)}"
        raise ValueError(msg)
    if mode is not None or options.needs_point:
        check_fractions(point, "point", xp, count)
    if peaks is not None:
        check_points(peaks, "peaks", xp, count, *images.shape[1:3])
    route = route_of(options.algorithm, xp)
    batch = _Batch(images, source_index, lam, mode, point, peaks)
    if options.per_batch:
        first = functools.partial(_first_for_all, count=count)
        batch = batch._replace(lam=first(lam), mode=first(mode), point=first(point))
    if mode is not None or options.mode == "mixup":
        mixed = _mixup(batch) if mode is None else _mix(options, batch, route=route)
        if paste is None:
            return mixed
        no_boxes = xp.zeros((count, 4), xp.int32)
        return mixed._replace(images=paste(mixed.images, source_index, no_boxes, source_boxes=None))
    if options.mode == "cutmix":
        return _pasted(batch, _Boxes(_boxes_around_points(batch, options.box)), paste, route=route)
    if route == "cuda" and not options.per_batch and options.label_weight == "area":
        return _saliencymix_in_kernels(options, batch, paste)
    return _pasted(batch, _salient_boxes(options, batch, route=route), paste, route=route)


class _Batch(NamedTuple):
    """The checked arrays of a call; with `per_batch`, the numbers of image 0 stand for all images."""

    images: Array
    source_index: Array
    lam: Array
    # None where not needed.
    mode: Array = None
    point: Array = None
    peaks: Array = None


class _Boxes(NamedTuple):
    """Boxes (N, 4) int32 of the patches, and the weights that follow from them."""

    receivers: Array
    sources: Array | None = None  # where the patches are cut out; None: at the same place
    lam: Array | None = None  # None: by area


def _mixup(batch: _Batch) -> Mixed:
    images, source_index, lam, *_ = batch
    xp = array_namespace(images)
    lam = lam.astype(xp.float32)
    no_boxes = xp.zeros((len(images), 4), xp.int32)
    return Mixed(blend(images.copy(order="K"), images, source_index, lam), lam, no_boxes, no_boxes)


def _mix(options: MixOptions, batch: _Batch, *, route: str) -> Mixed:
    images, source_index, lam, mode, _, _ = batch
    xp = array_namespace(images)
    by_saliency, by_point, blended = ((mode == index)[:, None] for index in range(len(MODES)))
    boxes, source_boxes, by_map = _salient_boxes(options, batch, route=route)
    around_point = xp.where(by_point, _boxes_around_points(batch, "clip"), 0)
    boxes = xp.where(by_saliency, boxes, around_point)
    if source_boxes is not None:
        source_boxes = xp.where(by_saliency, source_boxes, around_point)
    mixed = _pasted(batch, _Boxes(boxes, source_boxes), route=route)
    if by_map is not None:
        mixed = mixed._replace(lam=xp.where(by_saliency[:, 0], by_map, mixed.lam))
    weight = xp.where(blended[:, 0], lam, 1).astype(xp.float32)
    pixels = blend(mixed.images, images, source_index, weight)
    return mixed._replace(images=pixels, lam=xp.where(blended[:, 0], weight, mixed.lam))


def _pasted(batch: _Batch, placed: _Boxes, paste_them: Paste | None = None, *, route: str) -> Mixed:
    images, source_index, *_ = batch
    boxes, source_boxes, lam = placed
    xp = array_namespace(images)
    # Set the coordinates of all empty boxes to 0.
    covers = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1))[:, None]
    boxes = xp.where(covers, boxes, 0)
    if source_boxes is not None:
        source_boxes = xp.where(covers, source_boxes, 0)
    paste_them = paste_them or functools.partial(paste, route=route)
    mixed = paste_them(images, source_index, boxes, source_boxes=source_boxes)
    lam = lam_of_boxes(boxes, *images.shape[1:3]) if lam is None else lam
    return Mixed(mixed, lam, boxes, boxes if source_boxes is None else source_boxes)


def _salient_boxes(options: MixOptions, batch: _Batch, *, route: str) -> _Boxes:
    """Return the saliencymix boxes, of equal sizes in the receivers and in the sources.

    For images that saliencymix does not mix, the boxes are arbitrary.
    """
    xp = array_namespace(batch.images)
    count = len(batch.images)
    if options.per_batch and options.label_weight == "area":
        rows: Any = slice(1)  # only the boxes of image 0 are needed
    elif not is_host(xp):
        rows = slice(count)
    else:  # on a CPU, skip maps that are not needed
        wanted = batch.lam < 1
        if batch.mode is not None:
            wanted &= batch.mode == MODES.index("saliencymix")
        rows = slice(count) if wanted.all() else np.flatnonzero(wanted)
        if not wanted.any():
            return _Boxes(np.zeros((count, 4), np.int32))
    pairs = batch._replace(
        source_index=batch.source_index[rows],
        lam=batch.lam[rows],
        point=None if batch.point is None else batch.point[rows],
    )
    receivers = constant(xp, np.arange, count)[rows]
    placed = _boxes_of_pairs(options, pairs, receivers, route=route)
    if isinstance(rows, slice):
        return placed

    def for_all(part: Array | None, others: float) -> Array | None:
        if part is None:
            return None
        whole = np.full((count, *part.shape[1:]), others, part.dtype)
        whole[rows] = part
        return whole

    return _Boxes(for_all(placed.receivers, 0), for_all(placed.sources, 0), for_all(placed.lam, 1))


def _boxes_of_pairs(options: MixOptions, pairs: _Batch, receivers: Array, *, route: str) -> _Boxes:
    """Return the boxes for some pairs of images; all arrays except images and peaks have one entry per pair."""
    images, sources, lam, _, point, peaks = pairs
    size = images.shape[1:3]
    by_map = options.label_weight == "saliency"
    index = {"sources": sources, "receivers": receivers}
    asked = {"sources": options.source}
    if options.destination in SOURCES:
        asked["receivers"] = options.destination
    if peaks is not None:
        found = {name: peaks[index[name]] for name in asked}
    else:
        maps, places = _maps_of(options, images, index if by_map else {name: index[name] for name in asked})
        found = {which: find_peaks(maps, *size, least=which == "non_salient", route=route) for which in asked.values()}
        found = {name: found[which][places[name]] for name, which in asked.items()}
    source_boxes = place_boxes(found["sources"], lam, *size, box=options.box)
    boxes = source_boxes
    if options.destination != "corresponding":
        centres = scale_points(point, *size) if options.destination == "random" else found["receivers"]
        boxes = move_boxes(source_boxes, centres, *size)
    if options.per_batch:
        boxes, source_boxes = (_first_for_all(each, len(images)) for each in (boxes, source_boxes))
    weight = None
    if by_map:
        weight = lam_of_saliency(maps, places["receivers"], boxes, places["sources"], source_boxes, *size)
    return _Boxes(boxes, None if options.destination == "corresponding" else source_boxes, weight)


def _maps_of(options: MixOptions, images: Array, needed: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Return the maps of the images in `needed`, and for each of its indices the positions among these maps."""
    xp = array_namespace(images)
    parts = list(needed.values())
    index = xp.concatenate(parts) if len(parts) > 1 else parts[0]
    position = index
    if is_host(xp):
        different, position = np.unique(index, return_inverse=True)  # so that no map is computed twice
        images = images if len(different) == len(images) else images[different]
    elif len(index) < len(images):
        images, position = images[index], xp.arange(len(index))
    maps = saliency_maps(images, options.saliency, algorithm=options.algorithm)
    # All parts have the same length: one entry per pair.
    return maps, dict(zip(needed, position.reshape(len(needed), -1), strict=True))


def _saliencymix_in_kernels(options: MixOptions, batch: _Batch, paste_them: Paste | None = None) -> Mixed:
    """Mix with CUDA kernels: 3 launches for `spectral_residual`, 5 for `fine_grained`, without a map in memory.

    The kernel of `spectral_residual` uses a different FFT from the array function, so it may resolve near ties
    differently. Everything else is bit-identical.
    """
    from dali_saliencymix import _cuda

    images, source_index, lam, _, point, peaks = batch
    size = images.shape[1:3]

    def peaks_at(which: str) -> Array:
        if peaks is not None:
            return peaks
        least = which == "non_salient"
        if options.saliency == "fine_grained":
            return _cuda.fine_grained_peaks(images, least=least)
        if options.saliency == "spectral_residual" and min(size) >= MAP_SIZE:
            return _cuda.spectral_residual_peaks(images, *size, least=least)
        maps = saliency_maps(images, options.saliency, algorithm=options.algorithm)
        if maps.dtype == np.float32:
            return _cuda.saliency_peaks(maps, *size, least=least)
        return find_peaks(maps, *size, least=least)

    own = peaks_at(options.source)
    centres = None
    if options.destination == "random":
        centres = scale_points(point, *size)
    elif options.destination in SOURCES:
        centres = own if options.destination == options.source else peaks_at(options.destination)
    boxes, source_boxes, kept = _cuda.boxes_at_peaks(own, source_index, lam, *size, box=options.box, centres=centres)
    origins = None if centres is None else source_boxes
    mixed = (paste_them or _cuda.paste_boxes)(images, source_index, boxes, source_boxes=origins)
    return Mixed(mixed, kept, boxes, source_boxes)


def _boxes_around_points(batch: _Batch, box: str) -> Array:
    """Return CutMix boxes, centred at ``batch.point``."""
    size = batch.images.shape[1:3]
    return place_boxes(scale_points(batch.point, *size), batch.lam, *size, box=box)


def _first_for_all(array: Array | None, count: int) -> Array | None:
    return None if array is None else array_namespace(array).repeat(array[:1], count, axis=0)

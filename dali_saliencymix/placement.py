"""Which part of the source goes to which place of the receiver: options, presets, and the boxes that follow.

Images are (N, H, W, C) uint8, boxes (N, 4) int32 as (y0, x0, y1, x1), points (N, 2) int32 as (y, x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant, is_host
from dali_saliencymix._checks import check_choice, check_per_image, check_points
from dali_saliencymix.boxes import BOXES, boxes_at, boxes_moved_to, points_at, saliency_peaks
from dali_saliencymix.saliency import get_detector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dali_saliencymix.saliency import Detector

SOURCES = ("salient", "non_salient")
DESTINATIONS = ("corresponding", "salient", "non_salient", "random")


class Placement(NamedTuple):
    """How `dali_saliencymix.saliencymix` chooses what it pastes and where.

    Attributes
    ----------
    saliency : str or callable
        Detector: a name in `dali_saliencymix.DETECTORS`, or a function from images (N, H, W, C) uint8 to maps
        (N, h, w), larger where more salient.
    source : {"salient", "non_salient"}
        Cut the patch around the most or the least salient pixel of the source.
    destination : {"corresponding", "salient", "non_salient", "random"}
        Paste it at the same place, around the most or the least salient pixel of the receiver, or around a point
        drawn uniformly.
    box : {"fit", "clip"}
        A box that would stick out of the source is moved inside, or cut off; see `dali_saliencymix.boxes_at`. At
        another destination the patch keeps its size and is moved inside.
    per_batch : bool
        If true, the pair of image 0 and its source decides for the whole batch.
    """

    saliency: str | Detector = "spectral_residual"
    source: str = "salient"
    destination: str = "corresponding"
    box: str = "fit"
    per_batch: bool = False


# What an option is where it is not given. The paper's choice, the released code's geometry, and this project's.
PRESETS = {
    "default": Placement(),
    "paper": Placement(saliency="fine_grained"),
    "released-code": Placement(saliency="fine_grained", box="clip", per_batch=True),
}


def resolve_placement(preset: str, given: Mapping[str, Any], *, peaks_given: bool = False) -> Placement:
    """Return the options of a preset, with those of `given` in their place that are not None.

    Raises
    ------
    TypeError, ValueError
        If a name is unknown or options contradict each other.
    """
    check_choice(preset, "preset", tuple(PRESETS))
    placement = PRESETS[preset]._replace(**{name: value for name, value in given.items() if value is not None})
    get_detector(placement.saliency)
    check_choice(placement.source, "source", SOURCES)
    check_choice(placement.destination, "destination", DESTINATIONS)
    check_choice(placement.box, "box", BOXES)
    if not isinstance(placement.per_batch, bool):
        msg = f"per_batch must be True or False, got {placement.per_batch!r}"
        raise TypeError(msg)
    if peaks_given:
        if given["saliency"] is not None:
            msg = f"saliency must be left out where peaks are given, got {placement.saliency!r}"
            raise ValueError(msg)
        for name in ("source", "destination"):
            if getattr(placement, name) == "non_salient":
                msg = f"{name} must not be 'non_salient' where peaks are given: they are the most salient pixels"
                raise ValueError(msg)
    return placement


def check_given_points(placement: Placement, images: Array, peaks: Array | None, point: Array | None) -> None:
    """Require points that fit the images, and `point` just where the destination is random."""
    xp = array_namespace(images)
    count, height, width, _ = images.shape
    if peaks is not None:
        check_points(peaks, "peaks", xp, count, height, width)
    if (point is None) is (placement.destination == "random"):
        rule = "be given with" if point is None else "be left out without"
        msg = f"point must {rule} destination='random', got destination={placement.destination!r}"
        raise ValueError(msg)
    if point is not None:
        check_per_image(point, "point", xp, count, "f", trailing=(2,))


def salient_boxes(
    images: Array,
    source_index: Array,
    lam: Array,
    placement: Placement,
    *,
    peaks: Array | None = None,
    point: Array | None = None,
    wanted: Array | None = None,
    algorithm: str = "auto",
) -> tuple[Array, Array | None]:
    """Return the boxes in the receivers, and those of the same sizes in the sources; None where they are the same.

    Parameters
    ----------
    images, source_index, lam
        As for `dali_saliencymix.saliencymix`, checked.
    placement : Placement
        Options.
    peaks : ndarray of shape (N, 2), integer, optional
        Most salient pixel of each image; by default the detector is asked.
    point : ndarray of shape (N, 2), floating, optional
        Fractions (y, x) of the image: the destination ``"random"``.
    wanted : ndarray of shape (N,), bool, optional
        Which boxes are needed; the others are any boxes of the right size. By default all.
    algorithm : {"auto", "array", "kernel"}
        As for `dali_saliencymix.get_detector`.
    """
    xp = array_namespace(images)
    count = len(images)
    detector = get_detector(placement.saliency, algorithm=algorithm)
    if placement.per_batch:
        point = None if point is None else point[:1]
        receivers = constant(xp, np.arange, 1)
        pairs = _boxes_of_pairs(
            images, receivers, source_index[:1], lam[:1], placement, detector, peaks, point, algorithm
        )
        return _for_both(pairs, lambda boxes: xp.repeat(boxes, count, axis=0))
    pasted = lam < 1 if wanted is None else wanted & (lam < 1)
    if not is_host(xp) or pasted.all():
        receivers = constant(xp, np.arange, count)
        return _boxes_of_pairs(images, receivers, source_index, lam, placement, detector, peaks, point, algorithm)
    # On a CPU the maps that nobody needs are worth leaving out.
    rows = np.flatnonzero(pasted)
    if not len(rows):
        return np.zeros((count, 4), np.int32), None
    point = None if point is None else point[rows]
    pairs = _boxes_of_pairs(images, rows, source_index[rows], lam[rows], placement, detector, peaks, point, algorithm)
    return _for_both(pairs, lambda boxes: _scattered(boxes, rows, count))


def _scattered(boxes: Array, rows: Array, count: int) -> Array:
    scattered = np.zeros((count, 4), np.int32)
    scattered[rows] = boxes
    return scattered


def _for_both(pairs: tuple[Array, Array | None], function: Callable[[Array], Array]) -> tuple[Array, Array | None]:
    boxes, source_boxes = pairs
    return function(boxes), None if source_boxes is None else function(source_boxes)


def _boxes_of_pairs(
    images: Array,
    receivers: Array,
    sources: Array,
    lam: Array,
    placement: Placement,
    detector: Detector,
    peaks: Array | None,
    point: Array | None,
    algorithm: str,
) -> tuple[Array, Array | None]:
    """Return the boxes of some pairs of images; all arguments but `images` and `peaks` have one entry for each pair."""
    size = images.shape[1:3]
    asked = {"sources": (sources, placement.source)}
    if placement.destination in SOURCES:
        asked["receivers"] = (receivers, placement.destination)
    found = _salient_points(images, asked, detector, peaks, algorithm)
    source_boxes = boxes_at(found["sources"], lam, *size, box=placement.box)
    if placement.destination == "corresponding":
        return source_boxes, None
    centres = points_at(point, *size) if placement.destination == "random" else found["receivers"]
    return boxes_moved_to(source_boxes, centres, *size), source_boxes


def _salient_points(
    images: Array, asked: dict[str, tuple[Array, str]], detector: Detector, peaks: Array | None, algorithm: str
) -> dict[str, Array]:
    """Return the most or least salient pixels of the images that are asked for by index."""
    if peaks is not None:
        return {name: peaks[index] for name, (index, _) in asked.items()}
    xp = array_namespace(images)
    index = xp.concatenate([index for index, _ in asked.values()])
    if is_host(xp):
        needed, position = np.unique(index, return_inverse=True)  # no map is computed twice
        maps = checked_maps(detector, images if len(needed) == len(images) else images[needed])
    elif len(index) < len(images):
        maps, position = checked_maps(detector, images[index]), xp.arange(len(index))
    else:
        maps, position = checked_maps(detector, images), index
    size = images.shape[1:3]
    found = {
        which: saliency_peaks(maps, *size, least=which == "non_salient", algorithm=algorithm)
        for _, which in asked.values()
    }
    # All parts have one entry for each pair.
    positions = position.reshape(len(asked), -1)
    return {name: found[which][places] for (name, (_, which)), places in zip(asked.items(), positions, strict=True)}


def checked_maps(detector: Detector, images: Array) -> Array:
    """Return the saliency maps of `images`; a detector may be the user's own, so look at what it returns."""
    saliency_map = detector(images)
    shape: tuple[int, ...] = getattr(saliency_map, "shape", ())
    if array_namespace(saliency_map) is not array_namespace(images) or len(shape) != 3 or shape[0] != len(images):
        kind = type(saliency_map)
        msg = (
            f"saliency must return maps of shape ({len(images)}, h, w), in the array library of the images, "
            f"got {kind.__module__}.{kind.__qualname__} of shape {shape}"
        )
        raise ValueError(msg)
    return saliency_map

"""Argument checks. Each error names the argument, the rule and the given value.

Values on a GPU are not checked, because reading one would synchronise the stream. The docstring of each function says
how it treats invalid values on a GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, is_host

if TYPE_CHECKING:
    from collections.abc import Sequence


def kind_of(value: object) -> str:
    """Return the full name of the type of a value."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_array(array: Array, name: str) -> Namespace:
    """Require a NumPy or CuPy array; return its array library."""
    xp = array_namespace(array)
    if xp is None:
        msg = f"{name} must be a NumPy or CuPy array, got {kind_of(array)}"
        raise TypeError(msg)
    return xp


def check_images(images: Array) -> Namespace:
    """Require a non-empty batch (N, H, W, C) uint8 with C = 1 or 3; return its array library."""
    xp = check_array(images, "images")
    if images.dtype != np.uint8:
        msg = (
            f"images must be uint8 with pixel values 0..255, got {images.dtype}: saliency is defined on 8-bit pixels, "
            "and a detector silently returns noise for normalised floats. Mix before normalising"
        )
        raise TypeError(msg)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        msg = f"images must have shape (N, H, W, C) with C of 1 or 3, got {images.shape}"
        if images.ndim == 4 and images.shape[1] in (1, 3):
            msg += ": that looks like channels first, (N, C, H, W)"
        raise ValueError(msg)
    if 0 in images.shape:
        msg = f"images must not be empty, got shape {images.shape}"
        raise ValueError(msg)
    return xp


def check_maps(saliency_map: Array) -> Namespace:
    """Require non-empty maps (N, h, w); return their array library."""
    xp = check_array(saliency_map, "saliency_map")
    if saliency_map.ndim != 3 or 0 in saliency_map.shape:
        msg = f"saliency_map must have shape (N, h, w) and not be empty, got {saliency_map.shape}"
        raise ValueError(msg)
    return xp


_KINDS = {"iu": "integer", "f": "floating", "biuf": "real"}


def check_per_image(
    array: Array, name: str, xp: Namespace, count: int, kind: str, trailing: Sequence[int] = ()
) -> None:
    """Require an array of `xp` with shape (count, *trailing) and a dtype of `kind`: ``"iu"``, ``"f"`` or ``"biuf"``."""
    library = array_namespace(array)
    if library is not xp:
        library = check_array(array, name)
        msg = f"{name} must be a {xp.__name__} array like the other arrays, got a {library.__name__} array"
        raise TypeError(msg)
    shape = (count, *trailing)
    if array.shape != shape:
        msg = f"{name} must have shape {shape}, one entry for each image, got {array.shape}"
        raise ValueError(msg)
    if array.dtype.kind not in kind:
        msg = f"{name} must be of {_KINDS[kind]} dtype, got {array.dtype}"
        raise TypeError(msg)


def check_range(array: Array, name: str, low: float, high: float, rule: str) -> None:
    """Require low <= values <= high for an array in host memory; `rule` describes the range in the message."""
    if not is_host(array_namespace(array)) or array.size == 0:
        return
    # NaN fails both comparisons and is therefore rejected.
    if array.min() >= low and array.max() <= high:
        return
    wrong = ~((array >= low) & (array <= high))
    position = np.unravel_index(int(wrong.argmax()), array.shape)
    where = ", ".join(str(int(i)) for i in position)
    msg = f"{name} must be {rule}, got {array[position]} at [{where}]"
    raise ValueError(msg)


def check_source_index(source_index: Array, xp: Namespace, count: int) -> None:
    """Require (count,) integers in [0, count)."""
    check_per_image(source_index, "source_index", xp, count, "iu")
    check_range(source_index, "source_index", 0, count - 1, f"in [0, {count}), the images of the batch")


def check_lam(lam: Array, xp: Namespace, count: int) -> None:
    """Require (count,) floats in [0, 1]."""
    check_per_image(lam, "lam", xp, count, "f")
    check_range(lam, "lam", 0, 1, "in [0, 1]")


def check_mixing(images: Array, source_index: Array, lam: Array) -> Namespace:
    """Require images, and one source index and one weight per image; return their array library."""
    xp = check_images(images)
    check_source_index(source_index, xp, len(images))
    check_lam(lam, xp, len(images))
    return xp


def check_fractions(point: Array, name: str, xp: Namespace, count: int) -> None:
    """Require (count, 2) floats in [0, 1]: fractions (y, x) of height and width."""
    check_per_image(point, name, xp, count, "f", trailing=(2,))
    check_range(point, name, 0, 1, "in [0, 1]")


def check_points(points: Array, name: str, xp: Namespace, count: int, height: int, width: int) -> None:
    """Require (count, 2) integers: points (y, x) inside an image."""
    check_per_image(points, name, xp, count, "iu", trailing=(2,))
    if not is_host(xp):  # slicing a GPU array costs 1 or 2 microseconds of host time
        return
    check_range(points[:, 0], f"{name}[:, 0]", 0, height - 1, f"in [0, {height}), the rows of the image")
    check_range(points[:, 1], f"{name}[:, 1]", 0, width - 1, f"in [0, {width}), the columns of the image")


def check_boxes(boxes: Array, name: str, xp: Namespace, count: int, height: int, width: int) -> None:
    """Require (count, 4) integers: corners (y0, x0, y1, x1) of boxes inside an image."""
    check_per_image(boxes, name, xp, count, "iu", trailing=(4,))
    if not is_host(xp):  # slicing a GPU array costs 1 or 2 microseconds of host time
        return
    check_range(boxes[:, ::2], f"{name}[:, ::2]", 0, height, f"in [0, {height}], the edges of the image's rows")
    check_range(boxes[:, 1::2], f"{name}[:, 1::2]", 0, width, f"in [0, {width}], the edges of the image's columns")


def check_out(out: Array, xp: Namespace, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Require a C-contiguous output array of a given shape and dtype."""
    if array_namespace(out) is not xp or out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        msg = (
            f"out must be a C-contiguous {xp.__name__} array of {dtype} and shape {shape}, "
            f"got {kind_of(out)} of {getattr(out, 'dtype', None)} and shape {getattr(out, 'shape', None)}"
        )
        raise ValueError(msg)


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Require one of the given names."""
    if value not in choices:
        msg = f"{name} must be one of {', '.join(choices)}, got {value!r}"
        raise ValueError(msg)


def check_positive(value: float, name: str) -> float:
    """Require a positive, finite number."""
    if not _is_number(value) or not (0 < value < math.inf):
        msg = f"{name} must be a positive number, got {value!r}"
        raise ValueError(msg)
    return float(value)


def check_fraction(value: float, name: str) -> float:
    """Require a number in [0, 1]."""
    if not _is_number(value) or not (0 <= value <= 1):
        msg = f"{name} must be in [0, 1], got {value!r}"
        raise ValueError(msg)
    return float(value)


def check_flag(value: bool, name: str) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r}"
        raise TypeError(msg)


def check_at_least(value: int, name: str, least: int) -> None:
    """Require an integer >= `least`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        msg = f"{name} must be an integer of at least {least}, got {value!r}"
        raise ValueError(msg)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)

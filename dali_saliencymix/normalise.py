"""Mixing together with what stands behind it in a training pipeline: mirror, normalise, change the layout.

Images are (N, H, W, C) uint8, what comes out is float32 or float16 as a network takes it. Nothing is modified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix._array import Array, array_namespace, constant, is_host
from dali_saliencymix._checks import check_choice, check_images, check_out, check_per_image
from dali_saliencymix._routes import uses_kernel
from dali_saliencymix.pixels import check_pasting, into, paste_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUTS = ("CHW", "HWC")
DTYPES = ("float32", "float16")


def paste_normalised(
    images: Array,
    source_index: Array,
    boxes: Array,
    *,
    source_boxes: Array | None = None,
    mirror: Array | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any = "float32",
    layout: str = "CHW",
    algorithm: str = "auto",
    out: Array | None = None,
) -> Array:
    """Return mixed images, mirrored, normalised and in the layout of a network.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The receiving images, and the sources.
    source_index : ndarray of shape (N,), integer
        Image `i` receives from ``images[source_index[i]]``.
    boxes, source_boxes : ndarray of shape (N, 4), integer
        As for `dali_saliencymix.paste_boxes`.
    mirror : ndarray of shape (N,), bool or integer, optional
        Which of the mixed images are flipped horizontally, with their patches: those that are not 0. By default none.
    mean, std : sequence of C floats
        Of each channel, in grey levels 0..255; `std` is positive.
    dtype : {"float32", "float16"}
        Of the result, which is computed in float32 and rounded once.
    layout : {"CHW", "HWC"}
        Of each image of the result.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel that goes over the pixels once: compiled by Numba on a CPU, for float32, and in
        CUDA on a GPU. Both give the same bits. ``"auto"`` takes the kernel on a CPU where Numba is installed.
    out : ndarray, optional
        Where the result goes, C-contiguous; by default a new array.

    Returns
    -------
    ndarray of shape (N, C, H, W) or (N, H, W, C)
        ``(pixel - mean) * (1 / std)``: a new array, or `out`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape or value.

    Notes
    -----
    The arithmetic of DALI's ``fn.crop_mirror_normalize`` but for its last bit.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.array([[10, 20], [30, 40]], np.uint8).reshape(2, 1, 2, 1)
    >>> boxes = np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    >>> options = {"mirror": np.array([True, False]), "mean": [10], "std": [10]}
    >>> paste_normalised(images, np.array([1, 0]), boxes, **options).tolist()
    [[[[1.0, 2.0]]], [[[2.0, 3.0]]]]
    """
    xp = check_images(images)
    dtype = check_normalisation(images, mirror, mean, std, dtype, layout)
    shape = normalised_shape(images.shape, layout)
    if out is not None:
        check_out(out, xp, shape, dtype)
    kernel = uses_kernel(algorithm, xp)
    if kernel and not is_host(xp):
        from dali_saliencymix import _cuda as cuda

        return cuda.paste_normalised(
            images,
            source_index,
            boxes,
            source_boxes=source_boxes,
            mirror=mirror,
            mean=mean,
            std=std,
            dtype=dtype,
            layout=layout,
            out=out,
        )
    shift_and_scale = constant(xp, scaling, tuple(mean), tuple(std))
    if kernel and dtype == np.float32:
        from dali_saliencymix._numba import pixels as compiled_pixels

        check_pasting(images, source_index, boxes, source_boxes)
        out = np.empty(shape, np.float32) if out is None else out
        origins = boxes if source_boxes is None else source_boxes
        compiled_pixels.paste_normalised(images, source_index, boxes, origins, mirror, shift_and_scale, layout, out)
        return out
    mixed = paste_boxes(images, source_index, boxes, source_boxes=source_boxes)
    if mirror is not None:
        mixed = xp.where((mirror != 0)[:, None, None, None], mixed[:, :, ::-1], mixed)
    shift, scale = shift_and_scale
    normalised = ((mixed.astype(xp.float32) - shift) * scale).astype(dtype)
    if layout == "CHW":
        normalised = normalised.transpose(0, 3, 1, 2)
    return into(out, normalised if layout == "HWC" else xp.ascontiguousarray(normalised))


def normalised_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Return the shape of the result for images of shape (N, H, W, C)."""
    count, height, width, channels = shape
    return (count, channels, height, width) if layout == "CHW" else shape


def check_normalisation(
    images: Array, mirror: Array | None, mean: Sequence[float], std: Sequence[float], dtype: Any, layout: str
) -> np.dtype[Any]:
    """Require arguments of `paste_normalised` that fit the images; return `dtype` as an object of that class."""
    count, _, _, channels = images.shape
    if mirror is not None:
        kind = "b" if getattr(mirror, "dtype", None) == np.bool_ else "iu"
        check_per_image(mirror, "mirror", array_namespace(images), count, kind)
    checked = check_scaling(mean, std, dtype, layout)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            msg = f"{name} must have one finite number for each of the {channels} channels, got {list(values)}"
            raise ValueError(msg)
    return checked


def check_scaling(mean: Sequence[float], std: Sequence[float], dtype: Any, layout: str) -> np.dtype[Any]:
    """Require what can be required before there are images; return `dtype` as an object of that class."""
    for name, values in (("mean", mean), ("std", std)):
        try:
            finite = all(math.isfinite(value) for value in values)
        except TypeError:  # no sequence, or not of numbers
            finite = False
        if not finite:
            msg = f"{name} must have one finite number for each channel, got {values!r}"
            raise ValueError(msg)
    if not all(value > 0 for value in std):
        msg = f"std must be positive, got {list(std)}"
        raise ValueError(msg)
    check_choice(layout, "layout", LAYOUTS)
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found not in DTYPES:  # NumPy takes None for float64
        msg = f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
        raise ValueError(msg)
    return found


def scaling(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return mean and 1 / std of each channel: (2, C) float32."""
    return np.stack([np.asarray(mean), 1 / np.asarray(std, np.float64)]).astype(np.float32)

"""Pixels of mixed batches for given boxes: pasting, blending, and fused paste, flip and normalise.

Images are (N, H, W, C). No function modifies its arguments, except `out`. Each public function checks its arguments and
calls an internal function that does not, as `dali_saliencymix.mix` does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix._array import Array, Namespace, array_namespace, constant, is_host
from dali_saliencymix._checks import (
    check_array,
    check_boxes,
    check_choice,
    check_images,
    check_mixing,
    check_out,
    check_per_image,
    check_source_index,
)
from dali_saliencymix._routes import route_of
from dali_saliencymix._tables import scaling
from dali_saliencymix._threads import for_each_chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUTS = ("CHW", "HWC")
DTYPES = ("float32", "float16")

# Mean and standard deviation of ImageNet's training images, for pixels in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def in_grey_levels(values: Sequence[float]) -> list[float]:
    """Scale a mean or std from 0..1 to 0..255, for ``fn.crop_mirror_normalize`` and `dali_saliencymix.fn.Normalise`."""
    return [255 * value for value in values]


IMAGENET_IN_GREY_LEVELS = in_grey_levels(IMAGENET_MEAN), in_grey_levels(IMAGENET_STD)

_CHUNK = 16  # images per call of a thread


def paste_boxes(
    images: Array, source_index: Array, boxes: Array, *, source_boxes: Array | None = None, out: Array | None = None
) -> Array:
    """Return `images` with the pixels inside each box taken from the source image.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), any dtype
        The receivers. They also serve as sources, always unmixed.
    source_index : ndarray of shape (N,), integer
        The source of image `i` is ``images[source_index[i]]``.
    boxes : ndarray of shape (N, 4), integer
        Where to paste: (y0, x0, y1, x1), half-open, inside the image.
    source_boxes : ndarray of shape (N, 4), integer, optional
        Where to copy from in the sources: boxes of the same sizes as `boxes`; by default `boxes`. On a GPU only their
        corners (y0, x0) are used.
    out : ndarray of shape (N, H, W, C), optional
        Output array with the dtype of `images`. It must not share memory with `images`. By default a new array.

    Returns
    -------
    ndarray of shape (N, H, W, C)
        A new array with the dtype of `images`, or `out`.

    Raises
    ------
    ValueError
        If a box is not inside the image, a box and its source box differ in size, or `out` does not match.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.arange(2, dtype=np.uint8).repeat(4).reshape(2, 2, 2, 1)
    >>> paste_boxes(images, np.array([1, 0]), np.array([[0, 0, 1, 2], [0, 0, 0, 0]]))[..., 0].tolist()
    [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    """
    xp = _check_pasting(images, source_index, boxes, source_boxes)
    if out is not None:
        check_out(out, xp, images.shape, images.dtype)
        if xp.may_share_memory(out, images):
            msg = "out must not share memory with images"
            raise ValueError(msg)
    return paste(images, source_index, boxes, source_boxes=source_boxes, out=out, route=route_of("auto", xp))


def paste(
    images: Array,
    source_index: Array,
    boxes: Array,
    *,
    source_boxes: Array | None = None,
    out: Array | None = None,
    route: str,
) -> Array:
    """Return what `paste_boxes` returns, without checks; on a GPU `route` selects the kernel or array operations."""
    if is_host(array_namespace(images)):
        return _paste_by_slices(images, source_index, boxes, source_boxes, out)
    if route == "cuda":
        from dali_saliencymix import _cuda

        return _into(out, _cuda.paste_boxes(images, source_index, boxes, source_boxes=source_boxes))
    return _into(out, _paste_by_mask(images, source_index, boxes, source_boxes))


def _into(out: Array | None, made: Array) -> Array:
    """Copy `made` to `out` and return `out`; if `out` is None, return `made`."""
    if out is None:
        return made
    out[...] = made
    return out


def _check_pasting(images: Array, source_index: Array, boxes: Array, source_boxes: Array | None) -> Namespace:
    """Require valid arguments of `paste_boxes`; return their array library."""
    xp = check_array(images, "images")
    check_source_index(source_index, xp, len(images))
    check_boxes(boxes, "boxes", xp, *images.shape[:3])
    if source_boxes is not None:
        check_boxes(source_boxes, "source_boxes", xp, *images.shape[:3])
        _check_same_sizes(boxes, source_boxes, xp)
    return xp


def _check_same_sizes(boxes: Array, source_boxes: Array, xp: Namespace) -> None:
    if not is_host(xp):
        return
    different = ((boxes[:, 2:] - boxes[:, :2]) != (source_boxes[:, 2:] - source_boxes[:, :2])).any(axis=1)
    if different.any():
        i = int(different.argmax())
        msg = f"source_boxes must have the sizes of boxes, got {source_boxes[i].tolist()} for {boxes[i].tolist()}"
        raise ValueError(msg)


def _paste_by_slices(
    images: Array, source_index: Array, boxes: Array, source_boxes: Array | None = None, out: Array | None = None
) -> Array:
    """Paste with two slice copies per image, the fastest way on a CPU. A new array has the strides of `images`."""
    mixed = np.empty_like(images) if out is None else out
    index = source_index.tolist()
    places, origins = boxes.tolist(), (boxes if source_boxes is None else source_boxes).tolist()

    def paste(chunk: slice) -> None:
        mixed[chunk] = images[chunk]
        for receiver in range(chunk.start, chunk.stop):
            (y0, x0, y1, x1), (v0, u0, v1, u1) = places[receiver], origins[receiver]
            mixed[receiver, y0:y1, x0:x1] = images[index[receiver], v0:v1, u0:u1]

    for_each_chunk(paste, len(images), _CHUNK)
    return mixed


def _paste_by_mask(images: Array, source_index: Array, boxes: Array, source_boxes: Array | None = None) -> Array:
    """Paste with one ``where`` over all pixels, which needs no box coordinates on the host."""
    xp = array_namespace(images)
    _, height, width, _ = images.shape
    position = constant(xp, np.arange, max(height, width))
    within = (boxes[:, :2, None] <= position) & (position < boxes[:, 2:, None])  # of rows and columns
    inside = within[:, 0, :height, None] & within[:, 1, None, :width]
    if source_boxes is None:
        sources = images[source_index]
    else:
        taken = position - boxes[:, :2, None] + source_boxes[:, :2, None]
        rows = xp.clip(taken[:, 0, :height, None], 0, height - 1)
        columns = xp.clip(taken[:, 1, None, :width], 0, width - 1)
        # Indexing with three arrays would take three launches, each over an index of all pixels.
        index = (source_index.astype(xp.int64, copy=False)[:, None, None] * height + rows) * width + columns
        sources = xp.take(images.reshape(-1, images.shape[3]), index, axis=0)
    return xp.where(inside[..., None], sources, images)


def blend_images(images: Array, source_index: Array, lam: Array) -> Array:
    """Return the weighted mean of each image and its source: mixup.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The receivers. They also serve as sources, always unmixed.
    source_index : ndarray of shape (N,), integer
        The source of image `i` is ``images[source_index[i]]``.
    lam : ndarray of shape (N,), floating
        Weight of each receiver, in [0, 1].

    Returns
    -------
    ndarray of shape (N, H, W, C), uint8
        ``lam * image + (1 - lam) * source``, computed in float32 and rounded to the nearest integer, ties to even.

    Notes
    -----
    This is mixup on 8-bit pixels: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Rounding
    changes a pixel by at most half a grey level.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.array([[[[0]]], [[[100]]]], np.uint8)
    >>> blend_images(images, np.array([1, 0]), np.array([0.75, 1.0], np.float32)).ravel().tolist()
    [25, 100]
    """
    xp = check_mixing(images, source_index, lam)
    return blend(images.copy(order="K"), images, source_index, lam.astype(xp.float32))


def blend(mixed: Array, images: Array, source_index: Array, lam: Array) -> Array:
    """Return `mixed`, with blended `images` where `lam` < 1; on a CPU `mixed` is modified in place."""
    xp = array_namespace(images)
    if not is_host(xp):
        weight = lam[:, None, None, None]
        return xp.where(weight < 1, _blended(images, images[source_index], weight), mixed)
    for receiver in np.flatnonzero(lam < 1).tolist():  # one by one: the float32 pixels of one image fit the cache
        mixed[receiver] = _blended(images[receiver], images[source_index[receiver]], lam[receiver])
    return mixed


def _blended(image: Array, source: Array, weight: Array) -> Array:
    xp = array_namespace(image)
    return xp.rint(image * weight + source * (1 - weight)).astype(xp.uint8)


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
    """Return `images` with boxes pasted from their sources, then flipped and normalised, as network input.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The receivers. They also serve as sources, always unmixed.
    source_index : ndarray of shape (N,), integer
        The source of image `i` is ``images[source_index[i]]``.
    boxes, source_boxes : ndarray of shape (N, 4), integer
        As for `paste_boxes`.
    mirror : ndarray of shape (N,), bool or integer, optional
        Nonzero for each mixed image to flip horizontally, together with its patch. By default no image is flipped.
    mean, std : sequence of C floats
        Mean and standard deviation of each channel, in grey levels 0..255; `std` is positive.
    dtype : {"float32", "float16"}
        Dtype of the result, which is computed in float32 and rounded once.
    layout : {"CHW", "HWC"}
        Layout of each image of the result.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel that makes one pass over the pixels. There are kernels in CUDA on a GPU and, for
        float32 results, compiled by Numba on a CPU. Both algorithms are bit-identical. ``"auto"`` selects the kernel on
        a GPU, and on a CPU if Numba is installed.
    out : ndarray, optional
        C-contiguous output array. By default a new array.

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
    The result agrees with DALI's ``fn.crop_mirror_normalize`` except for the last bit.

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
    if mirror is not None:
        kind = "b" if getattr(mirror, "dtype", None) == np.bool_ else "iu"
        check_per_image(mirror, "mirror", xp, len(images), kind)
    dtype = check_scaling(mean, std, dtype, layout)
    check_channels(images.shape[3], mean, std)
    if out is not None:
        check_out(out, xp, normalised_shape(images.shape, layout), dtype)
    _check_pasting(images, source_index, boxes, source_boxes)
    patches = images, source_index, boxes, source_boxes, mirror
    return paste_and_normalise(*patches, mean, std, dtype, layout, route_of(algorithm, xp), out)


def paste_and_normalise(
    images: Array,
    source_index: Array,
    boxes: Array,
    source_boxes: Array | None,
    mirror: Array | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: np.dtype[Any],
    layout: str,
    route: str,
    out: Array | None,
) -> Array:
    """Return what `paste_normalised` returns, without checks; use the kernel of `route` if it supports `dtype`."""
    xp = array_namespace(images)
    shift_and_scale = constant(xp, scaling, tuple(mean), tuple(std))
    if route == "cuda":
        from dali_saliencymix import _cuda

        patches = images, source_index, boxes, source_boxes, mirror
        return _cuda.paste_normalised(*patches, shift_and_scale, dtype, layout, out)
    if route == "numba" and dtype == np.float32:
        from dali_saliencymix._numba import pixels

        out = np.empty(normalised_shape(images.shape, layout), np.float32) if out is None else out
        origins = boxes if source_boxes is None else source_boxes
        pixels.paste_normalised(images, source_index, boxes, origins, mirror, shift_and_scale, layout, out)
        return out
    mixed = paste(images, source_index, boxes, source_boxes=source_boxes, route="array")
    if mirror is not None:
        mixed = xp.where((mirror != 0)[:, None, None, None], mixed[:, :, ::-1], mixed)
    shift, scale = shift_and_scale
    normalised = ((mixed.astype(xp.float32) - shift) * scale).astype(dtype)
    if layout == "CHW":
        normalised = normalised.transpose(0, 3, 1, 2)
    return _into(out, normalised if layout == "HWC" else xp.ascontiguousarray(normalised))


def normalised_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Return the shape of normalised images in `layout`, for images of shape (N, H, W, C)."""
    count, height, width, channels = shape
    return (count, channels, height, width) if layout == "CHW" else shape


def check_channels(channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Require one mean and one std per channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            msg = f"{name} must have one finite number for each of the {channels} channels, got {list(values)}"
            raise ValueError(msg)


def check_scaling(mean: Sequence[float], std: Sequence[float], dtype: Any, layout: str) -> np.dtype[Any]:
    """Require a valid mean, std, dtype and layout, as far as images are not needed; return the ``numpy.dtype``."""
    for name, values in (("mean", mean), ("std", std)):
        try:
            finite = all(math.isfinite(value) for value in values)
        except TypeError:  # not a sequence of numbers
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
    if dtype is None or found not in DTYPES:  # NumPy interprets None as float64
        msg = f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
        raise ValueError(msg)
    return found

"""Mixing nodes of a DALI graph: DALI draws the random numbers, and Python mixes the images.

Python receives the drawn numbers unconverted. DALI runs CPU operators one at a time, and an operator on a batch of
numbers takes as long as decoding several images. Converting and packing the numbers in DALI would delay the decoder.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nvidia.dali import fn, types

from dali_saliencymix import pixels
from dali_saliencymix._array import array_namespace, constant, is_host
from dali_saliencymix._checks import check_flag
from dali_saliencymix._dali.bridge import OF_IMAGES
from dali_saliencymix._dali.python_operator import Buffers, Stage, python_operator, to_device
from dali_saliencymix._routes import route_of
from dali_saliencymix.mix import apply
from dali_saliencymix.options import MODES, MixOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nvidia.dali.pipeline import DataNode

    from dali_saliencymix._array import Array


# Messages for user inputs of different shapes.
_RULES = {
    "mirror": "mirror must be one number for each image, got {}",
    "peaks": "all peaks of a batch must have shape (2,), got {}",
}


class Normalise(NamedTuple):
    """Options of fused flip and normalise, in the same operator as the mixing instead of after it.

    On a CPU with Numba installed, saliencymix and cutmix mix, flip and normalise in one pass over the pixels, which
    takes less time than ``fn.crop_mirror_normalize`` alone. mixup and mix need a second pass. On an H100, fused and
    separate operators were equally fast within the noise.

    Attributes
    ----------
    mean : sequence of float
        Mean of each channel, in grey levels 0..255.
    std : sequence of float
        Standard deviation of each channel, in grey levels.
    mirror : DataNode, optional
        1 to flip a mixed image horizontally, with its patch, or 0; scalars or of shape (1,). On a GPU the values are
        not checked, and any nonzero value flips.
    dtype : {"float32", "float16"} or DALIDataType
        Dtype of the output images, as a name or a DALI type such as ``types.FLOAT``.
    layout : {"CHW", "HWC"}
        Layout of the output images.
    """

    mean: Sequence[float]
    std: Sequence[float]
    mirror: DataNode | None = None
    dtype: str | types.DALIDataType = "float32"
    layout: str = "CHW"


def mix_nodes(
    images: DataNode,
    labels: DataNode,
    options: MixOptions,
    *,
    peaks: DataNode | None = None,
    normalise: Normalise | None = None,
    return_boxes: bool = False,
    policy: bool = False,
) -> tuple[DataNode, ...]:
    """Return the mixed images, labels, source labels, weights, and, with `return_boxes`, boxes.

    See `dali_saliencymix.fn.saliencymix`. If `policy` is true, or `options` have several modes, a mode is drawn for
    each sample or batch.
    """
    check_flag(return_boxes, "return_boxes")
    normalise = None if normalise is None else _checked(normalise)
    policy = policy or options.mode is None
    source_index = fn.batch_permutation()
    given = {"source_index": source_index}
    given |= {f"lam of {mode}": fn.random.beta(alpha=alpha, beta=alpha) for mode, alpha in options.alphas.items()}
    if options.prob < 1:
        given["mixed"] = fn.random.coin_flip(probability=options.prob)
    if policy:
        probabilities = list(options.probabilities.values())
        given["mode"] = fn.random.choice(len(probabilities), p=probabilities)
    if policy or options.needs_point:
        given["point"] = fn.random.uniform(range=[0.0, 1.0], shape=[2])
    if normalise is not None and normalise.mirror is not None:
        given["mirror"] = normalise.mirror
    if peaks is not None:
        given["peaks"] = peaks
    mixing = _Mixing(options, tuple(given), normalise, return_boxes=return_boxes)
    images, lam, *boxes = python_operator(
        mixing,
        images,
        *(to_device(images.device, node) for node in given.values()),
        rules=(OF_IMAGES, *map(_RULES.get, given)),
        name="mix" if policy else str(options.mode),
        num_outputs=2 + return_boxes,
        layouts=["HWC" if normalise is None else normalise.layout],
        stage=mixing.stage(),
    )
    return images, labels, fn.permute_batch(labels, indices=source_index), lam, *boxes


def _checked(normalise: Normalise) -> Normalise:
    """Require a valid `Normalise`; return it with a NumPy dtype name."""
    if not isinstance(normalise, Normalise):
        msg = f"normalise must be a dali_saliencymix.fn.Normalise, got {normalise!r}"
        raise TypeError(msg)
    dtype = normalise.dtype
    if isinstance(dtype, types.DALIDataType):
        dtype = np.dtype(types.to_numpy_type(dtype)).name
    pixels.check_scaling(normalise.mean, normalise.std, dtype, normalise.layout)
    return normalise._replace(dtype=dtype)


class _Mixing:
    """Callback for each batch: mix images according to `options`, with further input arrays called `names`."""

    def __init__(
        self, options: MixOptions, names: tuple[str, ...], normalise: Normalise | None, *, return_boxes: bool
    ) -> None:
        self._options = options
        self._return_boxes = return_boxes
        self._names = names
        self._normalise = normalise
        self._buffers = Buffers()

    def __call__(self, images: Array, *given: Array) -> tuple[Array, ...]:
        """Return the mixed images, `lam` and, with `return_boxes`, boxes."""
        options, count = self._options, len(images)
        arrays = dict(zip(self._names, given, strict=True))
        xp = array_namespace(arrays["source_index"])
        lams = [arrays.pop(name) for name in self._names if name.startswith("lam of ")]
        arrays["lam"] = lams[0]
        if "mode" in arrays:
            arrays |= _chosen(arrays["mode"], xp.stack(lams, axis=1), options)
        if (is_mixed := arrays.pop("mixed", None)) is not None:
            arrays["lam"] = xp.where(is_mixed != 0, arrays["lam"], xp.float32(1))
        if "peaks" in arrays:
            # Accept any shape here; a check with a better message follows.
            arrays["peaks"] = arrays["peaks"].reshape(count, -1).astype("int64")
        on_host = is_host(xp)
        mirror = arrays.pop("mirror", None)
        if mirror is not None:
            mirror = _flipped(mirror, count)
        # Blending allocates a new array anyway, so a buffer would not help.
        into_buffer = on_host and "mode" not in arrays and options.mode != "mixup"
        paste = functools.partial(self._paste, mirror=mirror) if into_buffer or self._normalise is not None else None
        mixed = apply(options, images, **arrays, paste=paste)
        if not self._return_boxes:
            return mixed.images, mixed.lam
        return mixed.images, mixed.lam, _as_they_come_out(mixed.boxes, mirror, images.shape[2])

    def _paste(
        self, images: Array, source_index: Array, boxes: Array, *, source_boxes: Array | None, mirror: Array | None
    ) -> Array:
        """Return the mixed images, normalised if requested; in host memory, write them to reused buffers."""
        xp = array_namespace(images)
        on_host = is_host(xp)
        route = route_of(self._options.algorithm, xp)
        if self._normalise is None:
            out = self._buffers.take(images.shape, images.dtype) if on_host else None
            return pixels.paste(images, source_index, boxes, source_boxes=source_boxes, out=out, route=route)
        mean, std, _, dtype, layout = self._normalise
        pixels.check_channels(images.shape[3], mean, std)
        out = self._buffers.take(pixels.normalised_shape(images.shape, layout), dtype) if on_host else None
        patches = images, source_index, boxes, source_boxes, mirror
        return pixels.paste_and_normalise(*patches, mean, std, np.dtype(dtype), layout, route, out)

    def stage(self) -> Stage:
        """Return the description of this operator in a graph."""
        options = self._options
        looks_for_saliency = "saliencymix" in options.modes and "peaks" not in self._names
        return Stage(
            "paste" if self._normalise is None else "paste and normalise",
            self._leave_out_saliency if looks_for_saliency else None,
        )

    def _leave_out_saliency(self) -> None:
        self._options = replace(self._options, saliency=_no_saliency)


def _flipped(mirror: Array, count: int) -> Array:
    """Return which images are flipped, (N,) bool; in host memory reject values other than 0 and 1."""
    if mirror.size != count:
        msg = f"mirror must be one number for each image, got shape {mirror.shape[1:]}"
        raise ValueError(msg)
    mirror = mirror.reshape(count)
    if is_host(array_namespace(mirror)):
        wrong = mirror[(mirror != 0) & (mirror != 1)]
        if wrong.size:
            msg = f"mirror must be 0 or 1 for each image, got {wrong[0]}"
            raise ValueError(msg)
    return mirror != 0


def _as_they_come_out(boxes: Array, mirror: Array | None, width: int) -> Array:
    """Return the boxes after the flip of the images in `mirror`; empty boxes stay all 0."""
    if mirror is None:
        return boxes
    xp = array_namespace(boxes)
    y0, x0, y1, x1 = boxes.T
    flipped = xp.stack([y0, width - x1, y1, width - x0], axis=1)
    return xp.where((mirror & (x0 < x1))[:, None], flipped, boxes)


def _no_saliency(images: Array) -> Array:
    """Return constant maps (N, 8, 8): a detector of negligible cost."""
    return array_namespace(images).zeros((len(images), 8, 8), dtype="float32")


def _chosen(position: Array, lam: Array, options: MixOptions) -> dict[str, Array]:
    """Return the mode and lam of each sample, from its position in ``options.modes`` and one column of lam per mode."""
    xp = array_namespace(position)
    if options.choose == "batch":
        position = xp.repeat(position[:1], len(position), axis=0)
    return {
        "mode": constant(xp, _indices, tuple(options.modes))[position],
        "lam": xp.take_along_axis(lam, position[:, None], axis=1)[:, 0],
    }


def _indices(modes: tuple[str, ...]) -> np.ndarray:
    return np.array([MODES.index(name) for name in modes])

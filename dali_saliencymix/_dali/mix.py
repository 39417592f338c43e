"""What the mixing operators of `dali_saliencymix.fn` put into a pipeline: params drawn and packed, images mixed.

Python gets two inputs, the images and one vector of params a sample: each further one would be a copy more on its way
to a GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from nvidia.dali import fn, types

from dali_saliencymix import core
from dali_saliencymix._array import array_namespace, constant, is_host
from dali_saliencymix._dali.operator import Buffers, python_operator, to_device
from dali_saliencymix.draw import MODES
from dali_saliencymix.normalise import check_scaling, normalised_shape, paste_normalised
from dali_saliencymix.pixels import paste_boxes

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

    from dali_saliencymix._array import Array
    from dali_saliencymix.fn import Normalise


def mixed_with_partners(
    images: DataNode,
    labels: DataNode,
    function: str,
    drawn: dict[str, list[DataNode]],
    peaks: DataNode | None = None,
    *,
    normalise: Normalise | None = None,
    **options: Any,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Draw partners, then mix: Python gets two inputs, the images and one vector of params a sample."""
    source_index = fn.batch_permutation()
    drawn = {"source_index": [source_index], **drawn}
    if normalise is not None and normalise.mirror is not None:
        drawn["mirror"] = [fn.reshape(normalise.mirror, shape=[])]
    columns = {name: len(nodes) for name, nodes in drawn.items()}
    scalars = [fn.cast(node, dtype=types.FLOAT) for nodes in drawn.values() for node in nodes]
    params = to_device(images.device, fn.stack(*scalars))
    if peaks is not None:
        columns["peaks"] = 2
        # Flat, so that peaks of any shape get as far as the check that names them.
        flat = fn.reshape(fn.cast(peaks, dtype=types.FLOAT), shape=[-1])
        params = fn.cat(params, to_device(images.device, flat))
    mix = functools.partial(_mix, function=function, columns=columns, **options)
    layout = "HWC" if normalise is None else normalise.layout
    if normalise is not None or (images.device == "cpu" and function in ("saliencymix", "cutmix")):
        mix = functools.partial(mix, paste=_Paste(normalise))
    images, lam = python_operator(mix, images, params, name=function, num_outputs=2, layouts=[layout])
    return images, labels, fn.permute_batch(labels, indices=source_index), lam


def _mix(
    images: Array,
    params: Array,
    *,
    function: str,
    columns: dict[str, int],
    choice: Any = None,
    paste: _Paste | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Return images and lam of a function of `core`, with what is packed in the columns of `params`, (N, P) float32."""
    arrays, start = {}, 0
    for name, width in columns.items():
        arrays[name] = params[:, start : start + width]
        start += width
    if choice:
        arrays |= choice(arrays["mode"], arrays["lam"])
    else:
        arrays["lam"] = arrays["lam"][:, 0]
    # float32 holds every index of a batch of up to 2**24, and every pixel of an image as wide.
    arrays["source_index"] = arrays["source_index"][:, 0].astype("int64")
    if "peaks" in arrays:
        arrays["peaks"] = params[:, start - columns["peaks"] :].astype("int64")  # the last; too many are refused later
    mirror = arrays.pop("mirror", None)
    if mirror is not None and is_host(array_namespace(mirror)):
        wrong = mirror[(mirror != 0) & (mirror != 1)]
        if wrong.size:
            msg = f"mirror must be 0 or 1 for each image, got {wrong[0]}"
            raise ValueError(msg)
    if paste is not None:
        options["paste"] = functools.partial(paste, mirror=mirror, algorithm=options.get("algorithm", "auto"))
    mixed = getattr(core, function)(images, **arrays, **options)
    return mixed.images, mixed.lam


class _Paste:
    """Makes the mixed images, or the normalised ones; in host memory in buffers that are used again."""

    def __init__(self, normalise: Normalise | None) -> None:
        self.normalise = normalise
        if normalise is not None:
            self._dtype = check_scaling(normalise.mean, normalise.std, normalise.dtype, normalise.layout)
        self._buffers = Buffers()

    def __call__(
        self,
        images: Array,
        source_index: Array,
        boxes: Array,
        *,
        source_boxes: Array | None,
        mirror: Array | None,
        algorithm: str,
    ) -> Array:
        on_host = is_host(array_namespace(images))
        if self.normalise is None:
            out = self._buffers.take(images.shape, images.dtype) if on_host else None
            return paste_boxes(images, source_index, boxes, source_boxes=source_boxes, out=out)
        mean, std, _, _, layout = self.normalise
        out = self._buffers.take(normalised_shape(images.shape, layout), self._dtype) if on_host else None
        return paste_normalised(
            images,
            source_index,
            boxes,
            source_boxes=source_boxes,
            mirror=None if mirror is None else mirror[:, 0] != 0,
            mean=mean,
            std=std,
            dtype=self._dtype,
            layout=layout,
            algorithm=algorithm,
            out=out,
        )


def chosen(position: Array, lam: Array, *, modes: tuple[str, ...], choose: str) -> dict[str, Array]:
    """Return mode and lam of each sample from positions in `modes` and one column of lam for each of these."""
    xp = array_namespace(position)
    position = position.astype("int64")
    if choose == "batch":
        position = xp.repeat(position[:1], len(position), axis=0)
    return {
        "mode": constant(xp, _indices, modes)[position[:, 0]],
        "lam": xp.take_along_axis(lam, position, axis=1)[:, 0],
    }


def _indices(modes: tuple[str, ...]) -> np.ndarray:
    return np.array([MODES.index(name) for name in modes])

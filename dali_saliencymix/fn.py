"""DALI operators: SaliencyMix as one line of a pipeline.

They are called inside a pipeline definition, as ``nvidia.dali.fn`` functions are, and take and return graph nodes on
either device. All random numbers are drawn by DALI operators, so that the pipeline's seed and checkpoints cover them;
the Python code that DALI calls for each batch is a pure function.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert

from dali_saliencymix import _bridge, core, mixing
from dali_saliencymix._checks import check_alpha, check_at_least, check_box, check_prob
from dali_saliencymix.saliency import get_detector

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvidia.dali.pipeline import DataNode

    from dali_saliencymix._array import Array
    from dali_saliencymix.core import Mixed
    from dali_saliencymix.saliency import Detector

__all__ = ["cutmix", "saliencymix", "soft_labels"]


@do_not_convert
def saliencymix(
    images: DataNode,
    labels: DataNode,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    saliency: str | Detector = "spectral_residual",
    box: str = "fit",
    per_batch: bool = False,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Mix each image of a batch with the most salient part of a random other one.

    Put it behind the resize, where all images of a batch have one shape and are still uint8, and in front of
    ``fn.crop_mirror_normalize``.

    Parameters
    ----------
    images : DataNode
        HWC images, uint8, of 3 or 1 channels and one shape for the whole batch, on CPU or GPU. On a GPU CuPy is needed.
    labels : DataNode
        Labels of any shape and dtype, on either device.
    alpha : float
        Each sample's share to keep is drawn from Beta(alpha, alpha); 1 is the uniform law of the paper.
    prob : float
        Probability in [0, 1] that a sample is mixed; the paper's code has 1.0 for ImageNet and 0.5 for CIFAR.
    saliency : str or callable
        Name of a detector (``"spectral_residual"``, ``"fine_grained"``), or a function from images (N, H, W, C) uint8
        to maps (N, h, w), NumPy or CuPy as the images are.
    box : {"fit", "clip"}
        ``"fit"`` moves a box that would stick out inside the image, as the paper says; ``"clip"`` cuts it off, as the
        released code does.
    per_batch : bool
        If true, one draw and one box serve the whole batch, as in the released code.

    Returns
    -------
    images : DataNode
        Mixed images, HWC uint8, on the device of `images`.
    labels : DataNode
        The labels as they were given.
    source_labels : DataNode
        The label of each image's source, on the device of `labels`.
    lam : DataNode
        Weight of `labels` in each sample, float32 scalars, on the device of `images`: exactly the share of the pixels
        that are the image's own. 1 where a sample was not mixed.

    Raises
    ------
    TypeError, ValueError
        While the pipeline is defined, if an argument is wrong. While it runs, DALI reports a ``RuntimeError`` whose
        text says what is wrong with the images: not uint8, not HWC, not of one shape.

    Notes
    -----
    See `dali_saliencymix.saliencymix` for the function on arrays that does the work.

    Examples
    --------
    >>> from nvidia.dali import fn, pipeline_def
    >>> from dali_saliencymix.fn import saliencymix
    >>> @pipeline_def(batch_size=32, num_threads=4, device_id=None)
    ... def training_pipeline(file_root):
    ...     jpegs, labels = fn.readers.file(file_root=file_root, random_shuffle=True)
    ...     images = fn.resize(fn.decoders.image(jpegs), size=(224, 224))
    ...     images, labels, source_labels, lam = saliencymix(images, labels)
    ...     return images, labels, source_labels, lam
    """
    check_box(box)
    mix = functools.partial(_saliencymix, saliency=get_detector(saliency), box=box, per_batch=bool(per_batch))
    return _mixed_with_partners(images, labels, mix, [], alpha=alpha, prob=prob)


@do_not_convert
def cutmix(
    images: DataNode,
    labels: DataNode,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    box: str = "clip",
    per_batch: bool = False,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Mix each image of a batch with a random part of a random other one: CutMix.

    Parameters and returns are those of `saliencymix`, without `saliency`; the box is put around a point drawn
    uniformly from the image.

    Notes
    -----
    See `dali_saliencymix.cutmix` for the function on arrays that does the work.

    Examples
    --------
    >>> from nvidia.dali import fn, pipeline_def
    >>> from dali_saliencymix.fn import cutmix
    >>> @pipeline_def(batch_size=32, num_threads=4, device_id=None)
    ... def training_pipeline(file_root):
    ...     jpegs, labels = fn.readers.file(file_root=file_root, random_shuffle=True)
    ...     images = fn.resize(fn.decoders.image(jpegs), size=(224, 224))
    ...     return cutmix(images, labels, alpha=1.0, prob=0.5)
    """
    check_box(box)
    mix = functools.partial(_cutmix, box=box, per_batch=bool(per_batch))
    centre = [fn.random.uniform(range=[0.0, 1.0]), fn.random.uniform(range=[0.0, 1.0])]
    return _mixed_with_partners(images, labels, mix, centre, alpha=alpha, prob=prob)


@do_not_convert
def soft_labels(labels: DataNode, source_labels: DataNode, lam: DataNode, *, num_classes: int) -> DataNode:
    """Make class probabilities of the labels of mixed images.

    Parameters
    ----------
    labels, source_labels : DataNode
        Integer class ids in [0, num_classes), scalars or of shape (1,), as the readers give them.
    lam : DataNode
        Weight of `labels`: floating scalars.
    num_classes : int
        K, the number of classes.

    Returns
    -------
    DataNode
        (K,) float32 for each sample, summing to 1; on the GPU if one of the arguments is there.

    Raises
    ------
    ValueError
        While the pipeline is defined, if `num_classes` is not an integer of at least 1.
    RuntimeError
        While the pipeline runs on the CPU, if a label lies outside [0, num_classes). On a GPU, which would have to
        be waited for, such a label makes a row of NaN instead, and so a loss of NaN.

    Notes
    -----
    See `dali_saliencymix.soft_labels` for the function on arrays that does the work.
    """
    check_at_least(num_classes, "num_classes", 1)
    make = functools.partial(_soft_labels, num_classes=num_classes)
    # One input for Python instead of three; float64 holds all class ids of up to 2**53.
    scalars = [fn.reshape(fn.cast(node, dtype=types.FLOAT64), shape=[]) for node in (labels, source_labels, lam)]
    device = "gpu" if any(scalar.device == "gpu" for scalar in scalars) else "cpu"
    packed = fn.stack(*(_to(device, scalar) for scalar in scalars))
    return fn.python_function(packed, function=make, batch_processing=True, **_placed(device))


def _mixed_with_partners(
    images: DataNode,
    labels: DataNode,
    mix: Callable[[Array, Array], Mixed],
    extra_params: list[DataNode],
    *,
    alpha: float,
    prob: float,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Draw partners and weights, then mix: Python gets two inputs, the images and one vector of params a sample."""
    alpha, prob = check_alpha(alpha), check_prob(prob)
    source_index = fn.batch_permutation()
    lam = fn.random.beta(alpha=alpha, beta=alpha)
    if prob < 1:
        mixed = fn.random.coin_flip(probability=prob)
        lam = mixed * lam + (1 - mixed)
    params = fn.stack(*(fn.cast(node, dtype=types.FLOAT) for node in (source_index, lam, *extra_params)))
    images, lam = fn.python_function(
        images,
        _to(images.device, params),
        function=functools.partial(_bridge.mix_samples, mix),
        num_outputs=2,
        batch_processing=True,
        output_layouts=["HWC"],
        **_placed(images.device),
    )
    return images, labels, fn.permute_batch(labels, indices=source_index), lam


def _to(device: str, node: DataNode) -> DataNode:
    return node.gpu() if device == "gpu" and node.device == "cpu" else node


def _placed(device: str) -> dict[str, Any]:
    """Keyword argument that puts a Python operator on `device`."""
    if device == "gpu" and importlib.util.find_spec("cupy") is None:
        msg = "mixing on a GPU needs CuPy, which is not installed: pip install 'dali-saliencymix[cuda12]'"
        raise ImportError(msg)
    return {"device": device}


def _saliencymix(images: Array, params: Array, **options: Any) -> Mixed:
    return core.saliencymix(images, *_source_and_lam(params), **options)


def _cutmix(images: Array, params: Array, **options: Any) -> Mixed:
    return core.cutmix(images, *_source_and_lam(params), params[:, 2:4], **options)


def _source_and_lam(params: Array) -> tuple[Array, Array]:
    # float32 holds every index of a batch of up to 2**24.
    return params[:, 0].astype("int64"), params[:, 1]


def _soft_labels(packed: list[Array], *, num_classes: int) -> list[Array]:
    batch = _bridge.as_batch(packed)
    labels, source_labels = batch[:, 0].astype("int64"), batch[:, 1].astype("int64")
    return _bridge.as_samples(mixing.soft_labels(labels, source_labels, batch[:, 2], num_classes=num_classes))

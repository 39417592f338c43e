"""SaliencyMix operators for DALI pipelines.

Call them inside a pipeline definition, like the functions of ``nvidia.dali.fn``. They take and return graph nodes on
either device. DALI operators draw all random numbers, so the pipeline's seed and checkpoints cover them. The Python
code that DALI calls for each batch is a pure function.

`saliencymix`, `cutmix`, `mixup` and `mix` are interchangeable in a pipeline and return the same four nodes. With
``return_boxes=True``, which mixup does not have, a fifth node holds the boxes of the patches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dali_saliencymix.packages import require

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import DataNode, Pipeline, do_not_convert
except ModuleNotFoundError:
    require("nvidia.dali", by=__name__)
    raise

from dali_saliencymix import labels as array_labels
from dali_saliencymix._array import array_namespace, is_host
from dali_saliencymix._checks import check_at_least, check_choice, check_fraction, check_images
from dali_saliencymix._dali.mix_nodes import Normalise, mix_nodes
from dali_saliencymix._dali.python_operator import Stage, python_operator, to_device
from dali_saliencymix._routes import ALGORITHMS, route_of
from dali_saliencymix.boxes import find_peaks
from dali_saliencymix.options import MixOptions, check_with_peaks
from dali_saliencymix.saliency import get_detector, saliency_maps

if TYPE_CHECKING:
    from collections.abc import Callable

    from dali_saliencymix._array import Array
    from dali_saliencymix.saliency import Detector

Normalize = Normalise  # the American spelling

__all__ = ["Normalise", "Normalize", "cutmix", "mix", "mixup", "saliency_peaks", "saliencymix", "soft_labels"]


_Arguments = ParamSpec("_Arguments")
_Nodes = TypeVar("_Nodes")


def _operator(function: Callable[_Arguments, _Nodes]) -> Callable[_Arguments, _Nodes]:
    """Reject calls outside a pipeline definition and nodes as options; disable DALI's conditionals in `function`."""
    parameters = inspect.signature(function).parameters.values()
    options = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} - {"peaks"}

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Nodes:
        if Pipeline.current() is None:
            msg = (
                f"dali_saliencymix.fn.{function.__name__} must be called in the definition of a DALI pipeline; "
                f"on arrays, and in DALI's dynamic mode, use dali_saliencymix.{function.__name__}"
            )
            raise RuntimeError(msg)
        for name in options & kwargs.keys():
            value = kwargs[name]
            for each in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(each, DataNode | types.ScalarConstant):
                    msg = f"{name} must be a plain value, the same for all batches, got a DALI {type(each).__name__}"
                    raise TypeError(msg)
        return function(*args, **kwargs)

    convert: Callable[[Callable[_Arguments, _Nodes]], Callable[_Arguments, _Nodes]] = do_not_convert
    return convert(checked)


@_operator
def saliencymix(
    images: DataNode,
    labels: DataNode,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: DataNode | None = None,
    label_weight: str = "area",
    algorithm: str = "auto",
    normalise: Normalise | None = None,
    return_boxes: bool = False,
) -> tuple[DataNode, ...]:
    """Paste the most salient patch of a random source image of the batch into each image, the receiver.

    Place it after the resize, where all images of a batch have the same shape and are still uint8, and before
    ``fn.crop_mirror_normalize``.

    Parameters
    ----------
    images : DataNode
        HWC images, uint8, with 3 or 1 channels, all of the same shape within a batch, on CPU or GPU. CuPy is
        required on a GPU.
    labels : DataNode
        Labels of any shape and dtype, on either device.
    alpha : float
        `lam`, the share of each image to keep, is drawn from Beta(alpha, alpha); 1 is the uniform distribution of the
        paper.
    prob : float
        Probability in [0, 1] that a sample is mixed; the paper's code uses 1.0 for ImageNet and 0.5 for CIFAR.
    preset : {"default", "paper", "released-code"}
        Values of the options that are None. ``"default"`` is ``saliency="spectral_residual"``, ``source="salient"``,
        ``destination="corresponding"``, ``box="fit"`` and ``per_batch=False``. ``"paper"`` differs in
        ``saliency="fine_grained"``. ``"released-code"`` differs from ``"paper"`` in ``box="clip"`` and
        ``per_batch=True``.
    saliency : str or callable, optional
        Name of a detector in `dali_saliencymix.DETECTORS`, or a function from images (N, H, W, C) uint8 to maps
        (N, h, w), NumPy on the CPU and CuPy on the GPU. On the CPU it is called only with the images whose maps are
        needed.
    source : {"salient", "non_salient"}, optional
        Cut the patch around the most or the least salient pixel of the source.
    destination : {"corresponding", "salient", "non_salient", "random"}, optional
        Paste the patch at the same place, around the most or the least salient pixel of the receiver, or around a
        random point.
    box : {"fit", "clip"}, optional
        If a box crosses the border of the source, ``"fit"`` moves it inside, as in the paper, and ``"clip"`` cuts it at
        the border, as in the released code.
    per_batch : bool, optional
        If true, one `lam` and one box are used for the whole batch, as in the released code.
    peaks : DataNode, optional
        Most salient pixel (y, x) of each image, of shape (2,), if already known, for example from `saliency_peaks`
        before a crop; replaces `saliency`.
    label_weight : {"area", "saliency"}
        Meaning of the returned `lam`. ``"area"`` is the share of the pixels outside the box. ``"saliency"`` is the
        ratio of the saliency kept to the saliency kept and pasted, see `dali_saliencymix.saliencymix`; it cannot be
        combined with `peaks`.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or kernels for the steps that have one; see `dali_saliencymix.fine_grained`.
    normalise : Normalise, optional
        If given, fused flip and normalise: it replaces ``fn.crop_mirror_normalize``.
    return_boxes : bool
        If true, also return the boxes of the patches.

    Returns
    -------
    images : DataNode
        Mixed images, HWC uint8, on the device of `images`. With `normalise`, they have its dtype and layout.
    labels : DataNode
        The given labels.
    source_labels : DataNode
        The label of each image's source, on the device of `labels`.
    lam : DataNode
        Weight of `labels` in each sample, float32 scalars, on the device of `images`. With ``label_weight="area"`` it
        is exactly the share of the receiver's pixels. 1 for samples that were not mixed.
    boxes : DataNode
        Only with `return_boxes`. Where the patch is in each output image, after the flip of `normalise`: (y0, x0, y1,
        x1), half-open, int32 of shape (4,) per sample, on the device of `images`. All 0 where nothing was pasted.

    Raises
    ------
    TypeError, ValueError
        At pipeline definition, if an argument is invalid. If the images are not uint8, not HWC or not of one shape,
        DALI raises a ``RuntimeError`` that says so when the pipeline runs.

    Notes
    -----
    See `dali_saliencymix.saliencymix` for the same function on arrays.

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
    options = MixOptions(
        alpha=alpha,
        prob=prob,
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
    return mix_nodes(images, labels, options, normalise=normalise, peaks=peaks, return_boxes=return_boxes)


@_operator
def cutmix(
    images: DataNode,
    labels: DataNode,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    box: str = "clip",
    per_batch: bool = False,
    normalise: Normalise | None = None,
    return_boxes: bool = False,
) -> tuple[DataNode, ...]:
    """Paste a random patch of a random source image of the batch into each image: CutMix.

    Parameters
    ----------
    images, labels, alpha, prob, per_batch, normalise, return_boxes
        As for `saliencymix`.
    box : {"fit", "clip"}
        If a box crosses the border of the image, ``"clip"`` cuts it at the border, as in CutMix, and ``"fit"`` moves it
        inside.

    Returns
    -------
    images, labels, source_labels, lam, boxes : DataNode
        As from `saliencymix`, with `boxes` if `return_boxes` is true. The centre of each box is drawn uniformly.

    Raises
    ------
    TypeError, ValueError
        As for `saliencymix`.

    Notes
    -----
    See `dali_saliencymix.cutmix` for the same function on arrays. The example of `saliencymix` also works with this
    operator.
    """
    options = MixOptions(modes={"cutmix": 1.0}, alpha=alpha, prob=prob, box=box, per_batch=bool(per_batch))
    return mix_nodes(images, labels, options, normalise=normalise, return_boxes=return_boxes)


@_operator
def mixup(
    images: DataNode,
    labels: DataNode,
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    per_batch: bool = False,
    normalise: Normalise | None = None,
) -> tuple[DataNode, ...]:
    """Blend each image of a batch with a random source image: mixup.

    Parameters
    ----------
    images, labels, alpha, prob, per_batch, normalise
        As for `saliencymix`. With ImageNet, `alpha` is commonly 0.2.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        As from `saliencymix`; `lam` is the blending weight of the image. Pixels are rounded to uint8, even before
        `normalise`. There are no boxes, since nothing is pasted.

    Raises
    ------
    TypeError, ValueError
        As for `saliencymix`.

    Notes
    -----
    See `dali_saliencymix.mixup` for the same function on arrays. The example of `saliencymix` also works with this
    operator.
    """
    options = MixOptions(modes={"mixup": 1.0}, alpha=alpha, prob=prob, per_batch=bool(per_batch))
    return mix_nodes(images, labels, options, normalise=normalise)


@_operator
def mix(
    images: DataNode,
    labels: DataNode,
    *,
    modes: Mapping[str, float],
    alpha: float | Mapping[str, float] = 1.0,
    prob: float = 1.0,
    choose: str = "sample",
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    peaks: DataNode | None = None,
    label_weight: str = "area",
    algorithm: str = "auto",
    normalise: Normalise | None = None,
    return_boxes: bool = False,
) -> tuple[DataNode, ...]:
    """Mix each image of a batch with a mode drawn at random.

    Parameters
    ----------
    images, labels, prob, peaks, algorithm, normalise, return_boxes
        As for `saliencymix`.
    modes : mapping from str to float
        Mixing modes to draw from, among ``"saliencymix"``, ``"cutmix"`` and ``"mixup"``, with their relative
        probabilities, which need not sum to 1.
    alpha : float or mapping from str to float
        Parameter of Beta(alpha, alpha), the distribution of `lam`: one number for all modes, or one per mode.
    choose : {"sample", "batch"}
        Whether to draw a mode for each sample or one for the whole batch.
    preset, saliency, source, destination, box, label_weight
        As for `saliencymix`, and only for samples of that mode.
    per_batch : bool, optional
        If true, one `lam`, one mode and one box are used for the whole batch.

    Returns
    -------
    images, labels, source_labels, lam, boxes : DataNode
        As from `saliencymix`, with `boxes` if `return_boxes` is true. The boxes of mixup samples are all 0.

    Raises
    ------
    TypeError, ValueError
        As for `saliencymix`.

    Notes
    -----
    See `dali_saliencymix.mix` for the same function on arrays.

    Examples
    --------
    >>> from nvidia.dali import fn, pipeline_def
    >>> from dali_saliencymix.fn import mix
    >>> @pipeline_def(batch_size=32, num_threads=4, device_id=None)
    ... def training_pipeline(file_root):
    ...     jpegs, labels = fn.readers.file(file_root=file_root, random_shuffle=True)
    ...     images = fn.resize(fn.decoders.image(jpegs), size=(224, 224))
    ...     modes, alpha = {"saliencymix": 0.5, "mixup": 0.5}, {"saliencymix": 1.0, "mixup": 0.2}
    ...     return mix(images, labels, modes=modes, alpha=alpha)
    """
    options = MixOptions(
        modes=modes,
        alpha=alpha,
        prob=prob,
        choose=choose,
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
    return mix_nodes(images, labels, options, normalise=normalise, peaks=peaks, return_boxes=return_boxes, policy=True)


@_operator
def saliency_peaks(
    images: DataNode,
    *,
    saliency: str | Detector = "spectral_residual",
    least: bool = False,
    algorithm: str = "auto",
) -> DataNode:
    """Find the most salient pixel of each image.

    Use it if saliency should be detected before a step that changes the geometry of the images, such as padding or
    cropping, and the images are mixed after that step. Transform the peak in the same way, and pass it to `saliencymix`
    as `peaks`.

    Parameters
    ----------
    images : DataNode
        As for `saliencymix`.
    saliency : str or callable
        As for `saliencymix`.
    least : bool
        If true, find the least salient pixel instead.
    algorithm : {"auto", "array", "kernel"}
        As for `saliencymix`.

    Returns
    -------
    DataNode
        (y, x), int32 of shape (2,) per sample, on the device of `images`.

    Raises
    ------
    TypeError, ValueError
        As for `saliencymix`.

    Notes
    -----
    See `dali_saliencymix.saliency_peaks` for the same function on maps.

    Examples
    --------
    >>> from nvidia.dali import fn, pipeline_def
    >>> from dali_saliencymix.fn import saliency_peaks, saliencymix
    >>> @pipeline_def(batch_size=32, num_threads=4, device_id=None)
    ... def training_pipeline(file_root):
    ...     jpegs, labels = fn.readers.file(file_root=file_root, random_shuffle=True)
    ...     images = fn.resize(fn.decoders.image(jpegs), size=(224, 224))
    ...     peaks = saliency_peaks(images)
    ...     inverted = fn.cast(255 - images, dtype=types.UINT8)
    ...     return saliencymix(inverted, labels, peaks=peaks)
    """
    get_detector(saliency)
    check_choice(algorithm, "algorithm", ALGORITHMS)
    find = functools.partial(_peaks_of_images, saliency=saliency, least=bool(least), algorithm=algorithm)
    return python_operator(find, images, name="saliency_peaks", stage=Stage("saliency peaks"))


@_operator
def soft_labels(
    labels: DataNode,
    source_labels: DataNode,
    lam: DataNode | float,
    *,
    num_classes: int | None = None,
    smoothing: float = 0.0,
) -> DataNode:
    """Compute the targets of mixed images from their labels.

    Parameters
    ----------
    labels, source_labels : DataNode
        Class ids in [0, num_classes), scalars or of shape (1,), as returned by DALI's readers; or vectors of K weights,
        such as one-hot or multi-hot vectors. Without `num_classes`, floats of shape (1,) are vectors of one weight, and
        integers of that shape are class ids.
    lam : DataNode, float or types.Constant
        Weight of `labels`: floating scalars, or one number in [0, 1] for all samples. For targets of the same form in a
        validation pipeline, pass ``lam=1`` and `labels` also as `source_labels`.
    num_classes : int, optional
        K, the number of classes. Required for class ids; omit it for vectors.
    smoothing : float
        Label smoothing in [0, 1]: the share of the weight that is spread evenly over all classes. Only for class ids.

    Returns
    -------
    DataNode
        Targets of shape (K,), float32. For class ids each sums to 1. They are on the GPU if any of the arguments is.

    Raises
    ------
    TypeError, ValueError
        At pipeline definition, if `labels` or `source_labels` is not a node, or `lam` or an option is invalid.
    RuntimeError
        When the pipeline runs, if labels are class ids and `num_classes` was not given, if the labels of a batch have
        different shapes, or if vectors and those of their sources have different shapes. On the CPU also if a label is
        not an integer in [0, num_classes), or `lam` is outside [0, 1]. On a GPU the values are not checked, since that
        would synchronise the stream: an invalid label gives a row of NaN, and so a loss of NaN.

    Notes
    -----
    See `dali_saliencymix.soft_labels` for the same function on arrays.

    Examples
    --------
    >>> from nvidia.dali import fn, pipeline_def
    >>> from dali_saliencymix.fn import saliencymix, soft_labels
    >>> @pipeline_def(batch_size=32, num_threads=4, device_id=None)
    ... def training_pipeline(file_root):
    ...     jpegs, labels = fn.readers.file(file_root=file_root, random_shuffle=True)
    ...     images = fn.resize(fn.decoders.image(jpegs), size=(224, 224))
    ...     images, labels, source_labels, lam = saliencymix(images, labels)
    ...     return images, soft_labels(labels, source_labels, lam, num_classes=1000, smoothing=0.1)
    """
    smoothing = check_fraction(smoothing, "smoothing")
    if isinstance(lam, types.ScalarConstant):
        lam = lam.value
    if not isinstance(lam, DataNode):
        lam = fn.constant(fdata=check_fraction(lam, "lam"), shape=[])
    for name, node in (("labels", labels), ("source_labels", source_labels)):
        if not isinstance(node, DataNode):
            msg = f"{name} must be a DataNode, got {node!r}"
            raise TypeError(msg)
    nodes = [labels, source_labels, lam]
    device = "gpu" if any(node.device == "gpu" for node in nodes) else "cpu"
    make: Callable[..., tuple[Array]] = _mixed_vectors
    if num_classes is not None:
        check_at_least(num_classes, "num_classes", 1)
        make = functools.partial(_soft_labels, num_classes=num_classes, smoothing=smoothing)
    else:
        array_labels.check_no_smoothing(smoothing)
    rules = [f"all {name} of a batch must have one shape, got {{}}" for name in ("labels", "source_labels", "lam")]
    inputs = [to_device(device, node) for node in nodes]
    return python_operator(make, *inputs, name="soft_labels", stage=Stage("soft labels"), rules=rules)


def _peaks_of_images(images: Array, *, saliency: str | Detector, least: bool, algorithm: str) -> tuple[Array]:
    xp = check_images(images)
    maps = saliency_maps(images, saliency, algorithm=algorithm)
    return (find_peaks(maps, *images.shape[1:3], least=least, route=route_of(algorithm, xp)),)


def _mixed_vectors(labels: Array, source_labels: Array, lam: Array) -> tuple[Array]:
    """Return the targets for vectors of weights (N, K)."""
    array_labels.check_vectors(labels)
    own, other, weight = (array.astype("float32") for array in (labels, source_labels, lam.reshape(-1)))
    return (array_labels.soft_labels(own, other, weight),)


def _soft_labels(
    labels: Array, source_labels: Array, lam: Array, *, num_classes: int, smoothing: float
) -> tuple[Array]:
    """Return the targets for class ids."""
    for name, values in (("labels", labels), ("source_labels", source_labels), ("lam", lam)):
        if values.size != len(values):
            msg = (
                f"{name} must be one number per sample if num_classes={num_classes} is given, got shape "
                f"{values.shape[1:]}. Omit num_classes if labels are vectors"
            )
            raise ValueError(msg)
    own, other = _class_ids(labels.reshape(-1), "labels"), _class_ids(source_labels.reshape(-1), "source_labels")
    weight = lam.reshape(-1).astype("float64")
    return (array_labels.soft_labels(own, other, weight, num_classes=num_classes, smoothing=smoothing),)


def _class_ids(values: Array, name: str) -> Array:
    """Return labels as int64; a label that is not an integer is an error, or becomes -1 on a GPU."""
    xp = array_namespace(values)
    if values.dtype.kind != "f":
        return values.astype(xp.int64)
    whole = (abs(values) <= 2.0**53) & (xp.floor(values) == values)
    if is_host(xp) and not whole.all():
        msg = f"{name} must be integer class ids, got {values[~whole][0]}"
        raise ValueError(msg)
    return xp.where(whole, values, -1).astype(xp.int64)

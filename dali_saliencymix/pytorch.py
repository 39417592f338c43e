"""SaliencyMix for batches of PyTorch tensors, from any loader.

Batches are uint8, not yet normalised, on a CPU or a GPU. They are passed to the array functions through DLPack, without
a copy. The mixed batch is a new tensor with the same memory format.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix.packages import require

try:
    import torch
    from torch.utils import data
except ModuleNotFoundError:
    require("torch", by=__name__)
    raise

from dali_saliencymix._checks import check_at_least, check_flag, check_fraction, kind_of
from dali_saliencymix._tensors import on_the_device_of, on_torch_s_stream, to_array, to_tensor
from dali_saliencymix._threads import limited_to
from dali_saliencymix.draw import draw
from dali_saliencymix.labels import soft_labels
from dali_saliencymix.mix import apply
from dali_saliencymix.network_saliency import NetworkSaliency
from dali_saliencymix.options import MixOptions

if TYPE_CHECKING:
    from dali_saliencymix.saliency import Detector

__all__ = ["NetworkSaliency", "SaliencyMix"]

_BOXES_KEY = "mix_boxes"  # key of the boxes in dict batches


class SaliencyMix:
    """Mix batches: ``images, targets = mix(images, labels)``.

    Use it in place of ``timm.data.Mixup`` or ``torchvision.transforms.v2.CutMix``: call it on the batches of a loader,
    or pass its method `collate` as the ``collate_fn`` of a ``DataLoader``.

    Parameters
    ----------
    num_classes : int
        K, the number of classes.
    alpha : float or mapping from str to float
        `lam`, the share of each image to keep, is drawn from Beta(alpha, alpha). One number for all modes, or one per
        mode.
    prob : float
        Probability in [0, 1] that an image is mixed.
    modes : mapping from str to float
        Mixing modes, among ``"saliencymix"``, ``"cutmix"`` and ``"mixup"``, with their relative probabilities, which
        need not sum to 1. By default saliencymix only.
    choose : {"sample", "batch"}
        Whether to draw a mode for each image or one for the whole batch.
    label_smoothing : float
        Share of the weight that is spread evenly over all classes, in [0, 1]. Each row of the targets becomes
        ``(1 - label_smoothing) * row + label_smoothing / K``, for class ids and for vectors, as in
        ``torch.nn.CrossEntropyLoss``.
    return_boxes : bool
        If true, also return the boxes of the pasted patches.
    image_key, label_key : str
        Keys of the image and the label in samples that are dicts, for `collate`.
    seed : int, optional
        Seed of this object's random draws. In distributed training, give each process its own seed; otherwise all
        processes make the same draws.
    generator : torch.Generator, optional
        CPU generator to draw from, instead of `seed`. By default PyTorch's global generator.
    preset, saliency, source, destination, box, per_batch, label_weight, algorithm
        As for `dali_saliencymix.saliencymix`.

    Raises
    ------
    TypeError, ValueError
        If an option is invalid, or `seed` and `generator` are both given.

    Notes
    -----
    Each worker of a ``DataLoader`` makes its own draws. PyTorch seeds the global generator of each worker in every
    epoch. A `seed` or `generator` given here is combined with the worker's seed, which comes from the loader's
    generator.

    Under ``torch.compile`` the call is one operator of the graph, also with ``fullgraph=True``. It draws from the same
    generator and is bit-identical to eager mode. A wrong shape or dtype raises an error from ``torch._dynamo.exc`` at
    compile time, with the same message as in eager mode. The call raises a ``RuntimeError`` if it is captured in a CUDA
    graph, because replays would repeat the captured draws.

    Examples
    --------
    >>> import torch
    >>> mix = SaliencyMix(num_classes=10, seed=0)
    >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    >>> mixed, targets = mix(images, torch.arange(4))
    >>> mixed.shape, targets.shape, targets.sum(dim=1).tolist()
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]), [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float | Mapping[str, float] = 1.0,
        prob: float = 1.0,
        modes: Mapping[str, float] | None = None,
        choose: str = "sample",
        label_smoothing: float = 0.0,
        return_boxes: bool = False,
        image_key: str = "image",
        label_key: str = "label",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        preset: str = "default",
        saliency: str | Detector | None = None,
        source: str | None = None,
        destination: str | None = None,
        box: str | None = None,
        per_batch: bool | None = None,
        label_weight: str = "area",
        algorithm: str = "auto",
    ) -> None:
        check_at_least(num_classes, "num_classes", 1)
        smoothing = check_fraction(label_smoothing, "label_smoothing")
        check_flag(return_boxes, "return_boxes")
        _check_keys(image_key, label_key)
        self._options = MixOptions(
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
        self._num_classes = int(num_classes)  # torch.compile treats NumPy scalars as tensors
        self._smoothing = smoothing
        self._return_boxes = return_boxes
        self._image_key, self._label_key = image_key, label_key
        self._generator = _generator(seed, generator)
        self._own_seed = 0 if self._generator is None else self._generator.initial_seed()
        self._worker_seed: int | None = None
        self._handle = _new_handle(self)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mix a batch.

        Parameters
        ----------
        images : torch.Tensor of shape (N, C, H, W), uint8
            RGB images, or grey images with C = 1, contiguous or channels-last in memory, on a CPU or a GPU. Not
            modified. CuPy is required on a GPU.
        labels : torch.Tensor of shape (N,) or (N, 1), integer, or (N, K), real
            Class ids in [0, num_classes), or vectors of K = num_classes weights, such as one-hot, multi-hot or soft
            labels. Integers of shape (N, 1) are class ids, even if K is 1: vectors of one weight must be bool or
            floating.

        Returns
        -------
        images : torch.Tensor of shape (N, C, H, W), uint8
            The mixed images, in the memory format and on the device of `images`.
        targets : torch.Tensor of shape (N, K), float32
            Targets for ``torch.nn.CrossEntropyLoss``, on the device of `images`. Rows for class ids sum to 1; rows for
            vectors sum to 1 if the vectors do. On a GPU the values of labels are not checked: a label outside
            [0, num_classes) gives a row of NaN.
        boxes : torch.Tensor of shape (N, 4), int32
            Only with ``return_boxes=True``. Where the patch is in each mixed image: (y0, x0, y1, x1), half-open, on the
            device of `images`. All 0 where nothing was pasted, for example with mixup.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong type, dtype, shape or value.
        RuntimeError
            If the current stream is capturing a CUDA graph.
        """
        _check_tensor(images, "images")
        _check_tensor(labels, "labels")
        if torch.compiler.is_compiling():
            mixed = _mix_in_graph(images, labels.detach(), self._handle, self._num_classes)
        else:
            _check_batch(images, labels, self._num_classes)
            mixed = self._mix(images, labels)
        return mixed if self._return_boxes else mixed[:2]

    def collate(self, samples: Sequence[Any]) -> tuple[torch.Tensor, ...] | dict[str, Any]:
        """Collate samples and mix the batch; pass this method as the ``collate_fn`` of a ``DataLoader``.

        Parameters
        ----------
        samples : sequence of (image, label), or of dict
            Images (C, H, W) uint8, tensors or NumPy arrays, all of one shape; class ids, or vectors of K weights.
            Dicts have the images and labels at `image_key` and `label_key`.

        Returns
        -------
        images, targets : torch.Tensor
            As from calling the object, with the boxes as a third member if `return_boxes` is true. If the samples are
            dicts, a dict with the same keys. It has the mixed images and the targets in place of images and labels, and
            the boxes at the key ``"mix_boxes"``. Other values are collated by ``torch.utils.data.default_collate``.

        Raises
        ------
        TypeError, ValueError
            If a sample is neither a pair nor a dict with both keys, or the batch cannot be mixed.
        """
        samples = list(samples)
        if isinstance(samples[0], Mapping):
            return self._collate_dicts(samples)
        for sample in samples:
            if not isinstance(sample, Sequence) or len(sample) != 2:
                members = f" with {len(sample)} members" if isinstance(sample, Sequence) else ""
                msg = (
                    "samples must be pairs (image, label), or dicts, which may have more entries; "
                    f"got {kind_of(sample)}{members}"
                )
                raise TypeError(msg)
        images, labels = data.default_collate(samples)
        return self(images, labels)

    def _collate_dicts(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        for sample in samples:
            if not isinstance(sample, Mapping):
                msg = f"samples must all be dicts where the first one is, got {kind_of(sample)}"
                raise TypeError(msg)
            for name, key in (("image_key", self._image_key), ("label_key", self._label_key)):
                if key not in sample:
                    keys = ", ".join(map(repr, sample))
                    msg = f"{name} must be a key of each sample, got {key!r} where a sample has {keys}"
                    raise ValueError(msg)
        if self._return_boxes and _BOXES_KEY in samples[0]:
            msg = f"return_boxes must be False where samples have a key {_BOXES_KEY!r} of their own"
            raise ValueError(msg)
        batch = dict(data.default_collate(samples))
        images, targets, *boxes = self(batch[self._image_key], batch[self._label_key])
        batch |= {self._image_key: images, self._label_key: targets}
        if boxes:
            (batch[_BOXES_KEY],) = boxes
        return batch

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mix a checked batch; return images, targets and boxes, which do not share memory."""
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            msg = "SaliencyMix must be called outside of a CUDA graph, which would repeat its draws: mix before it"
            raise RuntimeError(msg)
        # DataLoader workers share the cores, so a worker uses one thread, as PyTorch's own operators do there.
        with limited_to(0 if data.get_worker_info() is None else 1), on_torch_s_stream(images):
            # No array function needs contiguous memory, so the view (N, H, W, C) of a channels-first batch suffices.
            batch = to_array(images.permute(0, 2, 3, 1))
            params = draw(self._rng(), len(images), self._options)
            source_index, lam, mode, point = (
                to_array(on_the_device_of(images, torch.from_numpy(array))) for array in params
            )
            alone = self._options.mode == "saliencymix"
            mixed = apply(self._options, batch, source_index, lam, None if alone else mode, point)
            vectors = _are_vectors(labels)
            array = to_array(on_the_device_of(images, labels.float() if vectors else labels.flatten()))
            targets = to_tensor(
                soft_labels(array, array[source_index], mixed.lam, num_classes=None if vectors else self._num_classes)
            )
            if self._smoothing:
                targets = targets * (1 - self._smoothing) + self._smoothing / self._num_classes
            memory_format = _memory_format(images)
            pixels, boxes = to_tensor(mixed.images).permute(0, 3, 1, 2), to_tensor(mixed.boxes)
            if images.is_cuda:
                # Copy to PyTorch's memory. CuPy's pool reuses a buffer once the tensor is released, even if another
                # stream still reads it and `record_stream` was called.
                return pixels.clone(memory_format=memory_format), targets.clone(), boxes.clone()
            return pixels.contiguous(memory_format=memory_format), targets, boxes

    def __getstate__(self) -> dict[str, Any]:
        # When PyTorch 2.10 sends a generator to a spawned worker, it frees the state before the worker receives it.
        state = self.__dict__.copy()
        del state["_handle"]
        if self._generator is not None:
            state["_generator"] = self._generator.get_state().numpy().tobytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = _new_handle(self)
        if self._generator is not None:
            own = torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8)
            self._generator = torch.Generator("cpu").set_state(own)

    def _rng(self) -> np.random.Generator:
        """Return a generator for one batch, seeded from PyTorch's: its state determines all further draws."""
        worker = data.get_worker_info()
        if worker is not None and self._generator is not None and worker.seed != self._worker_seed:
            # Every worker has a copy of this object. Without reseeding, all workers would make the same draws, and in
            # every epoch.
            self._worker_seed = worker.seed
            seeds = np.random.SeedSequence([self._own_seed, worker.seed])
            self._generator.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        # The device is explicit because the user may have changed the default device.
        seed = torch.randint(2**63 - 1, (), generator=self._generator, device="cpu")
        return np.random.default_rng(int(seed))


# A torch.compile graph cannot contain Python objects. It contains the tensor `_handle`, whose value identifies its
# object. The operator declares that it mutates this tensor. Hence the compiler neither merges nor removes the calls of
# an object and keeps their order, which no tag achieves.
_objects: weakref.WeakValueDictionary[int, SaliencyMix] = weakref.WeakValueDictionary()


def _new_handle(mix: SaliencyMix) -> torch.Tensor:
    # The number is random so that a graph saved by another process finds no object, rather than a wrong one.
    number = uuid.uuid4().int >> 65
    _objects[number] = mix
    with torch.inference_mode(False):  # inference tensors cannot be written to outside inference mode
        return torch.tensor(number, device="cpu")


@torch.library.custom_op(
    "dali_saliencymix::mix",
    mutates_args=("handle",),
    schema="(Tensor images, Tensor labels, Tensor(a!) handle, SymInt num_classes) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _mix_in_graph(
    images: torch.Tensor, labels: torch.Tensor, handle: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mix = _objects.get(int(handle))
    if mix is None:
        msg = "the SaliencyMix of this compiled graph must exist in this process: compile the function in this process"
        raise RuntimeError(msg)
    return mix._mix(images, labels)


@_mix_in_graph.register_fake
def _(
    images: torch.Tensor, labels: torch.Tensor, handle: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_batch(images, labels, num_classes)
    return (
        torch.empty_like(images, memory_format=_memory_format(images)),
        images.new_empty((len(images), num_classes), dtype=torch.float32),
        images.new_empty((len(images), 4), dtype=torch.int32),
    )


def _generator(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    if generator is not None:
        if seed is not None:
            msg = f"seed must be left out where a generator is given, got {seed}"
            raise ValueError(msg)
        if not isinstance(generator, torch.Generator):
            msg = f"generator must be a torch.Generator, got {kind_of(generator)}"
            raise TypeError(msg)
        if generator.device.type != "cpu":
            msg = f"generator must be a CPU generator, got one on {generator.device}"
            raise ValueError(msg)
        return generator
    if seed is None:
        return None
    check_at_least(seed, "seed", 0)
    if seed >= 2**64:
        msg = f"seed must be under 2**64, got {seed}"
        raise ValueError(msg)
    return torch.Generator("cpu").manual_seed(int(seed))


def _check_keys(image_key: str, label_key: str) -> None:
    for name, key in (("image_key", image_key), ("label_key", label_key)):
        if not isinstance(key, str):
            msg = f"{name} must be a str, got {key!r}"
            raise TypeError(msg)
    if image_key == label_key:
        msg = f"label_key must differ from image_key, got {label_key!r} for both"
        raise ValueError(msg)


def _check_tensor(tensor: Any, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        msg = f"{name} must be a torch.Tensor, got {kind_of(tensor)}"
        raise TypeError(msg)


def _check_batch(images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            msg = f"{name} must be a dense tensor on the CPU or a CUDA GPU, got {kind} on {tensor.device}"
            raise ValueError(msg)
    if images.dtype != torch.uint8:
        msg = f"images must be uint8 with pixel values 0..255, got {images.dtype}: mix before normalising"
        raise TypeError(msg)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        msg = f"images must have shape (N, C, H, W) with C of 1 or 3, got {tuple(images.shape)}"
        if images.ndim == 4 and images.shape[3] in (1, 3):
            msg += ": that looks like channels last, (N, H, W, C)"
        raise ValueError(msg)
    if not images.numel():
        msg = f"images must not be empty, got shape {tuple(images.shape)}"
        raise ValueError(msg)
    _check_labels(labels, len(images), num_classes)


def _check_labels(labels: torch.Tensor, count: int, num_classes: int) -> None:
    shape, vectors = tuple(labels.shape), _are_vectors(labels)
    if shape not in ([(count, num_classes)] if vectors else [(count,), (count, 1)]):
        msg = (
            f"labels must have shape ({count},) or ({count}, 1) where they are integer class ids, or "
            f"({count}, {num_classes}) where they are vectors of num_classes weights, got {shape}, {labels.dtype}"
        )
        raise ValueError(msg)
    if labels.dtype.is_complex or not (vectors or _is_integer(labels)):
        msg = f"labels must be of {'real' if vectors else 'integer'} dtype, got {labels.dtype} and shape {shape}"
        raise TypeError(msg)


def _are_vectors(labels: torch.Tensor) -> bool:
    """Return whether labels are vectors of weights rather than class ids, by shape and dtype."""
    return labels.ndim == 2 and not (labels.shape[1] == 1 and _is_integer(labels))


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def _memory_format(images: torch.Tensor) -> torch.memory_format:
    """Return the memory format of the mixed images."""
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format

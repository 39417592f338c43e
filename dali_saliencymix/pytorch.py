"""SaliencyMix after the loader: on batches of PyTorch tensors from any loader.

Batches are uint8, before they are normalised, on CPU or GPU. They reach the array functions through DLPack, without
being copied, and what comes back is a new tensor of the same layout in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix.packages import require

try:
    import torch
    from torch.utils import data, dlpack
except ModuleNotFoundError:
    require("torch", by=__name__)
    raise

from dali_saliencymix._array import LentStream
from dali_saliencymix._checks import check_at_least, check_fraction
from dali_saliencymix._threads import limited_to
from dali_saliencymix.draw import draw
from dali_saliencymix.labels import soft_labels
from dali_saliencymix.mix import apply
from dali_saliencymix.options import MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from dali_saliencymix._array import Array
    from dali_saliencymix.saliency import Detector

__all__ = ["NetworkSaliency", "SaliencyMix"]


class SaliencyMix:
    """Mixes batches: ``images, targets = mix(images, labels)``.

    It stands where ``timm.data.Mixup`` or ``torchvision.transforms.v2.CutMix`` stand: behind a loader, or as its
    ``collate_fn`` in the form of `collate`.

    Parameters
    ----------
    num_classes : int
        K, the number of classes.
    alpha : float or mapping from str to float
        `lam`, the share that an image keeps, is drawn from Beta(alpha, alpha); one number for all modes, or one for
        each.
    prob : float
        Probability in [0, 1] that an image is mixed.
    modes : mapping from str to float
        Ways to mix, of ``"saliencymix"``, ``"cutmix"`` and ``"mixup"``, with their weights.
    choose : {"sample", "batch"}
        Whether each image gets a mode of its own, or all images of a batch the same one.
    label_smoothing : float
        Share of the weight that is spread evenly over all classes, in [0, 1].
    seed : int, optional
        Seed of the draws of this object. Give each process of a distributed run one of its own, or all mix alike.
    generator : torch.Generator, optional
        Where to draw from instead, on the CPU. By default it is PyTorch's global one.
    preset, saliency, source, destination, box, per_batch, algorithm
        As for `dali_saliencymix.saliencymix`.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong, or `seed` and `generator` are both given.

    Notes
    -----
    In the workers of a ``DataLoader`` each worker draws on its own: PyTorch seeds its global generator there in
    every epoch, and a `seed` or `generator` given here is combined with the worker's seed, which comes from the
    loader's generator.

    In a function under ``torch.compile`` the call is a graph break, as it is with timm's and torchvision's mixes: what
    is before and after it is compiled, and the result is that of the function alone. With ``fullgraph=True`` it is
    an error; call the object before the compiled function then.

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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        preset: str = "default",
        saliency: str | Detector | None = None,
        source: str | None = None,
        destination: str | None = None,
        box: str | None = None,
        per_batch: bool | None = None,
        algorithm: str = "auto",
    ) -> None:
        check_at_least(num_classes, "num_classes", 1)
        check_fraction(label_smoothing, "label_smoothing")
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
            algorithm=algorithm,
        )
        self._num_classes = num_classes
        self._smoothing = label_smoothing
        self._generator = _generator(seed, generator)
        self._own_seed = 0 if self._generator is None else self._generator.initial_seed()
        self._worker_seed: int | None = None

    # NumPy, CuPy and compiled kernels see the memory of tensors, which those that the compiler traces with do not have.
    @torch.compiler.disable(reason="it computes outside of PyTorch: call it before the compiled function")  # type: ignore[no-untyped-call]
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch.

        Parameters
        ----------
        images : torch.Tensor of shape (N, C, H, W), uint8
            RGB images, or grey ones with C = 1, contiguous or channels-last in memory, on CPU or GPU. Not modified. On
            a GPU CuPy is needed.
        labels : torch.Tensor of shape (N,), integer
            Class ids in [0, num_classes).

        Returns
        -------
        images : torch.Tensor of shape (N, C, H, W), uint8
            The mixed images, in the memory format of `images` and on its device.
        targets : torch.Tensor of shape (N, K), float32
            Rows that sum to 1, on the device of `images`: for ``torch.nn.CrossEntropyLoss``. On a GPU a label outside
            [0, num_classes) is no error, but makes a row of NaN.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong type, dtype, shape or value.
        """
        _check_tensor(images, "images")
        _check_tensor(labels, "labels")
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
        if labels.shape != images.shape[:1]:
            msg = f"labels must have shape ({len(images)},), one class id for each image, got {tuple(labels.shape)}"
            raise ValueError(msg)
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            msg = f"labels must be of integer dtype, got {labels.dtype}"
            raise TypeError(msg)
        # Beside other workers a worker has one core; PyTorch does the same.
        with limited_to(0 if data.get_worker_info() is None else 1), _on_torch_s_stream(images):
            # The view (N, H, W, C) of a channels-first batch is as good: nothing here asks for contiguous memory.
            batch = _to_array(images.permute(0, 2, 3, 1))
            params = draw(self._rng(), len(images), self._options)
            source_index, lam, mode, point = (
                _to_array(_on_the_device_of(images, torch.from_numpy(array))) for array in params
            )
            alone = self._options.mode == "saliencymix"
            mixed = apply(self._options, batch, source_index, lam, None if alone else mode, point)
            ids = _to_array(_on_the_device_of(images, labels))
            targets = soft_labels(
                ids, ids[source_index], mixed.lam, num_classes=self._num_classes, smoothing=self._smoothing
            )
            memory_format = torch.channels_last if _is_channels_last(images) else torch.contiguous_format
            pixels = _to_tensor(mixed.images).permute(0, 3, 1, 2)
            if images.is_cuda:
                # Into PyTorch's memory. CuPy would use its own again as soon as the tensor is dropped, even where
                # another stream still reads it and `record_stream` was called.
                return pixels.clone(memory_format=memory_format), _to_tensor(targets).clone()
            return pixels.contiguous(memory_format=memory_format), _to_tensor(targets)

    def collate(self, samples: Sequence[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a mixed batch of samples: the ``collate_fn`` of a ``DataLoader``.

        Parameters
        ----------
        samples : sequence of (image, label)
            Images (C, H, W) uint8, tensors or NumPy arrays, all of one shape; class ids.

        Returns
        -------
        images, targets : torch.Tensor
            As from calling the object.
        """
        images, labels = data.default_collate(list(samples))
        return self(images, labels)

    def __getstate__(self) -> dict[str, Any]:
        # On the way to a worker that is spawned, PyTorch 2.10 frees the state of a generator before it has arrived.
        state = self.__dict__.copy()
        if self._generator is not None:
            state["_generator"] = self._generator.get_state().numpy().tobytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._generator is not None:
            own = torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8)
            self._generator = torch.Generator("cpu").set_state(own)

    def _rng(self) -> np.random.Generator:
        """Return a generator for one batch, seeded from PyTorch's, whose state covers everything so."""
        worker = data.get_worker_info()
        if worker is not None and self._generator is not None and worker.seed != self._worker_seed:
            # Every worker has a copy of this object: without this all of them would draw the same, every epoch.
            self._worker_seed = worker.seed
            seeds = np.random.SeedSequence([self._own_seed, worker.seed])
            self._generator.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        # The device is named because a user's default device may be another one.
        seed = torch.randint(2**63 - 1, (), generator=self._generator, device="cpu")
        return np.random.default_rng(int(seed))


class NetworkSaliency:
    """Makes a detector of a PyTorch network, for the `saliency` of all mixing functions.

    Parameters
    ----------
    network : torch.nn.Module
        Takes normalised images (N, 3, H, W) float32, contiguous, and returns maps (N, h, w) or (N, 1, h, w), larger
        where more salient. Put it on the device that images are mixed on, and into evaluation mode.
    mean, std : sequence of float
        Of the normalisation, for pixels in 0..1; by default ImageNet's.
    size : int, optional
        Height and width that images are resized to before; by default they keep theirs.

    Raises
    ------
    ValueError
        If an option is wrong.
    TypeError
        When it is called, if the network returns no tensor.

    Notes
    -----
    The SaliencyMix paper tries such a network, BASNet at 224x224, in its ablation.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from dali_saliencymix import saliencymix
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.Sigmoid()).eval()
    >>> images = np.zeros((2, 32, 32, 3), np.uint8)
    >>> NetworkSaliency(network)(images).shape
    (2, 30, 30)
    >>> mixed = saliencymix(images, np.array([1, 0]), np.full(2, 0.75), saliency=NetworkSaliency(network))
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size: int | None = None,
    ) -> None:
        if size is not None:
            check_at_least(size, "size", 1)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                msg = f"{name} must have 3 numbers, one for each channel, got {len(values)}"
                raise ValueError(msg)
        self._network = network
        self._mean, self._std, self._size = tuple(mean), tuple(std), size

    @torch.inference_mode()
    def __call__(self, images: Array) -> Array:
        """Return the maps (N, h, w) float32 of images (N, H, W, C) uint8, in their array library."""
        with _torch_on_the_stream_of(images):
            pixels = _to_tensor(images).permute(0, 3, 1, 2).float().div(255)
            if self._size is not None:
                size = (self._size, self._size)
                pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
            # With numbers in place of tensors nothing is copied to a GPU, which would make the host wait.
            channels = zip(pixels.expand(-1, 3, -1, -1).unbind(1), self._mean, self._std, strict=True)
            maps = self._network(torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1))
            if not isinstance(maps, torch.Tensor):
                kind = f"{type(maps).__module__}.{type(maps).__qualname__}"
                msg = f"network must return a tensor of shape (N, h, w) or (N, 1, h, w), got {kind}"
                raise TypeError(msg)
            return _to_array((maps.squeeze(1) if maps.ndim == 4 else maps).float())


def _generator(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    if generator is not None:
        if seed is not None:
            msg = f"seed must be left out where a generator is given, got {seed}"
            raise ValueError(msg)
        if not isinstance(generator, torch.Generator):
            kind = f"{type(generator).__module__}.{type(generator).__qualname__}"
            msg = f"generator must be a torch.Generator, got {kind}"
            raise TypeError(msg)
        if generator.device.type != "cpu":
            msg = f"generator must be one of the CPU, got one of {generator.device}"
            raise ValueError(msg)
        return generator
    if seed is None:
        return None
    check_at_least(seed, "seed", 0)
    if seed >= 2**64:
        msg = f"seed must be under 2**64, got {seed}"
        raise ValueError(msg)
    return torch.Generator("cpu").manual_seed(int(seed))


def _check_tensor(tensor: Any, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        msg = f"{name} must be a torch.Tensor, got {type(tensor).__module__}.{type(tensor).__qualname__}"
        raise TypeError(msg)
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        msg = f"{name} must be a dense tensor on the CPU or a CUDA GPU, got {kind} on {tensor.device}"
        raise ValueError(msg)


def _is_channels_last(images: torch.Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as a NumPy or CuPy array, without a copy."""
    return (_cupy() if tensor.is_cuda else np).from_dlpack(tensor.detach())


def _to_tensor(array: Array) -> torch.Tensor:
    """Return a NumPy or CuPy array as a tensor, without a copy unless no tensor can be like it."""
    read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    # A tensor cannot run backwards through memory: PyTorch ends the process when it is handed such an array.
    backwards = any(stride < 0 for stride in array.strides)
    return dlpack.from_dlpack(array.copy() if read_only or backwards else array)


def _on_the_device_of(images: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device == images.device:
        return tensor
    # From pinned memory the copy does not stall the stream.
    return tensor.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else tensor.to(images.device)


def _on_torch_s_stream(images: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Let CuPy compute where PyTorch does, so that neither has to wait for the other."""
    if not images.is_cuda:
        return contextlib.nullcontext()
    cupy, contexts = _cupy(), contextlib.ExitStack()
    contexts.enter_context(cupy.cuda.Device(images.device.index))
    lent = LentStream(torch.cuda.current_stream(images.device).cuda_stream)
    contexts.enter_context(cupy.cuda.Stream.from_external(lent))
    return contexts


def _torch_on_the_stream_of(images: Array) -> contextlib.AbstractContextManager[Any]:
    """Let PyTorch compute where CuPy does: on DALI's stream, inside a pipeline."""
    if isinstance(images, np.ndarray):
        return contextlib.nullcontext()
    stream, device = _cupy().cuda.get_current_stream().ptr, images.device.id
    if not stream:  # the default one, of which PyTorch would make a new one
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))  # type: ignore[no-untyped-call]


def _cupy() -> Any:
    require("cupy", by="mixing on a GPU")
    import cupy

    return cupy

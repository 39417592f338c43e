"""SaliencyMix after the loader: on batches of PyTorch tensors from any loader.

Batches are uint8, before they are normalised, on CPU or GPU. They reach the array functions through DLPack, without
being copied, and what comes back is a new tensor of the same layout in memory.
"""

from __future__ import annotations

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

from dali_saliencymix._checks import check_at_least, check_fraction
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
        with limited_to(0 if data.get_worker_info() is None else 1), on_torch_s_stream(images):
            # The view (N, H, W, C) of a channels-first batch is as good: nothing here asks for contiguous memory.
            batch = to_array(images.permute(0, 2, 3, 1))
            params = draw(self._rng(), len(images), self._options)
            source_index, lam, mode, point = (
                to_array(on_the_device_of(images, torch.from_numpy(array))) for array in params
            )
            alone = self._options.mode == "saliencymix"
            mixed = apply(self._options, batch, source_index, lam, None if alone else mode, point)
            ids = to_array(on_the_device_of(images, labels))
            targets = soft_labels(
                ids, ids[source_index], mixed.lam, num_classes=self._num_classes, smoothing=self._smoothing
            )
            memory_format = torch.channels_last if _is_channels_last(images) else torch.contiguous_format
            pixels = to_tensor(mixed.images).permute(0, 3, 1, 2)
            if images.is_cuda:
                # Into PyTorch's memory. CuPy would use its own again as soon as the tensor is dropped, even where
                # another stream still reads it and `record_stream` was called.
                return pixels.clone(memory_format=memory_format), to_tensor(targets).clone()
            return pixels.contiguous(memory_format=memory_format), to_tensor(targets)

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

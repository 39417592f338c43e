"""Loading without DALI: PyTorch's ``DataLoader``, torchvision's transforms, and this project's array functions.

The steps are those of the DALI pipelines: random crop, mixing as uint8, random horizontal flip, normalisation. All
random numbers derive from the seed, the epoch and the position in the epoch, and no process keeps a random state. The
batches therefore do not depend on the number of workers, and the state of a loader is its epoch, its step and its bad
files.
"""

from __future__ import annotations

import functools
import io
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils import data
from torchvision.transforms import v2

from dali_saliencymix import get_detector, saliency_peaks
from dali_saliencymix._threads import limited_to
from dali_saliencymix.datasets.cifar import CifarImages
from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.datasets.formats import open_image, to_rgb
from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.draw import draw
from dali_saliencymix.loaders.bad_files import BadFiles, replace_file
from dali_saliencymix.loaders.base import Batches, LoaderError
from dali_saliencymix.loaders.options import ERASED_AREA, ERASED_ASPECT_RATIO, DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.mix import apply
from dali_saliencymix.saliency import Detector

Images = NDArray[np.uint8]  # (N, H, W, 3)


class TorchLoaderState(TypedDict):
    """State of a loader: complete epochs, batches yielded in the current one, and the replacements of bad files."""

    epoch: int
    step: int
    replaced: dict[int, int]  # absent in old checkpoints


# Purposes of random generators. They come first in a seed: NumPy treats seeds that differ in trailing zeros as equal.
_ORDER, _IMAGE, _BATCH, _ERASED = 1, 2, 3, 4


def _generator(purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([purpose, *numbers])


@functools.lru_cache(maxsize=1)  # all batches of an epoch share one order
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return _generator(_ORDER, seed, epoch).permutation(count)


@dataclass(frozen=True)
class FolderImages:
    """Image files of a folder: random crops for training; centre crops for validation, if `resize_size` is given."""

    folder: ImageFolder
    crop_size: int
    min_crop_area: float = 0.08
    color_jitter: float = 0.0
    resize_size: int | None = None
    policy: v2.Transform | None = None

    def __len__(self) -> int:
        return len(self.folder)

    def read(
        self, indices: NDArray[np.int64], epoch: int, seed: int, replaced: dict[int, int], found: dict[int, str]
    ) -> tuple[Images, NDArray[np.int64], None]:
        """Decode, crop and resize images; return them and their labels.

        In training, the files in `replaced` are replaced; in validation, they are left out. Files that cannot be read
        are entered into `replaced`, and with the reasons into `found`.
        """
        cut = v2.Compose(self._steps())
        images, labels = [], []
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata and many pixels
            for index in indices.tolist():
                _seed_torchvision(seed, epoch, index)
                decoded = self._decoded(index, replaced, found)
                if decoded is not None:
                    images.append(np.asarray(cut(decoded)))
                    labels.append(self.folder.labels[replaced.get(index, index)])
        shape = -1, self.crop_size, self.crop_size, 3  # also if there are no images
        return np.array(images, np.uint8).reshape(shape), np.array(labels, np.int64), None

    def _steps(self) -> list[v2.Transform]:
        if self.resize_size is not None:
            return [v2.Resize(self.resize_size), v2.CenterCrop(self.crop_size)]
        steps = [v2.RandomResizedCrop(self.crop_size, scale=(self.min_crop_area, 1.0), ratio=(3 / 4, 4 / 3))]
        if self.policy is not None:
            steps.append(self.policy)
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        return steps

    def _decoded(self, index: int, replaced: dict[int, int], found: dict[int, str]) -> Image.Image | None:
        """Decode a file or its replacement; return None for an image that is left out."""
        while self.resize_size is None or index not in replaced:
            place = replaced.get(index, index)
            file = Path(self.folder.files[place])
            try:
                return to_rgb(open_image(io.BytesIO(file.read_bytes()), file.suffix.lower()))
            except Exception as error:  # Pillow raises errors of many types for damaged files
                found[place] = why_unusable(file) or " ".join(str(error).split()) or type(error).__name__
                replace_file(self.folder, place, replaced)
        return None


def _seed_torchvision(seed: int, epoch: int, index: int) -> None:
    """Seed PyTorch's default generator, which torchvision uses, for an image; the caller restores its state."""
    torch.default_generator.manual_seed(int(_generator(_IMAGE, seed, epoch, index).integers(2**63)))


def policy_of(options: DataOptions) -> v2.Transform | None:
    """Return torchvision's transform for the option `auto_augment`, with the interpolation and fill value of DALI."""
    common: dict[str, Any] = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": 128}
    if options.auto_augment == "ra":
        return v2.RandAugment(num_ops=2, magnitude=options.ra_magnitude, **common)
    return v2.TrivialAugmentWide(**common) if options.auto_augment == "ta_wide" else None


@dataclass(frozen=True)
class PaddedImages:
    """Small images in memory: random crops of the zero-padded images.

    The detector `saliency` finds the most salient pixels after `policy` is applied and before the padding.
    """

    cifar: CifarImages
    padding: int = 0
    saliency: str | Detector | None = None
    policy: v2.Transform | None = None

    def __len__(self) -> int:
        return len(self.cifar)

    def read(
        self, indices: NDArray[np.int64], epoch: int, seed: int, *_: dict[int, Any]
    ) -> tuple[Images, NDArray[np.int64], NDArray[np.int64] | None]:
        """Apply the policy, pad and crop images; return images, labels and peaks, which are None without `saliency`.

        Further arguments are those of `FolderImages.read` about bad files, which cannot occur here.
        """
        images, labels = self.cifar.images[indices], self.cifar.labels[indices].astype(np.int64)
        if self.policy is not None:
            with torch.random.fork_rng(devices=[]):
                for place, index in enumerate(indices.tolist()):
                    _seed_torchvision(seed, epoch, index)
                    images[place] = np.asarray(self.policy(Image.fromarray(images[place])))
        size = images.shape[1]
        peaks = None
        if self.saliency is not None:
            peaks = saliency_peaks(get_detector(self.saliency)(images), size, size).astype(np.int64)
        if not self.padding:
            return images, labels, peaks
        draws = (_generator(_IMAGE, seed, epoch, index) for index in indices)
        corners = np.array([rng.integers(0, 2 * self.padding, 2, endpoint=True) for rng in draws]).reshape(-1, 2)
        border = (self.padding, self.padding)
        padded = np.pad(images, [(0, 0), border, border, (0, 0)])
        for place, (y, x) in enumerate(corners):
            images[place] = padded[place, y : y + size, x : x + size]
        if peaks is not None:
            peaks = (peaks + self.padding - corners).clip(0, size - 1)
        return images, labels, peaks


Source = FolderImages | PaddedImages


@dataclass(frozen=True)
class TrainingBatches:
    """Batches by epoch and step: each image of the shard once per epoch, without an incomplete last batch."""

    source: Source
    options: DataOptions
    processes: Processes

    def __len__(self) -> int:
        return len(self.source) // self.processes.world_size // self.options.batch_size

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the indices of the images in a batch."""
        order = _order(len(self.source), self.options.seed, epoch)
        return _of_step(order, step, self.options, self.processes)

    def load(self, epoch: int, step: int, replaced: dict[int, int], found: dict[int, str]) -> tuple[torch.Tensor, ...]:
        """Return images (N, H, W, 3) uint8, labels, source labels, and `lam`, the weights of the labels.

        `replaced` and `found` are those of `FolderImages.read`.
        """
        options = self.options
        indices = self.indices(epoch, step)
        images, labels, peaks = self.source.read(indices, epoch, options.seed, replaced, found)
        rng = _generator(_BATCH, options.seed, epoch, step, self.processes.rank)
        source_labels, lam = labels, np.ones(len(labels), np.float32)
        if options.mix is not None:
            drawn = draw(rng, len(images), options.mix)
            mode = None if options.mix.mode else drawn.mode
            mixed = apply(options.mix, images, drawn.source_index, drawn.lam, mode, drawn.point, peaks=peaks)
            images, source_labels, lam = mixed.images, labels[drawn.source_index], mixed.lam
        mirrored = rng.random(len(images)) < options.hflip_prob
        images[mirrored] = images[mirrored, :, ::-1]
        return tuple(torch.from_numpy(array) for array in (images, labels, source_labels, lam))

    def erase(self, images: torch.Tensor, epoch: int, step: int) -> None:
        """Set a random rectangle of some square normalised images (N, C, H, W) to 0, the mean, in place.

        Sides longer than the image are clipped.
        """
        if not self.options.random_erase:
            return
        count, size = len(images), images.shape[-1]
        rng = _generator(_ERASED, self.options.seed, epoch, step, self.processes.rank)
        chosen = rng.random(count) < self.options.random_erase
        area = rng.uniform(*ERASED_AREA, count)
        shortest, longest = np.log(ERASED_ASPECT_RATIO)
        ratio = np.exp(rng.uniform(shortest, longest, count))
        sides = np.sqrt(np.stack([area * ratio, area / ratio], axis=1))
        sides = np.rint(sides * size).astype(np.int64).clip(max=size)
        corners = rng.integers(0, size - sides, endpoint=True)
        for index in np.flatnonzero(chosen):
            (y, x), (height, width) = corners[index], sides[index]
            images[index, :, y : y + height, x : x + width] = 0


@dataclass(frozen=True)
class ValidationBatches:
    """Batches by epoch and step: each image once over all shards; the last batch of a shard may be short or empty."""

    source: Source
    options: DataOptions
    processes: Processes

    def __post_init__(self) -> None:
        images, world_size = len(self.source), self.processes.world_size
        if images < world_size:
            msg = f"{images} validation images are too few for {world_size} processes"
            raise ValueError(msg)

    def __len__(self) -> int:
        largest_shard = -(-len(self.source) // self.processes.world_size)
        return -(-largest_shard // self.options.batch_size)

    def load(self, epoch: int, step: int, replaced: dict[int, int], found: dict[int, str]) -> tuple[torch.Tensor, ...]:
        """Return images (N, H, W, 3) uint8 and labels; the arguments are those of `TrainingBatches.load`."""
        indices = _of_step(np.arange(len(self.source)), step, self.options, self.processes)
        images, labels, _ = self.source.read(indices, 0, 0, replaced, found)
        return torch.from_numpy(images), torch.from_numpy(labels)


def _of_step(order: NDArray[np.int64], step: int, options: DataOptions, processes: Processes) -> NDArray[np.int64]:
    """Return the part of `order` that is the batch of this process at a step."""
    shard = order[processes.rank :: processes.world_size]
    return shard[step * options.batch_size : (step + 1) * options.batch_size]


class TorchLoader(Batches):
    """Normalised batches on a device, prefetched by `workers` processes; with 0, this process loads them.

    A file that cannot be read is left out as by `dali_saliencymix.loaders.dali.Loader`.

    To resume from `state`, all other arguments must be as they were for the loader that returned it.
    """

    def __init__(
        self, batches: TrainingBatches | ValidationBatches, *, workers: int, state: TorchLoaderState | None = None
    ) -> None:
        options, device, source = batches.options, batches.processes.device, batches.source
        self._length = len(batches)
        self._epoch, self._step = (state["epoch"], state["step"]) if state else (0, 0)
        # Images in memory have no files, so none of these is bad.
        folder = source.folder if isinstance(source, FolderImages) else ImageFolder(Path(), [], [], [])
        self._bad = BadFiles(
            folder,
            options.max_bad_batches,
            replace=isinstance(batches, TrainingBatches),
            replaced=state.get("replaced") if state else None,
            report=batches.processes.is_main,
        )
        self._places: list[_Wanted] = []
        self._batches = batches
        self._loader: data.DataLoader[Any] = data.DataLoader(
            _Attempts(batches, threads=1 if workers else 0),  # each worker has about one core
            batch_size=None,
            sampler=self._places,
            num_workers=workers,
            prefetch_factor=options.prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            # PyTorch draws the seeds of workers from this generator. With the default one, a resumed run, which creates
            # its loaders once more, would draw once more too, and its dropout would differ.
            generator=torch.Generator(),
        )
        self._device = device
        self._memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        scaling = options.mean, options.std
        self._mean, self._std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in scaling)

    def _remaining(self) -> Iterator[tuple[torch.Tensor, ...]]:
        # An image appears once per epoch, so replacements found in this epoch matter from the next one on.
        replaced = dict(self._bad.replaced)
        self._places[:] = [_Wanted(self._epoch, step, replaced) for step in range(self._step, self._length)]
        for batch, found in self._loader:
            for index, why in found.items():
                if index not in self._bad.replaced:  # two batches can meet the same bad replacement
                    self._bad.leave_out(index, why)
            if isinstance(batch, LoaderError):
                raise LoaderError(str(batch))  # a new one: its traceback refers to this frame, which holds `batch`
            pixels, *others = (tensor.to(self._device, non_blocking=True) for tensor in batch)
            images = (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std
            if isinstance(self._batches, TrainingBatches):
                self._batches.erase(images, self._epoch, self._step)
            self._step += 1
            yield images.contiguous(memory_format=self._memory_format), *others
        self._epoch, self._step = self._epoch + 1, 0

    def state(self) -> TorchLoaderState:
        """Return the state, from which a new loader resumes with the next batch."""
        return {"epoch": self._epoch, "step": self._step, "replaced": dict(self._bad.replaced)}

    @property
    def bad_files(self) -> list[str]:
        """The files that were left out, in the order in which they were found."""
        return self._bad.names


def _leave_signals_to_parent(_: int) -> None:
    """Make a worker process ignore SIGUSR1, and any SIGTERM that its parent has not sent.

    A scheduler sends these signals to all processes of a job to stop it. The parent still needs its workers to complete
    the step.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


class _Wanted(NamedTuple):
    """A requested batch, and the replacements of bad files."""

    epoch: int
    step: int
    replaced: dict[int, int]


class _Attempts(data.Dataset[Any]):
    """Loads each batch, and returns it with the indices of the files that could not be read, and the reasons."""

    def __init__(self, batches: TrainingBatches | ValidationBatches, *, threads: int) -> None:
        self._batches, self._threads = batches, threads

    def __getitem__(self, wanted: _Wanted) -> tuple[tuple[torch.Tensor, ...] | LoaderError, dict[int, str]]:
        found: dict[int, str] = {}
        try:
            with limited_to(self._threads):
                return self._batches.load(wanted.epoch, wanted.step, dict(wanted.replaced), found), found
        except LoaderError as error:  # raised in a worker, it would arrive wrapped in a stack trace
            return error, found

"""SaliencyMix between the operators of DALI's dynamic mode, for a job that calls them one by one from Python.

Dynamic mode is marked as experimental by DALI, whose releases may change it; this was written for 2.4.

    python -m pipelines.dynamic_mode DATA
    python -m pipelines.dynamic_mode DATA --capture

DATA holds one folder of images for each class.

There is no operator for the mixing: the array function is called on a batch as it stands between two operators. All
that is random comes from one seed: the reader's order of the files, and a NumPy generator that partners and weights
are drawn from. DALI's own ``ndd.random`` would do for these too, but then they would have to be brought out of DALI for
the array function, and with ``capture=True`` they are drawn some batches ahead. A NumPy generator stands where the
training stands: what is left of its stream belongs to the batches that are still to come.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch.utils import dlpack

from dali_saliencymix import draw_params, saliencymix
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


def training_batches(
    folder: ImageFolder,
    *,
    batch_size: int,
    epochs: int = 1,
    size: int = 224,
    alpha: float = 1.0,
    prob: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    capture: bool = False,
    **options: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Decode, resize, mix, normalise: one batch after the other, for some epochs.

    Parameters
    ----------
    folder : ImageFolder
        The images.
    batch_size : int
        Images in a batch. All batches are full: the last one of an epoch takes its missing images from the next epoch.
    epochs : int
        Times that the files are read.
    size : int
        Height and width of the images that come out.
    alpha, prob
        As for `dali_saliencymix.draw_params`.
    seed : int
        Seed of all that is random: the order of the files, partners and weights. Not negative.
    device : {"cpu", "gpu"}
        Where images are decoded and processed. On a GPU CuPy is needed.
    capture : bool
        If true, DALI makes a pipeline of its operators in front of the mixing, and has their batches ready in advance.
        The batches are the same ones. For this the loop has to end by itself, not by ``break``.
    **options
        Of `dali_saliencymix.saliencymix`: `preset`, `saliency`, ...

    Yields
    ------
    images : torch.Tensor of shape (N, 3, size, size), float32
        Mixed and normalised.
    labels, source_labels : torch.Tensor of shape (N,), int64
        Class ids of the receiving and the source images.
    lam : torch.Tensor of shape (N,), float32
        Weight of `labels`, exactly the share of the pixels that are the image's own.

    Raises
    ------
    ValueError
        If an option is wrong, or there are fewer images than in a batch.

    Examples
    --------
    >>> import tempfile
    >>> from dali_saliencymix.datasets.image_folder import list_image_folder
    >>> from dali_saliencymix.datasets.sample_data import make_sample_data
    >>> with tempfile.TemporaryDirectory() as root:
    ...     make_sample_data(root, train=1, val=1)
    ...     folder = list_image_folder(f"{root}/train")
    ...     shapes = [images.shape for images, *_ in training_batches(folder, batch_size=4, size=32)]
    >>> shapes
    [torch.Size([4, 3, 32, 32]), torch.Size([4, 3, 32, 32])]
    """
    if device not in ("cpu", "gpu"):
        msg = f"device must be one of cpu, gpu, got {device!r}"
        raise ValueError(msg)
    if len(folder) < batch_size:
        msg = f"batch_size must be at most {len(folder)}, the images in {folder.root}, got {batch_size}"
        raise ValueError(msg)
    xp = _array_library(device)
    rng = np.random.default_rng(seed)
    reader = ndd.readers.File(
        files=folder.files, labels=folder.labels, shuffle_after_epoch=True, shuffle_after_epoch_seed=seed
    )
    for _ in range(epochs):
        for encoded, label in reader.next_epoch(batch_size=batch_size, capture=capture):
            # To be captured, an argument has to be a constant that DALI can prove from this source, or a promised one.
            images = ndd.decoders.image(encoded, device=device)
            images = ndd.resize(images, size=ndd.capture.invariant([size, size]))

            # From here on it is arrays: a view of DALI's memory, and a new array for what is mixed.
            source_index, lam = draw_params(rng, batch_size, alpha=alpha, prob=prob)
            batch = xp.from_dlpack(ndd.as_tensor(images))
            mixed = saliencymix(batch, xp.asarray(source_index), xp.asarray(lam), **options)

            images = ndd.crop_mirror_normalize(
                ndd.as_batch(mixed.images, layout="HWC"), mean=MEAN, std=STD, dtype=ndd.float32, output_layout="CHW"
            )
            pixels = images.torch()
            labels = np.asarray(ndd.as_tensor(label)).ravel().astype(np.int64)
            ids, source_ids = (torch.from_numpy(array).to(pixels.device) for array in (labels, labels[source_index]))
            yield pixels, ids, source_ids, dlpack.from_dlpack(mixed.lam)


def _array_library(device: str) -> Any:
    if device == "cpu":
        return np
    import cupy

    return cupy


def main(arguments: list[str] | None = None) -> None:
    """Print what comes out of one epoch."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.dynamic_mode")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where images are processed")
    parser.add_argument("--capture", action="store_true", help="let DALI prepare batches in advance")
    args = parser.parse_args(arguments)
    batches = training_batches(
        list_image_folder(args.data),
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        capture=args.capture,
    )
    for number, (images, labels, source_labels, lam) in enumerate(batches):
        mixed = int(((lam < 1) & (labels != source_labels)).sum())
        print(  # noqa: T201
            f"batch {number}: {images.dtype} {tuple(images.shape)} on {images.device}, "
            f"{mixed} images hold two classes, mean lam {lam.mean():.3f}"
        )


if __name__ == "__main__":
    main()

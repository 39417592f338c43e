"""SaliencyMix between the operators of DALI's dynamic mode, which Python calls one by one, without a graph.

    python pipelines/dynamic_mode.py DATA
    python pipelines/dynamic_mode.py DATA --device gpu --capture

DATA is a folder with one folder of images for each class. DALI marks dynamic mode as experimental, and may change it;
this was written for DALI 2.4.

The array function is called on a batch as it stands between two operators. One seed decides all that is random: the
reader's order of the files, and a NumPy generator that partners and weights are drawn from. ``ndd.random`` would draw
them inside DALI, from where they would have to be fetched, and with ``capture=True`` some batches ahead. The NumPy
generator stands where the training stands.
"""

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from dali_saliencymix.packages import require_or_exit

require_or_exit("nvidia.dali", "torch")

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch.utils import dlpack

from dali_saliencymix import draw_params, saliencymix
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


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
    """Decode, resize, mix, normalise: yield ``(images, labels, source_labels, lam)`` for some epochs.

    All batches are full: the last one of an epoch takes its missing images from the next epoch. With `capture` DALI
    makes a pipeline of its operators in front of the mixing, and has their batches ready in advance; the batches are
    the same, but the loop has to end by itself, not by ``break``. `options` are those of `saliencymix`.
    """
    if len(folder) < batch_size:
        msg = f"batch_size must be at most {len(folder)}, the images in {folder.root}, got {batch_size}"
        raise ValueError(msg)
    xp = importlib.import_module("cupy") if device == "gpu" else np
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


def main() -> None:
    """Print what comes out of one epoch."""
    parser = argparse.ArgumentParser(description="Print an epoch of batches that are mixed in DALI's dynamic mode.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where images are processed")
    parser.add_argument("--capture", action="store_true", help="let DALI prepare batches in advance")
    args = parser.parse_args()
    folder = list_image_folder(args.data)
    batches = training_batches(folder, batch_size=args.batch_size, device=args.device, capture=args.capture)
    for number, (images, _, _, lam) in enumerate(batches):
        print(f"batch {number}: {images.dtype} {tuple(images.shape)} on {images.device}, mean lam {lam.mean():.3f}")


if __name__ == "__main__":
    main()

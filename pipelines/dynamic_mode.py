"""Use SaliencyMix in DALI's dynamic mode, in which Python calls DALI operators one by one, without a graph.

    python pipelines/dynamic_mode.py DATA
    python pipelines/dynamic_mode.py DATA --device gpu --capture

DATA is a folder with one folder of images for each class. Dynamic mode is experimental and may change; this example
needs DALI 2.3 or later.

The example calls the array function on the batch between two operators. One seed determines everything random: the
order of the files, and the NumPy generator that draws partners and weights. ``ndd.random`` would draw them inside DALI,
so they would have to be copied out, and with ``capture=True`` they would be drawn some batches ahead. The state of the
NumPy generator always matches the batch that is trained on.
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
    """Decode, resize, mix and normalise; yield ``(images, labels, source_labels, lam)`` for `epochs` epochs.

    All batches are full: the last batch of an epoch is filled with images of the next epoch. With `capture`, DALI
    compiles the operators before the mixing into a pipeline and prefetches their batches. The batches are the same, but
    the loop must run to its end: do not leave it with ``break``. `options` are passed to `saliencymix`.
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
            # Capture needs constant arguments: DALI infers this from the source code, or `invariant` declares it.
            images = ndd.decoders.image(encoded, device=device)
            images = ndd.resize(images, size=ndd.capture.invariant([size, size]))

            # `batch` is a view of DALI's memory; `mixed.images` is a new array.
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
    """Print the batches of one epoch."""
    parser = argparse.ArgumentParser(description="Mix one epoch of batches in DALI's dynamic mode and print them.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where images are processed")
    parser.add_argument("--capture", action="store_true", help="let DALI prefetch batches")
    args = parser.parse_args()
    folder = list_image_folder(args.data)
    batches = training_batches(folder, batch_size=args.batch_size, device=args.device, capture=args.capture)
    for number, (images, _, _, lam) in enumerate(batches):
        print(f"batch {number}: {images.dtype} {tuple(images.shape)} on {images.device}, mean lam {lam.mean():.3f}")


if __name__ == "__main__":
    main()

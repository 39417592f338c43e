"""A training with Hugging Face Accelerate, in one process or many, fed by DALI and mixed with SaliencyMix.

    python pipelines/accelerate_training.py DATA
    accelerate launch pipelines/accelerate_training.py DATA --output weights.pt

DATA is a folder with one folder of images for each class.

Model and optimizer go through ``accelerator.prepare``; the loader does not. Each process asks DALI for its own share of
the files, and the tensors are on its device already. A prepared loader would shard and move each batch again.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import nn
from torch.nn.functional import cross_entropy

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.fn import saliencymix, soft_labels
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


@pipeline_def
def training_pipeline(folder: ImageFolder, size: int, gpu: bool, rank: int, processes: int) -> tuple[DataNode, ...]:
    """Read this process's share of the files, decode a random crop, resize, mix, flip horizontally, normalise."""
    # All processes shuffle with one seed, or their shares would overlap; the other draws have the pipeline's own seed.
    encoded, labels = fn.readers.file(
        files=folder.files, labels=folder.labels, shard_id=rank, num_shards=processes, pad_last_batch=True,
        shuffle_after_epoch=True, shuffle_after_epoch_seed=0, name="reader",
    )  # fmt: skip
    images = fn.decoders.image_random_crop(encoded, device="mixed" if gpu else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, soft_labels(labels, source_labels, lam, num_classes=len(folder.classes))


def train(
    folder: ImageFolder, accelerator: Accelerator, *, epochs: int, batch_size: int, size: int, lr: float
) -> tuple[nn.Module, list[float]]:
    """Train a ResNet-18 in all processes; return it, unwrapped, and the mean loss of each epoch over all of them."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = len(folder) // processes // batch_size
    if not steps:
        limit = f"the share that each of {processes} processes has of the {len(folder)} images in {folder.root}"
        msg = f"batch_size must be at most {len(folder) // processes}, {limit}, got {batch_size}"
        raise ValueError(msg)
    gpu = accelerator.device.type == "cuda"
    pipeline = training_pipeline(
        folder, size, gpu, rank, processes,
        batch_size=batch_size, num_threads=4, device_id=accelerator.device.index or 0 if gpu else None, seed=rank,
    )  # fmt: skip
    loader = DALIGenericIterator([pipeline], ["images", "targets"], reader_name="reader", auto_reset=True)
    model = torchvision.models.resnet18(num_classes=len(folder.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)

    losses = []
    for epoch in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for step, (batch,) in enumerate(loader):
            if step >= steps:  # no full batch without padding: to be read, so that no share gets into the next epoch
                continue
            with accelerator.autocast():
                loss = cross_entropy(model(batch["images"]), batch["targets"])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        losses.append(accelerator.reduce(total / steps, reduction="mean").item())
        accelerator.print(f"epoch {epoch + 1}/{epochs}  {steps} steps  loss {losses[-1]:.3f}")
    return accelerator.unwrap_model(model), losses


def main() -> None:
    """Train, and write the weights."""
    parser = argparse.ArgumentParser(description="Train a ResNet-18 with Accelerate and SaliencyMix.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch of each process")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    parser.add_argument("--output", type=Path, help="file for the weights")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "size": args.size, "lr": args.lr}
    model, _ = train(list_image_folder(args.data), accelerator, **options)
    if args.output is not None:
        accelerator.save(model.state_dict(), args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Train a ResNet-18 for ten steps on images that DALI reads and mixes with SaliencyMix.

    python pipelines/imagenet.py DATA
    python pipelines/imagenet.py DATA --device gpu

DATA is a folder with one folder of images for each class, or a folder that contains such a folder called train.
``python -m dali_saliencymix sample-data DATA`` creates a small one.
"""

import argparse
import itertools
import sys
from pathlib import Path

from dali_saliencymix.packages import require_or_exit

require_or_exit("nvidia.dali", "torch", "torchvision")

import torch
import torchvision
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch.nn.functional import cross_entropy

from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS
OUTPUTS = ["images", "labels", "source_labels", "lam"]


@pipeline_def
def training_pipeline(files: list[str], labels: list[int], size: int, device: str) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, flip horizontally, normalise."""
    encoded, labels = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    # Images must be uint8 and of one size here. Labels do not change; lam is the receiver's share of the pixels.
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


def main() -> None:
    """Train and print the loss of each step."""
    parser = argparse.ArgumentParser(description="Train a ResNet-18 for ten steps with SaliencyMix.")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder with one folder per class, or with train/")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where to decode, mix and train")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    args = parser.parse_args()
    gpu = args.device == "gpu"
    if gpu and not torch.cuda.is_available():
        sys.exit("error: --device must be cpu if PyTorch finds no CUDA GPU, got gpu")

    train = args.data / "train"
    folder = list_image_folder(train if train.is_dir() else args.data)
    pipeline = training_pipeline(
        folder.files, folder.labels, args.size, args.device,
        batch_size=args.batch_size, num_threads=4, device_id=0 if gpu else None,
    )  # fmt: skip
    loader = DALIGenericIterator([pipeline], OUTPUTS, reader_name="reader", auto_reset=True)
    model = torchvision.models.resnet18(num_classes=len(folder.classes)).to("cuda" if gpu else "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    epochs = itertools.repeat(loader)
    for step, (batch,) in zip(range(1, 11), itertools.chain.from_iterable(epochs), strict=False):
        images, labels, source_labels, lam = (batch[name].to(batch["images"].device) for name in OUTPUTS)
        logits = model(images)
        own, source = (cross_entropy(logits, ids[:, 0].long(), reduction="none") for ids in (labels, source_labels))
        loss = (lam * own + (1 - lam) * source).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

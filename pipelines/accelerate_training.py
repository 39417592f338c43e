"""A whole training with Hugging Face Accelerate, and SaliencyMix inside the DALI loader that feeds it.

    python -m pipelines.accelerate_training DATA
    accelerate launch -m pipelines.accelerate_training DATA
    torchrun --nproc_per_node=2 -m pipelines.accelerate_training DATA --cpu

DATA holds one folder of images for each class.

Model and optimizer go through ``accelerator.prepare``; the loader does not. What `prepare` would do to it, it does
already: each process asks for its own share of the files by its rank, and the tensors come out of DALI on the process's
device. Prepared, every batch would be shared out a second time, and moved.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.fn import saliencymix
from dali_saliencymix.loaders.dali import training_loader
from dali_saliencymix.training.metrics import mixed_cross_entropy


def train(
    folder: ImageFolder,
    accelerator: Accelerator,
    *,
    arch: str = "resnet18",
    epochs: int = 1,
    batch_size: int = 32,
    crop_size: int = 224,
    num_threads: int = 2,
    lr: float = 0.05,
    alpha: float = 1.0,
    prob: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, list[float]]:
    """Train a torchvision network on mixed batches; every process of the run has to call this.

    Parameters
    ----------
    folder : ImageFolder
        The training images.
    accelerator : accelerate.Accelerator
        Says which process this is and where it computes, and does the mixed precision and the exchange of gradients.
    arch : str
        Name of a classifier in torchvision.
    epochs : int
        Times that the images are gone through.
    batch_size : int
        Images in a batch of this process.
    crop_size : int
        Height and width of the images.
    num_threads : int
        DALI's threads on the CPU.
    lr : float
        Learning rate, the same in all steps.
    alpha, prob
        As for `dali_saliencymix.fn.saliencymix`.
    seed : int
        Seed of the weights, of the order of the files and of all other draws. Give all processes the same one.

    Returns
    -------
    model : torch.nn.Module
        The trained network, unwrapped.
    losses : list of float
        Mean loss of each epoch over all processes.

    Raises
    ------
    ValueError
        If there are not enough images for one batch on each process, or an option is wrong.
    """
    loader = training_loader(
        folder,
        batch_size=batch_size,
        num_threads=num_threads,
        device=accelerator.device,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        crop_size=crop_size,
        mix=functools.partial(saliencymix, alpha=alpha, prob=prob),
    )
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, num_classes=len(folder.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)

    losses = []
    model.train()
    for epoch in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for images, labels, source_labels, lam in loader:
            with accelerator.autocast():
                loss = mixed_cross_entropy(model(images), labels, source_labels, lam)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        # All processes have the same number of batches, of the same size: the mean of their means is the mean.
        losses.append(accelerator.reduce(total / len(loader), reduction="mean").item())
        accelerator.print(f"epoch {epoch + 1}/{epochs}  {len(loader)} steps  loss {losses[-1]:.3f}")
    return accelerator.unwrap_model(model), losses


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.accelerate_training")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-a", "--arch", default="resnet18", help="name of a classifier in torchvision")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images in a batch of each process")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--crop-size", type=int, default=224, help="height and width of the images")
    parser.add_argument("-j", "--num-threads", type=int, default=2, help="DALI's threads")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=1.0, help="lam is drawn from Beta(alpha, alpha)")
    parser.add_argument("--prob", type=float, default=1.0, help="probability that an image is mixed")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    parser.add_argument("--output", type=Path, help="file for the weights")
    options = vars(parser.parse_args(arguments))
    data, cpu, output = (options.pop(name) for name in ("data", "cpu", "output"))

    accelerator = Accelerator(cpu=cpu)
    model, _ = train(list_image_folder(data), accelerator, **options)
    if output is not None:
        accelerator.save(model.state_dict(), output)
    accelerator.end_training()


if __name__ == "__main__":
    main()

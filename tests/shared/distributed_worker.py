"""Run in two processes under ``torchrun`` for `test_distributed.py`, and record what each gets without checking it.

The first argument is the data set, the second the JSON file that the main process writes.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torchvision
from torch.nn.parallel import DistributedDataParallel

import train
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.loaders.imagenet import training_loader, validation_loader
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.arguments import parse_arguments
from dali_saliencymix.training.distributed import start_processes, stop_processes
from dali_saliencymix.training.metrics import mixed_cross_entropy

TRAINING = [(12, 3), (13, 3), (23, 4), (47, 5)]  # images and batch size
VALIDATION = [(5, 3), (7, 3), (16, 4), (23, 5)]
EPOCHS = 3


def numbered(files: list[str], count: int) -> ImageFolder:
    """Return a data set in which the label of a file is its number."""
    names = [f"{number:03d}" for number in range(count)]
    return ImageFolder(Path(files[0]).parent, names, files[:count], list(range(count)))


def loaded_labels(loader) -> list[list[list[int]]]:
    """Return the labels of each batch of each epoch."""
    return [[batch[1].tolist() for batch in loader] for _ in range(EPOCHS)]


def gradients_of(network, model, images, *targets) -> torch.Tensor:
    model.zero_grad()
    mixed_cross_entropy(network(images), *targets).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def one_step(loader) -> dict:
    """Compare the gradients of a step with those that each process computes alone with the same weights."""
    torch.manual_seed(7)
    model = torchvision.models.resnet18(num_classes=100)
    images, labels, source_labels, lam = next(iter(loader))
    alone = copy.deepcopy(model)
    local = gather(gradients_of(alone, alone, images, labels, source_labels, lam))
    network = DistributedDataParallel(model)
    shared = gather(gradients_of(network, model, images, labels, source_labels, lam))
    mean = (local[0] + local[1]) / 2
    return {
        "lam": gather(lam.tolist()),
        "same": bool(torch.equal(shared[0], shared[1])),
        "off_the_mean": ((shared[0] - mean).norm() / mean.norm()).item(),
        "between_processes": ((local[0] - local[1]).norm() / mean.norm()).item(),
    }


def one_epoch(arguments: list[str], processes) -> dict:
    """Train for an epoch with the trainer of train.py; report what must be equal in all processes."""
    trainer = train.Trainer(parse_arguments(arguments), processes)
    begin = sum(parameter.double().sum().item() for parameter in trainer.model.parameters())
    dropped = torch.nn.functional.dropout(torch.ones(100, device=processes.device), 0.3).eq(0).nonzero().flatten()
    trained = trainer.train_epoch()
    val = trainer.validate(trainer.data.val_loader(trainer.options.data, processes), trainer.model)
    state = [part.double().sum().item() for part in trainer.model.state_dict().values()]
    sums = {name: trained[name] for name in ("loss", "mixed_top1", "images")}
    return {"begin": gather(begin), "dropped": gather(dropped.tolist()), "both": gather([state, sums, val])}


def main() -> None:
    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    processes = start_processes("cpu")
    place = {"rank": processes.rank, "world_size": processes.world_size}
    common = {"num_threads": 1, "device": processes.device, "crop_size": 32, **place}
    files = list_image_folder(data / "train").files
    report: dict = {"training": {}, "validation": {}}
    for count, batch_size in TRAINING:
        loader = training_loader(numbered(files, count), batch_size=batch_size, seed=5, **common)
        report["training"][f"{count} {batch_size}"] = gather(loaded_labels(loader))
    for count, batch_size in VALIDATION:
        loader = validation_loader(numbered(files, count), batch_size=batch_size, resize_size=32, **common)
        report["validation"][f"{count} {batch_size}"] = gather(loaded_labels(loader))
    report["step"] = one_step(training_loader(numbered(files, 16), batch_size=6, seed=5, mix=MixOptions(), **common))
    report["epoch"] = one_epoch([str(data), *sys.argv[3:]], processes)
    if processes.is_main:
        output.write_text(json.dumps(report))
    stop_processes()


if __name__ == "__main__":
    main()

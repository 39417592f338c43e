"""Compute loss and accuracy of a network on a validation set, overall and per class."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from dali_saliencymix._errors import naming
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import distributed, metrics
from dali_saliencymix.training.models import autocast
from dali_saliencymix.training.options import ModelOptions
from dali_saliencymix.training.run_log import Progress


class ValidationLoader(Protocol):
    """A loader of the validation batches ``(images, labels)`` of one process: (N, C, H, W) float and (N,) int64."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the batches; some may be empty."""


def sums_over_images(
    model: nn.Module,
    loader: ValidationLoader,
    processes: Processes,
    names: Sequence[str],
    count: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]],
    *,
    description: str,
) -> dict[str, float]:
    """Return the sums of the results of `count` over all batches, and of ``"images"``; call it in all processes.

    The model is switched to evaluation mode and stays in it. Its buffers are broadcast from the main process.
    """
    distributed.copy_buffers_from_main(model)
    model.eval()
    totals = metrics.Totals(*names, "images", device=processes.device)
    with Progress(description, len(loader)) as progress:
        for images, labels in loader:
            if len(images):  # a shard that ends early yields empty batches
                totals.add(*count(images, labels), len(images))
            progress.advance()
    return totals.over_processes()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    processes: Processes,
    computation: ModelOptions,
    per_class: PerClass | None = None,
) -> dict[str, float]:
    """Return loss, top-1 and top-5 accuracy over all validation images; call it in all processes.

    Over all processes, `loader` must yield each image once. `computation` has the precision of forward passes, and
    `per_class` also counts the predictions per class. ``"loss"`` is the mean cross-entropy, ``"top1"`` and ``"top5"``
    are in percent, and ``"images"`` is the number of images. With fewer than five classes, top-5 is 100. The result is
    the same in all processes.
    """

    def count(images: torch.Tensor, labels: torch.Tensor) -> Sequence[torch.Tensor]:
        with autocast(computation, images.device):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        answers = logits.topk(min(5, logits.shape[1]), dim=1).indices
        if per_class is not None:
            per_class.add(answers, labels)
        right = answers == labels[:, None]
        return loss, right[:, 0].sum(), right.sum()

    names = ("loss", "top1", "top5")
    sums = sums_over_images(model, loader, processes, names, count, description="validation")
    images = sums["images"]
    tops = {name: 100 * sums[name] / images for name in names[1:]}
    return {"loss": sums["loss"] / images, **tops, "images": int(images)}


class PerClass:
    """Counts the predictions per class: a confusion matrix and top-5 hits."""

    def __init__(self, classes: int, device: torch.device) -> None:
        # Integer sums over batches and processes are exact in any order. They take 8 MB for the classes of ImageNet.
        self._answers = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros(classes, dtype=torch.int64, device=device)
        self._classes = classes

    def add(self, answers: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: the classes (N, 5) of the largest logits, largest first, and the true labels (N,)."""
        self._answers.index_add_(0, labels * self._classes + answers[:, 0], torch.ones_like(labels))
        self._top5.index_add_(0, labels, (answers == labels[:, None]).sum(dim=1))

    def over_processes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the counts over all processes, each of which must call this.

        The first is the confusion matrix (K, K), with true classes as rows and predicted classes as columns. The second
        (K,) is the number of images per class whose class is among the five best predictions.
        """
        confusion = distributed.sum_over_processes(self._answers).view(self._classes, self._classes)
        return confusion.cpu(), distributed.sum_over_processes(self._top5).cpu()


COLUMNS = ("class", "images", "top1", "top5", "most_frequent_wrong_answer", "its_count")


def write_per_class(path: Path, classes: Sequence[str], confusion: torch.Tensor, top5: torch.Tensor) -> None:
    """Write a CSV file with one line per class, from the result of `PerClass.over_processes`.

    ``top1`` and ``top5`` are percentages of the images of the class. Both are empty for a class without images. The
    last two columns are empty for a class without mistakes; ties go to the lowest label. An OSError names the file.
    """
    with naming(path), open(path, "w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(COLUMNS)
        for label, name in enumerate(classes):
            wrong = confusion[label].clone()
            images, right = int(wrong.sum()), int(wrong[label])
            wrong[label] = 0
            accuracy = [f"{100 * count / images:.2f}" if images else "" for count in (right, int(top5[label]))]
            worst = int(wrong.argmax())
            mistake = [classes[worst], int(wrong[worst])] if right < images else ["", ""]
            lines.writerow([name, images, *accuracy, *mistake])


def unused_path(path: Path) -> Path:
    """Return `path`, or if it exists, the first of ``name-2``, ``name-3``, ... that does not."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return unused

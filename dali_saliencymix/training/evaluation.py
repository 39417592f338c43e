"""Loss and accuracy of a network over a validation set, as a whole and class by class, and the files with them."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dali_saliencymix._json import finite
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import distributed, logs, metrics


class ValidationLoader(Protocol):
    """What gives one process's validation batches, ``(images, labels)``: (N, C, H, W) floating and (N,) int64."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the batches; some may be empty."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    processes: Processes,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    per_class: PerClass | None = None,
) -> dict[str, float]:
    """Return loss, top-1 and top-5 over all validation images, each counted once; all processes have to call this.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits (N, K) for images (N, C, H, W). It is put into evaluation mode, in which it stays, and all
        processes get the main one's buffers.
    loader : ValidationLoader
        This process's share: the shares of all processes together hold each image once.
    processes : Processes
        Which process this is.
    autocast : callable
        Makes the context for the forward passes.
    per_class : PerClass, optional
        Counts the answers class by class.

    Returns
    -------
    dict
        ``"loss"``, the mean cross-entropy; ``"top1"`` and ``"top5"`` in percent, where of fewer than five classes all
        are among the first five; ``"images"``, how many there were. The same in all processes.
    """
    distributed.copy_buffers_from_main(model)
    model.eval()
    totals = metrics.Totals("loss", "top1", "top5", "images", device=processes.device)
    progress = logs.Progress("validation", len(loader), enabled=processes.is_main)
    for images, labels in loader:
        if len(images):  # a shard that ends early gives empty batches
            with autocast():
                logits = model(images)
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            answers = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right = answers == labels[:, None]
            totals.add(loss, right[:, 0].sum(), right.sum(), len(images))
            if per_class is not None:
                per_class.add(answers, labels)
        progress.advance()
    progress.close()
    sums = totals.over_processes()
    count = sums["images"]
    return {
        "loss": sums["loss"] / count,
        "top1": 100 * sums["top1"] / count,
        "top5": 100 * sums["top5"] / count,
        "images": int(count),
    }


class PerClass:
    """Counts, class by class, how often the network was right and what it said instead.

    Parameters
    ----------
    classes : int
        Number of classes, K. K * K counts are kept: 8 MB for the 1000 classes of ImageNet.
    device : torch.device
        Where they are kept.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        # Whole numbers, so that sums over batches and processes are exact in any order.
        self._answers = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros(classes, dtype=torch.int64, device=device)
        self._classes = classes

    def add(self, answers: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Parameters
        ----------
        answers : tensor of shape (N, 5), int64
            The classes of the largest logits, the largest first; all classes if there are fewer than five.
        labels : tensor of shape (N,), int64
            What is right.
        """
        self._answers.index_add_(0, labels * self._classes + answers[:, 0], torch.ones_like(labels))
        self._top5.index_add_(0, labels, (answers == labels[:, None]).sum(dim=1))

    def over_processes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the counts over all processes, all of which have to call this.

        Returns
        -------
        confusion : tensor of shape (K, K), int64
            How often an image of a class (row) was taken for a class (column).
        top5 : tensor of shape (K,), int64
            How many images of a class had it among the first five answers.
        """
        confusion = distributed.sum_over_processes(self._answers).view(self._classes, self._classes)
        return confusion.cpu(), distributed.sum_over_processes(self._top5).cpu()


COLUMNS = ("class", "images", "top1", "top5", "most_frequent_wrong_answer", "its_count")


def write_per_class(path: Path, classes: Sequence[str], confusion: torch.Tensor, top5: torch.Tensor) -> None:
    """Write a CSV file with a line for each class.

    Parameters
    ----------
    path : Path
        File to write, UTF-8.
    classes : sequence of str
        Names of the K classes by label.
    confusion, top5 : tensor
        As from `PerClass.over_processes`.

    Notes
    -----
    The columns are `COLUMNS`; ``top1`` and ``top5`` are percent of the class's images. What cannot be said is left
    empty: both of them for a class without images, the last two columns for a class without mistakes. Of wrong answers
    that are equally frequent, the first by label is named.
    """
    with open(path, "w", encoding="utf-8", newline="") as stream:
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


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the figures of an evaluation as JSON; a figure that is no finite number becomes null."""
    path.write_text(json.dumps(finite(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def unused_path(path: Path) -> Path:
    """Return `path`, or where that is taken the first of ``name-2``, ``name-3``, ... that is free."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return unused

"""Loss and accuracy of mixed batches.

`labels` and `source_labels` are (N,) int64, `lam` is (N,) float, the weight of `labels`; logits are (N, K).
All tensors stay on their device. Only functions that return Python numbers synchronise with a GPU.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dali_saliencymix.training.distributed import sum_over_processes


def mixed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    source_labels: torch.Tensor,
    lam: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the mean over the batch of lam * CE(labels) + (1 - lam) * CE(source_labels).

    With `label_smoothing` in [0, 1], both terms use smoothed labels. This equals the cross-entropy against mixed labels
    that are smoothed afterwards.
    """
    own = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    source = functional.cross_entropy(logits, source_labels, reduction="none", label_smoothing=label_smoothing)
    return (lam * own + (1 - lam) * source).mean()


def mixed_correct(
    logits: torch.Tensor, labels: torch.Tensor, source_labels: torch.Tensor, lam: torch.Tensor
) -> torch.Tensor:
    """Return the lam-weighted number of correct predictions: lam for the label, 1 - lam for the source label."""
    answer = logits.argmax(dim=1)
    return (lam * (answer == labels) + (1 - lam) * (answer == source_labels)).sum()


def correct_in_top(logits: torch.Tensor, labels: torch.Tensor, top: int) -> torch.Tensor:
    """Return the number of samples whose label is among the `top` largest logits, or among all if there are fewer."""
    answers = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (answers == labels[:, None]).any(dim=1).sum()


class Totals:
    """Named sums over an epoch, accumulated on the device in float64."""

    def __init__(self, *names: str, device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, *values: torch.Tensor | float) -> None:
        """Add one value for each name."""
        parts = [value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in values]
        self._sums += torch.stack([part.detach().to(self._sums, non_blocking=True) for part in parts])

    def over_processes(self) -> dict[str, float]:
        """Return the sums over all processes, each of which must call this."""
        return dict(zip(self._names, sum_over_processes(self._sums).tolist(), strict=True))

    def mean(self, name: str, count: str) -> float:
        """Return the sum `name` divided by the sum `count` in this process; this synchronises with a GPU."""
        sums = dict(zip(self._names, self._sums.tolist(), strict=True))
        return sums[name] / sums[count]

    def state(self) -> list[float]:
        """Return the sums of this process, in the order of the names, for `restore`."""
        sums: list[float] = self._sums.tolist()
        return sums

    def restore(self, sums: list[float]) -> None:
        """Resume from sums that `state` returned."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

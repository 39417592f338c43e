"""Batches of loaders, to be compared after all of them have come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

Batch = Sequence[torch.Tensor]


def epoch(loader: Iterable[Batch]) -> list[list[torch.Tensor]]:
    """What is left of an epoch, cloned: a loader may write the next batch into the same memory."""
    return [[tensor.clone() for tensor in batch] for batch in loader]


def epochs_with_states(loader: Any, count: int) -> tuple[list[list[torch.Tensor]], list[Any]]:
    """The batches of some epochs, cloned, and the state of the loader after each, of an epoch's last after its end."""
    batches, states = [], []
    for _ in range(count):
        for batch in loader:
            batches.append([tensor.clone() for tensor in batch])
            states.append(loader.state())
        states[-1] = loader.state()
    return batches, states


def ids(batches: Iterable[Batch]) -> list[int]:
    """The labels of all images, which the tests make the images' numbers."""
    return [label for _, labels, *_ in batches for label in labels.tolist()]


def assert_equal_batches(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for our_batch, their_batch in zip(ours, theirs, strict=True):
        for our_tensor, their_tensor in zip(our_batch, their_batch, strict=True):
            assert torch.equal(our_tensor, their_tensor)

"""Collect and compare the batches of loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

Batch = Sequence[torch.Tensor]


def epoch(loader: Iterable[Batch]) -> list[list[torch.Tensor]]:
    """Return the remaining batches of an epoch, cloned: a loader may write the next batch into the same memory."""
    return [[tensor.clone() for tensor in batch] for batch in loader]


def epochs_with_states(loader: Any, count: int) -> tuple[list[list[torch.Tensor]], list[Any]]:
    """Return the cloned batches of some epochs, and the state of the loader after each batch.

    The state after the last batch of an epoch is taken when the epoch has ended.
    """
    batches, states = [], []
    for _ in range(count):
        for batch in loader:
            batches.append([tensor.clone() for tensor in batch])
            states.append(loader.state())
        states[-1] = loader.state()
    return batches, states


def ids(batches: Iterable[Batch]) -> list[int]:
    """Return the labels of all images, which are the numbers of the images in these tests."""
    return [label for _, labels, *_ in batches for label in labels.tolist()]


def assert_equal_batches(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for our_batch, their_batch in zip(ours, theirs, strict=True):
        for our_tensor, their_tensor in zip(our_batch, their_batch, strict=True):
            assert torch.equal(our_tensor, their_tensor)

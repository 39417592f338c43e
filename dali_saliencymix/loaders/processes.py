"""Which process of a run this is, and where it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run.

    Attributes
    ----------
    rank, local_rank, world_size : int
        Number of this process in the run and on its machine, and how many there are.
    device : torch.device
        Where this process computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

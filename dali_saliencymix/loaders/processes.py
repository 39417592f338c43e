"""Rank and device of a process in a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processes:
    """Rank and device of this process, and the number of processes.

    Attributes
    ----------
    rank : int
        Rank of this process in the run.
    local_rank : int
        Its rank on its machine.
    world_size : int
        Number of processes in the run.
    device : torch.device
        The device on which this process computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

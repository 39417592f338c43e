"""One process or many: what ``torchrun`` says about them, and sums over all of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


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


def start_processes(device: str = "auto") -> Processes:
    """Choose the device and join the process group, where ``torchrun`` has started this process.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``"auto"`` takes a GPU if there is one, and otherwise the CPU, which it says on stderr.

    Raises
    ------
    ValueError
        If a GPU is asked for and there is none for this process.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
        if device == "cpu" and rank == 0:
            sys.stderr.write("no CUDA GPU found: everything runs on the CPU\n")
    if device == "cuda" and gpus <= local_rank:
        msg = f"device must be 'cpu' where no CUDA GPU is left for process {local_rank}, got {asked!r} with {gpus} GPUs"
        raise ValueError(msg)
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        if device == "cuda":
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
    return Processes(rank, local_rank, world_size, chosen)


_TORCHRUN = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes; of one process, the tensor."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather_from_processes(value: Any) -> list[Any]:
    """Return the values of all processes by rank; all have to call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def copy_buffers_from_main(model: torch.nn.Module) -> None:
    """Give all processes the main one's buffers, such as running means: all then evaluate the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

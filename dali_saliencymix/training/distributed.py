"""One process or many: what ``torchrun`` says about them, and sums over all of them."""

from __future__ import annotations

import ctypes
import datetime
import os
import re
import signal
import sys
import threading
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dali_saliencymix._errors import EXPECTED, line_of, write_error
from dali_saliencymix.loaders.base import LoaderError
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure import processes
from dali_saliencymix.measure.processes import is_lost_connection

# What the processes leave for each other to read. It is kept by torchrun, and outlives them.
_board: Store | None = None

# Only a last resort: whoever waits that long is stopped by its watchdog first.
_PATIENCE = datetime.timedelta(hours=6)

_ANSWER_SECONDS = 5.0


class OtherProcessError(RuntimeError):
    """Another process of the run has failed, and says why itself: this one cannot go on either."""


def start_processes(device: str = "auto") -> Processes:
    """Choose the device and join the process group, where ``torchrun`` has started this process.

    ``"auto"`` takes a GPU if there is one, and otherwise the CPU, which it says on stderr. ValueError if a GPU is asked
    for and there is none for this process, or if `torchrun` would start the processes again in a way that fails.
    """
    global _board
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in given.items())
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
        _die_with_parent()
        store, _, _ = next(rendezvous("env://"))
        _board = PrefixStore("board", store)
        _check_restarts()
        if device == "cuda":
            dist.init_process_group("nccl", device_id=chosen, store=store, rank=rank, world_size=world_size)
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_PATIENCE)
        # Small facts go from process to process on the CPU, in a group of their own: gradients may be under way in the
        # other.
        processes.use_group(dist.new_group(backend="gloo", timeout=_PATIENCE))
    return Processes(rank, local_rank, world_size, chosen)


def _check_restarts() -> None:
    """Refuse what makes processes that ``torchrun`` starts again look for those that have ended, and wait for them."""
    # The store keeps the addresses of the first processes: https://github.com/pytorch/pytorch/issues/135712
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        msg = f"torchrun --max-restarts {restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        raise ValueError(msg)


def _die_with_parent() -> None:
    """Have the system send SIGTERM to this process when ``torchrun`` is gone: it would run on without it for ever."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    global _board
    if dist.is_initialized():
        dist.destroy_process_group()
    _board = None
    processes.use_group(None)


def end(line: str, status: int) -> int:
    """Write the main process's last line to stderr, and return the status."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"train.py: {line}\n")
    return status


def fail(error: Exception, *, prog: str = "train.py", with_traceback: bool = False) -> int:
    """Write the line of an error of `prog` to stderr and return the status 1; of several processes, end this at once.

    What several processes have to say is written once, and nothing is written by those that only fail because another
    one has failed.
    """
    lost = is_lost_connection(error)
    told = OtherProcessError("another process of the run has ended without a word; was it killed?") if lost else error
    expected = isinstance(told, (*EXPECTED, OtherProcessError, LoaderError)) or _is_of_the_machine(told)
    is_named_elsewhere = isinstance(error, OtherProcessError) and not str(error)
    if not is_named_elsewhere and _claims(line_of(told, expected=expected), needs_to_be_first=lost):
        write_error(told, prog, expected=expected, with_traceback=with_traceback)
    if dist.is_initialized():
        # Leaving the group in good order would wait for processes that may be gone, and so would unwritten messages.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _is_of_the_machine(error: Exception) -> bool:
    """Return whether PyTorch's error is about memory, a driver or a lost worker process, not about a program."""
    words = r"out of memory|allocate memory|CUDA (error|driver)|cuDNN error|DataLoader worker .* exited"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def announce_failure() -> bool:
    """Tell the other processes that this one ends with an error which it writes; return whether it is the first.

    Where that cannot be found out in a few seconds it counts as the first.
    """
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(_claims("", needs_to_be_first=True)), daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return answers[0] if answers else True


def end_at_once(line: str) -> NoReturn:
    """End this process with status 1 and a line on stderr, from any thread, and without another word or file."""
    announce_failure()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(1)


def _claims(text: str, *, needs_to_be_first: bool) -> bool:
    """Return whether this process is the one to write an error, the same one only once or the first of the run only."""
    if _board is None:
        return True
    try:
        number = _board.add("errors", 1)
        return number == 1 if needs_to_be_first else _board.add(f"error: {text}", 1) == 1
    except RuntimeError:  # whoever kept the board is gone too
        return True


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes; of one process, the tensor."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def copy_buffers_from_main(model: torch.nn.Module) -> None:
    """Give all processes the main one's buffers, such as running means: all then evaluate the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

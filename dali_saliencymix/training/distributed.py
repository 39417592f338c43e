"""Start and stop the processes of a run with ``torchrun``, report their errors, and sum over them."""

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

# A store through which the processes exchange messages. torchrun holds it, so it outlives them.
_board: Store | None = None

# A last resort: the watchdog stops a waiting process long before.
_PATIENCE = datetime.timedelta(hours=6)

_ANSWER_SECONDS = 5.0


class OtherProcessError(RuntimeError):
    """Another process of the run has failed and reports the reason itself. This process has to end, too."""


def start_processes(device: str = "auto") -> Processes:
    """Choose the device and, under ``torchrun``, join the process group.

    ``"auto"`` selects a GPU if there is one, and otherwise the CPU, which stderr reports. ValueError if a GPU is
    requested but there is none for this process, or if ``torchrun`` is set to restart processes in a way that hangs.
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
        msg = f"device must be 'cpu' if no CUDA GPU is left for process {local_rank}, got {asked!r} with {gpus} GPUs"
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
        # A separate group for small messages on the CPU, as an all-reduce of gradients may be running in the other.
        processes.use_group(dist.new_group(backend="gloo", timeout=_PATIENCE))
    return Processes(rank, local_rank, world_size, chosen)


def _check_restarts() -> None:
    """Refuse settings of ``torchrun`` with which restarted processes would wait for those that have ended."""
    # The store would keep the addresses of the first processes: https://github.com/pytorch/pytorch/issues/135712
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        msg = f"torchrun --max-restarts {restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        raise ValueError(msg)


def _die_with_parent() -> None:
    """Ask the system to send SIGTERM to this process when ``torchrun`` dies; otherwise it would run on for ever."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def is_main_process() -> bool:
    """Return whether this is the process that shows messages; ``torchrun`` sets the rank."""
    return os.environ.get("RANK", "0") == "0"


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    global _board
    if dist.is_initialized():
        dist.destroy_process_group()
    _board = None
    processes.use_group(None)


def end(line: str, status: int) -> int:
    """Write the main process's last line to stderr, and return the status."""
    if is_main_process():
        sys.stderr.write(f"train.py: {line}\n")
    return status


def fail(error: Exception, *, prog: str = "train.py", with_traceback: bool = False) -> int:
    """Write the message of an error of `prog` to stderr and return status 1; in a process group, exit at once.

    A message that several processes share is written once. Processes that fail only because another one has failed
    write nothing.
    """
    lost = is_lost_connection(error)
    told = OtherProcessError("another process of the run exited without an error message (killed?)") if lost else error
    expected = isinstance(told, (*EXPECTED, OtherProcessError, LoaderError)) or _is_of_the_machine(told)
    is_named_elsewhere = isinstance(error, OtherProcessError) and not str(error)
    if not is_named_elsewhere and _claims(line_of(told, expected=expected), needs_to_be_first=lost):
        write_error(told, prog, expected=expected, with_traceback=with_traceback)
    if dist.is_initialized():
        # Leaving the group properly would wait for processes that may be gone. `_exit` does not flush buffers.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _is_of_the_machine(error: Exception) -> bool:
    """Return whether an error of PyTorch is about memory, a driver or a lost worker process, not about a bug."""
    words = r"out of memory|allocate memory|CUDA (error|driver)|cuDNN error|DataLoader worker .* exited"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def announce_failure() -> bool:
    """Announce to the other processes that this one fails and reports its error; return whether it is the first.

    If the store does not answer within a few seconds, this process counts as the first.
    """
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(_claims("", needs_to_be_first=True)), daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return answers[0] if answers else True


def end_at_once(line: str) -> NoReturn:
    """Exit at once with status 1 and a line on stderr, from any thread, without further messages or files."""
    announce_failure()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(1)


def _claims(text: str, *, needs_to_be_first: bool) -> bool:
    """Return whether this is the first process with an error of this text, or the first with any error in the run."""
    if _board is None:
        return True
    try:
        number = _board.add("errors", 1)
        return number == 1 if needs_to_be_first else _board.add(f"error: {text}", 1) == 1
    except RuntimeError:  # the process that holds the board is gone, too
        return True


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes; with one process, the tensor itself."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def copy_buffers_from_main(model: torch.nn.Module) -> None:
    """Broadcast the buffers of the main process, such as running means, so that all evaluate the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

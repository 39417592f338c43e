"""Run programs for the tests, in processes that `program_server.py` forks, or as `torchrun` does.

Tests of the start of a program use a fresh interpreter and `subprocess` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 240.0  # time limit of a program in seconds


def python_path() -> str:
    """Return a PYTHONPATH with the repository, its tests and the current entries, which may have packages."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")]))


def environment_of_program() -> dict[str, str]:
    """Return the environment of a single process, on one thread and without a GPU."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path()}


class Server:
    """The process that forks programs; it ends when this process ends."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).with_name("program_server.py")), str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, env=environment_of_program(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._statuses: dict[int, int] = {}
        atexit.register(self._close)

    def start(self, arguments: list[str], environment: dict[str, str], folder: Path, out: int, err: int) -> int:
        """Fork a program that writes to these files; return the number of its process."""
        request = {"arguments": arguments, "environment": environment, "folder": str(folder)}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [out, err])
        while not (started := self._receive(PATIENCE).get("started")):
            pass
        return started

    def status(self, pid: int, seconds: float) -> int | None:
        """Return the exit status of a program as `subprocess` does, or None if it still runs after these seconds."""
        deadline = time.monotonic() + seconds
        while pid not in self._statuses:
            try:
                self._receive(max(deadline - time.monotonic(), 1e-3))
            except TimeoutError:
                return None
        return self._statuses[pid]

    def _close(self) -> None:
        self._connection.close()
        self._process.wait()

    def _receive(self, seconds: float) -> dict:
        self._connection.settimeout(seconds)
        message = self._connection.recv(1 << 16)
        assert message, "the server of programs has ended; its stderr says why"
        answer = json.loads(message)
        if "ended" in answer:
            self._statuses[answer["ended"]] = answer["status"]
        return answer


server: Server | None = None


def run_program(
    *command: str | Path, check: bool = True, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, in a folder, on one thread and without a GPU."""
    return _finished(command, [environment_of_program()], check, folder)


def torchrun(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes with the environment of `torchrun`; if one fails, end both as `torchrun` does."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return _finished(command, [environment_of_program() | shared | rank for rank in ranks], check)


def real_torchrun(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes on this machine with `torchrun` itself."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    line = [sys.executable, *launcher, *map(str, command)]
    ended = subprocess.run(
        line, cwd=REPOSITORY, env=environment_of_program(), capture_output=True, text=True, timeout=PATIENCE
    )
    if check:
        assert ended.returncode == 0, ended.stderr
    return ended


def _finished(
    command: tuple[str | Path, ...], environments: list[dict[str, str]], check: bool, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Fork a program in each environment; return their output when they and their children have ended."""
    global server
    server = server or Server()
    arguments = [str(word) for word in command]
    outputs: list[list[str]] = [[], []]
    ends = [os.pipe() for _ in outputs]
    readers = [
        threading.Thread(target=_read, args=(end, to), daemon=True) for (end, _), to in zip(ends, outputs, strict=True)
    ]
    for reader in readers:
        reader.start()
    pids = [server.start(arguments, environment, folder, *(end for _, end in ends)) for environment in environments]
    for _, end in ends:
        os.close(end)
    try:
        status, said = _wait(server, pids)
    finally:
        for pid in pids:
            if server.status(pid, 0) is None:
                _kill(pid, signal.SIGKILL)
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive(), f"a process that {arguments} has started runs on"
    (out,), (err,) = outputs
    ended = subprocess.CompletedProcess(arguments, status, out, err + said)
    if check:
        assert ended.returncode == 0, ended.stderr
    return ended


def _read(end: int, to: list[str]) -> None:
    with open(end, errors="replace") as stream:
        to.append(stream.read())


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has already ended
        os.kill(pid, number)


def _wait(server: Server, pids: list[int]) -> tuple[int, str]:
    """Wait for programs; return an exit status and a message.

    For a single program these are its status and an empty message. For several they are the status and message of
    torchrun, which ends the other processes when one fails and writes the status of that one to stderr.
    """
    deadline, failed = time.monotonic() + PATIENCE, None
    while None in (statuses := [server.status(pid, 0.02) for pid in pids]):
        if time.monotonic() > deadline:
            msg = f"processes {pids} run on, of which have ended: {statuses}"
            raise TimeoutError(msg)
        if any(statuses) and failed is None:
            deadline, failed = time.monotonic() + 30.0, next(filter(None, statuses))
            for pid, status in zip(pids, statuses, strict=True):
                if status is None:
                    _kill(pid, signal.SIGTERM)
    if len(pids) == 1:
        return statuses[0], ""
    failed = failed or next(filter(None, statuses), 0)
    return (1, f"exitcode  : {failed}\n") if failed else (0, "")

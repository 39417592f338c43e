"""A process that has imported what programs of the tests need, and forks one of them for each request.

Importing PyTorch, torchvision, DALI and Numba takes longer than what these programs do. A forked program is a process
of its own, with arguments, environment, folder, standard streams, signals and exit status as if Python had started it.
`programs.py` starts this file and sends the requests.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import types

import numpy as np


def preload() -> None:
    """Import what programs of the tests need; none of it starts a thread, which a forked process would lack."""
    import nvidia.dali.plugin.pytorch  # noqa: F401
    import torch.distributed
    import torchvision  # noqa: F401

    import train  # noqa: F401
    from dali_saliencymix._compile import compile_kernels
    from shared import tiny_model  # noqa: F401

    torch.set_num_threads(1)
    compile_kernels(lambda line: None)  # or load them, where that was done before
    assert len(os.listdir("/proc/self/task")) == 1, "a module has started a thread"
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request and tell how the processes end; returns in a forked process, with what to run there."""
    processes: dict[int, int] = {}
    while True:
        for ready in select.select([requests, *processes], [], [])[0]:
            if ready is requests:
                message, streams, *_ = socket.recv_fds(requests, 1 << 20, 2)
                if not message:
                    os._exit(0)
                pid = os.fork()
                if not pid:
                    return json.loads(message), streams
                for stream in streams:
                    os.close(stream)
                processes[os.pidfd_open(pid)] = pid
                requests.send(json.dumps({"started": pid}).encode())
            else:
                _, status = os.waitpid(processes[ready], 0)
                ended = {"ended": processes.pop(ready), "status": os.waitstatus_to_exitcode(status)}
                os.close(ready)
                requests.send(json.dumps(ended).encode())


def become(request: dict, streams: list[int]) -> None:
    """Take over streams, environment and folder of the program."""
    for stream, number in zip(streams, (1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()  # noqa: NPY002 (NumPy's own generator, as a fresh interpreter seeds it)


class Leaving:
    """The end of a program, once all that is registered for it is done: without taking half a million objects apart."""

    status = 1  # what an error makes

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if self.status == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(self.status)


def run(arguments: list[str]) -> None:
    """Run ``python ARGUMENTS``: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv[:], sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if kind == "-c":
        source, path, sys.argv[:], sys.path[0] = rest[0], "<string>", ["-c", *rest[1:]], ""
    else:
        with open(kind, "rb") as stream:
            source, path, sys.argv[:], sys.path[0] = stream.read(), kind, arguments, os.path.dirname(kind)
        main.__file__ = path
    exec(compile(source, path, "exec"), vars(main))


if __name__ == "__main__":
    leaving = Leaving()
    atexit.register(leaving)  # the first of all, which is the last to be called
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who has asked for the programs
    preload()
    # As the programs do at their beginning. There it would fail: Python takes this stream for one that can be searched,
    # and in a program it is a pipe.
    sys.stdout.reconfigure(errors="backslashreplace")
    asked, given = serve(connection)
    connection.close()
    become(asked, given)
    try:
        run(asked["arguments"])
        leaving.status = 0
    except SystemExit as ended:
        leaving.status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except KeyboardInterrupt:
        leaving.status = -signal.SIGINT
        raise

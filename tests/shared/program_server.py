"""Import the packages that programs of the tests need, and fork a program for each request.

Importing PyTorch, torchvision, DALI and Numba takes longer than these programs run. A forked program is a separate
process with its own arguments, environment, folder, standard streams, signals and exit status, as if Python had started
it. `programs.py` starts this file and sends the requests.
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
    """Import the packages; none may start a thread, which would be missing in a forked process."""
    import nvidia.dali.plugin.pytorch  # noqa: F401
    import torch.distributed
    import torchvision  # noqa: F401

    import train  # noqa: F401
    from dali_saliencymix._compile import compile_kernels
    from shared import tiny_model  # noqa: F401

    torch.set_num_threads(1)
    compile_kernels(lambda line: None)  # or load them from the cache
    assert len(os.listdir("/proc/self/task")) == 1, "a module has started a thread"
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request and report how the processes end; return only in a forked process, with its request."""
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
    """Take over the streams, environment and folder of the program."""
    for stream, number in zip(streams, (1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()  # noqa: NPY002 (NumPy's own generator, as a fresh interpreter seeds it)


class Leaving:
    """End a program after its exit functions have run, without the slow destruction of half a million objects."""

    status = 1  # of an error

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
    atexit.register(leaving)  # registered first, so it is called last
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that sends the requests
    preload()
    # The programs do this at their start. There it would fail, since Python regards this stream as seekable, but in a
    # program it is a pipe.
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

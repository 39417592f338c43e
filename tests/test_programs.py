"""Forked test programs behave like programs in a fresh interpreter, but start faster."""

from __future__ import annotations

import subprocess
import sys

import pytest
from shared.programs import REPOSITORY, environment_of_program, run_program, torchrun

ENDS = {
    "done": "print('out')",
    "status": "import sys; sys.stderr.write('why'); sys.exit(3)",
    "words": "raise SystemExit('a line')",
    "error": "1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "handler": "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: print('got it')); os.kill(os.getpid(), 10)",
    "at once": "import os; print('lost'); os._exit(4)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "place": "import os, sys; print(os.getcwd(), sys.argv, sys.path[0], __name__, '__file__' in vars())",
    "child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'])",
    "environment": "import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('RANK'))",
}


def by_a_fresh_interpreter(*command):
    environment = environment_of_program()
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_program_ends_as_one_of_a_fresh_interpreter(end):
    command = ("-c", ENDS[end], "a", "b c")
    ours, theirs = run_program(*command, check=False), by_a_fresh_interpreter(*command)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_scripts_and_modules_are_run_as_python_runs_them(tmp_path):
    text = "import sys, beside; print(sys.argv, sys.path[0], __name__, __file__, beside.__name__)"
    (tmp_path / "script.py").write_text(text)
    (tmp_path / "beside.py").touch()
    command = (str(tmp_path / "script.py"), "a")
    assert run_program(*command).stdout == by_a_fresh_interpreter(*command).stdout
    command = ("-m", "json.tool", "--help")
    assert run_program(*command).stdout == by_a_fresh_interpreter(*command).stdout


def test_programs_draw_other_random_numbers():
    code = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (run_program("-c", code).stdout.split() for _ in range(2))
    assert set(first).isdisjoint(second)


def test_two_processes_are_ended_where_one_fails():
    code = (
        "import os, sys, time; print(os.environ['RANK']); time.sleep(60 if os.environ['RANK'] == '0' else sys.exit(7))"
    )
    ended = torchrun("-c", code, check=False)
    assert ended.returncode == 1
    assert "exitcode  : 7" in ended.stderr

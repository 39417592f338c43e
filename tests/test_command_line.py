"""The program name in usage and errors is the one that the user called; help imports nothing slow."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from shared.programs import REPOSITORY, environment_of_program

from dali_saliencymix.__main__ import main

as_called = pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/somewhere/bin/dali-saliencymix", "dali-saliencymix"),
        ("/somewhere/dali_saliencymix/__main__.py", "python -m dali_saliencymix"),
    ],
)


@as_called
@pytest.mark.parametrize(
    "arguments",
    ["sample-data DATA --train many", "bottleneck", "bottleneck DATA --epochs many", "compare A.json"],
)
def test_usage_and_wrong_options_are_of_the_program_that_was_called(called, name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{name} {arguments.split()[0]}: error: ")


@as_called
def test_an_error_is_of_the_program_that_was_called(called, name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    missing = str(tmp_path / "missing.json")
    assert main(["compare", missing, missing]) == 1
    assert capsys.readouterr().err.startswith(f"{name} compare: error: ")


HELP = """
import contextlib, runpy, sys
from dali_saliencymix.__main__ import main

_, *commands = sys.argv
for arguments in commands:
    script, *rest = arguments.split()
    sys.argv[:] = [script, *rest]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__") if script.endswith(".py") else main([script, *rest])
slow = {"torch", "torchvision", "nvidia.dali", "numba", "matplotlib"}
print(sorted(slow & set(sys.modules)))
"""


def test_help_comes_at_once_since_nothing_slow_is_imported(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.search(r"\{(.*?)\}", capsys.readouterr().out)[1].split(",")
    assert {"bottleneck", "compile"} <= set(commands)
    scripts = ["train.py", "transfer_voc.py"]
    helps = ["--help", *(f"{command} --help" for command in [*commands, *scripts])]
    line = [sys.executable, "-c", HELP, *helps]
    ended = subprocess.run(
        line, env=environment_of_program(), cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert ended.stdout.count("usage: ") == len(helps)
    assert ended.stdout.splitlines()[-1] == "[]"

"""Messages about packages that are not installed, from programs and from imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shared.programs import REPOSITORY, environment_of_program

from dali_saliencymix.packages import EXTRAS, MissingPackageError, require

OF_EXTRAS = {module for brought in EXTRAS.values() for module in brought}
# Python runs this first; it hides modules from imports.
HIDING = """
import os
from importlib.machinery import PathFinder

find, hidden = PathFinder.find_spec, set(os.environ["HIDDEN"].split())
PathFinder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
"""
COMMAND = ("-m", "dali_saliencymix")
# The packages that each program needs.
NEEDED = {
    (*COMMAND, "sample-data", "OUT", "--train=1", "--val=1"): {"PIL"},
    (*COMMAND, "preview", "DATA"): {"PIL", "matplotlib", "nvidia.dali", "simplejpeg"},
    (*COMMAND, "scan", "DATA"): {"PIL", "pebble", "simplejpeg", "tqdm"},
    (*COMMAND, "compile"): {"numba"},
    (*COMMAND, "bottleneck", "DATA"): {"PIL", "nvidia.dali", "torch", "torchvision", "tqdm", "yaml"},
    ("train.py", "DATA"): {"PIL", "nvidia.dali", "torch", "torchvision", "tqdm", "yaml"},
    ("transfer_voc.py", "DATA", "--checkpoint=DATA"): {"PIL", "torch", "torchvision", "tqdm"},
    ("pipelines/imagenet.py", "DATA"): {"nvidia.dali", "torch", "torchvision"},
    ("pipelines/external_source.py", "DATA"): {"PIL", "nvidia.dali"},
    ("pipelines/dynamic_mode.py", "DATA"): {"nvidia.dali", "torch"},
    ("pipelines/accelerate_training.py", "DATA"): {"accelerate", "nvidia.dali", "torch", "torchvision"},
}
THEIR_OWN = {"accelerate": {"tqdm", "yaml"}, "torchvision": {"PIL"}}  # their own dependencies
programs = pytest.mark.parametrize(
    ("command", "needed"), NEEDED.items(), ids=[" ".join(command).removeprefix("-m ") for command in NEEDED]
)


def run_without(hidden: set[str], command: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as if these modules were not installed; DATA and OUT of a command are missing folders."""
    (folder / "sitecustomize.py").write_text(HIDING)
    environment = environment_of_program()
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{environment['PYTHONPATH']}", "HIDDEN": " ".join(hidden)}
    words = [re.sub("DATA|OUT", lambda found: str(folder / found[0]), word) for word in command]
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@programs
def test_a_program_names_all_packages_that_it_lacks_and_the_extras_in_one_line(command, needed, tmp_path):
    ended = run_without(OF_EXTRAS, command, tmp_path)
    assert ended.returncode == (2 if "scan" in command else 1)
    (line,) = ended.stderr.splitlines()
    prog = "python -m dali_saliencymix " + command[2] if command[0] == "-m" else Path(command[0]).name
    assert line.startswith(f"{prog}: error: this program needs ")
    installed = re.search(r"pip install '\.\[(.*?)\]'", line)[1].split(",")
    assert needed <= set().union(*(EXTRAS[extra] for extra in installed))
    for module in needed:
        assert any(name in line for brought in EXTRAS.values() if (name := brought.get(module)))


@pytest.mark.slow
@programs
def test_a_program_does_without_what_it_does_not_ask_for(command, needed, tmp_path):
    installed = needed.union(*(THEIR_OWN.get(module, ()) for module in needed))
    ended = run_without(OF_EXTRAS - installed, command, tmp_path)
    if not any("DATA" in word for word in command):
        assert (ended.returncode, ended.stderr) == (0, "")
    else:
        assert str(tmp_path / "DATA") in ended.stderr.splitlines()[-1], ended.stderr


@pytest.mark.parametrize(
    ("module", "needed", "extra"),
    [("dali_saliencymix.fn", "NVIDIA DALI", "cuda12"), ("dali_saliencymix.pytorch", "PyTorch", "train")],
)
def test_importing_a_module_without_its_package_says_what_to_install(module, needed, extra, tmp_path):
    ended = run_without(OF_EXTRAS, ("-c", f"import {module}"), tmp_path)
    assert ended.returncode == 1
    message = f"{module} needs {needed}, which is not installed; the extra {extra} provides it: pip install '.[{extra}"
    assert message in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("function", "needed"), [("lightning_callback", "PyTorch Lightning"), ("transformers_callback", "Transformers")]
)
def test_a_callback_without_its_package_says_what_to_install(function, needed, tmp_path):
    script = f"from dali_saliencymix import callbacks; callbacks.{function}()"
    ended = run_without({"lightning", "pytorch_lightning", "transformers"}, ("-c", script), tmp_path)
    message = f"{function} needs {needed}, which is not installed; the extra test provides it: pip install '.[test]' "
    assert message in ended.stderr.splitlines()[-1]


def test_another_missing_module_is_a_fault(tmp_path):
    ended = run_without({"dali_saliencymix.datasets.scan"}, (*COMMAND, "scan", "DATA"), tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Traceback")
    assert "error: unexpected ModuleNotFoundError: No module named 'dali_saliencymix.datasets.scan'" in ended.stderr


@pytest.mark.parametrize(
    ("modules", "extras"),
    [
        (["PIL"], "train"),
        (["PIL", "matplotlib"], "preview"),
        (["PIL", "tqdm"], "train"),
        (["matplotlib", "torch", "tqdm"], "train,preview"),
        (["nvidia.dali", "torch"], "cuda12,train"),
    ],
    ids=str,
)
def test_no_extra_is_named_that_brings_nothing_more(modules, extras, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=rf"pip install '\.\[{extras}\]'"):
        require(*modules)


def test_the_extras_bring_what_the_messages_say():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {extra: {re.match(r"[\w-]+", each)[0] for each in extras[extra]} for extra in extras}
    distributions = {"PIL": "pillow", "yaml": "pyyaml"}
    for cuda, dali in (("12", "120"), ("13", "130")):
        of_cuda = distributions | {"nvidia.dali": f"nvidia-dali-cuda{dali}", "cupy": f"cupy-cuda{cuda}x"}
        for extra, modules in EXTRAS.items():
            named = {of_cuda.get(module, module) for module in modules}
            found = brought[f"cuda{cuda}" if extra == "cuda12" else extra]
            assert named <= found if extra == "test" else named == found

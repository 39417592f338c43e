"""The wheel and the sdist: their content, and that the installed package works without the rest of the repository."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
VERSION = "1.2.3"
FOUND = """
import importlib.util, dali_saliencymix
print(dali_saliencymix.__file__)
print([name for name in ("pipelines", "train", "transfer_voc", "benchmarks") if importlib.util.find_spec(name)])
"""
IN_A_PIPELINE = """
import sys
from nvidia.dali import fn, pipeline_def
from dali_saliencymix.fn import saliencymix

@pipeline_def(batch_size=4, num_threads=1, device_id=None, seed=1, exec_dynamic=True)
def pipeline():
    encoded, labels = fn.readers.file(file_root=sys.argv[1])
    images = fn.resize(fn.decoders.image(encoded), size=(32, 32))
    return saliencymix(images, labels)

images, labels, source_labels, lam = pipeline().run()
print(images.as_tensor().shape(), labels.as_tensor().shape(), lam.as_tensor().shape())
"""
ON_TENSORS = """
import torch
from dali_saliencymix.pytorch import SaliencyMix

images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
mixed, targets = SaliencyMix(num_classes=10, seed=1)(images, torch.arange(4))
print(tuple(mixed.shape), tuple(targets.shape), targets.sum().item())
"""


def source_files() -> set[str]:
    """Return the files that git tracks, or would track after ``git add``."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("compares with the files of git, and this is not a git repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).exists()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    for name in ("hatchling", "hatch_vcs", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason=f"building needs {name}, which is not installed")
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    environment = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION": VERSION}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory) -> Path:
    """The folder with the unpacked wheel."""
    (file,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Return a function that runs Python with the wheel, in a separate folder, and returns its stdout.

    Python does not read the .pth files of an editable install (-S). It finds other packages where this process does,
    except in a checkout.
    """
    here = tmp_path_factory.mktemp("elsewhere")
    others = [entry for entry in sys.path if entry and not Path(entry, "pyproject.toml").exists()]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(wheel), *others])}
    # Numba would compile kernels at a new path from scratch, which takes half a minute.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NUMBA_DISABLE_JIT": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-S", *arguments]
        ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.fixture(scope="module")
def data(run, tmp_path_factory) -> str:
    """A data set made with the wheel."""
    root = tmp_path_factory.mktemp("data")
    run("-m", "dali_saliencymix", "sample-data", str(root), "--train", "2", "--val", "1")
    return str(root)


def test_the_wheel_holds_all_of_the_package_and_nothing_else(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        held = set(archive.namelist())
    metadata = {name for name in held if name.partition("/")[0].endswith(".dist-info")}
    assert held - metadata == {name for name in source_files() if name.startswith("dali_saliencymix/")}
    assert {"dali_saliencymix/py.typed", "dali_saliencymix/_cuda/paste.cu", "dali_saliencymix/_cuda/paste.cuh"} <= held
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_sdist_holds_all_source_files_and_nothing_else(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert held - {"PKG-INFO"} == source_files()


def test_links_and_images_of_the_description_lead_to_the_files_of_the_version(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    description = metadata.read_text().partition("\n\n")[2]
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", description)
    pattern = re.compile(rf"https://\S+?/dali-saliencymix/dali-saliencymix/(?:blob/)?v{re.escape(VERSION)}/([^#]+)")
    files = [found[1] for _, link in links if (found := pattern.match(link))]
    assert {"docs/preview.jpg", "docs/tutorial.md", "CONTRIBUTING.md"} <= set(files)
    assert [name for name in files if not (REPOSITORY / name).is_file()] == []
    assert [link for _, link in links if not link.startswith("https://")] == []
    assert all(("/blob/" in link) != bool(image) for image, link in links if pattern.match(link))


def test_the_package_that_runs_is_that_of_the_wheel_and_the_rest_of_the_repository_is_not_there(run, wheel):
    assert run("-c", FOUND).splitlines() == [str(wheel / "dali_saliencymix" / "__init__.py"), "[]"]


def test_preview_and_scan_run(run, data, tmp_path):
    picture = tmp_path / "preview.png"
    run("-m", "dali_saliencymix", "preview", data, "-o", str(picture), "-n", "2", "--size", "32")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = run("-m", "dali_saliencymix", "scan", data, "-o", str(tmp_path / "scan"), "-j", "1")
    assert "train: 16 files in 8 classes, 16 usable" in printed
    assert len((tmp_path / "scan" / "train.txt").read_text().splitlines()) == 16


def test_bottleneck_measures_a_folder_and_its_reports_are_compared(run, data, tmp_path):
    report = str(tmp_path / "report.json")
    options = ["--device", "cpu", "-a", "resnet18", "-b", "2", "-j", "1", "--train-crop-size", "32", "--images", "16"]
    # Saliency takes long without compilation; the test of a pipeline below computes it.
    options += ["--mix", "cutmix", "--seconds", "0.1", "--rounds", "5", "--no-storage", "--no-what-ifs", "-o", report]
    assert "step alone (G)" in run("-m", "dali_saliencymix", "bottleneck", data, *options)
    assert json.loads(Path(report).read_text())["conditions"]["options"]["arch"] == "resnet18"
    assert "measured under the same conditions" in run("-m", "dali_saliencymix", "compare", report, report)


def test_the_console_script_is_the_command_line(run, wheel, tmp_path):
    (metadata,) = wheel.glob("*.dist-info")
    (script,) = importlib.metadata.Distribution.at(metadata).entry_points
    assert (script.group, script.name) == ("console_scripts", "dali-saliencymix")
    program = tmp_path / script.name
    program.write_text(f"import sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n")
    assert run(str(program), "--version") == f"dali-saliencymix {VERSION}\n"
    for command in ([], ["scan"], ["bottleneck"]):
        assert run(str(program), *command, "--help").startswith(f"usage: {' '.join([script.name, *command])} [")


def test_images_are_mixed_in_a_pipeline_and_on_tensors(run, data):
    assert run("-c", IN_A_PIPELINE, f"{data}/train") == "[4, 32, 32, 3] [4, 1] [4]\n"
    assert run("-c", ON_TENSORS) == "(4, 3, 32, 32) (4, 10) 4.0\n"

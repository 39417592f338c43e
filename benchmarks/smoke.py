"""Check in one minute whether a GPU host is fit for benchmarks.

    python -m benchmarks.smoke

The script shows the machine, runs PyTorch, CuPy and DALI in one process, takes batches from the training pipeline with
and without mixing, and runs the tests on which everything else depends. It names each step before the step starts, so
the last name in the log shows where it hangs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import loaders, machine, outcomes, program
from dali_saliencymix._versions import versions
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.measure.environment import cores

TESTS = (
    "tests/test_cuda.py::test_kernels_give_what_the_array_functions_give_on_a_gpu",
    "tests/test_gpu.py::test_kernels_and_array_operations_mix_alike",
    "tests/test_dali_python_operator.py::test_a_held_batch_of_a_gpu_does_not_change",
    "tests/test_cuda.py::test_kernels_are_captured_by_the_current_stream_alone",
)
_BATCHES, _BATCH_SIZE, _CROP_SIZE = 20, 16, 64


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("--dry", action="store_true", help="run on the CPU if there is no GPU")
    options = parser.parse_args()
    machine.check_gpu(or_dry=options.dry)
    gpu = machine.has_gpu()
    show_machine()
    compute_together(gpu=gpu)
    with tempfile.TemporaryDirectory() as folder:
        take_batches(Path(folder), gpu=gpu)
    run_tests()


def step(text: str) -> None:
    sys.stdout.write(f"---- {text}\n")
    sys.stdout.flush()


def show_machine() -> None:
    """Print the GPU, the size of shared memory, and versions."""
    step("machine")
    for line in (["nvidia-smi"], ["df", "-h", "/dev/shm", "/tmp"]):
        if shutil.which(line[0]):
            sys.stdout.write(subprocess.run(line, capture_output=True, text=True, check=False).stdout)
    sys.stdout.write(f"cores {cores()}, {versions('numba', 'scipy', 'pytest', 'pillow')}\n")


def compute_together(*, gpu: bool) -> None:
    """Compute with PyTorch and CuPy in one process."""
    step("PyTorch")
    device = torch.device("cuda" if gpu else "cpu")
    ones = torch.ones(64, 64, device=device)
    require((ones @ ones).sum().item() == 64**3, "a matrix product in PyTorch is wrong")
    if not gpu:
        return
    step("CuPy: a kernel compiled by NVRTC, cuFFT, cuBLAS, DLPack")
    import cupy

    numbers = cupy.arange(64 * 64, dtype=cupy.float32).reshape(64, 64)
    spectrum = cupy.fft.rfft2(numbers)
    require(np.isclose(spectrum[0, 0].get(), numbers.get().sum(), rtol=1e-5), "an FFT in CuPy is wrong")
    require(
        bool(cupy.allclose(cupy.eye(64, dtype=cupy.float32) @ numbers, numbers)), "a matrix product in CuPy is wrong"
    )
    require(cupy.from_dlpack(ones).sum().get() == 64**2, "a PyTorch tensor has other values in CuPy")


def take_batches(folder: Path, *, gpu: bool) -> None:
    """Take batches of the training pipeline, with and without mixing."""
    make_sample_data(folder, train=8, val=1)
    images = list_image_folder(folder / "train")
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    setting = loaders.Setting(images, _BATCH_SIZE, 2, _CROP_SIZE, device)
    for name in ["none", *loaders.ways("spectral_residual")]:
        step(f"pipeline: {name}")
        stream = loaders.makers()[name](setting)
        for _ in range(_BATCHES):
            pixels, labels, source_labels, lam = next(stream.batches)
            require(pixels.shape == (_BATCH_SIZE, 3, _CROP_SIZE, _CROP_SIZE), f"images of shape {pixels.shape}")
            require(pixels.device == device and lam.device == device, f"a batch on {pixels.device}")
            require(bool(pixels.isfinite().all()), "pixels that are not finite")
            require(0.1 < pixels.std().item() < 3, f"pixels with a standard deviation of {pixels.std().item():.3g}")
            require(bool(((lam >= 0) & (lam <= 1)).all()), f"lam of {lam.tolist()}")
            require(sorted(labels.tolist()) == sorted(source_labels.tolist()), "sources that are not a permutation")
            require(bool((lam == 1).all()) is (name == "none"), f"lam of {lam.tolist()}")
    loaders.say_memory(device)


def run_tests() -> None:
    """Run the tests on which everything else depends; without a GPU they are skipped."""
    step("tests")
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # else the named plugin would be loaded twice
    line = (*outcomes.PYTEST, *outcomes.timeout(60), "-x", *TESTS)
    if status := program.python(*line, capture_output=False, env=alone).returncode:
        msg = f"the tests ended with status {status}"
        raise RuntimeError(msg)


def require(holds: bool, otherwise: str) -> None:
    """Raise RuntimeError with the message `otherwise` unless `holds`."""
    if not holds:
        raise RuntimeError(otherwise)


if __name__ == "__main__":
    program.run(main)

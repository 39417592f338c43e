"""The CUDA kernels as C++ on the CPU, through ``cuda_on_cpu.h``: compiled once, launched by name; and images for them.

A test module gets the fixture with ``pytest_plugins = ["shared.kernels_on_cpu"]`` and imports the rest by name. That
import happens before pytest can rewrite the assertions of this file, so rewriting is disabled: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dali_saliencymix._cuda import launch as cuda_launch

KERNELS = {
    "fine_grained": ["integral_image", "surrounds", "contrast_maps", "contrast_peaks"],
    "paste": ["paste_16", "paste_4", "paste_1"],
    "paste_normalised": [
        f"paste_normalised_{dtype}_{layout}" for dtype in ("float32", "float16") for layout in ("CHW", "HWC")
    ],
    "peaks_and_boxes": ["saliency_peaks", "boxes_at_peaks_float32", "boxes_at_peaks_float64"],
    "small_luma": ["small_luma"],
    "spectral_residual": ["spectral_residual"],
}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Return a C++ library for each .cu file, with its kernels and a function that launches them by name."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run the kernels on a CPU")
    folder = tmp_path_factory.mktemp("kernels")
    running = []
    for file, names in KERNELS.items():
        cases = "".join(
            f'if (!strcmp(name, "{name}"))'
            f" wrong = on_cpu::launch({name}, arguments, size, blocks, threads, reversed);\n"
            for name in names
        )
        (folder / f"{file}.cpp").write_text(
            f'#include "{Path(__file__).with_name("cuda_on_cpu.h")}"\n{cuda_launch.source(file)}\n'
            'extern "C" const char* run(const char* name, void** arguments, const size_t* sizes, int count,'
            " unsigned blocks, unsigned threads, int reversed) {\n"
            'static std::string wrong; wrong = "no such kernel";\n'
            f"const std::vector<size_t> size(sizes, sizes + count);\n{cases}return wrong.c_str(); }}\n"
        )
        # Multiply-adds are not fused, as _launch.py asks of NVRTC. A fortified longjmp would check the stack, but each
        # fibre has its own.
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w"]
        command = [compiler, *flags, str(folder / f"{file}.cpp"), "-o", str(folder / f"{file}.so")]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    loaded = {file: ctypes.CDLL(str(folder / f"{file}.so")) for file in KERNELS}
    for library in loaded.values():
        library.run.restype = ctypes.c_char_p
    return loaded


def launch(libraries, file, name, grid, block, arguments, *, backwards=False):
    """Launch a kernel as CuPy's ``kernel(grid, block, arguments)`` does; the threads of a block run in either order."""
    values = [_argument_value(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    sizes = (ctypes.c_size_t * len(values))(*(value.nbytes for value in values))
    (blocks,), (threads,) = grid, block
    wrong = libraries[file].run(name.encode(), addresses, sizes, len(values), blocks, threads, backwards)
    assert wrong == b"", f"{name}: {wrong.decode()}"


def _argument_value(argument):
    """Return what CUDA would pass to a kernel: the value of a scalar, the address of an array."""
    if argument is None:
        return np.zeros(1, np.uintp)
    if isinstance(argument, np.generic):
        return np.array([argument])
    assert hasattr(argument, "strides"), f"{argument!r} has no fixed size"
    # NumPy and CuPy arrays have different attributes for their address.
    address = argument.ctypes.data if isinstance(argument, np.ndarray) else argument.data.ptr
    return np.array([address], np.uintp)


def pictures(count, height, width, channels, seed=0, apart=0):
    """Return random images with some structure, (N, H, W, C) uint8, read-only, with `apart` bytes between them."""
    rng = np.random.default_rng([seed, count, height, width, channels])
    y, x = np.ogrid[:height, :width]
    shape = (count, 1, 1, channels)
    waves = np.sin(y[..., None] * rng.uniform(0, 0.3, shape) + x[..., None] * rng.uniform(0, 0.3, shape))
    images = (127 + 60 * waves + rng.normal(0, 20, (count, height, width, channels))).clip(0, 255).astype(np.uint8)
    memory = np.full((count, images[0].size + apart), 7, np.uint8)
    memory[:, : images[0].size] = images.reshape(count, -1)
    memory.setflags(write=False)
    return memory[:, : images[0].size].reshape(images.shape) if not apart else strided(memory, images.shape)


def strided(memory, shape):
    view = np.lib.stride_tricks.as_strided(memory, shape, (memory.strides[0], *np.zeros(shape[1:], "u1").strides))
    view.setflags(write=False)
    return view

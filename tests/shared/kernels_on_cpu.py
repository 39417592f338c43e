"""The CUDA kernels as C++ on the CPU, through ``cuda_on_cpu.h``: compiled once, launched by name; and images for them.

A test module gets the fixture with ``pytest_plugins = ["shared.kernels_on_cpu"]`` and imports the rest by name. That
import happens before pytest can rewrite the assertions of this file, so rewriting is disabled: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import ctypes
import hashlib
import os
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
def libraries(pytestconfig, tmp_path_factory):
    """Return a C++ library for each .cu file, with its kernels and a function that launches them by name."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run the kernels on a CPU")
    # Multiply-adds are not fused, as launch.py asks of NVRTC. A fortified longjmp would check the stack, but each fibre
    # has its own.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w"]
    # Compiling takes 4 seconds, so the libraries stay in pytest's cache, under names that depend on what is compiled.
    has_cache = pytestconfig.pluginmanager.hasplugin("cacheprovider")
    folder = pytestconfig.cache.mkdir("kernels_on_cpu") if has_cache else tmp_path_factory.mktemp("kernels_on_cpu")
    compiled, running = {}, []
    for file in KERNELS:
        text = _as_cpp(file)
        digest = hashlib.sha256(f"{flags}{text}".encode()).hexdigest()[:16]
        compiled[file] = library = folder / f"{file}-{digest}.so"
        if not library.exists():
            made = library.with_suffix(f".{os.getpid()}")  # another test process may compile it at the same time
            command = [compiler, *flags, "-x", "c++", "-", "-o", str(made)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            running.append((process, text, made, library))
    for process, text, made, library in running:
        _, errors = process.communicate(text)
        assert process.returncode == 0, errors
        made.replace(library)
    loaded = {file: ctypes.CDLL(str(library)) for file, library in compiled.items()}
    for library in loaded.values():
        library.run.restype = ctypes.c_char_p
    return loaded


def _as_cpp(file):
    cases = "".join(
        f'if (!strcmp(name, "{name}")) wrong = on_cpu::launch({name}, arguments, size, blocks, threads, reversed);\n'
        for name in KERNELS[file]
    )
    return (
        f"{Path(__file__).with_name('cuda_on_cpu.h').read_text()}\n{cuda_launch.source(file)}\n"
        'extern "C" const char* run(const char* name, void** arguments, const size_t* sizes, int count,'
        " unsigned blocks, unsigned threads, int reversed) {\n"
        'static std::string wrong; wrong = "no such kernel";\n'
        f"const std::vector<size_t> size(sizes, sizes + count);\n{cases}return wrong.c_str(); }}\n"
    )


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

"""The Numba kernels are bit-identical to NumPy, with any number of threads."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared.programs import environment_of_program

import dali_saliencymix
from dali_saliencymix import (
    DETECTORS,
    _compile,
    _routes,
    _threads,
    boxes,
    fine_grained,
    get_detector,
    paste_normalised,
    phase_spectrum,
    saliency_peaks,
    saliencymix,
    spectral_residual,
)
from dali_saliencymix._numba import stopwatch
from dali_saliencymix._threads import in_chunks, limited_to
from dali_saliencymix.saliency import grey

numba = pytest.importorskip("numba")
kernel = pytest.importorskip("dali_saliencymix._numba.kernel", reason="Numba is not installed")
contrast = pytest.importorskip("dali_saliencymix._numba.contrast", reason="Numba is not installed")
pixels = pytest.importorskip("dali_saliencymix._numba.pixels", reason="Numba is not installed")
fft = pytest.importorskip("dali_saliencymix._numba.fft", reason="Numba is not installed")
spectral = pytest.importorskip("dali_saliencymix._numba.spectral", reason="Numba is not installed")

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 7, 1), (1, 2, 2), (5, 37, 23), (9, 64, 64), (2, 70, 331), (3, 225, 224)]


def images_of(shape: tuple[int, ...], channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    blocks = rng.integers(0, 256, (shape[0], -(-shape[1] // 4), -(-shape[2] // 4), channels), np.uint8)
    smooth = blocks.repeat(4, axis=1).repeat(4, axis=2)[:, : shape[1], : shape[2]]
    return smooth ^ rng.integers(0, 8, (*shape, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("detector", [fine_grained, phase_spectrum])
def test_kernels_are_bit_identical_to_array_operations(detector, shape, channels):
    images = images_of(shape, channels)
    expected = detector(images, algorithm="array")
    np.testing.assert_array_equal(detector(images, algorithm="kernel"), expected)
    np.testing.assert_array_equal(detector(planar(images), algorithm="kernel"), expected)
    turned = images[::2, ::-1]
    np.testing.assert_array_equal(detector(turned, algorithm="kernel"), detector(turned, algorithm="array"))


def planar(images):
    """Return the same images, read-only and with channels-first memory, like tensors."""
    strided = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    strided.setflags(write=False)
    return strided


def test_kernels_are_bit_identical_to_array_operations_on_photos(jpeg_images):
    for image in jpeg_images:
        ours = fine_grained(image[None], algorithm="kernel")
        np.testing.assert_array_equal(ours, fine_grained(image[None], algorithm="array"))


# Only maps of 32x32 or 64x64 pixels have kernels of their own. Others use just the kernel that reduces the image, and
# are bit-identical.
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 32, 32), (2, 32, 64), (1, 200, 64), (4, 91, 91)], ids=str)
def test_the_kernel_of_spectral_residual_differs_from_array_operations_by_rounding(shape, channels):
    images = images_of(shape, channels)
    images[-1] = 77  # constant: the map is zero
    expected = spectral_residual(images, algorithm="array")
    ours = spectral_residual(images, algorithm="kernel")
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(spectral_residual(planar(images), algorithm="kernel"), ours)
    np.testing.assert_allclose(
        spectral_residual(images[::2, ::-1], algorithm="kernel"),
        spectral_residual(images[::2, ::-1], algorithm="array"),
        atol=1e-5,
    )
    # The map of an image does not depend on the other images.
    np.testing.assert_array_equal(spectral_residual(images[:1], algorithm="kernel"), ours[:1])


def test_only_the_map_of_one_grey_level_is_zero_in_the_kernel():
    stripes = np.zeros((2, 64, 64, 1), np.uint8)
    stripes[0, 20:24], stripes[1, :, 20:24] = 200, 200  # each row, or each column, has one level
    np.testing.assert_array_equal(spectral_residual(stripes, algorithm="kernel").max(axis=(1, 2)), 1)


def test_the_kernel_of_spectral_residual_finds_the_peaks_of_array_operations_in_photos(jpeg_images):
    for image in jpeg_images:
        by_kernel, by_array = (spectral_residual(image[None], algorithm=name) for name in ("kernel", "array"))
        np.testing.assert_allclose(by_kernel, by_array, atol=1e-5)
        size = image.shape[:2]
        np.testing.assert_array_equal(saliency_peaks(by_kernel, *size), saliency_peaks(by_array, *size))


@pytest.mark.parametrize("size", [32, 64])
def test_the_transform_is_that_of_numpy(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size))
    planes = np.zeros((2, 64, 64), np.float32)
    planes[:, :size, :size] = values.real, values.imag
    twiddles = fft.twiddles(size)
    fft.transform_columns(planes, np.empty_like(planes), twiddles, size)
    ours = planes[0, :size, :size] + 1j * planes[1, :size, :size]
    np.testing.assert_allclose(ours, np.fft.fft(values, axis=0), atol=2e-6 * size)


def test_logarithm_and_exponential_are_those_of_numpy():
    amplitudes = np.geomspace(1, 1e7, 20001).astype(np.float32)
    ours = np.array([spectral._log(value) for value in amplitudes])
    np.testing.assert_allclose(ours, np.log(amplitudes.astype(np.float64)), rtol=2e-7, atol=1e-8)
    residuals = np.linspace(-30, 30, 20001).astype(np.float32)
    ours = np.array([spectral._exp(value) for value in residuals])
    np.testing.assert_allclose(ours, np.exp(residuals.astype(np.float64)), rtol=3e-7)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    levels=st.lists(st.sampled_from([-1.0, 0.0, 0.5, np.nan, np.inf, -np.inf]), min_size=1, max_size=4),
)
def test_the_most_salient_pixel_is_that_of_numpy(seed, size, levels):
    maps = np.random.default_rng(seed).choice(np.array(levels, np.float32), (3, *size))
    closeness = boxes.closeness_to_centre(*size, 40, 90)
    expected = boxes._extreme(maps, closeness=closeness, least=False)
    np.testing.assert_array_equal(pixels.most_salient(maps, closeness), expected)


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (5, 37, 23, 3), (9, 8, 31, 1), (3, 64, 48, 3)], ids=str)
@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_pixels_are_normalised_as_array_operations_do_it(shape, layout, mirrored, apart):
    rng = np.random.default_rng(sum(shape))
    count, height, width, channels = shape
    images = rng.integers(0, 256, shape, np.uint8)
    corners = np.sort(rng.integers(0, [[height + 1], [width + 1]], (count, 2, 2)), axis=2)
    pasted = np.ascontiguousarray(corners.transpose(0, 2, 1).reshape(count, 4))
    options = {
        "source_boxes": pasted - np.tile(pasted[:, :2], 2) if apart else None,
        "mirror": rng.integers(0, 2, count) if mirrored else None,
        "mean": [123.7, 116.3, 103.5][:channels],
        "std": [58.4, 57.1, 57.4][:channels],
        "layout": layout,
    }
    arguments = (images, rng.integers(0, count, count), pasted)
    expected = paste_normalised(*arguments, **options, algorithm="array")
    kernel = paste_normalised(*arguments, **options, algorithm="kernel")
    np.testing.assert_array_equal(kernel, expected, strict=True)
    out = np.full_like(expected, np.nan)
    assert paste_normalised(*arguments, **options, out=out) is out
    np.testing.assert_array_equal(out, expected)
    strided = (np.repeat(images, 2, axis=2)[:, :, ::2], *arguments[1:])
    np.testing.assert_array_equal(paste_normalised(*strided, **options), expected)


@pytest.mark.parametrize("level", [160, 250])
def test_fine_grained_rounds_its_float32_sums_as_numpy_does(level):
    images = np.random.default_rng(level).integers(level, 256, (1, 420, 400, 3), np.uint8)
    kernel, array = (fine_grained(images, algorithm=algorithm) for algorithm in ("kernel", "array"))
    np.testing.assert_array_equal(kernel, array)


@pytest.mark.parametrize("reduced", [(64, 64), (37, 23), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_small_luma_is_that_of_numpy(reduced, channels):
    images = images_of((3, 97, 131), channels)
    ours = contrast.small_luma(images, *reduced)
    np.testing.assert_array_equal(ours, grey.small_luma(images, *reduced))
    assert ours.dtype == np.float32


def test_auto_takes_the_kernel_where_numba_is_installed(monkeypatch):
    images = images_of((2, 20, 30))
    called = []
    kernel = contrast.fine_grained
    monkeypatch.setattr(contrast, "fine_grained", lambda batch: called.append(len(batch)) or kernel(batch))
    fine_grained(images)
    assert called == [2]
    fine_grained(images, algorithm="array")
    assert called == [2]
    monkeypatch.setattr(_routes, "_numba_is_installed", lambda: False)
    fine_grained(images)
    assert called == [2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"algorithm='kernel' on a CPU needs Numba, .* pip install '\.\[compiled\]'"
    with pytest.raises(ImportError, match=message):
        fine_grained(images, algorithm="kernel")


def test_an_unknown_algorithm_is_refused_by_every_function():
    images = images_of((2, 20, 30))
    for call in (
        lambda: fine_grained(images, algorithm="cuda"),
        lambda: spectral_residual(images, algorithm="cuda"),
        lambda: get_detector("frequency_tuned", algorithm="cuda"),
        lambda: saliencymix(images, np.array([1, 0]), np.full(2, 0.5), algorithm="cuda"),
    ):
        with pytest.raises(ValueError, match="algorithm must be one of auto, array, kernel, got 'cuda'"):
            call()


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_the_algorithm_does_not_change_what_is_mixed(name):
    images = images_of((6, 70, 50))
    source_index, lam = np.array([3, 1, 0, 0, 2, 5]), np.linspace(0, 1, 6)
    by_array, by_kernel = (
        saliencymix(images, source_index, lam, saliency=name, algorithm=algorithm) for algorithm in ("array", "kernel")
    )
    for ours, theirs in zip(by_kernel, by_array, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_chunks_come_back_in_order_whatever_the_threads(count, threads):
    batch = np.arange(count * 3).reshape(count, 3)
    sizes, names = [], set()

    def double(chunk):
        sizes.append(len(chunk))
        names.add(threading.current_thread().name)
        return chunk * 2

    with limited_to(threads):
        np.testing.assert_array_equal(in_chunks(double, batch, 4), batch * 2)
    assert sorted(sizes) == sorted(len(batch[i : i + 4]) for i in range(0, count, 4))
    assert len(names) <= threads


def test_several_threads_are_really_used_and_the_limit_ends_with_its_block():
    barrier = threading.Barrier(3, timeout=30)
    with limited_to(3):
        in_chunks(lambda chunk: (barrier.wait(), chunk)[1], np.arange(3), 1)  # passes only with three threads at a time
    assert _threads._num_threads.get() == 0


def test_an_error_in_a_chunk_reaches_the_caller_and_the_threads_go_on():
    def fail(chunk):
        if chunk[0] == 5:
            msg = "chunk 5"
            raise ValueError(msg)
        return chunk

    with limited_to(2):
        with pytest.raises(ValueError, match="chunk 5"):
            in_chunks(fail, np.arange(8), 1)
        np.testing.assert_array_equal(in_chunks(lambda chunk: chunk, np.arange(8), 1), np.arange(8))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")  # is tested
def test_a_forked_process_has_threads_of_its_own():
    images = images_of((8, 40, 40))
    with limited_to(2):
        expected = fine_grained(images)
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(fine_grained(images), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_without_numba_the_package_works_and_mixes_alike(tmp_path):
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
        "import numpy as np; from dali_saliencymix import fine_grained\n"
        "images = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), np.uint8)\n"
        f"np.save({str(tmp_path / 'map.npy')!r}, fine_grained(images)); assert 'numba.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), np.uint8)
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), fine_grained(images))


# Numba's cache, its messages, and folders in which it cannot write its cache

FOUND_PEAKS = """
import numpy as np
from dali_saliencymix import saliency_peaks
print(saliency_peaks(np.random.default_rng(0).random((2, 8, 6), np.float32), 40, 30).tolist())
"""


def found_peaks(
    *before: str, setup: str = "", folder: Path = Path(dali_saliencymix.__file__).parents[1], **environment
) -> tuple[str, list[str]]:
    """Run a kernel of the package in `folder` in a fresh interpreter; return its result and the lines on stderr."""
    command = [*before, sys.executable, "-B", "-c", setup + FOUND_PEAKS]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr.splitlines()


def peaks_here() -> str:
    return f"{saliency_peaks(np.random.default_rng(0).random((2, 8, 6), np.float32), 40, 30).tolist()}\n"


def unprivileged() -> list[str]:
    """Return a command prefix that runs a program without root's permission to write to any folder."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    dropped = "=-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set{dropped}", f"--inh-caps{dropped}"]


@pytest.fixture
def read_only_installation():
    """Return a copy of the package that only root can write to, outside pytest's folders, which others cannot read."""
    folder = Path(tempfile.mkdtemp())
    skip = shutil.ignore_patterns("__pycache__")
    installed = shutil.copytree(Path(dali_saliencymix.__file__).parent, folder / "dali_saliencymix", ignore=skip)
    folders = [folder, *(path for path in installed.rglob("*") if path.is_dir()), installed]
    for path in folders:
        path.chmod(0o555)
    yield folder
    for path in folders:
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_read_only_installation_without_a_home_compiles_for_each_process_and_says_so(read_only_installation):
    at = {"folder": read_only_installation, "HOME": str(read_only_installation)}
    found, said = found_peaks(*unprivileged(), **at)
    assert found == peaks_here()
    assert said == [
        "warning: Numba cannot cache its kernels, so each process compiles them, which takes some seconds: there is no "
        "writable folder for the cache; set NUMBA_CACHE_DIR to a writable folder"
    ]
    assert not list(read_only_installation.rglob("*.nb?"))


@pytest.mark.slow
def test_a_full_disk_and_damaged_files_cost_the_time_to_compile_and_nothing_else(tmp_path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
    expected, said = found_peaks(setup=full, NUMBA_CACHE_DIR=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert said == [
        "warning: Numba cannot cache its kernels, so each process compiles them, which takes some seconds: "
        f"{folder}: File too large; set NUMBA_CACHE_DIR to a writable folder"
    ]
    assert list(folder.iterdir()) == []
    assert expected == peaks_here()
    compiles = [
        f"Numba compiles kernels: up to half a minute of processor time, once; it caches them in {folder}; "
        'to compile them in advance, run "python -m dali_saliencymix compile"'
    ]
    assert found_peaks(NUMBA_CACHE_DIR=str(tmp_path), RANK="0") == (expected, compiles)
    folder.chmod(0o555)
    assert found_peaks(*unprivileged(), NUMBA_CACHE_DIR=str(tmp_path)) == (expected, [])
    folder.chmod(0o755)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    for path in kept:
        path.write_bytes(b"")
    assert found_peaks(NUMBA_CACHE_DIR=str(tmp_path), RANK="1") == (expected, [])
    assert {path: path.stat().st_size > 0 for path in folder.iterdir()} == dict.fromkeys(kept, True)


# Batches in the memory layouts of arrays, tensors, slices and DALI, of all sizes with their own kernels.
ALL_CALLS = """
import numpy as np
from nvidia.dali import fn, pipeline_def, types
import dali_saliencymix as ds, dali_saliencymix.fn as dsfn
from dali_saliencymix._compile import compile_kernels
from dali_saliencymix._numba import contrast, fft, pixels, spectral
from dali_saliencymix._numba.stopwatch import compile_seconds

def called():  # a kernel that another kernel calls is compiled into it and has no types of its own
    kernels = [each for module in (contrast, fft, pixels, spectral) for each in vars(module).values()]
    return {(each.__name__, types) for each in kernels for types in getattr(each, "signatures", ())}

compile_kernels(lambda line: None)
known = called()
rng, index, lam = np.random.default_rng(0), np.arange(4)[::-1], np.linspace(0, 1, 4)
for size in (32, 64, 72):
    for channels in (1, 3):
        images = rng.integers(0, 256, (4, size, size, channels), np.uint8)
        frozen = images.copy()
        frozen.setflags(write=False)
        planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        for batch in (images, frozen, planar, images[:, ::2, ::-1], np.asfortranarray(images)):
            for saliency in ds.DETECTORS:
                ds.saliencymix(batch, index, lam, saliency=saliency)
            for layout in ("CHW", "HWC"):
                for boxes in (np.zeros((4, 4), np.int32), np.zeros((4, 4), np.uint8), np.zeros((4, 8), int)[:, ::2]):
                    options = {"mean": [0] * channels, "std": [1] * channels, "mirror": index % 2}
                    ds.paste_normalised(batch, index, boxes, source_boxes=boxes, layout=layout, **options)
        ds.mix(images, index, lam, np.arange(4) % 3, np.full((4, 2), 0.5))
        maps = images[..., 0].astype(np.float32)
        for each in (maps, maps[:, :, ::2], maps.T):
            ds.saliency_peaks(each, size, size)

@pipeline_def(batch_size=4, num_threads=1, device_id=None, exec_dynamic=True)
def pipeline(layout):
    images = fn.random.uniform(range=[0, 255], shape=[48, 48, 3], dtype=types.UINT8)
    labels = fn.random.uniform(range=[0, 9], shape=[1], dtype=types.INT32)
    mixed = dsfn.saliencymix(images, labels, normalise=dsfn.Normalise([0] * 3, [1] * 3, layout=layout))
    return *mixed, *dsfn.mix(images, labels, modes=dict.fromkeys(ds.MODES, 1))

for layout in ("CHW", "HWC"):
    pipeline(layout).run()
print(called() - known, compile_seconds())
"""


@pytest.mark.slow
def test_the_command_compiles_all_that_is_called(monkeypatch):
    monkeypatch.setattr(kernel.compilations, "silent", True)
    monkeypatch.setattr(_compile, "compile_seconds", itertools.accumulate(itertools.cycle([0, 1.5, 0, 0])).__next__)
    said = []
    _compile.compile_kernels(said.append)
    assert said[0].endswith(f"caches them in {kernel.folder_for(contrast.reduce_luma)}")
    assert said[1:3] == ["grey levels: 1.5 s", "fine_grained: in the cache"]
    assert said[6:] == ["done, 4.5 s in all"]
    # The kernels of a new process come from the cache, all of them in advance.
    found = subprocess.run(
        [sys.executable, "-c", ALL_CALLS], env=environment_of_program(), capture_output=True, text=True, check=True
    )
    assert (found.stdout, found.stderr) == ("set() 0.0\n", "")


def test_functions_of_others_compile_as_before():
    """Functions created by `exec` have no module."""
    namespace = {}
    exec("def twice(x): return 2 * x", namespace)
    namespace["twice"].__module__ = None
    assert numba.njit(namespace["twice"])(4) == 8


def test_the_time_for_compiling_is_known_without_numba_and_includes_what_goes_on(monkeypatch):
    script = (
        "import sys; from dali_saliencymix._numba.stopwatch import compile_seconds\n"
        "print(compile_seconds(), 'numba' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "0.0 False\n"
    now = iter([10.0, 13.0, 15.0, 20.0, 21.0])
    monkeypatch.setattr(stopwatch, "_state", (0.0, None))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    stopwatch.start()
    assert stopwatch.compile_seconds() == 3
    stopwatch.stop()
    assert stopwatch.compile_seconds() == 5
    stopwatch.start()
    stopwatch.stop()
    assert stopwatch.compile_seconds() == 6

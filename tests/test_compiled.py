"""The kernels that Numba compiles give the bits that NumPy gives, and the threads change nothing either."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from dali_saliencymix import (
    DETECTORS,
    _algorithms,
    _threads,
    fine_grained,
    get_detector,
    phase_spectrum,
    saliencymix,
    spectral_residual,
)
from dali_saliencymix._threads import in_chunks, limited_to
from dali_saliencymix.saliency import grey

compiled = pytest.importorskip("dali_saliencymix.saliency.compiled", reason="Numba is not installed")

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 7, 1), (1, 2, 2), (5, 37, 23), (9, 64, 64), (2, 70, 331), (3, 225, 224)]


def images_of(shape: tuple[int, ...], channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    blocks = rng.integers(0, 256, (shape[0], -(-shape[1] // 4), -(-shape[2] // 4), channels), np.uint8)
    smooth = blocks.repeat(4, axis=1).repeat(4, axis=2)[:, : shape[1], : shape[2]]
    return smooth ^ rng.integers(0, 8, (*shape, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("detector", [fine_grained, spectral_residual, phase_spectrum])
def test_kernels_give_the_bits_of_array_operations(detector, shape, channels):
    images = images_of(shape, channels)
    expected = detector(images, algorithm="array")
    np.testing.assert_array_equal(detector(images, algorithm="kernel"), expected)
    # Strided batches, as operators and tensors make them, and read-only ones.
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    planar.setflags(write=False)
    np.testing.assert_array_equal(detector(planar, algorithm="kernel"), expected)
    np.testing.assert_array_equal(detector(images[::2, ::-1], algorithm="kernel"), detector(images[::2, ::-1]))


def test_kernels_give_the_bits_of_array_operations_on_photos(jpeg_images):
    for image in jpeg_images:
        for detector in (fine_grained, spectral_residual):
            ours = detector(image[None], algorithm="kernel")
            np.testing.assert_array_equal(ours, detector(image[None], algorithm="array"))


@pytest.mark.parametrize("level", [160, 250])
def test_fine_grained_rounds_its_float32_sums_as_numpy_does(level):
    images = np.random.default_rng(level).integers(level, 256, (1, 420, 400, 3), np.uint8)
    kernel, array = (fine_grained(images, algorithm=algorithm) for algorithm in ("kernel", "array"))
    np.testing.assert_array_equal(kernel, array)


@pytest.mark.parametrize("reduced", [(64, 64), (37, 23), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_small_luma_is_that_of_numpy(reduced, channels):
    images = images_of((3, 97, 131), channels)
    ours = compiled.small_luma(images, *reduced)
    np.testing.assert_array_equal(ours, grey.small_luma(images, *reduced))
    assert ours.dtype == np.float32


def test_auto_takes_the_kernel_where_numba_is_installed(monkeypatch):
    images = images_of((2, 20, 30))
    called = []
    kernel = compiled.fine_grained
    monkeypatch.setattr(compiled, "fine_grained", lambda batch: called.append(len(batch)) or kernel(batch))
    fine_grained(images)
    assert called == [2]
    fine_grained(images, algorithm="array")
    assert called == [2]
    monkeypatch.setattr(_algorithms, "_numba_is_installed", lambda: False)
    fine_grained(images)
    assert called == [2]
    message = r"algorithm='kernel' on a CPU needs Numba, .* pip install 'dali-saliencymix\[compiled\]'"
    with pytest.raises(ImportError, match=message):
        fine_grained(images, algorithm="kernel")


def test_an_unknown_algorithm_is_refused_by_every_door():
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
        in_chunks(lambda chunk: (barrier.wait(), chunk)[1], np.arange(3), 1)  # passes with three at a time only
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


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")  # what is tried
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

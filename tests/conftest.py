"""Fixtures for all tests: array libraries, read-only inputs and realistic pictures."""

from __future__ import annotations

import functools
import gc
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

try:
    import hypothesis
except ImportError:  # a GPU host may lack it: the tests that do without it run there
    pass
else:
    # The same examples in every run, without a deadline: a busy machine must not fail a test.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
    hypothesis.settings.load_profile("repeatable")


@functools.cache
def _why_no_gpu() -> str:
    """Return the reason why CuPy cannot compute here, or an empty string if it can."""
    try:
        import cupy
    except ImportError:
        return "needs a GPU: CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs a GPU: {error}"
    return "" if count else "needs a GPU: CuPy sees none"


# `make check` skips these files, which start several programs, wait or measure, and single tests marked `slow`.
SLOW = {
    *("accelerate", "benchmarks", "bottleneck", "bottleneck_processes", "bottleneck_training_source", "damaged_input"),
    *("distributed", "docs", "dynamic_mode", "evaluate_run", "faults", "folder_lock", "gpu_checks", "gpu_suite"),
    *("jobs", "loaders", "loaders_dali", "lockstep", "oversubscription", "peers", "preview", "recipes", "run_record"),
    *("scan", "slurm", "train", "train_errors", "transfer_voc", "watchdog", "wheel"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


# A DALI pipeline is part of a reference cycle, so Python's garbage collector destroys it, in whichever thread the
# collector runs. In a thread that calls a Python operator of the same pipeline this aborts the process; in a thread
# that calls one of another pipeline it deadlocks, since DALI runs one Python operator at a time. So the collector runs
# only between tests.
gc.disable()
_ended = itertools.count(1)


def pytest_collection_finish() -> None:
    # Exclude the objects of the imports from collection: scanning them takes most of a second each time.
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None:
        gc.collect()
    elif next(_ended) % 25 == 0:
        gc.collect(1)  # what has been created since the last time: scanning all objects takes half a second


# Fixtures of hypothesis tests have session scope: all examples of a test use the same array library.
@pytest.fixture(scope="session", params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """NumPy, then CuPy if there is a GPU."""
    return pytest.importorskip(request.param)


@pytest.fixture(scope="session")
def put(xp):
    """Return a function that converts a NumPy array to an array of `xp`, read-only if `xp` is NumPy."""

    def to_library(array):
        array = np.array(array)
        array.setflags(write=False)
        return array if xp is np else xp.asarray(array)

    return to_library


@pytest.fixture(scope="session")
def fetch(xp):
    """Return a function that converts a result of `xp` to NumPy, and fails if it belongs to another library."""

    def to_numpy(array):
        assert isinstance(array, xp.ndarray)
        return array if xp is np else xp.asnumpy(array)

    return to_numpy


@pytest.fixture(scope="session")
def jpeg_images() -> list[np.ndarray]:
    """Photo-like RGB images (H, W, 3) uint8, read-only, decoded from JPEG."""
    rng = np.random.default_rng(20)
    sizes = [(224, 224)] * 6 + [(180, 250), (333, 500), (97, 301), (64, 80)]
    return [_through_jpeg(_picture(rng, height, width)) for height, width in sizes]


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint objects on a ground, both with the 1/f texture of natural images."""
    ground, figure = (_texture(rng, height, width) + rng.uniform(60, 200, 3) for _ in range(2))
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for shape in (draw.ellipse, draw.rectangle)[: rng.integers(1, 3)]:
        left, top = rng.uniform(0, 0.7, 2) * (width, height)
        right, bottom = (left, top) + rng.uniform(0.1, 0.4, 2) * (width, height)
        shape([left, top, right, bottom], fill=255)
    picture = np.where(np.asarray(mask)[..., None] > 0, figure, ground)
    return picture.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sum noise of many cell sizes, grey for the most part: (H, W, 3) of mean 0."""
    texture = np.zeros((height, width, 3))
    for cell in (1, 2, 4, 8, 16, 32, 64, 128):
        shape = (height // cell + 2, width // cell + 2)
        grey = rng.normal(size=shape)
        for channel in range(3):
            noise = Image.fromarray((grey + 0.4 * rng.normal(size=shape)).astype(np.float32))
            texture[..., channel] += 4 * cell**0.4 * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return texture


def _through_jpeg(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    decoded = np.array(Image.open(file))
    decoded.setflags(write=False)
    return decoded

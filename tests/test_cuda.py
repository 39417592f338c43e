"""The CUDA kernels: they compile, and return the same results as the array functions.

Without a GPU they run as C++ on the CPU, through ``cuda_on_cpu.h``, launched by the same functions that launch them on
a GPU. Tests that need a GPU are marked `gpu`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nvidia.dali.ops._operators import python_function
from shared import reference
from shared.kernels_on_cpu import KERNELS, launch, pictures, strided

from benchmarks import sanitize
from dali_saliencymix import _cuda as cuda
from dali_saliencymix import _routes, boxes_at, boxes_moved_to, kept_fraction, pixels, saliencymix
from dali_saliencymix import fine_grained as fine_grained_of_arrays
from dali_saliencymix import saliency_peaks as saliency_peaks_of_arrays
from dali_saliencymix import spectral_residual as spectral_residual_of_arrays
from dali_saliencymix._array import array_namespace, constant
from dali_saliencymix._cuda import launch as cuda_launch
from dali_saliencymix._cuda import saliency
from dali_saliencymix._dali import bridge
from dali_saliencymix._tables import scaling
from dali_saliencymix.mix import _Batch, _saliencymix_in_kernels
from dali_saliencymix.options import MixOptions
from dali_saliencymix.saliency import grey

pytest_plugins = ["shared.kernels_on_cpu"]

MARGIN = 256  # bytes around each array that must not be written to


# --- The kernels on a CPU ---


@pytest.fixture(params=["forwards", "backwards"])
def on_cpu(request, libraries, monkeypatch):
    """Launch kernels on the CPU, with threads in either order; return the list of launches, which grows."""
    launches = []
    guarded = []

    def find_kernel(xp, file, name):
        assert xp is np
        return lambda grid, block, arguments: run(file, name, grid, block, arguments)

    def run(file, name, grid, block, arguments):
        launches.append(name)
        launch(libraries, file, name, grid, block, arguments, backwards=request.param == "backwards")

    plain_empty = np.empty

    @functools.wraps(plain_empty)
    def empty(shape, dtype=float, **options):
        # Outputs are filled with values that no test expects, between margins that are checked at the end.
        if not sys._getframe(1).f_globals["__name__"].startswith("dali_saliencymix._cuda"):
            return plain_empty(shape, dtype, **options)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * MARGIN, 0x5A, np.uint8)
        guarded.append(memory)
        return memory[MARGIN : MARGIN + size].view(dtype).reshape(shape)

    monkeypatch.setattr(cuda_launch, "find_kernel", find_kernel)
    # Numba must not get this function, since what it compiles stays for the whole process.
    monkeypatch.setattr(_routes, "_numba_is_installed", lambda: False)
    monkeypatch.setattr(np, "empty", empty)
    yield launches
    for memory in guarded:
        assert (memory[:MARGIN] == 0x5A).all(), "a kernel wrote in front of its result"
        assert (memory[-MARGIN:] == 0x5A).all(), "a kernel wrote behind its result"


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 1, 1), (1, 1)),
        ((5, 37, 23, 3), (37, 23)),
        ((2, 37, 23, 3), (11, 23)),
        ((3, 100, 65, 1), (64, 64)),
        ((1, 224, 180, 3), (64, 64)),
    ],
)
@pytest.mark.parametrize("apart", [0, 13])
def test_small_luma(on_cpu, shape, size, apart):
    images = pictures(*shape, apart=apart)
    assert_same(cuda.small_luma(images, *size), grey.small_luma(images, *size))
    assert on_cpu == ["small_luma"]


def test_images_that_are_no_rows_of_pixels_are_copied(on_cpu):
    images = pictures(2, 20, 30, 3)[:, ::-1, 1:]
    assert_same(cuda.small_luma(images, 7, 8), grey.small_luma(images, 7, 8))


def with_flat_and_sparse(images):
    """Prepend a constant image and one with a bright spot."""
    flat = np.full((2, *images.shape[1:]), 90, np.uint8)
    y, x = images.shape[1] // 3, images.shape[2] // 4
    flat[1, y : y + 5, x : x + 5] = 255
    return np.concatenate([flat, images])


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (2, 65, 130, 3), (2, 224, 224, 3), (1, 100, 64, 3)])
def test_spectral_residual(on_cpu, shape):
    images = with_flat_and_sparse(pictures(*shape))
    maps = cuda.spectral_residual(images)
    assert on_cpu == ["spectral_residual"]
    theirs = spectral_residual_of_arrays(images, algorithm="array")
    assert maps.dtype == theirs.dtype
    np.testing.assert_allclose(maps, theirs, atol=1e-4)
    assert not maps[0].any()
    assert (maps[1:].max(axis=(1, 2)) == 1).all()


def test_spectral_residual_of_photographs(on_cpu, jpeg_images):
    images = np.stack([image for image in jpeg_images if image.shape == (224, 224, 3)][:3])
    maps = cuda.spectral_residual(images)
    np.testing.assert_allclose(maps, spectral_residual_of_arrays(images, algorithm="array"), atol=2e-5)
    small = grey.small_luma(images, 64, 64)
    np.testing.assert_allclose(maps[0], reference.spectral_residual(small[0]), atol=2e-5)
    for least in (False, True):
        peaks = cuda.spectral_residual_peaks(images, 224, 224, least=least)
        assert_same(peaks, saliency_peaks_of_arrays(maps, 224, 224, least=least))


@pytest.mark.parametrize("apart", [0, 5])
@pytest.mark.parametrize("least", [False, True])
def test_spectral_residual_peaks(on_cpu, least, apart):
    images = with_flat_and_sparse(pictures(3, 71, 90, 3))
    if apart:
        images = np.concatenate([images[i] for i in range(5)]).reshape(5, -1)
        images = strided(np.pad(images, ((0, 0), (0, apart))), (5, 71, 90, 3))
    peaks = cuda.spectral_residual_peaks(images, 71, 90, least=least)
    assert on_cpu == ["spectral_residual"]  # and no map
    assert_same(peaks, saliency_peaks_of_arrays(cuda.spectral_residual(images), 71, 90, least=least))
    assert (abs(peaks[0] - [35, 45]) <= 1).all()  # the peak of a constant image is its centre


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 3),
        (2, 1, 5, 1),
        (2, 5, 1, 3),
        (1, 2, 2, 3),
        (1, 3, 2, 1),
        (4, 37, 23, 3),
        (1, 70, 131, 3),
        (2, 224, 224, 3),
        # The kernel splits an image into bands of 32 rows and strips of 240 columns, of 512 columns for the surrounds.
        (2, 33, 240, 1),
        (1, 34, 241, 3),
        (1, 65, 484, 3),
        (1, 32, 1027, 1),
    ],
)
def test_fine_grained(on_cpu, shape):
    images = pictures(*shape, apart=3)
    images = with_flat_and_sparse(images) if min(shape[1:3]) > 3 else images
    maps = cuda.fine_grained(images)
    assert on_cpu == ["integral_image", "surrounds", "contrast_maps"]
    assert_same(maps, fine_grained_of_arrays(images, algorithm="array"))
    for least in (False, True):
        peaks = cuda.fine_grained_peaks(images, least=least)
        assert_same(peaks, saliency_peaks_of_arrays(maps, *shape[1:3], least=least))


def test_fine_grained_rounds_large_sums_where_numpy_does(on_cpu):
    rng = np.random.default_rng(3)
    # In areas of one grey level, differences are close to integers, so rounding errors show.
    images = rng.integers(240, 256, (1, 30, 40, 1)).repeat(10, 1).repeat(10, 2).astype(np.uint8)
    assert images.sum(dtype=np.int64) > 2**24
    assert_same(cuda.fine_grained(images), fine_grained_of_arrays(images, algorithm="array"))


def test_fine_grained_divides_by_all_maxima(on_cpu):
    # An image for each maximum, with all values up to it.
    maxima = np.concatenate([np.arange(1, 6 * 255 + 1), [4095, 4096, 40_000, 65_535]]).astype(np.int32)
    values = np.linspace(0, 1, 6 * 255 + 1)
    on = np.rint(values * maxima[:, None]).astype(np.uint32)
    maps = np.empty(on.shape, np.float32)
    for shift in (0, 16):
        tops = np.stack([maxima, np.zeros_like(maxima)][:: 1 if shift == 0 else -1], axis=1).copy()
        launched = saliency._contrast_maps(np, (*on.shape, 1))
        launched(on << np.uint32(shift), tops, maps)
        assert_same(maps, (on.astype(np.int64) * 255 // maxima[:, None]).astype(np.float32) * np.float32(1 / 255))


def test_fine_grained_adds_in_8_bits(on_cpu):
    # Nested squares, found by search: the centre is brighter than near surrounds and darker than far ones, by so much
    # that the sum of both exceeds 255.
    levels = np.array([156, 33, 65, 58, 149, 162, 167, 167, 172, 172, 60], np.uint8)
    distance = abs(np.arange(96) - 48)
    square = np.searchsorted([2, 6, 10, 13, 18, 25, 29, 36, 43, 49], np.maximum(distance[:, None], distance), "right")
    images = levels[square][None, :, :, None]
    maps = cuda.fine_grained(images)
    assert_same(maps, fine_grained_of_arrays(images, algorithm="array"))
    assert maps[0, 48, 48] < 0.2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 12), (224, 61)])
def test_saliency_peaks(on_cpu, size, least):
    rng = np.random.default_rng(5)
    maps = rng.integers(0, 3, (12, 5, 7)).astype(np.float32)  # many ties
    maps[1] = NAN
    maps[2, 1:4] = NAN
    maps[3] = 0
    maps[4] = np.where(maps[4] > 1, 0.0, -0.0)
    maps[5] = -maps[5] - 1
    maps[6, 4, 6], maps[6, 0, 0] = INF, -INF
    maps[7] = -INF
    maps[7, 0, 0] = NAN
    maps[8] = 1e-42 * maps[8]  # subnormal
    maps[9, 1, 1], maps[9, 2, 2] = NAN, -NAN  # the result of 0 / 0 has either sign
    peaks = cuda.saliency_peaks(maps, *size, least=least)
    assert on_cpu == ["saliency_peaks"]
    assert_same(peaks, saliency_peaks_of_arrays(maps, *size, least=least))
    for one, peak in zip(maps, peaks.tolist(), strict=True):
        if not np.isnan(one).any():  # the oracle does not handle NaN
            assert tuple(peak) == reference.peak(one, *size, least)


def test_saliency_peaks_of_maps_larger_than_a_block(on_cpu):
    maps = np.random.default_rng(6).integers(0, 40, (2, 60, 45)).astype(np.float32)
    assert_same(cuda.saliency_peaks(maps, 60, 45), saliency_peaks_of_arrays(maps, 60, 45))
    maps = np.random.default_rng(7).random((1, 1, 1), np.float32)
    assert_same(cuda.saliency_peaks(maps, 9, 4), saliency_peaks_of_arrays(maps, 9, 4))


def mixing_arguments(count, height, width, seed=1):
    rng = np.random.default_rng(seed)
    peaks = np.stack([rng.integers(0, height, count), rng.integers(0, width, count)], axis=1).astype(np.int32)
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]
    peaks[: min(4, count)] = corners[: min(4, count)]
    lam = rng.random(count)
    lam[count // 2 :: 5], lam[count // 3 :: 7] = 0, 1
    return peaks, rng.permutation(count), lam


def boxes_of_arrays(peaks, source_index, lam, height, width, *, box="fit", centres=None):
    """Compute with array functions what boxes_at_peaks fuses."""
    source_boxes = boxes_at(peaks[source_index], lam, height, width, box=box)
    boxes = source_boxes if centres is None else boxes_moved_to(source_boxes, centres, height, width)
    covers = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)[:, None]
    boxes, source_boxes = np.where(covers, boxes, 0), np.where(covers, source_boxes, 0)
    return boxes, source_boxes, kept_fraction(boxes, height, width)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("other_place", [False, True])
@pytest.mark.parametrize("box", ["fit", "clip"])
@pytest.mark.parametrize("size", [(224, 224), (37, 23), (1, 5)])
def test_boxes_at_peaks(on_cpu, size, box, other_place, dtype):
    count = 300
    peaks, source_index, lam = mixing_arguments(count, *size)
    lam = lam.astype(dtype)
    lam[:256] = np.clip(1 - (np.arange(256) / size[0]) ** 2, 0, 1)  # sides that are integers, or just below
    centres = mixing_arguments(count, *size, seed=2)[0] if other_place else None
    ours = cuda.boxes_at_peaks(peaks, source_index, lam, *size, box=box, centres=centres)
    theirs = boxes_of_arrays(peaks, source_index, lam, *size, box=box, centres=centres)
    for our_array, their_array in zip(ours, theirs, strict=True):
        assert_same(our_array, their_array.astype(our_array.dtype))
    assert len(on_cpu) == 1


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "int64"])
def test_boxes_at_peaks_reads_columns_of_other_arrays(on_cpu, dtype):
    peaks, source_index, lam = mixing_arguments(50, 60, 40)
    packed = np.stack([lam, lam, source_index], axis=1).astype(np.float32)
    index = np.stack([source_index + 1, source_index], axis=1).astype(dtype)
    ours = cuda.boxes_at_peaks(peaks.astype(np.int64), index[:, 1], packed[:, 1], 60, 40)
    for our_array, their_array in zip(ours, boxes_of_arrays(peaks, source_index, packed[:, 0], 60, 40), strict=True):
        assert_same(our_array, their_array.astype(our_array.dtype))


def test_boxes_of_impossible_lam_stay_inside_the_image(on_cpu):
    lam = np.array([NAN, 1.5, -3.0, INF, -INF, 0.5], np.float32)
    index = np.array([0, -1, 6, 2**31 - 1, -(2**31), 5], np.int32)
    for box in ("fit", "clip"):
        boxes, _, kept = cuda.boxes_at_peaks(np.full((6, 2), 9, np.int32), index, lam, 30, 20, box=box)
        assert ((boxes >= 0) & (boxes <= [30, 20, 30, 20])).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert ((kept >= 0) & (kept <= 1)).all()
        assert kept[:2].tolist() == [1, 1]


def paste_arguments(count, height, width, seed=3, other_place=True):
    """Return boxes of all kinds (empty, whole, one pixel wide, at each border) and source boxes."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, [[height + 1], [width + 1]], (count, 2, 2)), axis=2)
    boxes = corners.transpose(0, 2, 1).reshape(count, 4)
    special = [(0, 0, 0, 0), (0, 0, height, width), (height - 1, 0, height, width), (0, width - 1, height, width)]
    boxes[: min(count, 4)] = special[: min(count, 4)]
    side = boxes[:, 2:] - boxes[:, :2]
    start = rng.integers(0, [height, width] - side + 1)
    source_boxes = np.concatenate([start, start + side], axis=1) if other_place else None
    return rng.permutation(count), boxes.astype(np.int32), source_boxes


@pytest.mark.parametrize("destination", ["corresponding", "salient", "non_salient", "random"])
@pytest.mark.parametrize("source", ["salient", "non_salient"])
@pytest.mark.parametrize("saliency", ["fine_grained", "spectral_residual", "frequency_tuned"])
def test_a_whole_mix_is_that_of_the_array_functions(on_cpu, saliency, source, destination):
    images = pictures(4, 70, 66, 3, seed=5)
    rng = np.random.default_rng(8)
    source_index, lam, point = np.array([2, 0, 3, 3]), np.array([0.3, 0.9, 1.0, 0.0], np.float32), rng.random((4, 2))
    given = {"saliency": saliency, "source": source, "destination": destination}
    at = {"point": point} if destination == "random" else {}
    expected = saliencymix(images, source_index, lam, algorithm="array", **given, **at)
    ours = _saliencymix_in_kernels(MixOptions(**given), _Batch(images, source_index, lam, point=at.get("point")))
    for mine, wanted in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(mine, wanted)
        assert mine.dtype == wanted.dtype
    if saliency != "frequency_tuned" and (source, destination) == ("salient", "corresponding"):
        assert len(on_cpu) == {"spectral_residual": 3, "fine_grained": 5}[saliency]


def test_a_whole_mix_takes_peaks_and_clips(on_cpu):
    images = pictures(3, 40, 30, 1, seed=6)
    source_index, lam, peaks = np.array([1, 2, 0]), np.array([0.2, 0.5, 0.7]), np.array([[0, 0], [39, 29], [20, 3]])
    expected = saliencymix(images, source_index, lam, peaks=peaks, box="clip")
    ours = _saliencymix_in_kernels(MixOptions(box="clip"), _Batch(images, source_index, lam, peaks=peaks))
    for mine, wanted in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(mine, wanted)
    assert on_cpu == ["boxes_at_peaks_float64", on_cpu[1]]


@pytest.mark.parametrize("other_place", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "apart", "vector"),
    [
        ((7, 37, 23, 3), "uint8", 0, 1),
        ((7, 37, 23, 1), "uint8", 4, 1),
        ((6, 9, 24, 3), "uint8", 0, 4),
        ((6, 9, 32, 3), "uint8", 0, 16),
        ((6, 9, 32, 3), "uint8", 4, 4),
        ((6, 9, 32, 3), "uint8", 16, 16),
        ((6, 9, 32, 3), "uint8", 5, 1),
        ((5, 64, 80, 3), "uint8", 0, 16),
        ((5, 6, 5, 2), "float32", 0, 4),
        ((5, 6, 5, 2), "float64", 0, 16),
        ((5, 6, 5, 3), "int16", 0, 1),
        ((1, 40, 16, 3), "uint8", 0, 16),
    ],
)
def test_paste_boxes(on_cpu, shape, dtype, apart, vector, other_place):
    size = np.dtype(dtype).itemsize
    bytes_of_pixels = pictures(*shape[:3], shape[3] * size, apart=apart)
    images = aligned(bytes_of_pixels).view(dtype)
    source_index, boxes, source_boxes = paste_arguments(*shape[:3], other_place=other_place)
    mixed = cuda.paste_boxes(images, source_index, boxes, source_boxes=source_boxes)
    assert on_cpu == [f"paste_{vector}"]
    theirs = pixels.paste_boxes(images, source_index, boxes, source_boxes=source_boxes)
    assert_same(mixed.view(np.uint8), np.ascontiguousarray(theirs).view(np.uint8))
    assert not np.shares_memory(mixed, images)


def aligned(images):
    """Copy images and the gaps between them to an address that is a multiple of 64."""
    length = images.strides[0] * len(images)
    memory = np.zeros(length + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = np.lib.stride_tricks.as_strided(memory[start:], images.shape, images.strides)
    copy[:] = images
    copy.setflags(write=False)
    return copy


def test_paste_boxes_at_an_odd_address(on_cpu):
    source_index, boxes, _ = paste_arguments(4, 9, 32)
    images = aligned(pictures(4, 9, 32, 3, apart=16))
    odd = np.lib.stride_tricks.as_strided(images.reshape(-1)[3:], (3, 9, 32, 3), images.strides)
    mixed = cuda.paste_boxes(odd, source_index[:3] % 3, boxes[:3])
    assert_same(mixed, pixels.paste_boxes(odd, source_index[:3] % 3, boxes[:3]))
    assert on_cpu == ["paste_1"]


def test_paste_boxes_of_no_images(on_cpu):
    empty = np.zeros((0, 4, 4, 3), np.uint8)
    assert cuda.paste_boxes(empty, np.zeros(0, int), np.zeros((0, 4), int)).shape == empty.shape
    assert on_cpu == []


@pytest.mark.parametrize("width", [8, 5, 16])
def test_wrong_boxes_and_indices_stay_inside_the_memory(on_cpu, width):
    rng = np.random.default_rng(4)
    count, height = 40, 6
    images = pictures(count, height, width, 3)
    # Invalid input on a GPU, where values are not checked; the array function for a GPU defines the result.
    source_index = rng.integers(0, count, count)
    boxes, source_boxes = rng.integers(-9, 25, (2, count, 4)).astype(np.int32)
    mixed = cuda.paste_boxes(images, source_index, boxes, source_boxes=source_boxes)
    assert_same(mixed, pixels._paste_by_mask(images, source_index, boxes, source_boxes))
    options = {"mean": [0] * 3, "std": [1] * 3, "layout": "HWC"}
    normalised = normalised_by_kernel(images, source_index, boxes, source_boxes=source_boxes, **options)
    assert_same(normalised, mixed.astype(np.float32))
    around = cuda.paste_boxes(images, source_index - 3 * count, boxes, source_boxes=source_boxes)
    assert_same(around, mixed)


def normalised_by_kernel(
    images, source_index, boxes, *, mean, std, source_boxes=None, mirror=None, dtype="float32", layout="CHW", out=None
):
    """Call the kernel with the arguments of `paste_normalised`."""
    tables = constant(array_namespace(images), scaling, tuple(mean), tuple(std))
    patches = images, source_index, boxes, source_boxes, mirror
    return cuda.paste_normalised(*patches, tables, np.dtype(dtype), layout, out)


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "apart", "mirror", "other_place"),
    [
        ((6, 37, 23, 3), 0, "bool", False),
        ((6, 16, 24, 3), 7, "int32", True),
        ((5, 20, 9, 1), 0, "uint8", True),
        ((1, 5, 4, 3), 0, None, False),
    ],
)
def test_paste_normalised(on_cpu, shape, apart, mirror, other_place, dtype, layout):
    images = pictures(*shape, apart=apart)
    source_index, boxes, source_boxes = paste_arguments(*shape[:3], other_place=other_place)
    options = {
        "source_boxes": source_boxes,
        "mirror": None if mirror is None else (2 * (np.arange(len(images)) % 2)).astype(mirror),
        "mean": [123.675, 116.28, 103.53][: shape[3]],
        "std": [58.395, 57.12, 57.375][: shape[3]],
        "dtype": dtype,
        "layout": layout,
    }
    ours = normalised_by_kernel(images, source_index, boxes, **options)
    assert_same(ours, pixels.paste_normalised(images, source_index, boxes, **options, algorithm="array"))
    assert on_cpu == [f"paste_normalised_{dtype}_{layout}"]


def test_halves_are_rounded_to_the_nearest_and_overflow_to_infinity(on_cpu):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for std in (1e-7, 3e-3, 0.7, 3e3, 1e7, 1e9):
        arguments = (images, np.zeros(1, int), np.zeros((1, 4), int))
        options = {"mean": [127.3], "std": [std], "dtype": "float16"}
        with np.errstate(over="ignore"):
            theirs = pixels.paste_normalised(*arguments, **options)
        assert_same(normalised_by_kernel(*arguments, **options), theirs)


@pytest.mark.parametrize("out", [False, True])
def test_paste_normalised_writes_into_an_array_that_is_given(on_cpu, out):
    images = pictures(3, 8, 6, 3)
    source_index, boxes, _ = paste_arguments(3, 8, 6)
    options = {"mean": [1, 2, 3], "std": [4, 5, 6]}
    target = np.full((3, 3, 8, 6), NAN, np.float32) if out else None
    made = normalised_by_kernel(images, source_index, boxes, **options, out=target)
    assert_same(made, pixels.paste_normalised(images, source_index, boxes, **options, algorithm="array"))
    assert (made is target) is out


def test_launches_that_are_kept_give_the_same(on_cpu, monkeypatch):
    made, make = [], cuda_launch.Launch.__init__

    def recorded(self, xp, kernel, *arguments):
        made.append(kernel)
        make(self, xp, kernel, *arguments)

    monkeypatch.setattr(cuda_launch.Launch, "__init__", recorded)
    modules = [sys.modules[f"{cuda.__name__}.{name}"] for name in ("boxes", "pixels", "saliency")]
    prepared = [(module, name) for module in modules for name, each in vars(module).items() if is_prepared(each)]
    assert len(prepared) == 9
    # Shapes and options alternate and repeat with other pixels: nothing may carry over from one call to the next.
    shapes = [(3, 70, 66, 3), (2, 70, 66, 3), (3, 66, 70, 1)]
    for seed in range(2):
        for shape in shapes:
            called = calls(np, pictures(*shape, seed=seed))
            for label, (name, _, arguments, options) in called.items():
                if shape[3] == 1 and "mean" in options:
                    options |= {"mean": [120], "std": [50]}
                made.clear()
                kept = as_tuple(kernel_named(name)(*arguments, **options))
                # The width of paste's copies depends on the addresses of the arrays, which differ between calls.
                assert seed == 0 or all(kernel.startswith("paste:") for kernel in made)
                with monkeypatch.context() as context:
                    for module, launch in prepared:
                        context.setattr(module, launch, getattr(module, launch).__wrapped__)
                    fresh = as_tuple(kernel_named(name)(*arguments, **options))
                assert made
                for ours, theirs in zip(kept, fresh, strict=True):
                    np.testing.assert_array_equal(ours, theirs, err_msg=label)


def is_prepared(function):
    code = getattr(function, "__code__", None)
    return hasattr(function, "__wrapped__") and code.co_filename == cuda_launch.__file__


# --- The array version of paste_normalised ---


def test_paste_normalised_of_arrays_is_the_three_steps(xp, put, fetch):
    images = pictures(4, 6, 5, 3)
    source_index, boxes, _ = paste_arguments(4, 6, 5)
    mirror = np.array([0, 1, 1, 0])
    mean, std = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    arguments = [put(array) for array in (images, source_index, boxes)]
    ours = fetch(pixels.paste_normalised(*arguments, mirror=put(mirror), mean=mean, std=std))
    assert ours.shape == (4, 3, 6, 5)
    assert ours.dtype == np.float32
    mixed = pixels.paste_boxes(images, source_index, boxes)
    for i, channel, y, x in np.ndindex(ours.shape):
        level = mixed[i, y, 4 - x if mirror[i] else x, channel]
        assert ours[i, channel, y, x] == (float(level) - mean[channel]) / std[channel]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mean": [1, 2]}, ValueError, r"mean must have one finite number for each of the 3 channels, got \[1, 2\]"),
        ({"mean": 1.0}, ValueError, "mean must have one finite number for each channel, got 1.0"),
        ({"mean": "123"}, ValueError, "mean must have one finite number for each channel, got '123'"),
        ({"std": [1, NAN, 1]}, ValueError, "std must have one finite number"),
        ({"std": [1, 0, 1]}, ValueError, r"std must be positive, got \[1, 0, 1\]"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float32, float16, got 'float64'"),
        ({"dtype": "floaty"}, ValueError, "dtype must be one of float32, float16, got 'floaty'"),
        ({"dtype": None}, ValueError, "dtype must be one of float32, float16, got None"),
        ({"layout": "NCHW"}, ValueError, "layout must be one of CHW, HWC, got 'NCHW'"),
        ({"mirror": np.zeros(3, bool)}, ValueError, r"mirror must have shape \(2,\)"),
        ({"mirror": np.zeros(2)}, TypeError, "mirror must be of integer dtype, got float64"),
    ],
)
def test_paste_normalised_refuses(wrong, error, message):
    options = {"mean": [0, 0, 0], "std": [1, 1, 1], **wrong}
    with pytest.raises(error, match=message):
        pixels.paste_normalised(pictures(2, 4, 4, 3), np.array([1, 0]), np.zeros((2, 4), int), **options)


# --- Compiling and launching ---


def test_the_program_for_the_sanitizer_launches_every_kernel(on_cpu):
    sanitize.launch_every_kernel(np)
    assert set(on_cpu) == {name for names in KERNELS.values() for name in names}


def test_every_kernel_is_listed():
    files = {path.stem: path.read_text() for path in Path(cuda_launch.__file__).parent.glob("*.cu")}
    assert set(files) == set(KERNELS) == set(cuda_launch.OPTIONS)
    for file, names in KERNELS.items():
        for name in names:
            assert name in files[file] or name.rpartition("_")[0] in files[file] or file.startswith("paste")


def test_a_header_stands_once_in_the_text_of_a_kernel():
    text = cuda_launch.source("spectral_residual")
    assert "#include" not in text
    assert text.count("int reduced_luma(") == text.count("Value block_maximum(Value value") == 1


def nvrtc_architectures():
    """Return the oldest and the newest: no kernel has code for one architecture alone."""
    try:
        from cupy.cuda import nvrtc

        known = sorted({80, 90, 100} & set(nvrtc.getSupportedArchs()))
    except (ImportError, RuntimeError):
        return []
    return known[:1] + known[1:][-1:]


@pytest.mark.parametrize("file", sorted(KERNELS))
def test_kernels_compile_without_warnings(file):
    architectures = nvrtc_architectures()
    if not architectures:
        pytest.skip("needs CuPy and NVRTC")
    from cupy.cuda import nvrtc

    for architecture in architectures:
        program = nvrtc.createProgram(cuda_launch.source(file), f"{file}.cu", [], [])
        nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{architecture}", *cuda_launch.OPTIONS[file]))
        assert nvrtc.getProgramLog(program).strip() == ""
        binary = nvrtc.getCUBIN(program)
        assert all(f".text.{name}\0".encode() in binary for name in KERNELS[file])
        nvrtc.destroyProgram(program)


def test_numpy_arrays_are_refused():
    with pytest.raises(TypeError, match="must be CuPy arrays for a CUDA kernel, got NumPy arrays"):
        cuda.fine_grained(pictures(1, 4, 4, 3))


def test_importing_the_kernels_imports_no_cupy():
    script = "import sys, dali_saliencymix._cuda, dali_saliencymix.pixels; print('cupy' in sys.modules)"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


# --- Between DALI and CuPy ---


@pytest.fixture
def lent(monkeypatch):
    """A stand-in for the parts of CuPy that DALI uses, and the list of the streams that it has destroyed."""
    current, destroyed = [], []

    class Stream:
        """A stream like CuPy's: current inside a ``with`` block; destroying the object destroys the CUDA stream."""

        def __init__(self, *, null):
            assert null
            self.ptr = 0

        def __enter__(self):
            current.append(self)

        def __exit__(self, *_):
            current.pop()

        def __del__(self):
            if self.ptr:
                destroyed.append(self.ptr)

    cuda = SimpleNamespace(
        Stream=Stream,
        Device=contextlib.nullcontext,
        get_current_stream=lambda: current[-1],
        runtime=SimpleNamespace(getDevice=lambda: 0),
    )
    monkeypatch.setattr(python_function, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(bridge, "array_namespace", lambda array: SimpleNamespace(cuda=cuda))
    return destroyed


def call_as_dali_does(monkeypatch, function, stream, *inputs):
    """Call a function as DALI calls it for a GPU, with DALI's stream current."""
    dali = python_function.PythonFunction
    monkeypatch.setattr(dali, "current_stream", lambda: SimpleNamespace(ptr=stream))
    return dali._cupy_stream_wrapper(
        functools.partial(bridge.on_samples, function, rules=[bridge.OF_IMAGES] * len(inputs)), *inputs
    )


def test_an_error_on_a_gpu_leaves_dali_its_stream(lent, monkeypatch):
    samples = [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]
    with pytest.raises(ValueError, match="must have one shape") as caught:
        call_as_dali_does(monkeypatch, print, 7, samples)
    del caught
    gc.collect(0)
    assert lent == []


def test_on_a_gpu_a_stream_keeps_its_thread(lent, monkeypatch):
    monkeypatch.setattr(bridge, "as_batch", lambda samples, rule: np.stack(samples))
    kept, calls = threading.local(), []

    def function(batch):
        calls.append((bridge.array_namespace(batch).cuda.get_current_stream().ptr, getattr(kept, "stream", None)))
        kept.stream = calls[-1][0]
        return (batch + 1,)

    for stream in (7, 8, 7, 8):
        # Each call comes from another thread, since DALI's threads lose thread-local data between calls.
        made = []
        samples = [np.zeros(2), np.ones(2)]
        thread = threading.Thread(
            target=lambda: made.append(call_as_dali_does(monkeypatch, function, stream, samples))  # noqa: B023
        )
        thread.start()
        thread.join()
        np.testing.assert_array_equal(made[0][0], [[1, 1], [2, 2]])
    assert calls == [(7, None), (8, None), (7, 7), (8, 8)]
    assert lent == []


# --- On a GPU ---


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


def calls(xp, images):
    """Return calls by label: the kernel's name, the array function if it is a single one, arguments and options."""
    count, height, width, _ = images.shape
    peaks, source_index, lam = (xp.asarray(array) for array in mixing_arguments(count, height, width))
    _, boxes, source_boxes = paste_arguments(count, height, width)
    boxes, source_boxes = xp.asarray(boxes), xp.asarray(source_boxes)
    maps = xp.asarray(np.random.default_rng(8).integers(0, 9, (count, 30, 40)).astype(np.float32))
    options = {"mirror": lam > 0.5, "mean": [120, 110, 100], "std": [50, 51, 52], "dtype": "float16"}
    return {
        "small_luma": ("small_luma", grey.small_luma, (images, 64, 64), {}),
        "fine_grained": ("fine_grained", fine_grained_of_arrays, (images,), {}),
        "saliency_peaks": ("saliency_peaks", saliency_peaks_of_arrays, (maps, height, width), {"least": True}),
        "paste": ("paste_boxes", pixels.paste_boxes, (images, source_index, boxes), {}),
        "paste elsewhere": (
            "paste_boxes",
            pixels.paste_boxes,
            (images, source_index, boxes),
            {"source_boxes": source_boxes},
        ),
        "CHW": ("paste_normalised", pixels.paste_normalised, (images, source_index, boxes), options),
        "HWC": (
            "paste_normalised",
            pixels.paste_normalised,
            (images, source_index, boxes),
            {**options, "layout": "HWC", "dtype": "float32"},
        ),
        "boxes": ("boxes_at_peaks", None, (peaks, source_index, lam, height, width), {"box": "clip"}),
        "spectral": ("spectral_residual", spectral_residual_of_arrays, (images,), {}),
        "spectral peaks": ("spectral_residual_peaks", None, (images, height, width), {}),
        "fine-grained peaks": ("fine_grained_peaks", None, (images,), {}),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 224, 224, 3), (3, 131, 97, 3)])
def test_kernels_give_what_the_array_functions_give_on_a_gpu(cupy, shape):
    images = pictures(*shape)
    on_gpu, on_host = calls(cupy, cupy.asarray(images)), calls(np, images)
    for label, (name, of_arrays, arguments, options) in on_gpu.items():
        ours = kernel_named(name)(*arguments, **options)
        if label == "spectral":
            np.testing.assert_allclose(ours.get(), of_arrays(images), atol=1e-3)
        elif of_arrays is not None:
            _, _, host_arguments, host_options = on_host[label]
            assert_same(ours.get(), of_arrays(*host_arguments, **host_options))
    _, _, arguments, options = on_host["boxes"]
    ours = cuda.boxes_at_peaks(*on_gpu["boxes"][2], **options)
    for our_array, their_array in zip(ours, boxes_of_arrays(*arguments, **options), strict=True):
        assert_same(our_array.get(), their_array.astype(our_array.dtype))
    size = shape[1:3]
    maps = cuda.spectral_residual(cupy.asarray(images)).get()
    peaks = cuda.spectral_residual_peaks(cupy.asarray(images), *size).get()
    assert_same(peaks, saliency_peaks_of_arrays(maps, *size))
    peaks = cuda.fine_grained_peaks(cupy.asarray(images)).get()
    assert_same(peaks, saliency_peaks_of_arrays(fine_grained_of_arrays(images), *size))


@pytest.mark.gpu
def test_kernels_are_captured_by_the_current_stream_alone(cupy):
    # During capture, synchronising the stream is an error, and so is a synchronous copy to or from the host. The graph
    # would not replay work on another stream.
    images = cupy.asarray(pictures(4, 224, 224, 3))
    both = calls(cupy, images)

    def call_all():
        return {
            label: as_tuple(kernel_named(name)(*given, **options)) for label, (name, _, given, options) in both.items()
        }

    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        # The first call compiles, creates the constants, and fills the memory pool for the second call.
        expected = {label: [array.get() for array in result] for label, result in call_all().items()}
        stream.begin_capture()
        try:
            results = call_all()
        finally:
            graph = stream.end_capture()
        for result in results.values():
            for array in result:
                array.fill(0)
        graph.launch()
        stream.synchronize()
        for label, result in results.items():
            for ours, theirs in zip(result, expected[label], strict=True):
                assert_same(ours.get(), theirs)


def kernel_named(name):
    return normalised_by_kernel if name == "paste_normalised" else getattr(cuda, name)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)

"""Peaks, boxes and kept areas: compared with the oracle, as properties, and as statistics of many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import reference

from dali_saliencymix import boxes_at, boxes_moved_to, kept_fraction, points_at, saliency_peaks

SIZES = [(1, 1), (1, 6), (5, 5), (8, 8), (37, 23), (18, 61)]

sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))
lams = st.floats(0, 1, width=32) | st.floats(0, 1, width=64) | st.sampled_from([0.0, 0.19, 0.36, 0.75, 1.0])


@st.composite
def maps_with_ties(draw):
    """Draw a map of few levels and the size of its image."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    levels = st.sampled_from([-1.0, 0.0, 1.0, math.nan, math.inf, -math.inf])
    cells = draw(st.lists(levels, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(cells, np.float32).reshape(shape), *draw(sizes)


@pytest.mark.parametrize("least", [False, True])
@given(case=maps_with_ties())
def test_peaks_equal_the_oracle(put, fetch, case, least):
    saliency_map, height, width = case
    peaks = fetch(saliency_peaks(put(saliency_map[None]), height, width, least=least))
    assert peaks.tolist() == [list(reference.peak(saliency_map, height, width, least))]


@pytest.mark.parametrize("map_size", SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_a_single_maximum_is_found_in_every_corner(map_size, size, put, fetch):
    rows, columns = map_size
    corners = [(i, j) for i in (0, rows - 1) for j in (0, columns - 1)]
    maps = np.zeros((len(corners), *map_size), np.float32)
    for saliency_map, corner in zip(maps, corners, strict=True):
        saliency_map[corner] = 1e-30
    peaks = fetch(saliency_peaks(put(maps), *size))
    assert peaks.dtype == np.int32
    assert peaks.tolist() == [list(reference.peak(saliency_map, *size)) for saliency_map in maps]


def test_a_peak_is_the_centre_of_its_cell_in_image_pixels(put, fetch):
    maps = np.zeros((2, 4, 2), np.float32)
    maps[0, 0, 1] = maps[1, 3, 0] = 1
    assert fetch(saliency_peaks(put(maps), 40, 10)).tolist() == [[5, 7], [35, 2]]


@pytest.mark.parametrize(
    ("size", "centre"), [((5, 7), [2, 3]), ((6, 8), [2, 3]), ((1, 1), [0, 0]), ((1, 4), [0, 1]), ((37, 23), [18, 11])]
)
@pytest.mark.parametrize("level", [0.0, -2.5, np.nan, np.inf, -np.inf])
def test_the_peak_of_a_constant_map_is_the_centre(size, centre, level, put, fetch):
    assert fetch(saliency_peaks(put(np.full((1, *size), level, np.float32)), *size)).tolist() == [centre]


@pytest.mark.parametrize(
    ("ties", "winner"),
    [
        ([(0, 0), (4, 5)], [4, 5]),  # the nearer to the centre (4, 4), though later
        ([(2, 4), (6, 4), (4, 2), (4, 6)], [2, 4]),  # equally near: the first row by row
        ([(4, 6), (4, 2), (6, 4)], [4, 2]),
        ([(1, 4), (2, 2)], [2, 2]),  # by Euclidean distance
        ([(0, 0), (0, 8), (8, 0), (8, 8)], [0, 0]),
        ([(8, 0), (8, 8)], [8, 0]),
    ],
)
def test_of_equal_maxima_the_nearest_to_the_centre_wins_then_the_first(ties, winner, put, fetch):
    saliency_map = np.zeros((9, 9), np.float32)
    for tie in ties:
        saliency_map[tie] = 3
    assert fetch(saliency_peaks(put(saliency_map[None]), 9, 9)).tolist() == [winner]


def test_nearness_is_measured_in_image_pixels_not_cells(put, fetch):
    saliency_map = np.zeros((1, 9, 9), np.float32)
    saliency_map[0, 1, 4] = saliency_map[0, 4, 6] = 1  # 3 cells of 10 rows away, and 2 cells of 100 columns
    assert fetch(saliency_peaks(put(saliency_map), 90, 900)).tolist() == [[15, 450]]


def test_nan_is_the_least_salient(put, fetch):
    maps = np.full((2, 3, 3), np.nan, np.float32)
    maps[0, 0, 2] = -1e30
    assert fetch(saliency_peaks(put(maps), 3, 3)).tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int64, bool])
def test_maps_of_any_real_dtype_are_taken(dtype, put, fetch):
    maps = np.eye(4, dtype=dtype)[None, ::-1]
    assert fetch(saliency_peaks(put(maps), 4, 4)).tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3, 1), (0, 3, 3), (1, 0, 3)])
def test_maps_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"saliency_map must have shape \(N, h, w\) and not be empty, got \("):
        saliency_peaks(np.zeros(shape, np.float32), 3, 3)


def test_complex_maps_and_lists_are_refused():
    with pytest.raises(TypeError, match="saliency_map must be of real dtype, got complex64"):
        saliency_peaks(np.zeros((1, 3, 3), np.complex64), 3, 3)
    with pytest.raises(TypeError, match=r"saliency_map must be a NumPy or CuPy array, got builtins\.list"):
        saliency_peaks([[[1.0]]], 3, 3)


def boxes_of(put, fetch, peaks, lam, height, width, box):
    boxes = fetch(boxes_at(put(np.array(peaks, np.int32)), put(lam), height, width, box=box))
    assert boxes.dtype == np.int32
    return [tuple(int(edge) for edge in row) for row in boxes]


@pytest.mark.parametrize("box", ["fit", "clip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (224, 224)])
def test_boxes_equal_the_oracle(box, dtype, height, width, put, fetch):
    rng = np.random.default_rng(height * width)
    whole = np.array([1 - (k / height) ** 2 for k in range(height + 1)], dtype)  # floor(height * sqrt) jumps here
    beside = np.concatenate([np.nextafter(whole, dtype(-1)).clip(0), np.nextafter(whole, dtype(2)).clip(max=1)])
    lam = np.concatenate([[0, 1], whole, beside, rng.random(300)]).astype(dtype)
    peaks = np.stack([rng.integers(0, height, lam.size), rng.integers(0, width, lam.size)], axis=1)
    corners = rng.random(lam.size) < 0.3
    peaks[corners] = rng.integers(0, 2, (corners.sum(), 2)) * (height - 1, width - 1)

    expected = [
        reference.box_at((int(y), int(x)), float(share), height, width, box)
        for (y, x), share in zip(peaks, lam, strict=True)
    ]
    assert boxes_of(put, fetch, peaks, lam, height, width, box) == expected


@given(size=sizes, lam=lams, where=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)))
def test_a_fitted_box_has_its_nominal_size_lies_inside_and_holds_its_peak(put, fetch, size, lam, where):
    peak = [int(share * axis) for share, axis in zip(where, size, strict=True)]
    ((y0, x0, y1, x1),) = boxes_of(put, fetch, [peak], np.array([lam]), *size, "fit")
    scale = math.sqrt(1 - lam)
    assert (y1 - y0, x1 - x0) == (math.floor(size[0] * scale), math.floor(size[1] * scale))
    assert 0 <= y0 <= y1 <= size[0]
    assert 0 <= x0 <= x1 <= size[1]
    for start, stop, position in ((y0, y1, peak[0]), (x0, x1, peak[1])):
        assert start <= position < stop or start == stop


@given(size=sizes, lam=lams, where=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)))
def test_a_clipped_box_lies_inside_and_within_the_fitted_one(put, fetch, size, lam, where):
    peak = [int(share * axis) for share, axis in zip(where, size, strict=True)]
    ((y0, x0, y1, x1),) = boxes_of(put, fetch, [peak], np.array([lam]), *size, "clip")
    ((top, left, bottom, right),) = boxes_of(put, fetch, [peak], np.array([lam]), *size, "fit")
    assert 0 <= y0 <= y1 <= size[0]
    assert 0 <= x0 <= x1 <= size[1]
    assert (y1 - y0) * (x1 - x0) <= (bottom - top) * (right - left)


@pytest.mark.parametrize("size", SIZES)
def test_lam_1_gives_an_empty_box_and_lam_0_the_whole_image(size, put, fetch):
    peaks = [(0, 0), (size[0] - 1, size[1] - 1)]
    empty = boxes_of(put, fetch, peaks, np.ones(2, np.float32), *size, "fit")
    assert all((y0, x0) == (y1, x1) for y0, x0, y1, x1 in empty)
    whole = boxes_of(put, fetch, peaks, np.zeros(2, np.float32), *size, "fit")
    assert whole == [(0, 0, *size)] * 2


def test_an_unknown_box_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="box must be one of fit, clip, got 'shift'"):
        boxes_at(np.zeros((1, 2), np.int32), np.ones(1, np.float32), 4, 4, box="shift")


@pytest.mark.parametrize("size", SIZES)
def test_kept_fraction_is_the_exact_share_outside_the_box(size, put, fetch):
    rng = np.random.default_rng(0)
    corners = [np.sort(rng.integers(0, axis + 1, (200, 2)), axis=1) for axis in size]
    boxes = np.stack([corners[0][:, 0], corners[1][:, 0], corners[0][:, 1], corners[1][:, 1]], axis=1)
    kept = fetch(kept_fraction(put(boxes.astype(np.int32)), *size))
    pixels = size[0] * size[1]
    expected = [np.float32((pixels - (y1 - y0) * (x1 - x0)) / pixels) for y0, x0, y1, x1 in boxes]
    assert kept.dtype == np.float32
    assert kept.tolist() == expected


@pytest.mark.parametrize(
    ("box", "side", "expected"),
    [("clip", 32, 0.2993), ("clip", 224, 0.3178), ("fit", 32, 0.4792), ("fit", 224, 0.4970)],
)
def test_mean_pasted_share_at_uniform_peaks(box, side, expected):
    # For lam ~ U(0, 1), floor(side * sqrt(1 - lam)) is s with probability (2 s + 1) / side**2. So the mean over s of
    # (s / side)**2, or of the squared mean width after clipping over all peaks, is exact.
    count = 400_000
    rng = np.random.default_rng(side)
    peaks = rng.integers(0, side, (count, 2), np.int32)
    boxes = boxes_at(peaks, rng.random(count), side, side, box=box)
    shares = 1 - kept_fraction(boxes, side, side).astype(np.float64)
    # Four standard errors, about 0.0018 for a standard deviation of 0.29, and half of the last digit.
    assert shares.mean() == pytest.approx(expected, abs=4 * shares.std() / math.sqrt(count) + 0.00005)


@pytest.mark.parametrize(
    ("peaks", "lam", "message"),
    [
        ([[8, 0]], [0.5], r"peaks\[:, 0\] must be in \[0, 8\), .* got 8"),
        ([[0, -1]], [0.5], r"peaks\[:, 1\] must be in \[0, 6\), .* got -1"),
        ([[0, 0]], [1.5], r"lam must be in \[0, 1\], got 1.5 at \[0\]"),
        ([[0, 0]], [0.5, 0.5], r"lam must have shape \(1,\), .* got \(2,\)"),
        ([0, 0], [0.5, 0.5], r"peaks must have shape \(2, 2\), .* got \(2,\)"),
    ],
)
def test_points_and_weights_that_cannot_be_are_refused(peaks, lam, message):
    with pytest.raises(ValueError, match=message):
        boxes_at(np.array(peaks, np.int32), np.array(lam), 8, 6)


@pytest.mark.parametrize("box", [(0, 0, 9, 6), (-1, 0, 8, 6), (0, 0, 8, 7)])
def test_boxes_outside_the_image_are_refused(box):
    with pytest.raises(ValueError, match=r"boxes\[:, 1?::2\] must be in \[0, [86]\], the edges of the image's"):
        kept_fraction(np.array([box]), 8, 6)


@given(size=sizes, lam=lams, where=st.tuples(*[st.floats(0, 1)] * 4))
def test_a_moved_box_keeps_its_size_and_is_as_near_to_its_new_centre_as_the_image_allows(put, fetch, size, lam, where):
    first, second = (reference.pixel_at(where[i : i + 2], *size) for i in (0, 2))
    box = reference.box_at(first, lam, *size, "fit")
    (moved,) = fetch(boxes_moved_to(put(np.array([box])), put(np.array([second])), *size)).tolist()
    for axis in (0, 1):
        side = box[axis + 2] - box[axis]
        assert (moved[axis], moved[axis + 2]) == reference.moved_inside(second[axis] - side // 2, side, size[axis])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points_are_the_pixels_at_fractions_and_all_come_as_often(size, dtype, put, fetch):
    steps = np.linspace(0, 1, 1009, dtype=dtype)
    fractions = np.stack([steps, steps[::-1]], axis=1)
    points = fetch(points_at(put(fractions), *size))
    assert points.dtype == np.int32
    assert points.tolist() == [list(reference.pixel_at(fraction, *size)) for fraction in fractions]
    for axis in (0, 1):
        counts = np.bincount(points[:, axis], minlength=size[axis])
        assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: points_at(np.array([[0.5, 1.5]]), 8, 6), r"fractions must be in \[0, 1\], got 1.5 at \[0, 1\]"),
        (lambda: points_at(np.array([[0.5]]), 8, 6), r"fractions must have shape \(1, 2\)"),
        (
            lambda: boxes_moved_to(np.array([[0, 0, 4, 4]]), np.array([[8, 0]]), 8, 6),
            r"centres\[:, 0\] must be in \[0, 8\), the rows of the image, got 8 at \[0\]",
        ),
        (
            lambda: boxes_moved_to(np.array([[0, 0, 9, 4]]), np.array([[0, 0]]), 8, 6),
            r"boxes\[:, ::2\] must be in \[0, 8\]",
        ),
    ],
)
def test_points_and_boxes_outside_the_image_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

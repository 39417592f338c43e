"""Pasting and labels for given boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import reference

from dali_saliencymix import blend_images, paste_boxes, soft_labels
from dali_saliencymix.pixels import _paste_by_mask, _paste_by_slices

SHAPES = [(1, 1, 1, 1), (1, 8, 8, 3), (5, 37, 23, 3), (4, 6, 9, 1), (2, 1, 7, 3)]


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    rows = np.sort(rng.integers(0, height + 1, (count, 2)), axis=1)
    columns = np.sort(rng.integers(0, width + 1, (count, 2)), axis=1)
    return np.stack([rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], axis=1).astype(np.int32)


def random_case(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape, np.uint8)
    return images, rng.integers(0, len(images), len(images)), random_boxes(rng, *shape[:3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_paste_boxes_equals_the_oracle(shape, seed, put, fetch):
    images, source_index, boxes = random_case(shape, seed)
    expected, *_ = reference.mix(images, source_index, boxes.tolist())
    mixed = fetch(paste_boxes(put(images), put(source_index), put(boxes)))
    np.testing.assert_array_equal(mixed, expected)


def test_the_result_goes_where_it_is_told_to(put, fetch):
    images, source_index, boxes = random_case((5, 8, 6, 3))
    arguments = [put(array) for array in (images, source_index, boxes)]
    out = put(np.zeros_like(images)).copy()
    assert paste_boxes(*arguments, out=out) is out
    np.testing.assert_array_equal(fetch(out), fetch(paste_boxes(*arguments)))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), r"out must be a C-contiguous numpy array of uint8 and shape \(2, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.int8), "got numpy.ndarray of int8"),
        (np.zeros((2, 8, 3, 8), np.uint8).transpose(0, 1, 3, 2), "C-contiguous"),
        ([0], "got builtins.list of None"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(out, message):
    images, boxes = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 4), np.int32)
    with pytest.raises(ValueError, match=message):
        paste_boxes(images, np.array([1, 0]), boxes, out=out)


@pytest.mark.parametrize("first", [0, 1], ids=["the same", "in part"])
def test_the_images_are_no_place_for_the_result(first):
    memory, boxes = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((2, 4), np.int32)
    with pytest.raises(ValueError, match="out must not share memory with images"):
        paste_boxes(memory[:2], np.array([1, 0]), boxes, out=memory[first : first + 2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_pasting_by_mask_equals_pasting_by_slices(shape, dtype):
    images, source_index, boxes = random_case(shape)
    case = (images.astype(dtype) * dtype(3), source_index, boxes)
    np.testing.assert_array_equal(_paste_by_mask(*case), _paste_by_slices(*case), strict=True)


@pytest.mark.parametrize("paste", [_paste_by_mask, _paste_by_slices, paste_boxes])
def test_sources_are_read_unmixed(paste):
    # A chain in which an implementation in place would read changed sources, in any order.
    images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(4, axis=1)
    whole = np.tile(np.array([0, 0, 4, 1], np.int32), (6, 1))
    for source_index in (np.roll(np.arange(6), 1), np.roll(np.arange(6), -1)):
        assert paste(images, source_index, whole)[:, 0, 0, 0].tolist() == source_index.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_the_dtype_of_the_images_is_kept(dtype, put, fetch):
    images, source_index, boxes = random_case((5, 8, 6, 3))
    images = images.astype(dtype)
    mixed = fetch(paste_boxes(put(images), put(source_index), put(boxes)))
    assert mixed.dtype == dtype
    np.testing.assert_array_equal(mixed, reference.mix(images, source_index, boxes.tolist())[0])


@pytest.mark.parametrize("index_dtype", [np.uint8, np.int32, np.int64])
def test_index_and_boxes_of_any_integer_dtype_are_taken(index_dtype, put, fetch):
    images, source_index, boxes = random_case((5, 8, 6, 3))
    expected, *_ = reference.mix(images, source_index, boxes.tolist())
    mixed = paste_boxes(put(images), put(source_index.astype(index_dtype)), put(boxes.astype(index_dtype)))
    np.testing.assert_array_equal(fetch(mixed), expected)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (3, 3, 3, 3), (0, 2, 8, 2), (8, 6, 8, 6)])
def test_an_empty_box_leaves_the_image_and_still_gives_a_new_array(box, put, fetch):
    images = np.arange(2 * 8 * 6, dtype=np.uint8).reshape(2, 8, 6, 1)
    given_images = put(images)
    mixed = paste_boxes(given_images, put(np.array([1, 0])), put(np.array([box, box])))
    np.testing.assert_array_equal(fetch(mixed), images)
    mixed[:] = 7
    np.testing.assert_array_equal(fetch(given_images), images)


def test_images_that_lie_scattered_in_memory_are_taken(put, fetch):
    images, source_index, boxes = random_case((5, 8, 12, 3))
    expected, *_ = reference.mix(images[:, :, ::-1], source_index, boxes.tolist())
    mixed = paste_boxes(put(images.repeat(2, axis=1))[:, ::2, ::-1], put(source_index), put(boxes))
    np.testing.assert_array_equal(fetch(mixed), expected)


def labels_of(put, fetch, labels, source_labels, lam, num_classes):
    arrays = (put(np.array(labels)), put(np.array(source_labels)), put(np.array(lam, np.float32)))
    return fetch(soft_labels(*arrays, num_classes=num_classes))


label_pairs = st.integers(1, 12).flatmap(
    lambda num_classes: st.tuples(
        st.just(num_classes),
        st.lists(st.tuples(*[st.integers(0, num_classes - 1)] * 2, st.floats(0, 1, width=32)), min_size=1, max_size=6),
    )
)


@given(label_pairs)
def test_soft_labels_equal_the_oracle_and_sum_to_1(put, fetch, case):
    num_classes, rows = case
    labels, source_labels, lam = zip(*rows, strict=True)
    targets = labels_of(put, fetch, labels, source_labels, lam, num_classes)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(
        targets, reference.soft_labels(labels, source_labels, np.array(lam, np.float32), num_classes)
    )
    # The rounding of 1 - lam and that of the sum cancel.
    assert targets.sum(axis=1).tolist() == [1.0] * len(labels)


def test_lam_is_the_weight_of_the_receiving_image_s_label(put, fetch):
    assert labels_of(put, fetch, [0, 1], [2, 0], [0.75, 1.0], 3).tolist() == [[0.75, 0, 0.25], [0, 1, 0]]


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.7, 1.0])
def test_equal_labels_give_one_hot_rows(lam, put, fetch):
    assert labels_of(put, fetch, [1], [1], [lam], 3).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
@pytest.mark.parametrize("lam_dtype", [np.float16, np.float32, np.float64])
def test_labels_of_any_integer_dtype_and_lam_of_any_floating_one_give_float32(dtype, lam_dtype, put, fetch):
    labels = put(np.array([0, 3], dtype))
    targets = fetch(soft_labels(labels, labels[::-1], put(np.array([0.5, 1], lam_dtype)), num_classes=4))
    assert targets.dtype == np.float32
    assert targets.tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0, 1]]


GOOD = {"labels": np.array([0, 1]), "source_labels": np.array([1, 0]), "lam": np.full(2, 0.5, np.float32)}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"labels": np.array([0, 3])},
            ValueError,
            r"labels must be in \[0, 3\) for num_classes=3, got 3 at \[1\]",
        ),
        ({"labels": np.array([-1, 0])}, ValueError, r"labels must be in \[0, 3\).* got -1 at \[0\]"),
        ({"source_labels": np.array([0, 7])}, ValueError, r"source_labels must be in \[0, 3\).* got 7 at \[1\]"),
        ({"source_labels": np.array([0])}, ValueError, r"source_labels must have shape \(2,\).* got \(1,\)"),
        ({"labels": np.zeros((2, 1, 1), int)}, ValueError, r"labels must have shape \(2,\).* got \(2, 1, 1\)"),
        (
            {"labels": np.zeros((2, 3))},
            ValueError,
            r"num_classes must be left out .* vectors, of shape \(2, 3\); got 3",
        ),
        (
            {"num_classes": None},
            ValueError,
            r"num_classes must be given where labels are class ids, got int64 of shape \(2,\)",
        ),
        (
            {"num_classes": None, "labels": np.zeros((2, 1), np.int32), "source_labels": np.zeros((2, 1), np.int32)},
            ValueError,
            r"num_classes must be given where labels are class ids, got int32 of shape \(2, 1\)",
        ),
        ({"labels": np.zeros((2, 1))}, ValueError, r"num_classes must be left out where labels are vectors"),
        ({"smoothing": 1.5}, ValueError, r"smoothing must be in \[0, 1\], got 1.5"),
        ({"labels": np.array([0.0, 1.0])}, TypeError, "labels must be of integer dtype, got float64"),
        ({"labels": np.array([True, False])}, TypeError, "labels must be of integer dtype, got bool"),
        ({"labels": [0, 1]}, TypeError, r"labels must be a NumPy or CuPy array, got builtins\.list"),
        ({"lam": np.array([0.5, 1.5])}, ValueError, r"lam must be in \[0, 1\], got 1.5 at \[1\]"),
        ({"lam": np.array([-0.1, 0.5])}, ValueError, r"lam must be in \[0, 1\], got -0.1 at \[0\]"),
        ({"lam": np.array([0.5, np.nan])}, ValueError, r"lam must be in \[0, 1\], got nan at \[1\]"),
        ({"lam": np.array([0, 1])}, TypeError, "lam must be of floating dtype, got int64"),
        ({"lam": np.full(3, 0.5)}, ValueError, r"lam must have shape \(2,\).* got \(3,\)"),
        ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1, got 0"),
        ({"num_classes": 3.0}, ValueError, "num_classes must be an integer of at least 1, got 3.0"),
        ({"num_classes": True}, ValueError, "num_classes must be an integer of at least 1, got True"),
    ],
)
def test_wrong_arguments_of_soft_labels_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        soft_labels(**{**GOOD, "num_classes": 3, **wrong})


def test_class_ids_may_have_an_axis_of_their_own(put, fetch):
    ids, lam = [np.array([0, 2], np.int32), np.array([1, 1], np.int32)], np.array([0.25, 1], np.float32)
    expected = labels_of(put, fetch, *ids, lam, 3)
    for labels, source_labels in ((ids[0][:, None], ids[1][:, None]), (ids[0][:, None], ids[1])):
        np.testing.assert_array_equal(labels_of(put, fetch, labels, source_labels, lam, 3), expected)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32, np.float64])
def test_vectors_are_weighted_as_they_are(dtype, put, fetch):
    labels, source_labels = np.array([[1, 1, 0], [0, 0, 1]], dtype), np.array([[0, 1, 1], [1, 0, 0]], dtype)
    targets = fetch(soft_labels(put(labels), put(source_labels), put(np.array([0.75, 0.5]))))
    assert targets.dtype == np.float32
    assert targets.tolist() == [[0.75, 1, 0.25], [0.5, 0, 0.5]]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"source_labels": np.zeros((2, 4))}, ValueError, r"source_labels must have shape \(2, 3\).* got \(2, 4\)"),
        ({"labels": np.zeros((2, 3), complex)}, TypeError, "labels must be of real dtype, got complex128"),
        ({"smoothing": 0.1}, ValueError, "smoothing must be 0 where labels are vectors, .* got 0.1"),
        ({"lam": np.array([0.5, 2])}, ValueError, r"lam must be in \[0, 1\], got 2.0 at \[1\]"),
    ],
)
def test_wrong_vectors_are_refused(wrong, error, message):
    good = {"labels": np.zeros((2, 3)), "source_labels": np.zeros((2, 3)), "lam": np.full(2, 0.5)}
    with pytest.raises(error, match=message):
        soft_labels(**{**good, **wrong})


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_spreads_its_share_over_all_classes_and_keeps_the_sum(smoothing, put, fetch):
    labels, lam = put(np.array([0, 3])), put(np.array([0.75, 1.0], np.float32))
    plain = fetch(soft_labels(labels, put(np.array([1, 1])), lam, num_classes=4))
    smoothed = fetch(soft_labels(labels, put(np.array([1, 1])), lam, num_classes=4, smoothing=smoothing))
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed, (1 - smoothing) * plain + smoothing / 4, atol=1e-7)
    np.testing.assert_allclose(smoothed.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_pasting_to_another_place_equals_the_oracle(shape, seed, put, fetch):
    images, source_index, source_boxes = random_case(shape, seed)
    rng = np.random.default_rng(seed)
    sides = source_boxes[:, 2:] - source_boxes[:, :2]
    start = rng.integers(0, np.array(shape[1:3]) - sides + 1)
    boxes = np.concatenate([start, start + sides], axis=1)
    expected, *_ = reference.mix(images, source_index, boxes.tolist(), source_boxes.tolist())
    mixed = paste_boxes(put(images), put(source_index), put(boxes), source_boxes=put(source_boxes))
    np.testing.assert_array_equal(fetch(mixed), expected)
    np.testing.assert_array_equal(_paste_by_mask(images, source_index, boxes, source_boxes), expected)


def test_boxes_of_two_sizes_are_refused():
    images, source_index, boxes = np.zeros((2, 8, 8, 3), np.uint8), np.array([1, 0]), np.array([[0, 0, 4, 4]] * 2)
    other = np.array([[0, 0, 4, 4], [1, 1, 4, 5]])
    message = r"source_boxes must have the sizes of boxes, got \[1, 1, 4, 5\] for \[0, 0, 4, 4\]"
    with pytest.raises(ValueError, match=message):
        paste_boxes(images, source_index, boxes, source_boxes=other)


def test_channels_first_memory_stays_channels_first():
    images, source_index, boxes = random_case((5, 8, 6, 3))
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    mixed = paste_boxes(planar, source_index, boxes)
    assert mixed.transpose(0, 3, 1, 2).flags.c_contiguous
    np.testing.assert_array_equal(mixed, paste_boxes(images, source_index, boxes))


def test_blending_rounds_to_the_nearest_and_leaves_lam_1_alone(put, fetch):
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    source_index = np.array([1, 0])
    mixed = fetch(blend_images(put(images), put(source_index), put(np.array([0.25, 1.0], np.float32))))
    np.testing.assert_array_equal(mixed[1], images[1])
    np.testing.assert_array_equal(mixed[0], np.rint(0.25 * images[0] + 0.75 * images[1]))


@pytest.mark.gpu
def test_on_a_gpu_a_label_outside_the_classes_gives_a_row_of_nan():
    cupy = pytest.importorskip("cupy")
    labels = cupy.array([0, 3, -1, 2])
    targets = cupy.asnumpy(soft_labels(labels, labels[::-1], cupy.full(4, 0.5, cupy.float32), num_classes=3))
    assert np.isnan(targets[1:3]).all()
    assert targets[[0, 3]].tolist() == [[0.5, 0, 0.5], [0.5, 0, 0.5]]

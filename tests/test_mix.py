"""Whole batches: saliencymix and cutmix compared with the oracle, their guarantees as properties, and errors."""

from __future__ import annotations

import functools
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import reference

from dali_saliencymix import MODES, PRESETS, MixOptions, cutmix, mix, mixup, saliencymix, spectral_residual
from dali_saliencymix.boxes import lam_of_saliency
from dali_saliencymix.mix import apply

SHAPES = [(1, 9, 14, 3), (5, 14, 9, 3), (5, 37, 23, 1)]
all_options = pytest.mark.parametrize(
    "options", [{"box": box, "per_batch": per_batch} for box in ("fit", "clip") for per_batch in (False, True)], ids=str
)

PLACEMENT = ("saliency", "source", "destination", "box", "per_batch")


def random_batch(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images without common pixel values, sources with repetitions and fixed points, and lam with 0 and 1."""
    rng = np.random.default_rng(seed)
    count = shape[0]
    blocks = rng.integers(0, 50, (count, -(-shape[1] // 5), -(-shape[2] // 5), shape[3]))
    images = blocks.repeat(5, axis=1).repeat(5, axis=2)[:, : shape[1], : shape[2]]
    images = images + 51 * np.arange(count)[:, None, None, None]
    source_index = np.array([3, 1, 0, 0, 2])[:count] % count
    lam = np.array([rng.random(), 0, 1, *rng.random(2)], np.float32)[:count]
    return images.astype(np.uint8), source_index, lam


def map_of_each(images: np.ndarray, maps: np.ndarray, put, fetch):
    """Return a detector with given maps for some images, for any subset of them in any order."""

    def detector(batch):
        known = {image.tobytes(): saliency_map for image, saliency_map in zip(images, maps, strict=True)}
        return put(np.stack([known[image.tobytes()] for image in fetch(batch)]))

    return detector


def check(mixed, expected, fetch):
    for found, wanted, dtype in zip(mixed, expected, (np.uint8, np.float32, np.int32, np.int32), strict=True):
        found = fetch(found)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


@functools.cache
def fine_grained_maps(shape: tuple[int, ...]) -> list[np.ndarray]:
    return [reference.fine_grained(image.repeat(3 // shape[3], axis=2)) for image in random_batch(shape)[0]]


@all_options
@pytest.mark.parametrize("shape", SHAPES)
def test_saliencymix_with_fine_grained_equals_the_oracle(shape, options, put, fetch):
    batch, maps = random_batch(shape), fine_grained_maps(shape)
    mixed = saliencymix(*map(put, batch), saliency="fine_grained", **options)
    check(mixed, reference.saliencymix(*batch, maps, **options), fetch)


@all_options
def test_saliencymix_with_fine_grained_equals_opencv_s_map_and_the_oracle_on_photos(jpeg_images, options, put, fetch):
    images = np.stack([image[:64, :80] for image in jpeg_images[:5]])
    _, source_index, lam = random_batch((5, 1, 1, 1), seed=3)
    if not hasattr(cv2, "saliency"):
        pytest.skip("needs opencv-contrib: this OpenCV has no saliency module")
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    maps = [detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1] for image in images]
    mixed = saliencymix(put(images), put(source_index), put(lam), saliency="fine_grained", **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, **options), fetch)


@all_options
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 90, 3)])
def test_saliencymix_by_default_takes_the_peak_of_spectral_residual(shape, options, put, fetch):
    # The map is the package's own, which has other tests: in float32, the order of sums decides near ties.
    images, source_index, lam = random_batch(shape)
    maps = fetch(spectral_residual(put(images)))
    mixed = saliencymix(put(images), put(source_index), put(lam), **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, **options), fetch)


@all_options
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cutmix_at_the_edges_equals_the_oracle(shape, options, dtype, put, fetch):
    batch = random_batch(shape)
    edge = np.nextafter(dtype(1), dtype(0))
    centre = np.array([[0.3, 0.8], [0, 0], [edge, 0.5], [0, edge], [edge, 1]], dtype)[: shape[0]]
    mixed = cutmix(*map(put, batch), put(centre), **options)
    check(mixed, reference.cutmix(*batch, centre, **options), fetch)


def test_by_default_saliencymix_fits_and_cutmix_clips_a_box_for_each_image(put, fetch):
    images, source_index, lam = random_batch((5, 37, 23, 3))
    centre, maps = np.full((5, 2), 0.9), np.zeros((5, 37, 23), np.float32)
    maps[:, 33, 20] = 1
    batch = tuple(map(put, (images, source_index, lam)))
    expected = reference.saliencymix(images, source_index, lam, maps, "fit", False)
    check(saliencymix(*batch, saliency=map_of_each(images, maps, put, fetch)), expected, fetch)
    check(cutmix(*batch, put(centre)), reference.cutmix(images, source_index, lam, centre, "clip", False), fetch)


def test_the_geometry_of_the_released_code_is_one_clipped_box_from_the_source_of_image_0(put, fetch):
    images, source_index, _ = random_batch((5, 32, 32, 3))
    lam = np.array([0.3, 0, 1, 0.6, 0.9], np.float32)
    maps = np.zeros((5, 32, 32), np.float32)
    maps[np.arange(5), [20, 9, 2, 30, 16], [11, 9, 29, 4, 16]] = 1
    mixed = saliencymix(
        *map(put, (images, source_index, lam)),
        saliency=map_of_each(images, maps, put, fetch),
        box="clip",
        per_batch=True,
    )
    # The peak of source 3 is at (30, 4); the side is int(32 * sqrt(0.7)) = 26.
    assert fetch(mixed.boxes).tolist() == [[17, 0, 32, 17]] * 5
    check(mixed, reference.saliencymix(images, source_index, lam, maps, "clip", True), fetch)


@st.composite
def cases(draw):
    """Draw a batch of images that all differ, maps of few levels and of any size, points, and all options."""
    count, height, width = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = rng.integers(0, 256, (count, height, width, draw(st.sampled_from([1, 3]))), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    source_index = np.array(draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count)))
    width_of_lam = draw(st.sampled_from([32, 64]))
    lam = draw(st.lists(st.floats(0, 1, width=width_of_lam), min_size=count, max_size=count))
    maps = rng.integers(0, 3, (count, *rng.integers(1, 9, 2))).astype(np.float32)
    point = rng.random((count, 2), np.float32)
    options = {
        "box": draw(st.sampled_from(["fit", "clip"])),
        "per_batch": draw(st.booleans()),
        "source": draw(st.sampled_from(["salient", "non_salient"])),
        "destination": draw(st.sampled_from(["corresponding", "salient", "non_salient", "random"])),
    }
    return images, source_index, np.array(lam, f"f{width_of_lam // 8}"), maps, point, options


@settings(max_examples=150)
@given(cases())
def test_every_scheme_equals_the_oracle_whatever_the_options(put, fetch, case):
    images, source_index, lam, maps, point, options = case
    batch = tuple(map(put, (images, source_index, lam)))
    given_point = {"point": put(point)} if options["destination"] == "random" else {}
    mixed = saliencymix(*batch, saliency=map_of_each(images, maps, put, fetch), **given_point, **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, point=point, **options), fetch)


@settings(max_examples=100)
@given(cases(), st.sampled_from([0, 1, 3]))
def test_labels_weighted_by_saliency_equal_the_oracle_and_nothing_else_changes(put, fetch, case, shift):
    images, source_index, lam, maps, point, options = case
    maps = maps - shift
    batch = tuple(map(put, (images, source_index, lam)))
    given_point = {"point": put(point)} if options["destination"] == "random" else {}
    detector = map_of_each(images, maps, put, fetch)
    mixed = saliencymix(*batch, saliency=detector, label_weight="saliency", **given_point, **options)
    by_area = saliencymix(*batch, saliency=detector, **given_point, **options)
    check(mixed._replace(lam=by_area.lam), [fetch(array) for array in by_area], fetch)
    weight, boxes, source_boxes = fetch(mixed.lam), fetch(mixed.boxes), fetch(mixed.source_boxes)
    assert weight.dtype == np.float32
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight[~boxes.any(axis=1)] == 1).all()
    expected = [
        reference.weight_by_saliency(maps[i], boxes[i], maps[source], source_boxes[i], *images.shape[1:3])
        for i, source in enumerate(source_index)
    ]
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=0)


CORNERS, MIDDLE, DIAGONAL = (np.diag(values) for values in ([1.0, 0, 0, 1], [0, 1.0, 1, 0], [1.0, 1, 1, 1]))


@pytest.mark.parametrize(
    ("own_map", "source_map", "expected"),
    [
        (np.ones((3, 5)), np.full((3, 5), 7.0), 0.75),  # here and below, 0.75 is the weight by area
        (np.zeros((4, 4)), DIAGONAL, 0.75),
        (DIAGONAL, np.zeros((4, 4)), 0.75),
        (np.full((4, 4), np.nan), DIAGONAL, 0.75),
        (np.ones((4, 4), bool), np.ones((4, 4), bool), 0.75),
        (-np.ones((4, 4)), DIAGONAL, 0.75),  # shifted, it is 0
        (MIDDLE, CORNERS, 0.75),  # no saliency is kept and none is pasted
        (CORNERS, CORNERS, 1),
        (MIDDLE * 1e-300, DIAGONAL * 1e300, 0),
        (CORNERS, MIDDLE, 0.5),
        (DIAGONAL, DIAGONAL, 0.5),
        (DIAGONAL - 1, DIAGONAL - 3, 0.5),
        (np.diag([1, 1, 1, np.nan]), np.diag([1, 1, -np.inf, np.inf]), (1 / 3) / (1 / 3 + 1 / 2)),
    ],
)
def test_saliency_of_any_kind_makes_a_weight(own_map, source_map, expected, put, fetch):
    box = put(np.array([[3, 5, 9, 15]]))  # the cells in the middle of 4 x 4
    maps = put(np.stack([own_map, source_map]))
    (weight,) = fetch(lam_of_saliency(maps, put(np.array([0])), box, put(np.array([1])), box, 12, 20))
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_with_one_box_for_the_batch_each_image_s_own_map_sets_its_label_weight(put, fetch):
    images, source_index, lam = random_batch((5, 16, 16, 1))
    maps = np.random.default_rng(2).random((5, 8, 8), np.float32)
    options = {"saliency": map_of_each(images, maps, put, fetch), "per_batch": True, "label_weight": "saliency"}
    mixed = saliencymix(*map(put, (images, source_index, lam)), **options)
    assert len(np.unique(fetch(mixed.boxes), axis=0)) == 1
    assert len(np.unique(fetch(mixed.lam))) == 5


@given(cases())
def test_cutmix_equals_the_oracle_whatever_the_options(put, fetch, case):
    images, source_index, lam, _, point, options = case
    options = {name: options[name] for name in ("box", "per_batch")}
    mixed = cutmix(*map(put, (images, source_index, lam)), put(point), **options)
    check(mixed, reference.cutmix(images, source_index, lam, point, **options), fetch)


@given(cases())
def test_mixup_blends_to_within_half_a_grey_level(put, fetch, case):
    images, source_index, lam, _, _, options = case
    mixed = mixup(*map(put, (images, source_index, lam)), per_batch=options["per_batch"])
    expected, weight = reference.mixup(images, source_index, lam, options["per_batch"])
    assert fetch(mixed.images).dtype == np.uint8
    # Half a grey level for the rounding, plus the error of float32 for numbers of up to 255.
    assert np.abs(fetch(mixed.images) - expected).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(fetch(mixed.lam), weight.astype(np.float32))
    assert not fetch(mixed.boxes).any()
    assert not fetch(mixed.source_boxes).any()


@given(cases())
def test_blending_passes_its_images_to_paste_with_empty_boxes(put, fetch, case):
    images, source_index, lam, _, point, options = case
    batch, mode = tuple(map(put, (images, source_index, lam))), np.arange(len(images)) % 3
    calls = []

    def paste(images, source_index, boxes, *, source_boxes):
        calls.append((images, source_index, boxes, source_boxes))
        return images + put(np.uint8(1))

    for function, others in ((mixup, ()), (functools.partial(mix, **options), (put(mode), put(point)))):
        per_batch = {"per_batch": options["per_batch"]}
        plain, finished = (function(*batch, *others, **per_batch, **given) for given in ({}, {"paste": paste}))
        mixed, index, boxes, source_boxes = calls.pop()
        np.testing.assert_array_equal(fetch(mixed), fetch(plain.images))
        np.testing.assert_array_equal(fetch(index), source_index)
        assert (boxes.shape, source_boxes) == ((len(images), 4), None)
        assert not fetch(boxes).any()
        np.testing.assert_array_equal(fetch(finished.images), fetch(plain.images) + np.uint8(1))
        check(finished._replace(images=mixed), [fetch(array) for array in plain], fetch)


@settings(max_examples=100)
@given(cases(), st.lists(st.integers(0, 2), min_size=5, max_size=5), st.sampled_from(["area", "saliency"]))
def test_mix_gives_each_image_what_its_mode_alone_would_give(put, fetch, case, modes, label_weight):
    images, source_index, lam, maps, point, options = case
    count = len(images)
    mode = np.array(modes[:count])
    batch = tuple(map(put, (images, source_index, lam)))
    detector = map_of_each(images, maps, put, fetch)
    mixed = mix(*batch, put(mode), put(point), saliency=detector, label_weight=label_weight, **options)
    per_batch = options["per_batch"]
    given_point = {"point": put(point)} if options["destination"] == "random" else {}
    alone = (
        saliencymix(*batch, saliency=detector, label_weight=label_weight, **given_point, **options),
        cutmix(*batch, put(point), per_batch=per_batch),
        mixup(*batch, per_batch=per_batch),
    )
    if per_batch:
        mode = np.full(count, mode[0])
    for i in range(count):
        check([array[i : i + 1] for array in mixed], [fetch(array[i : i + 1]) for array in alone[mode[i]]], fetch)


@settings(max_examples=100)
@given(cases(), st.sampled_from(["spectral_residual", "fine_grained", "image_signature"]))
def test_each_pixel_is_the_receiver_s_or_the_source_s_and_1_minus_lam_is_the_pasted_area(put, fetch, case, saliency):
    images, source_index, lam, _, point, options = case
    count, height, width, _ = images.shape
    given_point = {"point": put(point)} if options["destination"] == "random" else {}
    mixed = saliencymix(*map(put, (images, source_index, lam)), saliency=saliency, **given_point, **options)
    kept, boxes, source_boxes, pixels = map(fetch, (mixed.lam, mixed.boxes, mixed.source_boxes, mixed.images))
    for i in range(count):
        (y0, x0, y1, x1), (v0, u0, v1, u1) = boxes[i], source_boxes[i]
        assert (y1 - y0, x1 - x0) == (v1 - v0, u1 - u0)
        inside = np.zeros((height, width), bool)
        inside[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(pixels[i, y0:y1, x0:x1], images[source_index[i], v0:v1, u0:u1])
        np.testing.assert_array_equal(pixels[i][~inside], images[i][~inside])
        assert kept[i] == np.float32(1 - inside.sum() / (height * width))


@given(cases())
def test_the_most_salient_pixel_is_pasted_and_with_peaks_given_no_detector_is_asked(put, fetch, case):
    images, source_index, lam, maps, point, options = case
    options |= {"source": "salient", "destination": options["destination"].removeprefix("non_")}
    given_point = {"point": put(point)} if options["destination"] == "random" else {}
    size = images.shape[1:3]
    peaks = np.array([reference.peak(saliency_map, *size) for saliency_map in maps])
    batch = tuple(map(put, (images, source_index, lam)))
    mixed = saliencymix(*batch, peaks=put(peaks), **given_point, **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, point=point, **options), fetch)
    for i, (v0, u0, v1, u1) in enumerate(fetch(mixed.source_boxes)):
        y, x = peaks[source_index[0 if options["per_batch"] else i]]
        assert (v0 <= y < v1 and u0 <= x < u1) or v0 == v1


@settings(max_examples=100)
@given(cases(), st.permutations(range(5)), st.sampled_from(["spectral_residual", "fine_grained", "image_signature"]))
def test_a_permuted_batch_gives_the_permuted_result(put, fetch, case, order, saliency):
    images, source_index, lam, _, point, options = case
    options |= {"per_batch": False, "saliency": saliency}
    order = np.array([i for i in order if i < len(images)])
    mode = np.arange(len(images)) % 3
    whole = (images, source_index, lam, mode, point)
    permuted = (images[order], np.argsort(order)[source_index[order]], lam[order], mode[order], point[order])
    mixed = mix(*map(put, whole), **options)
    check(mix(*map(put, permuted), **options), [fetch(array)[order] for array in mixed], fetch)


@pytest.mark.parametrize("saliency", ["spectral_residual", "fine_grained"])
def test_lam_1_leaves_the_image_and_lam_0_replaces_it(saliency, put, fetch):
    images, source_index, _ = random_batch((5, 37, 23, 3))
    for lam, expected in ((1, images), (0, images[source_index])):
        mixed = saliencymix(put(images), put(source_index), put(np.full(5, lam, np.float32)), saliency=saliency)
        np.testing.assert_array_equal(fetch(mixed.images), expected)
        assert fetch(mixed.lam).tolist() == [lam] * 5


def test_the_result_is_new_even_where_nothing_is_mixed(put, fetch):
    images, source_index, _ = random_batch((5, 8, 8, 3))
    argument = put(images)
    saliencymix(argument, put(source_index), put(np.ones(5, np.float32))).images[:] = 0
    np.testing.assert_array_equal(fetch(argument), images)


def test_a_detector_of_the_user_s_sees_the_images_and_sets_the_peak(put, fetch):
    images = np.zeros((2, 12, 10, 3), np.uint8)
    images[0, 3, 6, 1] = images[1, 8, 2, 1] = 200
    lam = np.full(2, 0.98, np.float32)
    mixed = saliencymix(put(images), put(np.array([1, 0])), put(lam), saliency=lambda batch: batch[..., 1])
    assert fetch(mixed.boxes).tolist() == [[8, 2, 9, 3], [3, 6, 4, 7]]


@pytest.mark.parametrize(
    "returned",
    [np.zeros((4, 8, 8), np.float32), np.zeros((5, 8, 8, 1), np.float32), np.zeros((5, 64)), np.zeros(()), [[[0.0]]]],
    ids=["another count", "4-d", "2-d", "0-d", "a list"],
)
def test_a_detector_that_returns_something_else_is_refused(returned):
    images, *_ = random_batch((5, 8, 8, 3))
    with pytest.raises(ValueError, match=r"saliency must return maps of shape \(5, h, w\).* got (numpy|builtins)\."):
        saliencymix(images, np.arange(5), np.full(5, 0.5), saliency=lambda _: returned)


WRONG_IMAGES = [
    (np.zeros((5, 8, 8, 3), np.float32), TypeError, "images must be uint8 .*, got float32: .* Mix before normalising"),
    (np.zeros((5, 8, 8, 3), np.float64), TypeError, "images must be uint8 .*, got float64: .* returns noise"),
    (np.zeros((5, 8, 8, 3), np.int64), TypeError, "images must be uint8 .*, got int64: saliency is defined on 8-bit"),
    (np.zeros((5, 8, 8, 3), np.uint16), TypeError, "images must be uint8 .*, got uint16: saliency is defined on 8-bit"),
    (np.zeros((5, 3, 8, 8), np.uint8), ValueError, r"\(N, H, W, C\).* got \(5, 3, 8, 8\): .* channels first"),
    (np.zeros((5, 8, 8, 4), np.uint8), ValueError, r"with C of 1 or 3, got \(5, 8, 8, 4\)$"),
    (np.zeros((8, 8, 3), np.uint8), ValueError, r"images must have shape \(N, H, W, C\).* got \(8, 8, 3\)$"),
    (np.zeros((0, 8, 8, 3), np.uint8), ValueError, r"images must not be empty, got shape \(0, 8, 8, 3\)"),
    (np.zeros((5, 0, 8, 3), np.uint8), ValueError, r"images must not be empty, got shape \(5, 0, 8, 3\)"),
    ([[0]], TypeError, r"images must be a NumPy or CuPy array, got builtins\.list"),
]
WRONG_SOURCES = [
    (np.array([0, 1, 2, 3, 5]), ValueError, r"source_index must be in \[0, 5\), .* got 5 at \[4\]"),
    (np.array([0, 1, -1, 3, 4]), ValueError, r"source_index must be in \[0, 5\), .* got -1 at \[2\]"),
    (np.arange(4), ValueError, r"source_index must have shape \(5,\), .* got \(4,\)"),
    (np.arange(5.0), TypeError, "source_index must be of integer dtype, got float64"),
    (np.ones(5, bool), TypeError, "source_index must be of integer dtype, got bool"),
    ([0, 1, 2, 3, 4], TypeError, r"source_index must be a NumPy or CuPy array, got builtins\.list"),
]
WRONG_LAMS = [
    (np.array([0, 0, 0, 0, 1.01]), ValueError, r"lam must be in \[0, 1\], got 1.01 at \[4\]"),
    (np.array([0, -1e-9, 0, 0, 1]), ValueError, r"lam must be in \[0, 1\], got -1e-09 at \[1\]"),
    (np.array([0, 0, np.nan, 0, 0]), ValueError, r"lam must be in \[0, 1\], got nan at \[2\]"),
    (np.ones(1), ValueError, r"lam must have shape \(5,\), .* got \(1,\)"),
    (np.ones(5, int), TypeError, "lam must be of floating dtype, got int64"),
    (0.5, TypeError, r"lam must be a NumPy or CuPy array, got builtins\.float"),
]
WRONG_POINTS = [
    (np.array([[0.5, 0.5]] * 4 + [[0.5, 1.5]]), ValueError, r"point must be in \[0, 1\], got 1.5 at \[4, 1\]"),
    (np.array([[np.nan, 0.5]] * 5), ValueError, r"point must be in \[0, 1\], got nan at \[0, 0\]"),
    (np.full(5, 0.5), ValueError, r"point must have shape \(5, 2\), .* got \(5,\)"),
    (np.ones((5, 2), int), TypeError, "point must be of floating dtype, got int64"),
]
WRONG = [("images", *case) for case in WRONG_IMAGES]
WRONG += [("source_index", *case) for case in WRONG_SOURCES]
WRONG += [("lam", *case) for case in WRONG_LAMS]
WRONG += [("box", "cut", ValueError, "box must be one of fit, clip, got 'cut'")]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_wrong_arguments_are_named_with_the_rule_and_the_value(name, value, error, message):
    images, source_index, lam = random_batch((5, 8, 8, 3))
    arguments = {"images": images, "source_index": source_index, "lam": lam, name: value}
    with pytest.raises(error, match=message):
        saliencymix(**arguments)
    with pytest.raises(error, match=message):
        cutmix(**arguments, point=np.full((5, 2), 0.5))


@pytest.mark.parametrize(("point", "error", "message"), WRONG_POINTS)
def test_wrong_points_are_refused(point, error, message):
    with pytest.raises(error, match=message):
        cutmix(*random_batch((5, 8, 8, 3)), point)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"destination": "random"}, ValueError, "point must be given with destination='random'"),
        (
            {"point": np.full((5, 2), 0.5)},
            ValueError,
            "point must be left out without destination='random', got destination='corresponding'",
        ),
        (
            {"peaks": np.zeros((5, 2), int), "saliency": "fine_grained"},
            ValueError,
            "saliency must be left out where peaks are given, got 'fine_grained'",
        ),
        (
            {"peaks": np.zeros((5, 2), int), "destination": "non_salient"},
            ValueError,
            "destination must not be 'non_salient' where peaks are given",
        ),
        (
            {"peaks": np.zeros((5, 2), int), "label_weight": "saliency"},
            ValueError,
            "label_weight must be 'area' where peaks are given: there is no map, got 'saliency'",
        ),
        ({"peaks": np.full((5, 2), 8)}, ValueError, r"peaks\[:, 0\] must be in \[0, 8\), the rows .* got 8 at \[0\]"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        saliencymix(*random_batch((5, 8, 8, 3)), **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_options_and_an_option_that_is_given_goes_before_it(preset, put, fetch):
    batch = tuple(map(put, random_batch((5, 37, 23, 3))))
    by_name = [fetch(array) for array in saliencymix(*batch, preset=preset)]
    spelled_out = {name: getattr(PRESETS[preset], name) for name in PLACEMENT}
    check(saliencymix(*batch, **spelled_out), by_name, fetch)
    options = {**spelled_out, "box": "clip", "per_batch": False, "saliency": "image_signature"}
    expected = [fetch(array) for array in saliencymix(*batch, **options)]
    given_options = {name: options[name] for name in ("box", "per_batch", "saliency")}
    check(saliencymix(*batch, preset=preset, **given_options), expected, fetch)


def test_presets_are_what_the_paper_and_its_code_do():
    paper, released = ([getattr(PRESETS[name], option) for option in PLACEMENT] for name in ("paper", "released-code"))
    assert paper == ["fine_grained", "salient", "corresponding", "fit", False]
    assert released == ["fine_grained", "salient", "corresponding", "clip", True]


@pytest.mark.parametrize("label_weight", ["area", "saliency"])
@pytest.mark.parametrize("lam", [[1.0, 1, 1, 1, 1], [1, 0.5, 1, 1, 0.5]])
def test_on_a_cpu_only_the_maps_that_are_needed_are_computed(lam, label_weight):
    images, source_index, _ = random_batch((5, 8, 8, 3))
    asked = []

    def detector(batch):
        asked.extend(image.tobytes() for image in batch)
        return spectral_residual(batch)

    mixed = saliencymix(images, source_index, np.array(lam), saliency=detector, label_weight=label_weight)
    pairs = [pair for pair, share in zip(enumerate(source_index), lam, strict=True) if share < 1]
    needed = {images[source].tobytes() for _, source in pairs}
    if label_weight == "saliency":
        needed |= {images[receiver].tobytes() for receiver, _ in pairs}
    assert sorted(asked) == sorted(needed)
    check(mixed, saliencymix(images, source_index, np.array(lam), label_weight=label_weight), np.asarray)
    assert (mixed.lam == 1).tolist() == [share == 1 for share in lam]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        (np.array([0, 1, 2, 3, 0]), ValueError, r"mode must be in \[0, 3\), which are saliencymix, .* got 3 at \[3\]"),
        (np.zeros(5), TypeError, "mode must be of integer dtype, got float64"),
    ],
)
def test_wrong_modes_are_refused(mode, error, message):
    with pytest.raises(error, match=message):
        mix(*random_batch((5, 8, 8, 3)), mode, np.full((5, 2), 0.5))


def test_modes_are_named_in_the_order_of_their_numbers():
    assert MODES == ("saliencymix", "cutmix", "mixup")


def test_arguments_are_checked_once():
    # One call of a public function checks once, plus once for the detector, which is a public function too.
    batch = random_batch((5, 37, 23, 3))
    saliencymix(*batch)  # import and compile first
    calls = []  # but not those of one check by another

    def is_check(frame):
        return frame.f_code.co_filename.endswith("_checks.py")

    def count(frame, event, _):
        if event == "call" and is_check(frame) and not is_check(frame.f_back):
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        saliencymix(*batch)
    finally:
        sys.setprofile(None)
    assert "check_images" in calls
    assert len(calls) <= 5, calls


def test_several_modes_need_to_be_told_apart():
    options = MixOptions(modes={"mixup": 1, "cutmix": 1})
    with pytest.raises(ValueError, match="mode must be given where there are several modes: mixup, cutmix"):
        apply(options, *random_batch((5, 9, 14, 3)))

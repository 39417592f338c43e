"""Whole batches: saliencymix and cutmix against the oracle, their promises as properties, and what they refuse."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_saliencymix import cutmix, saliencymix, spectral_residual

SHAPES = [(1, 9, 14, 3), (5, 14, 9, 3), (5, 37, 23, 1)]
all_options = pytest.mark.parametrize(
    "options", [{"box": box, "per_batch": per_batch} for box in ("fit", "clip") for per_batch in (False, True)], ids=str
)


def random_batch(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images that share no pixel value, sources that repeat and point at themselves, lam with 0 and 1."""
    rng = np.random.default_rng(seed)
    count = shape[0]
    blocks = rng.integers(0, 50, (count, -(-shape[1] // 5), -(-shape[2] // 5), shape[3]))
    images = blocks.repeat(5, axis=1).repeat(5, axis=2)[:, : shape[1], : shape[2]]
    images = images + 51 * np.arange(count)[:, None, None, None]
    source_index = np.array([3, 1, 0, 0, 2])[:count] % count
    lam = np.array([rng.random(), 0, 1, *rng.random(2)], np.float32)[:count]
    return images.astype(np.uint8), source_index, lam


def check(mixed, expected, fetch):
    for found, wanted, dtype in zip(mixed, expected, (np.uint8, np.float32, np.int32), strict=True):
        found = fetch(found)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


@all_options
@pytest.mark.parametrize("shape", SHAPES)
def test_saliencymix_with_fine_grained_equals_the_oracle(shape, options, put, fetch):
    batch = random_batch(shape)
    maps = [reference.fine_grained(image.repeat(3 // shape[3], axis=2)) for image in batch[0]]
    mixed = saliencymix(*map(put, batch), saliency="fine_grained", **options)
    check(mixed, reference.saliencymix(*batch, maps, **options), fetch)


@all_options
def test_saliencymix_with_fine_grained_equals_opencv_s_map_and_the_oracle_on_photos(jpeg_images, options, put, fetch):
    images = np.stack([image[:64, :80] for image in jpeg_images[:5]])
    _, source_index, lam = random_batch((5, 1, 1, 1), seed=3)
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    maps = [detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1] for image in images]
    mixed = saliencymix(put(images), put(source_index), put(lam), saliency="fine_grained", **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, **options), fetch)


@all_options
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 90, 3)])
def test_saliencymix_by_default_takes_the_peak_of_spectral_residual(shape, options, put, fetch):
    # The map is the package's own, checked elsewhere: in float32 the order of sums decides between near ties.
    images, source_index, lam = random_batch(shape)
    picked = [source_index[0]] if options["per_batch"] else range(shape[0])
    maps = dict(zip(picked, fetch(spectral_residual(put(images[list(picked)]))), strict=True))
    maps = [maps.get(i, np.zeros((1, 1))) for i in range(shape[0])]
    mixed = saliencymix(put(images), put(source_index), put(lam), **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, **options), fetch)


@all_options
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cutmix_equals_the_oracle(shape, options, dtype, put, fetch):
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
    check(saliencymix(*batch, saliency=lambda _: put(maps)), expected, fetch)
    check(cutmix(*batch, put(centre)), reference.cutmix(images, source_index, lam, centre, "clip", False), fetch)


def test_the_geometry_of_the_released_code_is_one_clipped_box_from_the_source_of_image_0(put, fetch):
    images, source_index, _ = random_batch((5, 32, 32, 3))
    lam = np.array([0.3, 0, 1, 0.6, 0.9], np.float32)
    maps = np.zeros((5, 32, 32), np.float32)
    maps[np.arange(5), [20, 9, 2, 30, 16], [11, 9, 29, 4, 16]] = 1
    mixed = saliencymix(
        *map(put, (images, source_index, lam)),
        saliency=lambda batch: put(maps[source_index[:1]] if len(batch) == 1 else maps),
        box="clip",
        per_batch=True,
    )
    # Source 3 has its peak at (30, 4); the side is int(32 * sqrt(0.7)) = 26.
    assert fetch(mixed.boxes).tolist() == [[17, 0, 32, 17]] * 5
    check(mixed, reference.saliencymix(images, source_index, lam, maps, "clip", True), fetch)


@st.composite
def cases(draw):
    """Draw a batch, maps of few levels and of any size, and all options of the two functions."""
    count, height, width = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = rng.integers(0, 256, (count, height, width, draw(st.sampled_from([1, 3]))), np.uint8)
    source_index = np.array(draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count)))
    width_of_lam = draw(st.sampled_from([32, 64]))
    lam = draw(st.lists(st.floats(0, 1, width=width_of_lam), min_size=count, max_size=count))
    maps = rng.integers(0, 3, (count, *rng.integers(1, 9, 2))).astype(np.float32)
    centre = rng.random((count, 2), np.float32)
    options = {"box": draw(st.sampled_from(["fit", "clip"])), "per_batch": draw(st.booleans())}
    return images, source_index, np.array(lam, f"f{width_of_lam // 8}"), maps, centre, options


@given(cases())
def test_both_functions_equal_the_oracle_whatever_the_options(put, fetch, case):
    images, source_index, lam, maps, centre, options = case
    batch = tuple(map(put, (images, source_index, lam)))
    wanted_maps = maps[source_index[:1]] if options["per_batch"] else maps
    mixed = saliencymix(*batch, saliency=lambda _: put(wanted_maps), **options)
    check(mixed, reference.saliencymix(images, source_index, lam, maps, **options), fetch)
    mixed = cutmix(*batch, put(centre), **options)
    check(mixed, reference.cutmix(images, source_index, lam, centre, **options), fetch)


@settings(max_examples=30)
@given(cases(), st.sampled_from(["spectral_residual", "fine_grained"]))
def test_each_pixel_is_the_receiver_s_or_the_source_s_and_1_minus_lam_is_the_pasted_area(put, fetch, case, saliency):
    images, source_index, lam, _, _, options = case
    count, height, width, _ = images.shape
    mixed = saliencymix(*map(put, (images, source_index, lam)), saliency=saliency, **options)
    kept, boxes, pixels = fetch(mixed.lam), fetch(mixed.boxes), fetch(mixed.images)
    for i in range(count):
        y0, x0, y1, x1 = boxes[i]
        inside = np.zeros((height, width), bool)
        inside[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(pixels[i][inside], images[source_index[i]][inside])
        np.testing.assert_array_equal(pixels[i][~inside], images[i][~inside])
        assert kept[i] == np.float32(1 - inside.sum() / (height * width))


@pytest.mark.parametrize("saliency", ["spectral_residual", "fine_grained"])
@pytest.mark.parametrize("box", ["fit", "clip"])
def test_a_permuted_batch_gives_the_permuted_result(saliency, box, put, fetch):
    images, source_index, lam = random_batch((5, 37, 23, 3))
    order = np.array([2, 4, 0, 1, 3])
    permuted = (images[order], np.argsort(order)[source_index[order]], lam[order])
    mixed = saliencymix(*map(put, (images, source_index, lam)), saliency=saliency, box=box)
    check(saliencymix(*map(put, permuted), saliency=saliency, box=box), [fetch(a)[order] for a in mixed], fetch)


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
    with pytest.raises(ValueError, match=r"saliency must return maps of shape \(5, h, w\).* got (numpy|builtins)\."):
        saliencymix(*random_batch((5, 8, 8, 3)), saliency=lambda _: returned)


WRONG_IMAGES = [
    (np.zeros((5, 8, 8, 3), np.float32), TypeError, "images must be uint8 .*, got float32: .* Mix before normalising"),
    (np.zeros((5, 8, 8, 3), np.float64), TypeError, "images must be uint8 .*, got float64: .* returns noise"),
    (np.zeros((5, 8, 8, 3), np.int64), TypeError, "images must be uint8 .*, got int64: saliency is defined on 8-bit"),
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
WRONG_CENTRES = [
    (np.array([[0.5, 0.5]] * 4 + [[0.5, 1.5]]), ValueError, r"centre must be in \[0, 1\], got 1.5 at \[4, 1\]"),
    (np.array([[np.nan, 0.5]] * 5), ValueError, r"centre must be in \[0, 1\], got nan at \[0, 0\]"),
    (np.full(5, 0.5), ValueError, r"centre must have shape \(5, 2\), .* got \(5,\)"),
    (np.ones((5, 2), int), TypeError, "centre must be of floating dtype, got int64"),
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
        cutmix(**arguments, centre=np.full((5, 2), 0.5))


@pytest.mark.parametrize(("centre", "error", "message"), WRONG_CENTRES)
def test_wrong_centres_are_refused(centre, error, message):
    with pytest.raises(error, match=message):
        cutmix(*random_batch((5, 8, 8, 3)), centre)


def test_an_unknown_detector_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="saliency must be one of fine_grained, spectral_residual"):
        saliencymix(None, None, None, saliency="vgg")

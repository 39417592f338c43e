"""The detectors compared with OpenCV and with the oracle, and properties that all of them have."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from shared import reference

from dali_saliencymix import (
    DETECTORS,
    fine_grained,
    frequency_tuned,
    get_detector,
    image_signature,
    phase_spectrum,
    saliency_peaks,
    spectral_residual,
)
from dali_saliencymix._array import fft_module
from dali_saliencymix.saliency import contrast, spectral
from dali_saliencymix.saliency.filters import filtered
from dali_saliencymix.saliency.grey import luma, small_luma
from dali_saliencymix.saliency.lab import channel_planes, lab, small_planes

TOLERANCE = 5e-6
SIZES = [(1, 7), (7, 1), (2, 2), (5, 9), (37, 23), (64, 64), (70, 131), (224, 224)]

each_detector = pytest.mark.parametrize("detector", DETECTORS.values(), ids=list(DETECTORS))


def opencv_map(name: str, image: np.ndarray) -> np.ndarray:
    if not hasattr(cv2, "saliency"):
        pytest.skip("needs opencv-contrib: this OpenCV has no saliency module")
    detector = getattr(cv2.saliency, f"StaticSaliency{name}_create")()
    found, saliency_map = detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert found
    return saliency_map


def opencv_grey(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)


def noise(height: int, width: int, *, seed: int = 0, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (height, width, 3), np.uint8)


def two_levels(height: int, width: int) -> np.ndarray:
    image = np.full((height, width, 3), (200, 40, 90), np.uint8)
    image[height // 3 : height // 2 + 1, width // 4 : width // 2 + 1] = (10, 250, 30)
    return image


def concentric() -> np.ndarray:
    """Return an image whose centre is much darker than near pixels and much brighter than far ones, or the reverse."""
    image = np.full((169, 169, 3), 91, np.uint8)
    for half, level in ((31, 113), (22, 253), (1, 34)):
        image[84 - half : 84 + half, 84 - half : 84 + half] = level
    return image


def synthetic_images() -> dict[str, np.ndarray]:
    images = {f"{kind.__name__} {h}x{w}": kind(h, w) for kind in (noise, two_levels) for h, w in SIZES}
    images |= {f"smooth {h}x{w}": cv2.GaussianBlur(noise(h, w), (0, 0), 6) for h, w in SIZES}
    images |= {f"constant {level}": np.full((37, 23, 3), level, np.uint8) for level in (0, 1, 128, 255)}
    return images


@pytest.mark.parametrize("name", synthetic_images())
def test_fine_grained_equals_opencv_bit_exactly(name, put, fetch):
    image = synthetic_images()[name]
    np.testing.assert_array_equal(fetch(fine_grained(put(image[None])))[0], opencv_map("FineGrained", image))


def test_fine_grained_equals_opencv_where_on_and_off_add_up_to_more_than_8_bits(put, fetch):
    image = concentric()
    expected = opencv_map("FineGrained", image)
    assert round(float(expected[84, 84]) * 255) == 50  # 306 in 8 bits, the largest sum
    np.testing.assert_array_equal(fetch(fine_grained(put(image[None])))[0], expected)


@pytest.mark.parametrize("low", [160, 200, 250])
def test_fine_grained_equals_opencv_where_float32_sums_round(low, put, fetch):
    image = noise(224, 224, low=low)
    assert luma(image[None]).sum() > 2**23
    np.testing.assert_array_equal(fetch(fine_grained(put(image[None])))[0], opencv_map("FineGrained", image))


def test_fine_grained_equals_opencv_on_photos(jpeg_images):
    # The sum of the largest photo exceeds 2**24, where the order of summation must be OpenCV's, as in NumPy.
    assert max(int(luma(image[None]).sum()) for image in jpeg_images) > 2**24
    for image in jpeg_images:
        np.testing.assert_array_equal(fine_grained(image[None])[0], opencv_map("FineGrained", image))


@pytest.mark.parametrize("image", [noise(1, 2), noise(2, 1), noise(9, 14), two_levels(37, 23), noise(52, 40, low=90)])
def test_fine_grained_equals_the_oracle(image, put, fetch):
    levels = fetch(fine_grained(put(image[None])))[0] * 255
    np.testing.assert_array_equal(np.rint(levels), reference.fine_grained(image))
    np.testing.assert_allclose(levels, np.rint(levels), rtol=1e-6)


def test_fine_grained_for_a_gpu_equals_that_for_a_cpu(jpeg_images):
    # A GPU takes the whole batch at once, a CPU one image at a time.
    images = np.stack([image[:60, :80] for image in jpeg_images])
    np.testing.assert_array_equal(contrast._fine_grained(images), fine_grained(images))


def test_spectral_residual_equals_opencv_on_photos(jpeg_images, put, fetch):
    same_peak = []
    for image in jpeg_images:
        expected = opencv_map("SpectralResidual", image)
        found = fetch(spectral_residual(put(image[None])))[0]
        found = cv2.resize(found, image.shape[1::-1], interpolation=cv2.INTER_LINEAR_EXACT)
        # OpenCV's phase angles are accurate to 1.7e-4, and the square doubles this error if all bins add up. The
        # largest error was 9.4e-5 for 410 pictures like these and 7.3e-5 for 200 photos from ImageNet. An image of two
        # levels can reach 4e-3, since many of its bins are rounding errors.
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4)
        same_peak.append(found.argmax() == expected.argmax())
    assert np.mean(same_peak) >= 0.9  # measured for those pictures and photos: 1.0


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (8, 8), (37, 23), (63, 64), (64, 64), (40, 100), (224, 224)])
def test_spectral_residual_equals_the_oracle_at_the_size_of_the_map(size, put, fetch):
    image = noise(*size)
    map_size = min(64, size[0]), min(64, size[1])
    found = fetch(spectral_residual(put(image[None])))[0]
    assert found.shape == map_size
    # Error of single precision: 7e-7 with SciPy's FFT, and 7e-6 in the worst of 200 draws of `worst_fft`.
    np.testing.assert_allclose(found, reference.spectral_residual(opencv_grey(image, map_size)), rtol=0, atol=2e-5)


def test_spectral_residual_takes_what_has_no_finite_inverse_for_an_empty_bin(monkeypatch):
    image = two_levels(64, 1).repeat(64, axis=1)[None]
    expected = spectral_residual(image, algorithm="array")
    fft = fft_module(np)

    def rfft2(grey):
        spectrum = fft.rfft2(grey)
        assert (spectrum == 0).any()
        return np.where(spectrum == 0, np.complex64(1e-40), spectrum)

    patched = SimpleNamespace(rfft2=rfft2, ifft2=fft.ifft2)
    monkeypatch.setattr(spectral, "fft_module", lambda xp: patched)
    np.testing.assert_array_equal(spectral_residual(image, algorithm="array"), expected)


@pytest.mark.parametrize("size", [(1, 7), (2, 2), (2, 9), (3, 5), (8, 8), (37, 23), (63, 64), (64, 64), (40, 100)])
def test_phase_spectrum_equals_the_oracle_at_the_size_of_the_map(size, put, fetch):
    image = noise(*size)
    map_size = min(64, size[0]), min(64, size[1])
    found = fetch(phase_spectrum(put(image[None])))[0]
    assert found.shape == map_size
    np.testing.assert_allclose(found, reference.phase_spectrum(opencv_grey(image, map_size)), rtol=0, atol=TOLERANCE)


EMPTY_BINS = ["stripes", "faint stripes", "rows", "tiles", "square", "cross", "dots"]


def with_empty_bins(kind: str, height: int, width: int) -> np.ndarray:
    """Return an image with bins that are 0 except for rounding, at most sizes."""
    image = np.full((height, width, 3), 0 if kind == "dots" else 240, np.uint8)
    if kind == "stripes":
        image[:, width // 3] = 7
    elif kind == "faint stripes":
        image[:, width // 3] = 239
    elif kind == "rows":
        image[:] = noise(height, 1)
    elif kind == "tiles":
        image[::3, ::2] = 7
    elif kind == "square":
        image[1:3, 2:6] = 7
    elif kind == "cross":
        image[height // 2], image[:, width // 2] = 7, 7
    else:
        image[::4, ::3] = 255
    return image


@pytest.mark.parametrize("size", [(5, 9), (37, 23), (64, 48), (59, 61)])
@pytest.mark.parametrize("kind", EMPTY_BINS)
def test_phase_spectrum_takes_no_phase_from_empty_bins(kind, size, put, fetch):
    image = with_empty_bins(kind, *size)
    found = fetch(phase_spectrum(put(image[None])))[0]
    np.testing.assert_allclose(found, reference.phase_spectrum(luma(image[None])[0]), rtol=0, atol=TOLERANCE)


def at_a_corner(corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return an image the power of whose phase spectrum is 1 at `corner` and exactly 0 everywhere else."""
    image = np.zeros((*size, 3), np.uint8)
    image[corner] = 255
    return image


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 5)])
@pytest.mark.parametrize("size", [(8, 8), (37, 23), (64, 64)])
def test_phase_spectrum_of_what_stands_out_in_the_outermost_pixels_alone_is_zero(size, corner, put, fetch):
    assert not fetch(phase_spectrum(put(at_a_corner(corner, size)[None]))).any()


def worst_fft() -> SimpleNamespace:
    """Return FFTs with the largest error that those of any library may have.

    The documented error of cuFFT grows with log2(size). Here the error is this times the unit roundoff, relative to the
    norm. Float32 transforms by Bluestein's algorithm have a third of this error, SciPy's a tenth. In float64, the error
    of each bin of a forward transform is the bound from which `spectral._EMPTY_BIN` follows.
    """
    rng = np.random.default_rng(0)

    def directions(shape):
        return np.exp(2j * np.pi * rng.random(shape))

    def off(exact, size, dtype):
        norm = np.sqrt(np.mean(np.abs(exact) ** 2, axis=(1, 2), keepdims=True))
        error = norm * np.finfo(dtype).eps / 2 * math.log2(size)
        if np.isrealobj(exact):
            return (exact + 2**0.5 * error * directions(exact.shape).real).astype(dtype)
        return (exact + error * directions(exact.shape)).astype(np.result_type(dtype, np.complex64))

    def rfft2(images):
        exact = np.fft.rfft2(images.astype(np.float64))
        if images.dtype == np.float64:
            return exact + exact[:, :1, :1].real * 2**-41 * directions(exact.shape)
        return off(exact, images[0].size, images.dtype)

    def ifft2(spectrum):
        return off(np.fft.ifft2(spectrum.astype(np.complex128)), spectrum[0].size, spectrum.real.dtype)

    def irfft2(spectrum, s):
        return off(np.fft.irfft2(spectrum.astype(np.complex128), s=s), math.prod(s), spectrum.real.dtype)

    return SimpleNamespace(rfft2=rfft2, ifft2=ifft2, irfft2=irfft2)


@pytest.mark.parametrize("size", [(5, 9), (37, 23), (64, 64), (59, 61)])
def test_phase_spectrum_takes_no_phase_from_empty_bins_with_any_fft(size, monkeypatch):
    fft = worst_fft()
    monkeypatch.setattr(spectral, "fft_module", lambda xp: fft)
    for kind in EMPTY_BINS:
        image = with_empty_bins(kind, *size)
        expected = reference.phase_spectrum(luma(image[None])[0])
        np.testing.assert_allclose(phase_spectrum(image[None])[0], expected, rtol=0, atol=TOLERANCE, err_msg=kind)
    for corner in ((0, 0), (0, -1), (-1, 3)):
        assert not phase_spectrum(at_a_corner(corner, size)[None]).any()


# `spectral_residual` transforms in float32, in which the phase of a small bin is less accurate. Its worst map of 200
# photos from ImageNet, at five sizes of the map, was 7e-5 off.
@pytest.mark.parametrize(("detector", "tolerance"), [(spectral_residual, 3e-4), (phase_spectrum, TOLERANCE)])
def test_photos_have_the_same_peaks_with_any_fft(detector, tolerance, jpeg_images, monkeypatch):
    fft = worst_fft()
    for image in jpeg_images:
        expected = detector(image[None], algorithm="array")
        with monkeypatch.context() as patch:
            patch.setattr(spectral, "fft_module", lambda xp: fft)
            found = detector(image[None], algorithm="array")
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(*(saliency_peaks(maps, *image.shape[:2]) for maps in (found, expected)))


@pytest.mark.parametrize("size", [(1, 7), (2, 2), (5, 9), (24, 16), (37, 23)])
@pytest.mark.parametrize("kind", [noise, two_levels])
def test_image_signature_equals_the_oracle_at_the_size_of_the_map(kind, size, put, fetch):
    image = kind(*size)
    found = fetch(image_signature(put(image[None])))[0]
    np.testing.assert_allclose(found, reference.image_signature(image), rtol=0, atol=TOLERANCE)


def test_image_signature_equals_the_oracle_on_photos(jpeg_images, put, fetch):
    for image in jpeg_images[-2:]:
        small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR_EXACT)
        found = fetch(image_signature(put(image[None])))[0]
        np.testing.assert_allclose(found, reference.image_signature(small), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", [2, 4, 20])  # in single precision a sign would be wrong: differences of 0.03 to 0.05
def test_image_signature_has_the_signs_of_small_coefficients(seed, put, fetch):
    image = cv2.GaussianBlur(noise(37, 23, seed=seed), (0, 0), 6)
    found = fetch(image_signature(put(image[None])))[0]
    np.testing.assert_allclose(found, reference.image_signature(image), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(5, 9), (37, 23)])
@pytest.mark.parametrize("kind", [noise, two_levels])
def test_image_signature_of_grey_rgb_images_is_decided_by_lightness_alone(kind, size, put, fetch):
    grey = kind(*size)[..., :1].repeat(3, axis=2)
    found = fetch(image_signature(put(grey[None])))[0]
    assert len(reference.lab_planes(grey)) == 1
    np.testing.assert_allclose(found, reference.image_signature(grey), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [noise, two_levels])
def test_image_signature_of_a_symmetric_image_is_symmetric(kind, axis, put, fetch):
    # Half of the coefficients are 0. If rounding gave them signs, the map would not be symmetric.
    image = np.maximum(kind(40, 30), np.flip(kind(40, 30), axis))
    found = fetch(image_signature(put(image[None])))[0]
    np.testing.assert_allclose(found, np.flip(found, axis), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(1, 7), (2, 2), (5, 9), (37, 23)])
@pytest.mark.parametrize("kind", [noise, two_levels])
def test_frequency_tuned_equals_the_oracle(kind, size, put, fetch):
    image = kind(*size)
    found = fetch(frequency_tuned(put(image[None])))[0]
    np.testing.assert_allclose(found, reference.frequency_tuned(image), rtol=0, atol=TOLERANCE)


def test_frequency_tuned_equals_opencv_s_filter_on_photos(jpeg_images, put, fetch):
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for image in jpeg_images:
        planes = fetch(lab(channel_planes(put(image[None]))))[0].astype(np.float64)
        blurred = cv2.sepFilter2D(planes.transpose(1, 2, 0), -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
        expected = np.linalg.norm(planes.mean(axis=(1, 2)) - blurred, axis=2)
        found = fetch(frequency_tuned(put(image[None])))[0]
        np.testing.assert_allclose(found, expected / expected.max(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("colour", [(0, 0, 0), (77, 77, 77), (255, 255, 255), (1, 200, 33), (11, 241, 246)])
def test_frequency_tuned_finds_one_pixel_that_is_one_level_off(colour, channel, put, fetch):
    image = np.full((101, 67, 3), colour, np.uint8)
    image[80, 20, channel] ^= 1
    found = fetch(frequency_tuned(put(image[None])))[0]
    assert np.unravel_index(found.argmax(), found.shape) == (80, 20)
    assert found[:70].max() < 0.01


@pytest.mark.parametrize("size", [(2, 2), (2, 8), (36, 24), (37, 23), (224, 224)])
def test_frequency_tuned_of_a_pattern_of_single_pixels_is_zero(size, put, fetch):
    image = np.full((*size, 3), (250, 3, 60), np.uint8)
    image[::2, 1::2] = image[1::2, ::2] = (9, 230, 110)
    found = fetch(frequency_tuned(put(image[None])))[0]
    if size == (37, 23):  # one pixel more of one colour than of the other: the blurred image is not the mean
        assert found.min() == pytest.approx(1, abs=1e-3)
    else:
        assert not found.any()


def test_frequency_tuned_for_a_gpu_equals_that_for_a_cpu(jpeg_images):
    # A GPU takes the whole batch at once, a CPU one image at a time.
    images = np.stack([image[:60, :80] for image in jpeg_images])
    np.testing.assert_allclose(contrast._frequency_tuned(images), frequency_tuned(images), rtol=0, atol=1e-6)


def colours(step: int) -> np.ndarray:
    """Return all colours whose levels are multiples of `step` or 255, as one row of pixels."""
    levels = sorted({*range(0, 256, step), 255})
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3).astype(np.uint8)


def test_lab_equals_the_oracle(put, fetch):
    found = fetch(lab(channel_planes(put(colours(15)[None]))))
    assert found.dtype == np.float32
    expected = [reference.lab(colour) for colour in colours(15)[0]]
    np.testing.assert_allclose(found[0, :, 0].T, expected, rtol=0, atol=2e-4)


def test_lab_is_near_to_opencv_s(put, fetch):
    # OpenCV interpolates in a lookup table.
    image = colours(5)
    expected = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    found = fetch(lab(channel_planes(put(image[None]))))[0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)


def test_lab_of_grey_has_no_colour_at_all_and_one_plane_suffices(put, fetch):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    lightness = fetch(lab(channel_planes(put(levels))))
    planes = fetch(lab(channel_planes(put(levels.repeat(3, axis=3)))))
    assert lightness.shape == (1, 1, 16, 16)
    np.testing.assert_array_equal(planes[:, :1], lightness)
    assert not planes[:, 1:].any()
    assert lightness[0, 0, 0, 0] == 0
    assert lightness[0, 0, 15, 15] == pytest.approx(100, abs=1e-4)


@pytest.mark.parametrize("size", [2, 8, 30, 64])
def test_cosine_matrix_equals_opencv_s_transform(size):
    values = np.random.default_rng(0).random((size, size))
    matrix = spectral._cosine_matrix(size)
    np.testing.assert_allclose(matrix @ values @ matrix.T, cv2.dct(values), rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (64, 33), (17, 40)])
@pytest.mark.parametrize(("matrix", "sigma", "reach"), [("wide", 1 / 8, 3), ("signature", 0.045, 4)])
def test_gaussian_filters_equal_opencv_s(matrix, sigma, reach, size):
    values = np.random.default_rng(0).random(size, np.float32)
    if matrix == "wide":
        values[[0, -1]], values[:, [0, -1]] = 0, 0
    sigmas = [sigma * side for side in size]
    kernels = [cv2.getGaussianKernel(2 * round(reach * sigma) + 1, sigma) for sigma in sigmas]
    expected = cv2.sepFilter2D(values, -1, kernels[1], kernels[0], borderType=cv2.BORDER_REFLECT_101)
    found = filtered(values[None], getattr(spectral, f"_{matrix}_gaussian_matrix"))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_luma_equals_opencv_for_all_colours(put, fetch):
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for reds in np.arange(256, dtype=np.uint8).reshape(-1, 16):
        colours = np.concatenate([np.dstack([np.full_like(green, red), green, blue]) for red in reds])
        np.testing.assert_array_equal(fetch(luma(put(colours[None])))[0], cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY))


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 200), (97, 301), (128, 128), (224, 224), (333, 500)])
@pytest.mark.parametrize("reduced", [(64, 64), (37, 23)])
def test_small_images_equal_opencv_linear_exact(size, reduced, put, fetch):
    image = noise(*size)
    np.testing.assert_array_equal(fetch(small_luma(put(image[None]), *reduced))[0], opencv_grey(image, reduced))
    expected = cv2.resize(image, reduced[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    np.testing.assert_array_equal(fetch(small_planes(put(image[None]), *reduced))[0].transpose(1, 2, 0), expected)


@each_detector
@pytest.mark.parametrize("size", [(1, 1), *SIZES])
def test_maps_are_float32_in_0_to_1_and_reach_1(detector, size, put, fetch):
    saliency_map = fetch(detector(put(noise(*size)[None])))
    assert saliency_map.dtype == np.float32
    assert saliency_map.ndim == 3
    assert saliency_map.min() >= 0
    assert saliency_map.max() <= 1
    if min(size) > 2 or max(size) > 2:  # 2x2 pixels are blurred to one level
        assert saliency_map.max() == pytest.approx(1, abs=1e-6)


@each_detector
@pytest.mark.parametrize("level", [0, 1, 77, 255])
@pytest.mark.parametrize("size", [(5, 9), (64, 64), (101, 67)])
def test_constant_images_give_maps_of_zeros(detector, level, size, put, fetch):
    assert not fetch(detector(put(np.full((2, *size, 3), level, np.uint8)))).any()


@each_detector
def test_an_image_has_the_same_map_alone_and_in_a_batch(detector, put, fetch):
    images = np.stack([noise(70, 131, seed=seed) for seed in range(5)] + [np.zeros((70, 131, 3), np.uint8)])
    together = fetch(detector(put(images)))
    assert together.shape[0] == 6
    alone = np.concatenate([fetch(detector(put(images[i : i + 1]))) for i in range(6)])
    # Matrix products and FFTs may be split up differently for another batch size.
    np.testing.assert_allclose(together, alone, rtol=0, atol=0 if detector is fine_grained else 5e-6)


@each_detector
def test_detectors_do_not_depend_on_how_images_lie_in_memory(detector, put, fetch):
    image = noise(70, 131)
    for view in (lambda a: a[:, ::-1], lambda a: a.transpose(0, 2, 1, 3), lambda a: a[:, ::2, 1::2]):
        expected = fetch(detector(put(view(image[None]))))
        np.testing.assert_allclose(fetch(detector(view(put(image[None])))), expected, rtol=0, atol=1e-6)


@each_detector
@pytest.mark.parametrize("size", [(37, 23), (130, 90)])
def test_grey_images_give_the_maps_of_rgb_images_of_equal_channels(detector, size, put, fetch):
    grey = noise(*size)[None, ..., :1]
    np.testing.assert_array_equal(fetch(detector(put(grey))), fetch(detector(put(grey.repeat(3, axis=3)))))


@each_detector
def test_images_are_taken_for_rgb_not_bgr(detector, put, fetch):
    image = noise(37, 23)[None]
    assert not np.array_equal(fetch(detector(put(image))), fetch(detector(put(image[..., ::-1]))))


@pytest.mark.parametrize("name", DETECTORS)
def test_get_detector_finds_each_name(name):
    assert get_detector(name) is DETECTORS[name]


def test_get_detector_passes_a_callable_through():
    assert get_detector(len) is len


def test_get_detector_lists_the_known_names():
    names = ["fine_grained", "frequency_tuned", "image_signature", "phase_spectrum", "spectral_residual"]
    with pytest.raises(ValueError, match=f"must be one of {', '.join(names)}, or a callable, got 'basnet'"):
        get_detector("basnet")


def test_get_detector_refuses_what_is_neither_name_nor_callable():
    with pytest.raises(TypeError, match="name of a detector or a callable, got None"):
        get_detector(None)


@pytest.mark.parametrize("name", sorted(DETECTORS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_detectors_refuse_what_is_not_uint8(name, dtype):
    with pytest.raises(TypeError, match=f"images must be uint8 .* got {np.dtype(dtype)}: saliency is defined on 8-bit"):
        DETECTORS[name](np.ones((2, 32, 32, 3), dtype))

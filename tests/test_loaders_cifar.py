"""CIFAR's pipeline: no peak is in the padding."""

from __future__ import annotations

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dali_saliencymix import DETECTORS, fine_grained, saliency_peaks
from dali_saliencymix._dali import mix_nodes as dali_mix
from dali_saliencymix.datasets.cifar import MEAN, STD
from dali_saliencymix.loaders.cifar import cifar_training_pipeline
from dali_saliencymix.options import MixOptions

SIZE, PADDING, COUNT = 32, 4, 40


@pytest.fixture(scope="module")
def files(tmp_path_factory, jpeg_images):
    """Small bright pictures, so that the black padding is salient."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(4)
    paths = []
    for number in range(COUNT):
        photo = jpeg_images[number % len(jpeg_images)]
        top, left = (rng.integers(0, side - 63) for side in photo.shape[:2])
        small = Image.fromarray(photo[top : top + 64, left : left + 64]).resize((SIZE, SIZE))
        Image.fromarray(np.asarray(small) // 2 + 128).save(folder / f"{number:02d}.png")
        paths.append(str(folder / f"{number:02d}.png"))
    return paths


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def run(files, device="cpu", **options):
    device_id = 0 if device == "gpu" else None
    common = {"batch_size": COUNT, "num_threads": 2, "device_id": device_id, "seed": 5, "prefetch_queue_depth": 1}
    pipeline = cifar_training_pipeline(files, list(range(COUNT)), device=device, **common, **options)
    return [np.array(output.as_cpu().as_tensor()) for output in pipeline.run()]


def host(array):
    return array.get() if hasattr(array, "get") else np.array(array)


def recorded(monkeypatch):
    calls = []
    function = dali_mix.apply

    def record(options, images, **arguments):
        mixed = function(options, images, **arguments)
        calls.append((host(images), {k: host(v) for k, v in arguments.items() if hasattr(v, "shape")}, mixed))
        return mixed

    monkeypatch.setattr(dali_mix, "apply", record)
    return calls


def share_in_the_padding(images, peaks):
    return (images[np.arange(len(images)), peaks[:, 0], peaks[:, 1]] == 0).all(axis=1).mean()


@pytest.mark.parametrize("name", ["fine_grained", "spectral_residual"])
def test_no_peak_lies_in_the_padding_where_many_would(monkeypatch, files, device, name):
    calls = recorded(monkeypatch)
    run(files, device, mix=MixOptions(saliency=name))
    images, arguments, _ = calls[0]
    assert (images == 0).all(axis=3).mean() > 0.05  # the batch has padding
    assert share_in_the_padding(images, arguments["peaks"]) == 0
    # The first maximum, row by row, of the map of the padded image, as the paper's code takes it.
    maps = DETECTORS[name](images)
    first = np.stack(np.unravel_index(maps.reshape(COUNT, -1).argmax(axis=1), maps.shape[1:]), axis=1)
    assert share_in_the_padding(images, first) > 0.2


def test_a_peak_is_the_pixel_that_was_most_salient_before_the_padding_or_the_edge_beside_it(monkeypatch, files, device):
    calls = recorded(monkeypatch)
    *_, labels, _, _ = run(files, device, mix=MixOptions(saliency="fine_grained"))
    images, arguments, _ = calls[0]
    originals = np.stack([np.asarray(Image.open(files[label])) for label in labels.ravel()])
    peaks = saliency_peaks(fine_grained(originals), SIZE, SIZE)
    moved = 0
    for image, original, before, after in zip(images, originals, peaks, arguments["peaks"], strict=True):
        # Find the crop by trying all offsets.
        padded = np.pad(original, [(PADDING, PADDING), (PADDING, PADDING), (0, 0)])
        places = [
            (y, x)
            for y, x in np.ndindex(2 * PADDING + 1, 2 * PADDING + 1)
            if np.array_equal(padded[y : y + SIZE, x : x + SIZE], image)
        ]
        assert len(places) == 1
        expected = before + PADDING - np.array(places[0])
        assert after.tolist() == expected.clip(0, SIZE - 1).tolist()
        moved += places[0] != (PADDING, PADDING)
    assert moved > COUNT / 2


def test_images_come_out_normalised_and_mirrored_as_a_whole(files, device):
    images, labels, source_labels, lam = run(files, device, mix=MixOptions(prob=0.0), padding=0)
    assert images.shape == (COUNT, 3, SIZE, SIZE)
    pixels = (images.transpose(0, 2, 3, 1) * STD + MEAN).round()
    mirrored = 0
    for image, label in zip(pixels, labels.ravel(), strict=True):
        original = np.asarray(Image.open(files[label]))
        as_it_was = np.array_equal(image, original)
        assert as_it_was or np.array_equal(image, original[:, ::-1])
        mirrored += not as_it_was
    assert 0 < mirrored < COUNT
    assert (lam == 1).all()
    assert sorted(source_labels.ravel()) == sorted(labels.ravel())


@pytest.mark.parametrize("mode", ["cutmix", "mixup"])
def test_modes_without_peaks_take_none(files, device, mode):
    *_, lam = run(files, device, mix=MixOptions(modes={mode: 1.0}))
    assert ((lam >= 0) & (lam <= 1)).all()
    assert len(np.unique(lam)) > COUNT / 2


def test_the_least_salient_pixel_is_refused_beside_a_padding(files):
    mix = MixOptions(source="non_salient")
    with pytest.raises(ValueError, match="source must not be 'non_salient' where peaks are given"):
        run(files, mix=mix)
    assert len(run(files, mix=mix, padding=0)) == 4


def test_every_offset_of_the_crop_is_drawn():
    @pipeline_def(batch_size=900, num_threads=1, device_id=None, seed=1)
    def offsets():
        return fn.random.uniform(values=[float(offset) for offset in range(-PADDING, PADDING + 1)])

    (drawn,) = offsets().run()
    assert set(np.array(drawn.as_tensor()).tolist()) == set(range(-PADDING, PADDING + 1))

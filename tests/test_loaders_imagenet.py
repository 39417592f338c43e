"""The ready-made pipelines, compared with the same steps in Pillow and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dali_saliencymix._dali import python_operator
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.imagenet import training_pipeline, validation_pipeline
from dali_saliencymix.options import MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    return list_image_folder(root / "train")


def outputs(definition, folder, *, batch_size=8, seed=1, **options):
    pipeline = definition(
        folder.files, folder.labels, batch_size=batch_size, num_threads=2, device_id=None, seed=seed, **options
    )
    return [np.array(output.as_tensor()) for output in pipeline.run()]


def denormalised(images):
    return images * 255 * np.reshape(IMAGENET_STD, (3, 1, 1)) + 255 * np.reshape(IMAGENET_MEAN, (3, 1, 1))


def test_validation_resizes_and_crops_as_pillow_does(tmp_path):
    # Two gradients and a ring, so smooth that only geometry matters: a shift by one pixel is 1.5 grey levels.
    sizes = [(150, 100), (97, 210), (128, 128), (333, 211)]
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width] / max(height, width)
        ring = 60 * np.cos(8 * np.hypot(y - 0.3, x - 0.4))
        picture = np.stack([30 + 200 * x, 220 - 200 * y, 128 + ring], 2).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.jpg", quality=98, subsampling=0)
    files = sorted(str(path) for path in tmp_path.iterdir())
    pipeline = validation_pipeline(
        files, [5, 6, 7, 8], resize_size=72, crop_size=64, batch_size=4, num_threads=2, device_id=None
    )
    images, labels = (np.array(output.as_tensor()) for output in pipeline.run())
    assert images.shape == (4, 3, 64, 64)
    assert labels.ravel().tolist() == [5, 6, 7, 8]
    for ours, file in zip(denormalised(images), files, strict=True):
        with Image.open(file) as opened:
            scale = 72 / min(opened.size)
            picture = opened.resize([round(side * scale) for side in opened.size], Image.Resampling.BILINEAR)
        left, top = (picture.width - 64) / 2, (picture.height - 64) / 2
        expected = picture.crop((round(left), round(top), round(left) + 64, round(top) + 64))
        assert np.abs(ours - np.asarray(expected).transpose(2, 0, 1)).mean() < 1


@pytest.mark.parametrize("definition", [training_pipeline, validation_pipeline])
def test_layouts_and_types_hold_the_same_values(folder, definition):
    training = {"mix": MixOptions(), "random_erase": 0.7} if definition is training_pipeline else {}
    chw, *rest = outputs(definition, folder, **training)
    assert chw.shape == (8, 3, 224, 224)
    assert chw.dtype == np.float32
    hwc, *same = outputs(definition, folder, channels_last=True, fp16=True, **training)
    assert hwc.shape == (8, 224, 224, 3)
    assert hwc.dtype == np.float16
    np.testing.assert_allclose(hwc.transpose(0, 3, 1, 2), chw, atol=2e-3)
    erased = (chw == 0).all(axis=1)
    np.testing.assert_array_equal((hwc == 0).all(axis=3), erased)
    assert erased.any() == (definition is training_pipeline)
    for ours, theirs in zip(rest, same, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_training_images_are_normalised(folder):
    images, *_ = outputs(training_pipeline, folder, crop_size=32)
    pixels = denormalised(images)
    assert pixels.min() > -0.01
    assert pixels.max() < 255.01
    np.testing.assert_allclose(pixels, pixels.round(), atol=0.01)


@pytest.mark.parametrize(("mix", "count"), [(None, 9), (MixOptions(), 11), (MixOptions(prob=0.5), 12)])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_few_operators_on_the_cpu(folder, monkeypatch, device, mix, count):
    """DALI runs CPU operators one by one, and each costs a batch as much time as decoding some images."""
    monkeypatch.setattr(python_operator, "whole_batches_work", lambda: True)  # with all versions of DALI
    options = {"mix": mix, "device": device, "batch_size": 4, "num_threads": 1, "device_id": 0}
    pipeline = training_pipeline(folder.files, folder.labels, **options)
    pipeline._build_graph()
    on_images = {"Resize", "CropMirrorNormalize", "_JaxFunction", "decoders__ImageSlice"}
    operators = [each._op for each in pipeline._ops if each._op.device == "cpu"]
    small = [operator.schema_name for operator in operators if operator.schema_name not in on_images]
    assert len(small) == count + (2 if mix and device == "cpu" else 0), small  # the shapes of images and flags


def test_training_without_mixing_says_lam_1_and_gives_the_label_twice(folder):
    _, labels, source_labels, lam = outputs(training_pipeline, folder, crop_size=32)
    np.testing.assert_array_equal(labels, source_labels)
    np.testing.assert_array_equal(lam, np.ones(8, np.float32))


def test_mixing_changes_the_images_by_the_share_that_it_says(folder):
    plain, *_ = outputs(training_pipeline, folder, crop_size=40)
    mixed, labels, source_labels, lam = outputs(training_pipeline, folder, crop_size=40, mix=MixOptions())
    # Operators are seeded in the order of their creation: the crops are equal, the flips are not.
    own = np.maximum((mixed == plain).all(1).mean((1, 2)), (mixed[..., ::-1] == plain).all(1).mean((1, 2)))
    assert (own >= lam - 1e-6).all()
    assert (lam < 1).all()
    assert sorted(source_labels.ravel()) == sorted(labels.ravel())


def test_the_seed_decides_the_crops_and_the_shuffle_seed_the_order(folder):
    options = {"crop_size": 32, "mix": MixOptions(prob=0.5)}
    first = outputs(training_pipeline, folder, **options)
    for ours, theirs in zip(first, outputs(training_pipeline, folder, **options), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other_crops = outputs(training_pipeline, folder, seed=2, **options)
    assert not np.array_equal(first[0], other_crops[0])
    np.testing.assert_array_equal(first[1], other_crops[1])
    other_order = outputs(training_pipeline, folder, batch_size=32, shuffle_seed=9, **options)
    assert not np.array_equal(outputs(training_pipeline, folder, batch_size=32, **options)[1], other_order[1])


def test_sizes_that_cannot_be_are_refused(folder):
    with pytest.raises(ValueError, match=r"min_crop_area must be in \(0, 1\], got 0"):
        outputs(training_pipeline, folder, min_crop_area=0)
    with pytest.raises(ValueError, match="crop_size must be at most resize_size, got 224 and 100"):
        outputs(validation_pipeline, folder, resize_size=100)
    for option in ("color_jitter", "random_erase"):
        with pytest.raises(ValueError, match=rf"{option} must be in \[0, 1\], got 2"):
            outputs(training_pipeline, folder, **{option: 2})
    with pytest.raises(ValueError, match="auto_augment must be one of none, ra, ta_wide, got 'imagenet'"):
        outputs(training_pipeline, folder, auto_augment="imagenet")
    with pytest.raises(ValueError, match=r"ra_magnitude must be in \[0, 30\], got 31"):
        outputs(training_pipeline, folder, ra_magnitude=31)
    for definition in (training_pipeline, validation_pipeline):
        with pytest.raises(ValueError, match=r"std must be positive, got \[0.2, 0, 0.2\]"):
            outputs(definition, folder, std=[0.2, 0, 0.2])
        with pytest.raises(ValueError, match="mean must have one finite number for each of the 3 channels"):
            outputs(definition, folder, mean=[0.5])


def test_of_several_modes_each_sample_gets_one(folder):
    plain, *_ = outputs(training_pipeline, folder, crop_size=40, batch_size=24)
    several = MixOptions(modes={"saliencymix": 1, "mixup": 1})
    mixed, _, _, lam = outputs(training_pipeline, folder, crop_size=40, batch_size=24, mix=several)
    own = np.maximum((mixed == plain).all(1).mean((1, 2)), (mixed[..., ::-1] == plain).all(1).mean((1, 2)))
    pasted = own >= lam - 1e-6  # blending changes nearly all pixels of an image
    assert 6 < pasted.sum() < 18
    assert (own[~pasted] < 0.5 * lam[~pasted]).all()

"""The dynamic-mode loop: equal batches with and without capture, and equal to those of the array function."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.batches import assert_equal_batches
from shared.programs import run_program

from dali_saliencymix import saliencymix
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipelines import dynamic_mode
from pipelines.dynamic_mode import training_batches

pytest.importorskip("nvidia.dali", minversion="2.3")  # the example uses capture

COUNT, BATCH, SIZE = 24, 5, 32  # four full batches in the first epoch, and images that wrap into the second
EPOCHS = 2
MEAN, STD = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images whose labels are their numbers."""
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=3, val=1)
    listed = list_image_folder(root / "train")
    assert len(listed) == COUNT
    return replace(listed, labels=list(range(COUNT)))


@pytest.fixture
def draws(monkeypatch):
    """Return the list that the draws of all batches are appended to."""
    drawn = []
    draw = dynamic_mode.draw_params

    def recorded(*args, **options):
        drawn.append(draw(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(dynamic_mode, "draw_params", recorded)
    return drawn


def run(folder, *, clone=False, **options):
    """Return all batches, cloned one by one or only after the last one."""
    batches = training_batches(folder, **{"batch_size": BATCH, "epochs": EPOCHS, "size": SIZE, "seed": 3, **options})
    return [tuple(tensor.clone() for tensor in batch) if clone else batch for batch in batches]


def uint8_pixels(images):
    """Return images as before normalisation: (N, H, W, 3) uint8."""
    exact = images.cpu().numpy().transpose(0, 2, 3, 1).astype(np.float64) * STD + MEAN
    assert abs(exact - exact.round()).max() < 1e-3
    return exact.round().astype(np.uint8)


def test_batches_are_tensors_as_a_model_wants_them(folder):
    images, labels, source_labels, lam = run(folder)[0]
    assert images.shape == (BATCH, 3, SIZE, SIZE)
    assert labels.shape == source_labels.shape == lam.shape == (BATCH,)
    assert (images.dtype, lam.dtype) == (torch.float32, torch.float32)
    assert labels.dtype == source_labels.dtype == torch.int64


@pytest.mark.parametrize("options", [{}, {"saliency": "fine_grained", "prob": 0.5}], ids=str)
def test_captured_batches_equal_eager_ones(folder, options):
    eager, captured = (run(folder, capture=capture, **options) for capture in (False, True))
    assert len(eager) > EPOCHS * (COUNT // BATCH)
    assert_equal_batches(captured, eager)


def test_capture_takes_the_operators_in_front_of_the_mixing(folder, monkeypatch):
    # DALI silently runs operators that it does not capture as before. There is no public way to query this.
    from nvidia.dali.experimental.dynamic import _capture

    captured = []
    build = _capture.CaptureContext.build_pipeline

    def recorded(self, *args):
        captured.extend(node.op_class.__name__ for node in self.nodes)
        return build(self, *args)

    monkeypatch.setattr(_capture.CaptureContext, "build_pipeline", recorded)
    run(folder, capture=True)
    assert captured == ["Image", "Resize"]


@pytest.mark.parametrize("capture", [False, True])
def test_no_batch_changes_after_it_was_given(folder, capture):
    assert_equal_batches(run(folder, capture=capture), run(folder, capture=capture, clone=True))


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("options", [{}, {"preset": "released-code"}, {"destination": "salient"}], ids=str)
def test_a_batch_is_what_the_array_function_makes_of_it(folder, draws, options, capture):
    unmixed = run(folder, prob=0.0)
    draws.clear()
    mixed = run(folder, capture=capture, **options)
    for before, after, (source_index, drawn_lam) in zip(unmixed, mixed, draws, strict=True):
        expected = saliencymix(uint8_pixels(before[0]), source_index, drawn_lam, **options)
        np.testing.assert_array_equal(uint8_pixels(after[0]), expected.images)
        np.testing.assert_array_equal(after[3], expected.lam)
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[2], before[1][source_index])


@pytest.mark.parametrize("capture", [False, True])
def test_lam_is_the_share_of_pixels_that_are_the_image_s_own(folder, capture):
    originals = {}
    for images, labels, _, lam in run(folder, prob=0.0):
        assert (lam == 1).all()
        originals |= zip(labels.tolist(), uint8_pixels(images), strict=True)
    mixed = 0
    for images, labels, source_labels, lam in run(folder, capture=capture):
        for image, label, source, own in zip(
            uint8_pixels(images), labels.tolist(), source_labels.tolist(), lam.tolist(), strict=True
        ):
            is_own, is_source = ((image == originals[number]).all(-1) for number in (label, source))
            assert (is_own | is_source).all()
            assert (~is_own).mean() <= 1 - own + 1e-6 <= is_source.mean() + 2e-6
            mixed += label != source and own < 1
    assert mixed > COUNT


def test_epochs_give_each_image_and_orders_differ(folder):
    batches = run(folder, batch_size=6, epochs=3)
    orders = [torch.cat([labels for _, labels, *_ in batches[i : i + 4]]).tolist() for i in (0, 4, 8)]
    assert [sorted(order) for order in orders] == [list(range(COUNT))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_a_seed_repeats_the_order_and_the_mixing(folder):
    first, again, other = run(folder), run(folder), run(folder, seed=4)
    assert_equal_batches(first, again)
    assert not torch.equal(first[0][1], other[0][1])
    assert not torch.equal(first[0][3], other[0][3])


def test_alpha_and_prob_reach_the_draws(folder, draws):
    run(folder, alpha=1e4, prob=0.5, batch_size=COUNT)
    lam = np.concatenate([lam for _, lam in draws])
    assert 0 < (lam == 1).mean() < 1
    assert (abs(lam[lam < 1] - 0.5) < 0.05).all()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"batch_size": COUNT + 1}, f"batch_size must be at most {COUNT}, the images in .*, got {COUNT + 1}"),
        ({"preset": "mine"}, "preset must be one of default, paper, released-code, got 'mine'"),
    ],
)
def test_mistakes_are_named(folder, wrong, text):
    with pytest.raises(ValueError, match=text):
        run(folder, **wrong)


@pytest.mark.parametrize("options", [[], ["--capture"]], ids=str)
def test_the_job_prints_an_epoch(folder, options):
    lines = run_program("pipelines/dynamic_mode.py", folder.root, "-b", "8", *options).stdout.splitlines()
    assert len(lines) == COUNT // 8
    assert lines[0].startswith("batch 0: torch.float32 (8, 3, 224, 224) on cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True])
def test_on_the_gpu_a_batch_is_what_the_array_function_makes_of_it(folder, draws, capture):
    unmixed = run(folder, prob=0.0, device="gpu")
    draws.clear()
    mixed = run(folder, capture=capture, saliency="fine_grained", device="gpu")
    for before, after, (source_index, drawn_lam) in zip(unmixed, mixed, draws, strict=True):
        assert {tensor.device.type for tensor in after} == {"cuda"}
        expected = saliencymix(uint8_pixels(before[0]), source_index, drawn_lam, saliency="fine_grained")
        np.testing.assert_array_equal(uint8_pixels(after[0]), expected.images)
        np.testing.assert_array_equal(after[3].cpu(), expected.lam)

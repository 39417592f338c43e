"""SaliencyMix on PyTorch tensors: equal to the array functions, in a ``DataLoader``, and compatible with timm."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dali_saliencymix
from dali_saliencymix import DETECTORS, MODES, pytorch, saliency_peaks, saliencymix
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.pytorch import NetworkSaliency, SaliencyMix

# Python 3.12 and later warn if a process with threads forks, and NumPy and PyTorch have threads. On Linux the workers
# of a DataLoader are forked by default, so users get the same warning.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

K = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(6, 3, 32, 32), (1, 3, 37, 23), (5, 1, 24, 40), (1, 1, 9, 9)]
MIXES = [
    {},
    {"preset": "paper"},
    {"preset": "released-code"},
    {"destination": "random"},
    {"source": "non_salient", "destination": "salient", "prob": 0.5},
    {"modes": {"cutmix": 1.0}},
    {"modes": {"mixup": 1.0}, "alpha": 0.3},
    {"modes": {"saliencymix": 2.0, "cutmix": 1.0, "mixup": 1.0}, "destination": "random"},
    {"modes": {"mixup": 0.5, "saliencymix": 0.5}, "choose": "batch", "per_batch": True},
    {"label_weight": "saliency", "prob": 0.8},
    {"label_weight": "saliency", "modes": {"saliencymix": 2.0, "mixup": 1.0}},
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _global_generator_is_left_as_it_was():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def draws(monkeypatch):
    """Return the list that the draws of all batches are appended to."""
    drawn = []

    def recorded(*args, **options):
        drawn.append(draw(*args, **options))
        return drawn[-1]

    draw = pytorch.draw
    monkeypatch.setattr(pytorch, "draw", recorded)
    return drawn


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def class_ids(count):
    return torch.arange(count) * 3 % K


def hwc(images):
    """Return a NumPy copy (N, H, W, C) of a batch of tensors."""
    return np.ascontiguousarray(images.cpu().numpy().transpose(0, 2, 3, 1))


def mixed_arrays(images, params, modes=("saliencymix",), **options):
    """Mix NumPy images with the public array function for `modes`."""
    options = {name: value for name, value in options.items() if name not in {"alpha", "prob", "choose"}}
    at = {"point": params.point} if options.get("destination") == "random" else {}
    if list(modes) == ["saliencymix"]:
        return saliencymix(images, params.source_index, params.lam, **at, **options)
    if list(modes) == ["cutmix"]:
        return dali_saliencymix.cutmix(images, params.source_index, params.lam, params.point)
    if list(modes) == ["mixup"]:
        return dali_saliencymix.mixup(images, params.source_index, params.lam)
    return dali_saliencymix.mix(images, *params, **options)


def targets_by_hand(labels, params, lam, smoothing=0.0):
    """Return the expected targets, image by image."""
    targets = np.full((len(lam), K), smoothing / K)
    for row, (receiver, source) in enumerate(zip(labels, labels[params.source_index], strict=True)):
        targets[row, receiver] += (1 - smoothing) * lam[row]
        targets[row, source] += (1 - smoothing) * (1 - lam[row])
    return targets


# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", MIXES, ids=str)
def test_equals_the_array_functions(device, draws, options, shape):
    if options.get("preset", "default") == "default":
        options = {"saliency": "fine_grained", **options}  # its maps are exact on both devices
    images, labels = pixels(*shape).to(device), class_ids(shape[0]).to(device)
    mixed, targets = SaliencyMix(K, seed=1, **options)(images, labels)
    (params,) = draws
    expected = mixed_arrays(hwc(images), params, **options)
    np.testing.assert_array_equal(hwc(mixed), expected.images)
    np.testing.assert_allclose(
        targets.cpu(), targets_by_hand(labels.cpu().numpy(), params, expected.lam), rtol=1e-5, atol=1e-6
    )
    assert (mixed.dtype, targets.dtype) == (torch.uint8, torch.float32)
    assert mixed.device == targets.device == images.device


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_every_detector_sees_the_same_images_as_on_arrays(draws, name):
    images = pixels(6, 3, 33, 47)
    mixed, _ = SaliencyMix(K, seed=1, saliency=name)(images, class_ids(6))
    np.testing.assert_array_equal(hwc(mixed), mixed_arrays(hwc(images), *draws, saliency=name).images)


def test_some_pixels_change_and_lam_says_how_many(draws):
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 20, 30)
    labels = torch.arange(6)
    mixed, targets = SaliencyMix(6, seed=2)(images, labels)
    for row, source in enumerate(draws[0].source_index):
        shares = torch.bincount(mixed[row, 0].flatten(), minlength=6) / 600
        assert set(shares.nonzero().flatten().tolist()) <= {row, source}
        torch.testing.assert_close(targets[row], shares, rtol=0, atol=1e-6)
    assert (targets.max(dim=1).values < 1).sum() >= 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_targets_are_soft_labels(draws, smoothing):
    images, labels = pixels(8, 3, 16, 16), class_ids(8)
    _, targets = SaliencyMix(K, seed=3, label_smoothing=smoothing)(images, labels)
    lam = mixed_arrays(hwc(images), *draws).lam
    by_hand = targets_by_hand(labels.numpy(), *draws, lam, smoothing)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    np.testing.assert_allclose(targets, by_hand, rtol=0, atol=1e-6)
    ids = labels.numpy()
    ours = dali_saliencymix.soft_labels(ids, ids[draws[0].source_index], lam, num_classes=K, smoothing=smoothing)
    np.testing.assert_array_equal(targets, ours)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    images, labels = pixels(4, 3, 8, 8), class_ids(4)
    expected = SaliencyMix(K, seed=1)(images, labels)[1]
    assert torch.equal(SaliencyMix(K, seed=1)(images, labels.to(dtype))[1], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_one_hot_vectors_are_the_same_as_class_ids(device, dtype, smoothing):
    images, labels = pixels(6, 3, 16, 16).to(device), class_ids(6)
    one_hot = torch.nn.functional.one_hot(labels, K).to(device, dtype)
    expected = SaliencyMix(K, seed=1, label_smoothing=smoothing)(images, labels)
    ours = SaliencyMix(K, seed=1, label_smoothing=smoothing)(images, one_hot)
    assert equal_batches([ours], [expected]) == [True]


@pytest.mark.parametrize("vectors", ["soft", "multi-hot"])
def test_vectors_are_mixed_weight_by_weight(draws, vectors):
    images, given = pixels(8, 3, 16, 16), torch.from_numpy(np.random.default_rng(0).random((8, K)))
    labels = (given > 0.6) if vectors == "multi-hot" else given / given.sum(dim=1, keepdim=True)
    _, targets = SaliencyMix(K, seed=3)(images, labels)
    lam = mixed_arrays(hwc(images), *draws).lam
    for row, source in enumerate(draws[0].source_index):
        expected = [lam[row] * labels[row, k] + (1 - lam[row]) * labels[source, k] for k in range(K)]
        np.testing.assert_allclose(targets[row], expected, rtol=0, atol=1e-6)
    if vectors == "soft":
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("labels", [class_ids(8), torch.from_numpy(np.random.default_rng(0).random((8, K)))], ids=str)
def test_smoothing_is_that_of_cross_entropy(labels):
    images, logits = pixels(8, 3, 16, 16), torch.linspace(-3, 3, 8 * K).view(8, K).sin()
    _, plain = SaliencyMix(K, seed=3)(images, labels)
    _, smoothed = SaliencyMix(K, seed=3, label_smoothing=0.3)(images, labels)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(
        cross_entropy(logits, smoothed), cross_entropy(logits, plain, label_smoothing=0.3), rtol=0, atol=1e-6
    )


def test_a_column_of_class_ids_is_the_same_as_a_row_of_them():
    images, labels = pixels(4, 3, 8, 8), class_ids(4)
    expected = SaliencyMix(K, seed=1)(images, labels)
    assert equal_batches([SaliencyMix(K, seed=1)(images, labels[:, None])], [expected]) == [True]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.zeros(3, dtype=torch.int64), 1.0),
        (torch.zeros(3, 1, dtype=torch.int64), 1.0),
        (torch.zeros(3, 1, dtype=torch.bool), 0.0),
        (torch.full((3, 1), 0.25), 0.25),
    ],
    ids=["ids", "a column of ids", "a column of bool", "a column of weights"],
)
def test_with_one_class_only_the_dtype_tells_weights_from_class_ids(labels, expected):
    _, targets = SaliencyMix(1, seed=1)(pixels(3, 3, 8, 8), labels)
    torch.testing.assert_close(targets, torch.full((3, 1), expected))


def test_labels_that_need_a_gradient_are_taken_and_get_none():
    labels = torch.eye(K)[:4].requires_grad_()
    _, targets = SaliencyMix(K, seed=1)(pixels(4, 3, 8, 8), labels)
    assert not targets.requires_grad


@pytest.mark.parametrize("options", [*MIXES, {"prob": 0.5}], ids=str)
def test_boxes_are_those_of_the_array_functions(device, draws, options):
    if options.get("preset", "default") == "default":
        options = {"saliency": "fine_grained", **options}
    images = pixels(6, 3, 32, 24).to(device)
    mixed, targets, boxes = SaliencyMix(K, seed=1, return_boxes=True, **options)(images, class_ids(6))
    np.testing.assert_array_equal(boxes.cpu(), mixed_arrays(hwc(images), *draws, **options).boxes)
    assert (boxes.dtype, boxes.device, tuple(boxes.shape)) == (torch.int32, images.device, (6, 4))
    without = SaliencyMix(K, seed=1, **options)(images, class_ids(6))
    assert equal_batches([without], [(mixed, targets)]) == [True]


@pytest.mark.parametrize("options", [{}, {"destination": "random"}, {"modes": {"cutmix": 1.0}}, {"prob": 0.5}], ids=str)
def test_boxes_are_where_the_pixels_differ(draws, options):
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 20, 30)
    mixed, targets, boxes = SaliencyMix(8, seed=2, return_boxes=True, **options)(images, torch.arange(8))
    for row, source in enumerate(draws[0].source_index):
        expected = images[row].clone()
        y0, x0, y1, x1 = boxes[row].tolist()
        expected[:, y0:y1, x0:x1] = int(source)
        assert torch.equal(mixed[row], expected)
        if source != row:
            torch.testing.assert_close(targets[row, source], torch.tensor((y1 - y0) * (x1 - x0) / 600))
    assert boxes.any(dim=1).sum() >= 2


def test_mixup_has_no_boxes():
    *_, boxes = SaliencyMix(K, seed=1, return_boxes=True, modes={"mixup": 1.0})(pixels(4, 3, 8, 8), class_ids(4))
    assert not boxes.any()


# Memory


@pytest.mark.parametrize("options", [{}, {"modes": {"mixup": 1.0}}, {"modes": {"cutmix": 1.0}}, {"prob": 0.0}], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept_and_values_do_not_depend_on_it(device, memory_format, options):
    options = {"saliency": "fine_grained", "seed": 4, **options}
    images = pixels(5, 3, 24, 40).to(device)
    expected, targets = SaliencyMix(K, **options)(images, class_ids(5))
    mixed, same_targets = SaliencyMix(K, **options)(images.to(memory_format=memory_format), class_ids(5))
    assert mixed.stride() == images.to(memory_format=memory_format).stride()
    assert torch.equal(mixed, expected)
    assert torch.equal(same_targets, targets)


VIEWS = {
    "every second row": lambda images: images[:, :, ::2],
    "a window": lambda images: images[1:, :, 3:20, 5:-1],
    "rows and columns swapped": lambda images: images.transpose(2, 3),
    "one image repeated": lambda images: images[:1].expand(4, -1, -1, -1),
    "a window of a channels-last batch": lambda images: images.to(memory_format=torch.channels_last)[:, :, 3:20, 5:-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_view_of_memory_is_taken(view):
    images = VIEWS[view](pixels(5, 3, 24, 40))
    assert not images.is_contiguous()
    mixed, _ = SaliencyMix(K, seed=4)(images, class_ids(len(images)))
    expected, _ = SaliencyMix(K, seed=4)(images.contiguous(), class_ids(len(images)))
    assert torch.equal(mixed, expected)
    assert mixed.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_detector_sees_the_memory_of_the_tensor(memory_format):
    seen = []

    def detector(array):
        seen.append((array.__array_interface__["data"][0], array.strides, array.shape))
        return array[..., 0].astype(np.float32)

    images = pixels(5, 3, 24, 40).to(memory_format=memory_format)
    SaliencyMix(K, seed=4, saliency=detector)(images, class_ids(5))
    n, c, h, w = images.stride()
    assert seen == [(images.data_ptr(), (n, h, w, c), (5, 24, 40, 3))]


@pytest.mark.parametrize("options", [*MIXES, {"prob": 0.0}], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (1, 1, 8, 8)], ids=str)
def test_what_comes_in_stays_as_it_is_and_shares_no_memory_with_what_comes_out(options, shape):
    images, labels = pixels(*shape), class_ids(shape[0])
    before = images.clone(), labels.clone()
    mixed, targets = SaliencyMix(K, seed=5, **options)(images, labels)
    assert mixed.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    mixed.bitwise_not_()
    targets.zero_()
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


# Randomness


def drawn_batches(mix, count=3):
    return [mix(pixels(6, 3, 16, 16), class_ids(6)) for _ in range(count)]


def equal_batches(some, others):
    pairs = zip(some, others, strict=True)
    return [all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) for ours, theirs in pairs]


def test_a_seed_repeats_and_batches_differ():
    first, again, other = (drawn_batches(SaliencyMix(K, seed=seed)) for seed in (7, np.int64(7), 8))
    assert equal_batches(first, again) == [True] * 3
    assert equal_batches(first, other) == [False] * 3
    assert equal_batches(first[:2], first[1:]) == [False] * 2


def test_the_state_of_a_given_generator_covers_the_draws():
    generator = torch.Generator().manual_seed(3)
    mix = SaliencyMix(K, generator=generator, modes={"saliencymix": 1.0, "mixup": 1.0})
    drawn_batches(mix, 2)
    state = generator.get_state()
    batches = drawn_batches(mix)
    assert equal_batches(drawn_batches(mix), batches) == [False] * 3
    generator.set_state(state)
    assert equal_batches(drawn_batches(mix), batches) == [True] * 3


def test_by_default_the_global_generator_draws():
    mix = SaliencyMix(K)
    torch.manual_seed(3)
    batches = drawn_batches(mix)
    assert equal_batches(drawn_batches(mix), batches) == [False] * 3
    torch.manual_seed(3)
    assert equal_batches(drawn_batches(SaliencyMix(K)), batches) == [True] * 3


@pytest.mark.parametrize("own", [{"seed": 1}, {"generator": torch.Generator()}], ids=["seed", "generator"])
def test_own_randomness_leaves_the_global_generators_alone(own):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    drawn_batches(SaliencyMix(K, **own))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def saved_and_loaded(mix):
    stream = io.BytesIO()
    torch.save(mix, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_goes_on_from_where_the_original_stands(duplicate):
    generator = torch.Generator().manual_seed(3)
    mix = SaliencyMix(K, generator=generator)
    drawn_batches(mix)
    copied = duplicate(mix)
    batches = drawn_batches(mix)
    assert equal_batches(drawn_batches(copied), batches) == [True] * 3
    assert mix._generator is generator


@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=str)
def test_another_default_device_changes_nothing(options):
    torch.manual_seed(1)
    expected = drawn_batches(SaliencyMix(K, **options))
    torch.manual_seed(1)
    with torch.device("meta"):
        mix = SaliencyMix(K, **options)
        images, labels = pixels(6, 3, 16, 16), torch.from_numpy(np.arange(6) * 3 % K)
        batches = [mix(images, labels) for _ in range(3)]
    assert equal_batches(batches, expected) == [True] * 3


# Policies


def test_each_image_gets_a_mode_with_its_own_alpha(draws):
    modes, alpha = {"mixup": 1.0, "saliencymix": 3.0}, {"saliencymix": 1e4, "mixup": 1e-3}
    SaliencyMix(2, seed=1, modes=modes, alpha=alpha)(pixels(400, 1, 8, 8), torch.zeros(400, dtype=torch.long))
    (params,) = draws
    by_saliency = params.mode == MODES.index("saliencymix")
    assert set(params.mode) == {MODES.index("saliencymix"), MODES.index("mixup")}
    assert 0.67 < by_saliency.mean() < 0.83
    assert (abs(params.lam[by_saliency] - 0.5) < 0.05).all()
    assert (abs(params.lam[~by_saliency] - 0.5) > 0.3).mean() > 0.95


def test_one_mode_for_a_batch(draws):
    mix = SaliencyMix(K, seed=1, modes={"cutmix": 1.0, "saliencymix": 1.0}, choose="batch")
    drawn_batches(mix, 12)
    assert all(len(set(params.mode)) == 1 for params in draws)
    assert {params.mode[0] for params in draws} == {0, 1}


def test_prob_is_the_share_of_images_that_are_mixed(draws):
    mix = SaliencyMix(2, seed=1, prob=0.3)
    mix(pixels(500, 1, 8, 8), torch.zeros(500, dtype=torch.long))
    assert 0.22 < (draws[0].lam < 1).mean() < 0.38


# Mistakes

GOOD = {"images": pixels(4, 3, 16, 20), "labels": class_ids(4)}
BAD_CALLS = [
    ({"images": GOOD["images"].float()}, TypeError, "images must be uint8 with pixel values 0..255, got torch.float32"),
    ({"images": GOOD["images"].to(torch.int64)}, TypeError, "images must be uint8 .* got torch.int64: mix before"),
    ({"images": GOOD["images"].numpy()}, TypeError, "images must be a torch.Tensor, got numpy.ndarray"),
    ({"images": GOOD["images"][0]}, ValueError, r"images must have shape \(N, C, H, W\) .* got \(3, 16, 20\)$"),
    ({"images": GOOD["images"][:, :2]}, ValueError, r"with C of 1 or 3, got \(4, 2, 16, 20\)$"),
    (
        {"images": GOOD["images"].permute(0, 2, 3, 1)},
        ValueError,
        r"got \(4, 16, 20, 3\): that looks like channels last",
    ),
    ({"images": GOOD["images"][:0], "labels": class_ids(0)}, ValueError, r"images must not be empty, got .*\(0, 3, 16"),
    ({"images": GOOD["images"][:, :, :0]}, ValueError, r"images must not be empty, got shape \(4, 3, 0, 20\)"),
    (
        {"images": GOOD["images"].to("meta")},
        ValueError,
        "images must be a dense tensor on the CPU or a CUDA GPU, got layout torch.strided on meta",
    ),
    (
        {"images": GOOD["images"].to_sparse()},
        ValueError,
        "images must be a dense tensor .* got layout torch.sparse_coo on cpu",
    ),
    (
        {"labels": class_ids(4).to("meta")},
        ValueError,
        "labels must be a dense tensor .* got layout torch.strided on meta",
    ),
    ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a torch.Tensor, got builtins.list"),
    (
        {"labels": class_ids(3)},
        ValueError,
        r"labels must have shape \(4,\) or \(4, 1\) where they are integer class ids, or \(4, 10\) where they are "
        r"vectors of num_classes weights, got \(3,\), torch.int64",
    ),
    ({"labels": class_ids(4).float()[:, None]}, ValueError, r"labels must have shape .*, got \(4, 1\), torch.float32"),
    ({"labels": torch.eye(K)[:3]}, ValueError, r"labels must have shape .*, got \(3, 10\), torch.float32"),
    ({"labels": torch.eye(K + 1)[:4]}, ValueError, r"labels must have shape .*, got \(4, 11\), torch.float32"),
    ({"labels": torch.eye(K)[None, :4]}, ValueError, r"labels must have shape .*, got \(1, 4, 10\), torch.float32"),
    ({"labels": torch.tensor(0)}, ValueError, r"labels must have shape .*, got \(\), torch.int64"),
    ({"labels": class_ids(4).float()}, TypeError, r"labels must be of integer dtype, got torch.float32 .* \(4,\)"),
    ({"labels": class_ids(4).bfloat16()}, TypeError, "labels must be of integer dtype, got torch.bfloat16"),
    ({"labels": class_ids(4) > 1}, TypeError, "labels must be of integer dtype, got torch.bool"),
    ({"labels": class_ids(4).to(torch.complex64)}, TypeError, "labels must be of integer dtype, got torch.complex64"),
    ({"labels": torch.eye(K, dtype=torch.complex64)[:4]}, TypeError, "labels must be of real dtype, got torch.complex"),
    ({"labels": torch.tensor([0, 1, K, 2])}, ValueError, r"labels must be in \[0, 10\) .* got 10 at \[2\]"),
    ({"labels": torch.tensor([0, -1, 1, 2])}, ValueError, r"labels must be in \[0, 10\) .* got -1 at \[1\]"),
    ({"labels": torch.tensor([[0], [1], [K], [2]])}, ValueError, r"labels must be in \[0, 10\) .* got 10 at \[2\]"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), BAD_CALLS, ids=[text for _, _, text in BAD_CALLS])
def test_a_bad_batch_is_refused(wrong, kind, text):
    with pytest.raises(kind, match=text):
        SaliencyMix(K)(**{**GOOD, **wrong})


BAD_OPTIONS = [
    ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ({"num_classes": 2.0}, "num_classes must be an integer of at least 1, got 2.0"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\], got -0.1"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": 0.5}, "seed must be an integer of at least 0, got 0.5"),
    ({"seed": 2**64}, r"seed must be under 2\*\*64, got 18446744073709551616"),
    ({"seed": 0, "generator": torch.Generator()}, "seed must be left out where a generator is given, got 0"),
]


@pytest.mark.parametrize(("wrong", "text"), BAD_OPTIONS, ids=[text for _, text in BAD_OPTIONS])
def test_a_bad_option_is_refused_at_once(wrong, text):
    with pytest.raises(ValueError, match=text):
        SaliencyMix(**{"num_classes": K, **wrong})


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"return_boxes": 1}, TypeError, "return_boxes must be True or False, got 1"),
        ({"image_key": 0}, TypeError, "image_key must be a str, got 0"),
        ({"label_key": None}, TypeError, "label_key must be a str, got None"),
        ({"label_key": "image"}, ValueError, "label_key must differ from image_key, got 'image' for both"),
    ],
)
def test_a_bad_form_of_batches_is_refused_at_once(wrong, kind, text):
    with pytest.raises(kind, match=text):
        SaliencyMix(K, **wrong)


def test_a_generator_of_numpy_is_refused():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got numpy.random.*Generator"):
        SaliencyMix(K, generator=np.random.default_rng())


@pytest.mark.gpu
def test_a_generator_of_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"^generator must be a CPU generator, got one on cuda$"):
        SaliencyMix(K, generator=torch.Generator("cuda"))


# In a DataLoader

BATCHES = 4


def loader_of(mix, workers, *, seed=None, persistent=False):
    """Return a loader of equal batches, so that only the random draws make their targets differ."""
    dataset = TensorDataset(pixels(6, 3, 16, 16).repeat(BATCHES, 1, 1, 1), class_ids(6).repeat(BATCHES))
    return DataLoader(
        dataset,
        batch_size=6,
        collate_fn=mix.collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        persistent_workers=persistent,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )


def two_epochs(loader):
    return [(images.clone(), targets.clone()) for _ in range(2) for images, targets in loader]


@pytest.mark.parametrize("own", [{}, {"seed": 1}], ids=["no seed", "seed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_two_batches_of_a_loader_are_drawn_alike(workers, own):
    batches = two_epochs(loader_of(SaliencyMix(K, **own), workers))
    drawn = {tuple(targets.flatten().tolist()) for _, targets in batches}
    assert len(drawn) == len(batches) == 2 * BATCHES


@pytest.mark.parametrize(
    ("own", "persistent"),
    [({}, False), ({"seed": 1}, False), ({"seed": 1}, True), ("generator", True)],
    ids=["no seed, new workers", "seed, new workers", "seed, persistent workers", "generator, persistent workers"],
)
def test_the_loader_s_generator_repeats_what_workers_draw(own, persistent):
    def run(seed, own=own):
        if own == "generator":
            own = {"generator": torch.Generator().manual_seed(1)}
        return two_epochs(loader_of(SaliencyMix(K, **own), 2, seed=seed, persistent=persistent))

    batches = run(3)
    assert len({tuple(targets.flatten().tolist()) for _, targets in batches}) == 2 * BATCHES
    torch.manual_seed(99)  # must not matter
    assert equal_batches(run(3), batches) == [True] * 2 * BATCHES
    assert equal_batches(run(4), batches) == [False] * 2 * BATCHES
    if own:
        assert equal_batches(run(3, own={"seed": 2}), batches) == [False] * 2 * BATCHES


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_every_detector_works_in_a_worker_that_is_forked_after_its_use(name):
    # A library with its own threads can hang or crash there.
    mix = SaliencyMix(K, seed=1, saliency=name)
    drawn_batches(mix)
    first, again = (list(loader_of(mix, 1, seed=3)) for _ in range(2))
    assert equal_batches(first, again) == [True] * BATCHES


def test_collate_takes_tensors_and_arrays_and_gives_what_the_call_gives():
    images, labels = pixels(5, 3, 24, 40), class_ids(5)
    expected = SaliencyMix(K, seed=1)(images, labels)
    of_arrays = list(zip(images.numpy(), labels.tolist(), strict=True))
    of_tensors = tuple(zip(images, labels, strict=True))
    for samples in (of_arrays, of_tensors):
        assert equal_batches([SaliencyMix(K, seed=1).collate(samples)], [expected]) == [True]


def dicts(count):
    """Return samples in the format of Hugging Face's data sets."""
    return [
        {"pixel_values": image, "labels": label, "name": f"{index}.png", "size": {"height": index}}
        for index, (image, label) in enumerate(
            zip(pixels(count, 3, 16, 16).numpy(), class_ids(count).tolist(), strict=True)
        )
    ]


IN_DICTS = {"image_key": "pixel_values", "label_key": "labels"}


@pytest.mark.parametrize("return_boxes", [False, True])
def test_collate_takes_dicts_and_passes_on_what_else_is_in_them(return_boxes):
    batch = SaliencyMix(K, seed=1, return_boxes=return_boxes, **IN_DICTS).collate(dicts(5))
    images, targets, boxes = SaliencyMix(K, seed=1, return_boxes=True)(pixels(5, 3, 16, 16), class_ids(5))
    assert torch.equal(batch.pop("pixel_values"), images)
    assert torch.equal(batch.pop("labels"), targets)
    if return_boxes:
        assert torch.equal(batch.pop("mix_boxes"), boxes)
    assert batch.pop("name") == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert torch.equal(batch.pop("size")["height"], torch.arange(5))
    assert batch == {}


def test_collate_takes_vectors_and_arrays_in_dicts_and_returns_boxes_of_pairs():
    images, labels = pixels(5, 3, 24, 40), torch.eye(K)[:5]
    expected = SaliencyMix(K, seed=1, return_boxes=True)(images, labels)
    assert len(expected) == 3
    pairs = list(zip(images, labels, strict=True))
    dicts = [{"image": image.numpy(), "label": label.numpy()} for image, label in pairs]
    batch = SaliencyMix(K, seed=1, return_boxes=True).collate(dicts)
    assert list(batch) == ["image", "label", "mix_boxes"]
    assert equal_batches([tuple(batch.values())], [expected]) == [True]
    assert equal_batches([SaliencyMix(K, seed=1, return_boxes=True).collate(pairs)], [expected]) == [True]


def two_epochs_of_dicts(start, workers=2):
    mix = SaliencyMix(K, seed=1, return_boxes=True, **IN_DICTS)
    loader = DataLoader(
        dicts(24),
        batch_size=6,
        collate_fn=mix.collate,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(3),
    )
    return [copy.deepcopy(batch) for _ in range(2) for batch in loader]


def assert_batches_of_dicts_equal(some, others):
    for batch, same in zip(some, others, strict=True):
        assert batch["name"] == same["name"]
        assert all(torch.equal(batch[name], same[name]) for name in ("pixel_values", "labels", "mix_boxes"))


def test_workers_mix_dicts():
    batches = two_epochs_of_dicts("fork")
    assert [name for batch in batches for name in batch["name"]] == [f"{i}.png" for i in range(24)] * 2
    for batch in batches:
        torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(6))
    assert len({tuple(batch["labels"].flatten().tolist()) for batch in batches}) == len(batches)
    assert_batches_of_dicts_equal(batches, two_epochs_of_dicts("fork"))


@pytest.mark.slow
def test_it_does_not_matter_how_workers_are_started():
    # A worker that is spawned, or forked by a server, unpickles the object.
    assert_batches_of_dicts_equal(two_epochs_of_dicts("fork", workers=1), two_epochs_of_dicts("spawn", workers=1))


IMAGE = pixels(3, 8, 8)


@pytest.mark.parametrize(
    ("sample", "options", "kind", "text"),
    [
        (
            {"img": IMAGE, "label": 1},
            {},
            ValueError,
            "image_key must be a key of each sample, got 'image' where a sample has 'img', 'label'",
        ),
        (
            {"image": IMAGE, "target": 1},
            {"label_key": "labels"},
            ValueError,
            "label_key must be a key of each sample, got 'labels' where a sample has 'image', 'target'",
        ),
        (
            {"image": IMAGE, "label": 1, "mix_boxes": 3},
            {"return_boxes": True},
            ValueError,
            "return_boxes must be False where samples have a key 'mix_boxes' of their own",
        ),
        (
            (IMAGE, 1, "a.png"),
            {},
            TypeError,
            r"samples must be pairs .*, or dicts, which may have more entries; got builtins.tuple with 3 members",
        ),
        (IMAGE[:2], {}, TypeError, "samples must be pairs .*; got torch.Tensor$"),
    ],
)
def test_a_bad_sample_is_refused(sample, options, kind, text):
    with pytest.raises(kind, match=text):
        SaliencyMix(K, **options).collate([sample, sample])


def test_pairs_among_dicts_are_refused():
    with pytest.raises(TypeError, match=r"^samples must all be dicts where the first one is, got builtins\.tuple$"):
        SaliencyMix(K).collate([{"image": IMAGE, "label": 1}, (IMAGE, 1)])


def test_a_bad_sample_reaches_the_user_out_of_a_worker():
    dataset = TensorDataset(pixels(4, 3, 8, 8), torch.full((4,), K))
    loader = DataLoader(dataset, batch_size=4, collate_fn=SaliencyMix(K).collate, num_workers=1)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\)"):
        next(iter(loader))


# Under torch.compile


@pytest.fixture
def compiled():
    """Return `torch.compile` with cleared caches and ``fullgraph=True``."""
    torch._dynamo.reset()

    def compile_with(backend, *, fullgraph=True, **options):
        return lambda function: torch.compile(function, backend=backend, fullgraph=fullgraph, **options)

    yield compile_with
    torch._dynamo.reset()


def step(mix, images, labels):
    """Return the results of calls that a compiler must not merge, drop or reorder."""
    first = mix(images, labels)
    second = mix(images, labels)
    mix(images, labels)
    third = mix(second[0], labels)
    return [*first, *second, *third]


def assert_compiled_steps_equal(step_in_graph, shapes, labels_of=class_ids, **options):
    ours, theirs = SaliencyMix(K, seed=1, **options), SaliencyMix(K, seed=1, **options)
    for shape, memory_format in shapes:
        images, labels = pixels(*shape).to(memory_format=memory_format), labels_of(shape[0])
        mixed, expected = step_in_graph(ours, images, labels), step(theirs, images, labels)
        assert equal_batches([mixed], [expected]) == [True]
        assert [tensor.stride() for tensor in mixed] == [tensor.stride() for tensor in expected]
        assert not torch.equal(mixed[0], mixed[len(mixed) // 3])


BATCH_SHAPES = [
    ((6, 3, 16, 16), torch.contiguous_format),
    ((6, 3, 16, 16), torch.channels_last),
    ((5, 3, 16, 16), torch.contiguous_format),
    ((4, 3, 16, 20), torch.contiguous_format),
]


def test_a_step_in_one_graph_is_bit_identical(compiled):
    assert_compiled_steps_equal(compiled("aot_eager")(step), BATCH_SHAPES, return_boxes=True)
    options = {"modes": {"saliencymix": 1.0, "mixup": 1.0}, "label_smoothing": 0.1}
    assert_compiled_steps_equal(compiled("aot_eager")(step), BATCH_SHAPES[:1], **options)


def test_images_made_in_the_graph_are_mixed_bit_identically(compiled):
    def augmented(mix, images, labels):
        return step(mix, images.flip(3).bitwise_not(), labels)

    images, labels = pixels(6, 3, 16, 16).to(memory_format=torch.channels_last), class_ids(6)
    expected = augmented(SaliencyMix(K, seed=1), images, labels)
    assert equal_batches([compiled("aot_eager")(augmented)(SaliencyMix(K, seed=1), images, labels)], [expected]) == [
        True
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_step_compiled_by_inductor_is_bit_identical(compiled):
    shapes = [((count, 3, 16, 16), torch.channels_last) for count in (6, 5)]
    assert_compiled_steps_equal(compiled("inductor", dynamic=True)(step), shapes, return_boxes=True)


def test_vectors_are_taken_in_a_graph(compiled):
    assert_compiled_steps_equal(compiled("aot_eager")(step), BATCH_SHAPES[:1], lambda count: torch.eye(K)[:count] / 2)


@pytest.mark.gpu
def test_a_compiled_step_on_the_gpu_is_bit_identical(compiled):
    in_graph = compiled("aot_eager")(lambda mix, images, labels: step(mix, images.cuda(), labels.cuda()))
    ours, theirs = (SaliencyMix(K, seed=1, saliency="fine_grained") for _ in range(2))
    images, labels = pixels(6, 3, 16, 16), class_ids(6)
    expected = step(theirs, images.cuda(), labels.cuda())
    assert equal_batches([in_graph(ours, images, labels)], [expected]) == [True]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_cuda_graph_is_refused():
    mix, images, labels = SaliencyMix(K, seed=1), pixels(4, 3, 16, 16).cuda(), class_ids(4).cuda()
    mix(images, labels)
    with (
        pytest.raises(RuntimeError, match="must be called outside of a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        mix(images, labels)


@pytest.mark.parametrize("saliency", ["spectral_residual", "a compiled network"])
def test_gradients_of_a_compiled_step_are_the_same(compiled, saliency):
    images, labels = pixels(6, 3, 16, 16), class_ids(6)
    network = torch.nn.Linear(3 * 16 * 16, K)

    def loss_of(mix):
        mixed, targets = mix(images.flip(3), labels)
        return torch.nn.functional.cross_entropy(network(mixed.flatten(1) / 255), targets)

    def mix_by(wrap):
        chosen = saliency if saliency != "a compiled network" else NetworkSaliency(wrap(Channel(1)))
        return SaliencyMix(K, seed=1, saliency=chosen)

    expected = loss_of(mix_by(lambda network: network))
    expected.backward()
    gradient, network.weight.grad = network.weight.grad, None
    loss = compiled("aot_eager")(loss_of)(mix_by(lambda network: torch.compile(network, backend="eager")))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(network.weight.grad, gradient)


def test_the_global_generator_draws_in_a_graph_too(compiled):
    torch.manual_seed(3)
    expected = drawn_batches(SaliencyMix(K))
    torch.manual_seed(3)
    assert equal_batches(drawn_batches(compiled("aot_eager")(SaliencyMix(K))), expected) == [True] * 3


def test_one_graph_serves_other_objects_that_draw_for_themselves(compiled):
    graphs = []
    in_graph = compiled(lambda graph, _: graphs.append(graph) or graph.forward)(lambda mix, *batch: mix(*batch))
    mixes = [
        SaliencyMix(np.int64(K), seed=seed, modes=modes) for seed, modes in [(1, None), (2, None), (2, {"mixup": 1.0})]
    ]
    mixes += [pickle.loads(pickle.dumps(mixes[0])), copy.deepcopy(mixes[1])]
    expected = [mix(**GOOD) for mix in copy.deepcopy(mixes)]
    assert equal_batches([in_graph(mix, *GOOD.values()) for mix in mixes], expected) == [True] * 5
    assert len(graphs) == 1


def test_an_object_of_inference_mode_is_taken_outside_of_it(compiled):
    in_graph = compiled("aot_eager")(lambda mix: mix(**GOOD))
    with torch.inference_mode():
        mix = SaliencyMix(K, seed=1)
        expected = SaliencyMix(K, seed=1)(**GOOD)
    assert equal_batches([in_graph(mix)], [expected]) == [True]


def test_the_operator_keeps_the_rules_of_pytorch():
    mix = SaliencyMix(K, prob=0.0)  # so that all calls return equal results
    for images in (GOOD["images"], pixels(2, 1, 8, 9).to(memory_format=torch.channels_last)):
        torch.library.opcheck(pytorch._mix_in_graph, (images, class_ids(len(images)), mix._handle, K))


def test_objects_end_although_graphs_know_them(compiled):
    mix = SaliencyMix(K, seed=1)
    handle, ended = mix._handle, weakref.ref(mix)
    compiled("eager")(lambda mix: mix(**GOOD))(mix)
    del mix
    gc.collect(0)
    assert ended() is None
    with pytest.raises(RuntimeError, match="the SaliencyMix of this compiled graph must exist in this process"):
        pytorch._mix_in_graph(*GOOD.values(), handle, K)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"images": GOOD["images"].float()}, "images must be uint8 with pixel values 0..255, got torch.float32"),
        ({"labels": class_ids(3)}, r"labels must have shape \(4,\) or .*, got \(3,\)"),
        ({"labels": torch.tensor([0, 1, K, 2])}, r"labels must be in \[0, 10\) .* got 10 at \[2\]"),
    ],
)
def test_mistakes_are_named_by_a_compiled_step(compiled, wrong, text, fullgraph):
    mix = SaliencyMix(K)
    in_graph = compiled("aot_eager", fullgraph=fullgraph)(lambda images, labels: mix(images, labels))
    with pytest.raises((TypeError, ValueError, torch._dynamo.exc.TorchDynamoException), match=text):
        in_graph(**{**GOOD, **wrong})


# Beside timm and torchvision


@pytest.fixture(scope="module")
def timm():
    pytest.importorskip("timm", reason="timm is not installed")
    import timm.data
    import timm.loss

    return timm


def test_it_is_called_as_timm_s_mixup_and_its_targets_suit_timm_s_loss(timm):
    images, labels = pixels(6, 3, 16, 16), class_ids(6)
    _, theirs = timm.data.Mixup(cutmix_alpha=1.0, label_smoothing=0.1, num_classes=K)(images.float(), labels)
    mixed, targets = SaliencyMix(K, label_smoothing=0.1, seed=1)(images, labels)
    assert (targets.shape, targets.dtype, targets.device) == (theirs.shape, theirs.dtype, theirs.device)
    torch.testing.assert_close(theirs.sum(dim=1), targets.sum(dim=1))
    logits = torch.nn.Conv2d(3, K, 16)(mixed / 255).flatten(1)
    logits.retain_grad()
    timm.loss.SoftTargetCrossEntropy()(logits, targets).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(dim=1) - targets) / 6)


def test_collate_stands_where_timm_s_fast_collate_mixup_does(timm):
    samples = [(image, label) for label, image in enumerate(pixels(6, 3, 16, 24).numpy())]
    theirs = timm.data.FastCollateMixup(cutmix_alpha=1.0, num_classes=K)([(image.copy(), i) for image, i in samples])
    ours = SaliencyMix(K).collate(samples)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert (our_tensor.shape, our_tensor.dtype) == (their_tensor.shape, their_tensor.dtype)


def test_timm_s_loader_takes_collate(timm, tmp_path):
    from torchvision.datasets import ImageFolder

    make_sample_data(tmp_path, train=2, val=1)
    given = []

    class Recorded(SaliencyMix):
        def __call__(self, images, labels):
            given.append(super().__call__(images, labels))
            return given[-1]

    loader = timm.data.create_loader(
        ImageFolder(tmp_path / "train"),
        input_size=(3, 32, 48),
        batch_size=8,
        is_training=True,
        collate_fn=Recorded(8, seed=1).collate,
        device=torch.device("cpu"),
        num_workers=0,
        persistent_workers=False,
    )
    batches = list(loader)
    assert len(batches) == len(given) == 2
    for (normalised, targets), (mixed, our_targets) in zip(batches, given, strict=True):
        assert torch.equal(targets, our_targets)
        assert normalised.shape == (8, 3, 32, 48)
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
        torch.testing.assert_close(normalised * std + mean, mixed.float(), rtol=0, atol=1e-3)


def test_same_kinds_of_output_as_torchvision_s_cutmix():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, labels = pixels(6, 3, 16, 24), class_ids(6)
    for ours, theirs in zip(
        SaliencyMix(K)(images, labels), v2.CutMix(num_classes=K)(images.clone(), labels), strict=True
    ):
        assert (type(ours), ours.shape, ours.dtype) == (type(theirs), theirs.shape, theirs.dtype)


def test_image_tensors_of_torchvision_are_taken():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    images, labels = pixels(6, 3, 16, 24), class_ids(6)
    expected = SaliencyMix(K, seed=1)(images, labels)
    assert equal_batches([SaliencyMix(K, seed=1)(tv_tensors.Image(images), labels)], [expected]) == [True]


# NetworkSaliency


class Channel(torch.nn.Module):
    """A network that returns one channel of its input as saliency, and records its inputs."""

    def __init__(self, channel=0, keep_dimension=False):
        super().__init__()
        self.channel, self.keep_dimension, self.inputs = channel, keep_dimension, []

    def forward(self, images):
        self.inputs.append(images)
        chosen = images[:, self.channel : self.channel + 1]
        return chosen if self.keep_dimension else chosen[:, 0]


def channel_of_arrays(channel):
    return lambda images: images[..., channel].astype(np.float32)


def test_the_network_gets_normalised_float_images():
    images = hwc(pixels(3, 3, 20, 28))
    network = Channel()
    NetworkSaliency(network)(images)
    (given,) = network.inputs
    expected = (images / 255.0 - MEAN) / STD
    np.testing.assert_allclose(given.numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)
    assert given.dtype == torch.float32
    assert given.is_contiguous()  # so that a network may use `view`
    assert not given.requires_grad


def test_mean_and_std_are_the_user_s():
    images = hwc(pixels(2, 3, 8, 8))
    network = Channel()
    NetworkSaliency(network, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4])(images)
    expected = (images / 255.0 - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.4]
    np.testing.assert_allclose(network.inputs[0].numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("keep_dimension", [False, True], ids=["(N, h, w)", "(N, 1, h, w)"])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("channel", [0, 2])
def test_the_peak_lies_where_the_network_says(count, channel, keep_dimension):
    images = hwc(pixels(count, 3, 20, 28)) // 2
    places = [(3 * i % 20, 11 * i % 28) for i in range(1, count + 1)]
    for i, (y, x) in enumerate(places):
        images[i, y, x, channel] = 250
    maps = NetworkSaliency(Channel(channel, keep_dimension))(images)
    assert maps.shape == (count, 20, 28)
    assert maps.dtype == np.float32
    assert saliency_peaks(maps, 20, 28).tolist() == [list(place) for place in places]


def test_mixing_with_a_network_equals_mixing_with_a_function_that_says_the_same(draws):
    images = hwc(pixels(6, 3, 20, 28))
    source_index, lam = np.roll(np.arange(6), 1), np.linspace(0.3, 0.9, 6)
    ours = saliencymix(images, source_index, lam, saliency=NetworkSaliency(Channel(1)))
    expected = saliencymix(images, source_index, lam, saliency=channel_of_arrays(1))
    for our_array, their_array in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(our_array, their_array)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    mixed, _ = SaliencyMix(K, seed=1, saliency=NetworkSaliency(Channel(1)))(batch, class_ids(6))
    np.testing.assert_array_equal(hwc(mixed), mixed_arrays(images, *draws, saliency=channel_of_arrays(1)).images)


def test_grey_images_reach_the_network_in_three_channels():
    images = hwc(pixels(4, 1, 20, 28))
    network = Channel(2)
    maps = NetworkSaliency(network)(images)
    assert network.inputs[0].shape == (4, 3, 20, 28)
    np.testing.assert_allclose(maps, (images[..., 0] / 255.0 - MEAN[2]) / STD[2], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_for_the_network_and_the_peak_is_scaled_back(channels):
    images = np.zeros((2, 64, 96, channels), np.uint8)
    images[0, 8:16, 72:84] = 255
    images[1, 56:64, 0:12] = 255
    network = Channel()
    maps = NetworkSaliency(network, size=8)(images)
    assert network.inputs[0].shape == (2, 3, 8, 8)
    assert maps.shape == (2, 8, 8)
    (y0, x0), (y1, x1) = saliency_peaks(maps, 64, 96).tolist()
    assert (8 <= y0 < 16, 72 <= x0 < 84, 56 <= y1 < 64, 0 <= x1 < 12) == (True,) * 4


@pytest.mark.parametrize(
    "flip", [np.s_[..., ::-1], np.s_[:, ::-1], np.s_[:, :, ::-1], np.s_[::-1]], ids=["BGR", "rows", "columns", "images"]
)
def test_arrays_that_run_backwards_through_memory_are_taken(flip):
    images = hwc(pixels(4, 3, 20, 28))[flip]
    np.testing.assert_array_equal(NetworkSaliency(Channel())(images), NetworkSaliency(Channel())(images.copy()))


def test_read_only_arrays_are_taken():
    images = hwc(pixels(4, 3, 20, 28))
    expected = NetworkSaliency(Channel())(images)
    images.setflags(write=False)
    np.testing.assert_array_equal(NetworkSaliency(Channel())(images), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_floating_type_become_float32(dtype):
    network = torch.nn.Sequential(Channel(), torch.nn.Identity())
    network.register_forward_hook(lambda module, given, maps: maps.to(dtype))
    assert NetworkSaliency(network)(hwc(pixels(2, 3, 8, 8))).dtype == np.float32


def test_no_gradients_are_kept_of_a_network_s_parameters():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1)).eval()
    kept = []
    network.register_forward_hook(lambda module, given, maps: kept.append(maps.requires_grad))
    images = hwc(pixels(4, 3, 20, 28))
    mixed = saliencymix(images, np.array([1, 2, 3, 0]), np.full(4, 0.5), saliency=NetworkSaliency(network))
    assert (mixed.lam < 1).all()
    assert kept == [False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: NetworkSaliency(Channel(), size=0), ValueError, "size must be an integer of at least 1, got 0"),
        (lambda: NetworkSaliency(Channel(), mean=[0.5]), ValueError, "mean must have 3 numbers, .* got 1"),
        (lambda: NetworkSaliency(Channel(), std=[1.0] * 4), ValueError, "std must have 3 numbers, .* got 4"),
        (
            lambda: NetworkSaliency(lambda images: {"out": images})(hwc(pixels(1, 3, 8, 8))),
            TypeError,
            re.escape("network must return a tensor of shape (N, h, w) or (N, 1, h, w), got builtins.dict"),
        ),
        (
            lambda: SaliencyMix(K, saliency=NetworkSaliency(lambda images: images))(**GOOD),
            ValueError,
            r"saliency must return maps of shape \(\d, h, w\)",
        ),
    ],
)
def test_mistakes_with_networks_are_named(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


# Inside DALI


def dali_batch(images, saliency, device="cpu"):
    """Mix one batch in a pipeline with seed 5; return images, source index, lam and peaks as NumPy arrays."""
    from nvidia.dali import fn, pipeline_def

    from dali_saliencymix import fn as mix_fn

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=0 if device == "gpu" else None, seed=5)
    def pipeline():
        batch = fn.external_source(lambda: list(images), layout="HWC")
        number = fn.external_source(lambda: np.arange(len(images), dtype=np.int32)[:, None])
        batch = batch.gpu() if device == "gpu" else batch
        mixed, _, source, lam = mix_fn.saliencymix(batch, number, saliency=saliency)
        return mixed, source, lam, mix_fn.saliency_peaks(batch, saliency=saliency)

    outputs = pipeline().run()
    return [np.array((output.as_cpu() if device == "gpu" else output).as_tensor()) for output in outputs]


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(6, 3, 20, 28), (1, 3, 9, 9), (4, 1, 16, 16)], ids=str)
def test_a_network_inside_a_dali_pipeline(where, shape):
    images = hwc(pixels(*shape)) // 2
    places = [[5 * i % shape[2], 7 * i % shape[3]] for i in range(1, shape[0] + 1)]
    for i, (y, x) in enumerate(places):
        images[i, y, x] = 250
    network = Channel().to("cuda" if where == "gpu" else "cpu")
    ours = dali_batch(images, NetworkSaliency(network), where)
    assert network.inputs[0].shape == (*shape[:1], 3, *shape[2:])
    assert ours[3].tolist() == places
    expected = dali_batch(images, channel_of_arrays(0), where)
    assert (expected[2] < 1).any()
    for our_array, their_array in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(our_array, their_array)


# On a GPU alone


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_work_is_enqueued_on_pytorch_s_current_stream(draws, own_stream):
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    cpu_images = pixels(16, 3, 64, 64)
    mix = SaliencyMix(K, seed=1, saliency="fine_grained")
    mix(cpu_images.cuda(), class_ids(16).cuda())  # kernels are compiled and constants copied before
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        images = torch.zeros_like(cpu_images, device="cuda")
        pinned, labels = cpu_images.pin_memory(), class_ids(16).cuda()
        torch.cuda._sleep(200_000_000)  # the pixels arrive long after the call
        images.copy_(pinned, non_blocking=True)
        mixed, _ = mix(images, labels)
        late = mixed.clone()  # reads the result on the same stream
        images.zero_()
    stream.synchronize()
    expected = mixed_arrays(hwc(cpu_images), draws[1], saliency="fine_grained").images
    np.testing.assert_array_equal(hwc(late), expected)


@pytest.mark.gpu
def test_the_detector_sees_the_memory_of_a_tensor_on_the_gpu():
    cupy = pytest.importorskip("cupy")
    seen = []

    def detector(array):
        seen.append((array.data.ptr, cupy.cuda.get_current_stream().ptr))
        return array[..., 0].astype(cupy.float32)

    images = pixels(5, 3, 24, 40).cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        stream = torch.cuda.current_stream().cuda_stream
        SaliencyMix(K, seed=4, saliency=detector)(images, class_ids(5).cuda())
    assert seen == [(images.data_ptr(), stream)]


@pytest.mark.gpu
@pytest.mark.parametrize("labels_on", ["cpu", "cuda"])
def test_labels_may_lie_on_either_device(labels_on):
    images, labels = pixels(5, 3, 24, 40).cuda(), class_ids(5).to(labels_on)
    mixed, targets = SaliencyMix(K, seed=4)(images, labels)
    assert mixed.is_cuda
    assert targets.is_cuda
    torch.testing.assert_close(targets.sum(dim=1).cpu(), torch.ones(5))


@pytest.mark.gpu
def test_a_label_that_is_no_class_makes_nan_on_the_gpu(draws):
    labels = torch.tensor([0, K, 1, 2])
    _, targets = SaliencyMix(K)(pixels(4, 3, 16, 16).cuda(), labels.cuda())
    ((source_index, *_),) = draws
    unknown = (labels == K) | (labels[source_index] == K)
    assert targets.isnan().all(dim=1).tolist() == unknown.tolist()
    assert targets.isnan().any(dim=1).tolist() == unknown.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_network_on_the_gpu_computes_on_the_stream_of_the_images(own_stream):
    cupy = pytest.importorskip("cupy")
    images = hwc(pixels(6, 3, 32, 32))
    expected = NetworkSaliency(Channel())(images)
    streams = []

    def network(given):
        streams.append(torch.cuda.current_stream().cuda_stream)
        return given[:, 0]

    with cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null as stream:
        maps = NetworkSaliency(network)(cupy.asarray(images))
        assert isinstance(maps, cupy.ndarray)
        np.testing.assert_allclose(cupy.asnumpy(maps, stream=stream), expected, atol=1e-5)
    assert streams == [stream.ptr]

"""From options to batches: every backend produces the same kind of batches, shards, epochs and states."""

from __future__ import annotations

import functools
import io
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from shared.batches import assert_equal_batches, epoch, epochs_with_states, ids
from shared.cifar_files import write_cifar
from shared.training_fixtures import TINY, TINY_FOR_CIFAR
from torchvision.transforms import RandomErasing

from dali_saliencymix._dali import mix_nodes as dali_mix
from dali_saliencymix._dali.python_operator import to_device
from dali_saliencymix.datasets.cifar import read_cifar
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders import augmentation, imagenet
from dali_saliencymix.loaders import cifar as cifar_loaders
from dali_saliencymix.loaders import torch as torch_loaders
from dali_saliencymix.loaders.base import LoaderError, chosen_backend
from dali_saliencymix.loaders.cifar import CifarData
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.loaders.torch import PaddedImages, TrainingBatches
from dali_saliencymix.options import MixOptions
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from dali_saliencymix.training import arguments
from dali_saliencymix.training.activation_maps import _centre_crop
from dali_saliencymix.training.checkpoints import load_checkpoint, random_state

pytest_plugins = ["shared.training_fixtures"]

CPU = torch.device("cpu")
FOLDER_SIZES = ("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32")
KINDS = ["folder dali-cpu", "folder pytorch", "cifar10 dali-cpu", "cifar10 pytorch"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 32 training and 8 validation images in class folders, and CIFAR-10 with 30 and 15 images."""
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    write_cifar(root, "cifar10", train=30, test=15)
    return root


# Training options without random crops.
WHOLE = {"folder": ("--min-crop-area", "1"), "cifar10": ("--crop-padding", "0")}


def options(root, kind="folder dali-cpu", *more):
    dataset, backend = kind.split()
    line = [str(root), "--dataset", dataset, "--data-backend", backend, "-b", "4", "-j", "2", "--device", "cpu"]
    return arguments.parse_arguments([*line, *(FOLDER_SIZES if dataset == "folder" else ()), *more]).data


def process(rank=0, world_size=1, device=CPU):
    return Processes(rank, 0, world_size, device)


def numbered(data):
    """Return the data with the number of each image as its label."""
    if isinstance(data, CifarData):
        parts = {name: getattr(data, name) for name in ("train", "val")}
        return replace(data, **{n: replace(p, labels=np.arange(len(p), dtype=np.int32)) for n, p in parts.items()})
    parts = {name: getattr(data, name) for name in ("train", "val")}
    return replace(data, **{name: replace(part, labels=list(range(len(part)))) for name, part in parts.items()})


def train(args, *, state=None, data=None, **where):
    data = numbered(open_data(args)) if data is None else data
    return data.train_loader(args, process(**where), state=state)


@pytest.mark.parametrize("mix", ["saliencymix", "cutmix", "mixup", "none"])
@pytest.mark.parametrize("kind", [*KINDS, "folder synthetic"])
def test_a_training_batch_is_what_a_model_wants(root, kind, mix):
    args = options(root, kind, "--mix", mix, "--channels-last", "--synthetic-classes", "7")
    data = open_data(args)
    images, labels, source_labels, lam = next(iter(train(args, data=data)))
    assert images.shape == (4, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert [tensor.dtype for tensor in (images, labels, source_labels, lam)] == [
        *(torch.float32, torch.int64, torch.int64, torch.float32)
    ]
    assert labels.shape == source_labels.shape == lam.shape == (4,)
    assert set(labels.tolist()) <= set(range(len(data.classes)))
    assert images.abs().max() < 6
    assert images.std() > 0.3
    if mix == "none":
        assert lam.tolist() == [1] * 4
    else:
        assert sorted(labels.tolist()) == sorted(source_labels.tolist())
        assert ((lam >= 0) & (lam <= 1)).all()
        assert (lam < 1).any()


@each_kind
def test_an_epoch_gives_each_image_once_and_the_next_one_another_order(root, kind):
    args = options(root, kind, "-b", "5")
    loader = train(args)
    batches = [epoch(loader) for _ in range(3)]
    assert all(images.is_contiguous() for images, *_ in batches[0])
    epochs = [ids(part) for part in batches]
    assert len(loader) == 6
    assert all(len(order) == len(set(order)) == 30 for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert ids(epoch(train(args))) == epochs[0]
    assert ids(epoch(train(options(root, kind, "-b", "5", "--seed", "1")))) != epochs[0]


@each_kind
def test_shards_are_disjoint_and_of_equal_length_in_every_epoch(root, kind):
    args = options(root, kind, "-b", "3")
    data = numbered(open_data(args))
    loaders = [train(args, data=data, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(2):
        batches = [epoch(loader) for loader in loaders]
        assert {len(shard) for shard in batches} == {len(loaders[0])} == {3}
        seen = Counter(label for shard in batches for label in ids(shard))
        assert set(seen.values()) == {1}
        assert len(seen) == 27


@each_kind
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (4, 3)])
def test_validation_gives_each_image_exactly_once(root, kind, processes, batch_size):
    args = options(root, kind, "-b", str(batch_size))
    data = numbered(open_data(args))
    loaders = [data.val_loader(args, process(rank, processes)) for rank in range(processes)]
    for _ in range(2):
        batches = [epoch(loader) for loader in loaders]
        assert len({len(shard) for shard in batches}) == 1
        assert sorted(label for shard in batches for label in ids(shard)) == list(range(data.val_images))
        assert all(images.shape == (len(labels), 3, 32, 32) for shard in batches for images, labels in shard)


@each_kind
@pytest.mark.parametrize(("processes", "steps", "batches"), [(1, 2, 2), (2, 1, 1), (1, 9, None)])
def test_a_short_validation_takes_images_from_all_over_the_data_set(root, kind, processes, steps, batches):
    args = options(root, kind, "-b", "3", "--val-steps", str(steps))
    data = numbered(open_data(args))
    loaders = [data.val_loader(args, process(rank, processes)) for rank in range(processes)]
    whole = epoch(data.val_loader(replace(args, val_steps=None), process()))
    expected = list(range(data.val_images))
    if batches is not None:  # of 3 images in each process
        expected = np.linspace(0, data.val_images, 6, endpoint=False).astype(int).tolist()
    for _ in range(2):
        given = [epoch(loader) for loader in loaders]
        assert {len(loader) for loader in loaders} == {len(shard) for shard in given} == {batches or len(whole)}
        assert sorted(label for shard in given for label in ids(shard)) == expected
    images, by_label = torch.cat([images for images, _ in whole]), np.argsort(ids(whole))
    for batch, labels in (batch for shard in given for batch in shard):
        assert torch.equal(batch, images[by_label[labels]])


@pytest.mark.parametrize("kind", [*KINDS, "folder synthetic"])
def test_a_state_taken_anywhere_leads_to_the_batch_that_comes_next(root, kind):
    args = options(root, kind, "-b", "7", "--mix-prob", "0.6", "--seed", "5", "--synthetic-steps", "4")
    data = open_data(args)
    data = data if kind == "folder synthetic" else numbered(data)
    loader = train(args, data=data)
    assert len(loader) == 4
    batches, states = epochs_with_states(loader, 2)
    for position, state in enumerate(states[:-1], start=1):
        restored = train(args, data=data, state=pickle.loads(pickle.dumps(state)))
        rest = epoch(restored)
        assert len(rest) == 4 - position % 4
        while len(rest) < len(batches) - position:
            rest += epoch(restored)
        assert_equal_batches(rest, batches[position:])


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_a_training_that_was_stopped_in_an_epoch_ends_with_the_same_weights(root, train_here, tmp_path, kind):
    dataset, backend = kind.split()
    tiny = TINY if dataset == "folder" else TINY_FOR_CIFAR
    common = [root, *tiny, "--dataset", dataset, "--data-backend", backend, "--training-only"]
    weights = []
    for name, lines in (("whole", [()]), ("stopped", [("--max-steps", "4"), ("--resume", "auto")])):
        for line in lines:
            ended = train_here(*common, "--output-dir", tmp_path / name, *line)
            assert ended.status == 0, ended.err
        checkpoint = load_checkpoint(tmp_path / name / "checkpoint_last.pt")
        assert (checkpoint["epoch"], checkpoint["step"]) == (2, 0)
        weights.append(checkpoint["model"])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(part.values() for part in weights), strict=True))


@pytest.mark.parametrize("kind", [*KINDS, "folder synthetic"])
def test_after_the_last_batch_the_next_iteration_yields_the_next_epoch(root, kind):
    args = options(root, kind, "-b", "10", "--synthetic-steps", "3")
    data = open_data(args)
    loader, counted = train(args, data=data), train(args, data=data)
    epoch(loader)
    expected = epoch(loader)
    iterator = iter(counted)
    for _ in range(len(counted)):  # and does not ask whether there is one more
        next(iterator)
    restored = train(args, data=data, state=counted.state())
    assert len(expected) == 3
    assert_equal_batches(epoch(counted), expected)
    assert_equal_batches(epoch(restored), expected)


@pytest.mark.parametrize("kind", [*KINDS, "folder synthetic"])
def test_loaders_draw_nothing_from_the_generators_of_the_training(root, kind):
    args = options(root, kind)
    data = open_data(args)
    loaders = data.train_loader(args, process()), data.val_loader(args, process())
    torch.manual_seed(3)
    before = random_state(CPU)
    for loader in loaders:
        epoch(loader)
    after = random_state(CPU)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after


def test_the_number_of_workers_changes_nothing(root):
    args = [options(root, "folder pytorch", "--aa", "ra", "-j", workers) for workers in ("1", "2")]
    batches = [epoch(train(each)) for each in args]
    assert_equal_batches(*batches)


@each_kind
def test_prefetching_changes_no_batch_also_after_resuming(root, kind):
    args, deeper = options(root, kind), options(root, kind, "--prefetch", "3")
    whole, loader = epoch(train(args)), train(args)
    for _ in zip(range(2), loader, strict=False):
        pass
    assert_equal_batches(epoch(train(deeper)), whole)
    assert_equal_batches(epoch(train(deeper, state=loader.state())), whole[2:])


def test_a_loader_prefetches_as_many_batches_as_asked_for(root, monkeypatch):
    depths = []

    def noted(make, *given, **options):
        depths.append(options.get("prefetch_queue_depth", options.get("prefetch_factor")))
        return make(*given, **options)

    for module, name in ((imagenet, "define"), (cifar_loaders, "define"), (torch_loaders.data, "DataLoader")):
        monkeypatch.setattr(module, name, functools.partial(noted, getattr(module, name)))
    for kind in KINDS:
        train(options(root, kind, "--prefetch", "3"))
    assert depths == [3] * 4


def test_an_epoch_that_was_left_goes_on_where_it_was(root):
    args = options(root, "folder pytorch")
    whole, loader = epoch(train(args)), train(args)
    for _ in zip(range(3), loader, strict=False):
        pass
    rest = epoch(loader)
    assert_equal_batches(rest, whole[3:])


def test_pytorch_and_dali_decode_resize_and_normalise_alike(root):
    batches = [
        epoch(numbered(open_data(args)).val_loader(args, process()))
        for args in (options(root, f"folder {backend}", "-b", "8") for backend in ("dali-cpu", "pytorch"))
    ]
    (ours, our_ids), (theirs, their_ids) = batches[0][0], batches[1][0]
    assert torch.equal(our_ids, their_ids)
    # One of 256 levels is 0.017; JPEG decoders and filters differ by little more.
    assert (ours - theirs).abs().mean() < 0.05


def test_all_validate_on_the_same_pixels_of_a_photograph_whatever_its_size(tmp_path):
    # Sizes with half a pixel left at a border, or with a long side that is not an integer.
    sizes = [(83, 64), (85, 64), (64, 87), (100, 75), (101, 75), (75, 107), (107, 80), (64, 64), (211, 150)]
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        folder = tmp_path / "val" / f"{number}"
        folder.mkdir(parents=True)
        grain = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8))
        grain.resize((width, height), Image.Resampling.BICUBIC).save(folder / "grain.png")
    crops = []
    for backend in ("dali-cpu", "pytorch"):
        line = ["--train-dir", str(tmp_path / "val"), "--val-dir", str(tmp_path / "val"), "--device", "cpu"]
        line += ["--data-backend", backend, "-j", "1", "--val-resize-size", "64", "--val-crop-size", "48"]
        args = arguments.parse_arguments(line).data
        crops.append(torch.cat([images for images, _ in open_data(args).val_loader(args, process())]))
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    ours, theirs = (images * std for images in crops)
    levels = (ours - theirs).abs().mean(dim=(1, 2, 3))
    assert levels.max() < 0.5, levels
    pictures = [_centre_crop(tmp_path / "val" / f"{number}" / "grain.png", 64, 48) for number in range(len(sizes))]
    normalised = (torch.tensor(np.stack(pictures)) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(normalised.permute(0, 3, 1, 2), crops[1], atol=1e-4, rtol=0)


@each_kind
@pytest.mark.parametrize("mix", ["saliencymix", "mixup"])  # the former normalises in the same operator, on a CPU
def test_all_images_are_normalised_with_what_the_options_say(root, kind, mix):
    seen = []
    for more in ((), ("--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.3", "0.4")):
        args = options(root, kind, "--mix", mix, *more)
        data = open_data(args)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        assert (data.mean[1], data.std[1]) == ((0.4, 0.3) if more else (args.mean[1], args.std[1]))
        loaders = data.train_loader(args, process()), data.val_loader(args, process())
        seen.append(torch.cat([255 * (images * std + mean) for loader in loaders for images, *_ in epoch(loader)]))
    assert torch.allclose(*seen, atol=1e-3)
    assert torch.allclose(seen[0], seen[0].round(), atol=1e-3)
    if kind.startswith("cifar"):
        pixels = torch.from_numpy(data.val.images).permute(0, 3, 1, 2).float()
        assert torch.allclose(seen[0][-len(pixels) :], pixels, atol=1e-3)


def test_without_options_a_data_set_is_normalised_with_its_own_values(root):
    assert open_data(options(root)).mean == (0.485, 0.456, 0.406)
    cifar = open_data(options(root, "cifar10 dali-cpu"))
    assert 255 * np.array([cifar.mean, cifar.std]) == pytest.approx(np.array([[125.3, 123, 113.9], [63, 62.1, 66.7]]))
    assert open_data(options(root, "folder synthetic")).std == (1, 1, 1)


def test_pytorch_and_dali_crop_alike(root):
    crops = {}
    for backend in ("dali-cpu", "pytorch"):
        args = options(root, f"folder {backend}", "-b", "32", "--mix", "none", "--min-crop-area", "0.3")
        loader, images, labels = train(args), [], []
        for _ in range(6):
            for batch in loader:
                images.append(batch[0].clone())
                labels += batch[1].tolist()
        images = torch.cat(images)[np.argsort(labels)].view(32, 6, 3, 32, 32)
        crops[backend] = images.mean(dim=(0, 1, 3, 4)), images.std(), images.mean(dim=1).std()
    for ours, theirs in zip(crops["dali-cpu"], crops["pytorch"], strict=True):
        assert torch.allclose(ours, theirs, atol=0.05)


@each_kind
def test_flips_are_as_probable_as_the_option_says(root, kind):
    batches = [
        epoch(train(options(root, kind, "--hflip-prob", prob, "--mix-prob", "0.5"))) for prob in ("0", "1", "0.5")
    ]
    as_it_is, mirrored, half = (torch.cat([images for images, *_ in part]) for part in batches)
    assert torch.allclose(mirrored, as_it_is.flip(-1))
    alike = [torch.allclose(image, other) for image, other in zip(as_it_is, half, strict=True)]
    flipped = [torch.allclose(image, other) for image, other in zip(mirrored, half, strict=True)]
    assert all(a != f for a, f in zip(alike, flipped, strict=True))
    assert 5 < sum(flipped) < len(flipped) - 5


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_colours_change_by_the_factors_that_are_allowed(root, backend):
    common = ("--mix", "none", "--min-crop-area", "1", "--hflip-prob", "0", "-b", "16")
    plain, changed = (
        torch.cat([images for images, *_ in epoch(train(options(root, f"folder {backend}", *common, *jitter)))])
        for jitter in ((), ("--color-jitter", "0.4"))
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    brightness = [(images * std + mean).mean(dim=(1, 2, 3)) for images in (plain, changed)]
    ratio = brightness[1] / brightness[0]
    assert 0.05 < ratio.std() < 0.4
    assert ((ratio > 0.5) & (ratio < 1.5)).all()
    saturation = [(images * std).std(dim=1).mean(dim=(1, 2)) for images in (plain, changed)]
    assert (saturation[1] / saturation[0] / ratio).std() > 0.05


def grey_levels(root, kind, *more, epochs=1):
    """Return all training images as grey levels, in the order of their files."""
    args = options(root, kind, "--mix", "none", "--hflip-prob", "0", "-b", "10", *more)
    loader, images, labels = train(args), [], []
    for _ in range(epochs):
        batches = epoch(loader)
        images += [images for images, *_ in batches]
        labels += ids(batches)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (args.mean, args.std))
    return 255 * (torch.cat(images) * std + mean)[np.argsort(labels, kind="stable")]


@pytest.mark.parametrize("policy", ["ra", "ta_wide"])
@pytest.mark.parametrize(("dataset", "count"), [("folder", "32"), ("cifar10", "30")])
def test_pytorch_and_dali_augment_about_as_much(root, dataset, count, policy):
    same, changes = (*WHOLE[dataset], "-b", count), []
    for kind in (f"{dataset} dali-cpu", f"{dataset} pytorch"):
        plain = grey_levels(root, kind, *same).repeat_interleave(8, dim=0)
        changed = grey_levels(root, kind, *same, "--aa", policy, epochs=8)
        levels = (changed - plain).abs().mean(dim=(1, 2, 3))
        changes.append(levels.mean())
        assert 0.7 < (levels > 1).float().mean() < 1  # one operation of 14 changes nothing
        # Pixels from outside the image are grey.
        grey = ((changed - 128).abs().amax(dim=1) < 0.1).float().mean(dim=(1, 2))
        assert 0.15 < (grey > 0.05).float().mean() < 0.5
        # TrivialAugmentWide shifts a small image by up to 32 pixels, its whole width; DALI shifts images of a folder by
        # up to a seventh of theirs.
        is_far = policy == "ta_wide" and kind != "folder dali-cpu"
        assert ((grey > 0.6).sum() > 3) == is_far
    assert min(changes) > 15
    assert 0.75 < changes[0] / changes[1] < 1.33


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_the_padding_of_cifar_is_not_augmented(root, backend):
    black = grey_levels(root, f"cifar10 {backend}", "--aa", "ra", "-b", "30", epochs=4).abs().amax(dim=1) < 0.1
    rows, columns = black.all(dim=2), black.all(dim=1)
    padded = rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]
    assert padded.float().mean() > 0.95  # all crops except the central one


@pytest.mark.parametrize("kind", ["folder dali-cpu", "cifar10 pytorch"])
def test_a_larger_magnitude_changes_more(root, kind):
    same = WHOLE[kind.split()[0]]
    plain = grey_levels(root, kind, *same)
    weak, strong = (
        (grey_levels(root, kind, *same, "--aa", "ra", "--ra-magnitude", magnitude) - plain).abs().mean()
        for magnitude in ("2", "30")
    )
    assert strong > 1.5 * weak


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *zip(KINDS, ("ra", "ta_wide", "ta_wide", "ra"), strict=True),
        pytest.param("folder dali-gpu", "ta_wide", marks=pytest.mark.gpu),
        pytest.param("cifar10 dali-gpu", "ra", marks=pytest.mark.gpu),
    ],
)
def test_augmented_batches_come_again_after_a_state_taken_anywhere(root, kind, policy):
    args = options(root, kind, "-b", "10", "--aa", policy, "--mix-prob", "0.6", "--random-erase", "0.5")
    data = numbered(open_data(args))
    where = {"device": torch.device("cuda", 0) if "gpu" in kind else CPU}
    batches, states = epochs_with_states(train(args, data=data, **where), 2)
    for position in (2, 3):  # within an epoch, and at its end
        restored = train(args, data=data, **where, state=pickle.loads(pickle.dumps(states[position - 1])))
        rest = epoch(restored) + (epoch(restored) if position < 3 else [])
        assert_equal_batches(rest, batches[position:])


@each_kind
@pytest.mark.parametrize("mix", ["saliencymix", "mixup"])  # the former normalises in the same operator, on a CPU
@pytest.mark.parametrize("layout", [(), ("--channels-last",)], ids=["CHW", "HWC"])
def test_a_rectangle_of_the_mixed_images_is_set_to_the_mean_and_nothing_else_changes(root, kind, mix, layout):
    plain, changed = (
        epoch(train(options(root, kind, "--mix", mix, "-b", "10", *layout, *more)))
        for more in ((), ("--random-erase", "0.7"))
    )
    assert_equal_batches([others for _, *others in changed], [others for _, *others in plain])
    before, after = (torch.cat([images for images, *_ in batches]) for batches in (plain, changed))
    erased = (after == 0).all(dim=1)
    assert not (before == 0).all(dim=1).any()
    assert torch.equal(after, before.where(~erased[:, None], 0))
    rows, columns = erased.any(dim=2), erased.any(dim=1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])
    assert all((side.diff(dim=1).sum(dim=1) <= 2).all() for side in (rows, columns))  # without a gap
    assert 13 < erased.any(dim=(1, 2)).sum() < 28


@pipeline_def(batch_size=1000, num_threads=1, device_id=None, seed=4)
def dali_erases(size, device="cpu", fp16=False):
    images = fn.constant(fdata=[1.0], shape=[3, size, size], layout="CHW")
    images = fn.cast(to_device(device, images), dtype=types.FLOAT16 if fp16 else types.FLOAT)
    return augmentation.erased(images, 0.5, size, fp16=fp16)


@pytest.mark.gpu
@pytest.mark.parametrize("fp16", [False, True])
def test_a_gpu_erases_what_a_cpu_does(fp16):
    places = ({"device": "cpu"}, {"device": "gpu", "device_id": 0})
    images = [np.array(dali_erases(32, fp16=fp16, **place).run()[0].as_cpu().as_tensor()) for place in places]
    np.testing.assert_array_equal(*images)


def test_erased_rectangles_are_like_those_of_torchvision(root):
    size, count = 96, 1000
    torch.manual_seed(0)
    white = torch.ones(3, size, size)
    expected = [RandomErasing.get_params(white, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    of_pytorch = torch.ones(count, 3, size, size)
    cifar = PaddedImages(read_cifar(root, "cifar10")[0])
    batches = TrainingBatches(cifar, DataOptions(random_erase=0.5), process())
    batches.erase(of_pytorch, 0, 0)
    for place in ((0, 1), (1, 0)):
        batches.erase(others := torch.ones(count, 3, size, size), *place)
        assert ((others == 0) != (of_pytorch == 0)).any(dim=(1, 2, 3)).float().mean() > 0.5
    of_dali = torch.tensor(np.array(dali_erases(size).run()[0].as_tensor()))

    def described(boxes):
        # The share of the area, the logarithm of the aspect ratio and the centre of (y, x, height, width).
        corner, sides = torch.as_tensor(boxes).float().split(2, dim=1)
        share, ratio = sides.prod(dim=1, keepdim=True) / size**2, sides[:, :1] / sides[:, 1:]
        return torch.cat([share, ratio.log(), (corner + sides / 2) / size], dim=1)

    theirs = described(expected)
    for images in (of_dali, of_pytorch):
        erased = images[:, 0] == 0
        there = erased.any(dim=(1, 2))
        assert abs(there.float().mean() - 0.5) < 0.06
        sides = [erased[there].any(dim=dim).int() for dim in (2, 1)]  # rows, then columns
        boxes = [side.argmax(dim=1) for side in sides] + [side.sum(dim=1) for side in sides]
        ours = described(torch.stack(boxes, dim=1))
        assert (ours[:, 0] > 0.017).all()
        assert (ours[:, 0] < 0.34).all()
        tolerance = 0.2 * theirs.std(dim=0)  # four standard errors of a mean
        assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < tolerance).all()
        assert ((ours.std(dim=0) - theirs.std(dim=0)).abs() < tolerance).all()


def test_what_goes_wrong_while_a_pipeline_is_defined_is_said_in_one_line(root, monkeypatch):
    def mixed(*_, **__):
        msg = "a package is missing"
        raise ImportError(msg)

    monkeypatch.setattr(imagenet, "mixed", mixed)
    for more in ((), ("--aa", "ra")):
        with pytest.raises(ImportError, match=r"^a package is missing$"):
            train(options(root, "folder dali-cpu", *more))


@pytest.mark.parametrize("mode", ["saliencymix", "cutmix", "mixup"])
def test_a_batch_of_pytorch_is_mixed_as_the_array_functions_do_it(root, mode):
    cifar, _ = read_cifar(root, "cifar10")
    mix = MixOptions(modes={mode: 1.0})
    batches = TrainingBatches(
        PaddedImages(cifar), DataOptions(batch_size=8, mix=mix, hflip_prob=0.0, seed=3), process()
    )
    pixels, labels, source_labels, lam = (tensor.numpy() for tensor in batches.load(2, 1, {}, {}))
    originals = cifar.images[batches.indices(2, 1)]
    assert labels.tolist() == cifar.labels[batches.indices(2, 1)].tolist()
    own = (pixels == originals).all(axis=3)
    for number in range(8):
        candidates = [s for s in range(8) if cifar.labels[batches.indices(2, 1)][s] == source_labels[number]]
        if mode == "mixup":
            blends = [lam[number] * originals[number] + (1 - lam[number]) * originals[s] for s in candidates]
            assert min(np.abs(blend - pixels[number]).max() for blend in blends) < 0.51
        else:
            sources = [(pixels[number] == originals[s]).all(axis=2) for s in candidates]
            assert any((own[number] | source).all() for source in sources)
            if not own[number].all():
                assert own[number].mean() == pytest.approx(lam[number], abs=2e-3)
    assert len(np.unique(lam)) == 8


def recorded(monkeypatch):
    calls, function = [], dali_mix.apply

    def record(options, images, *others, **given):
        calls.append((np.array(images), given.get("peaks")))
        return function(options, images, *others, **given)

    for module in (dali_mix, torch_loaders):
        monkeypatch.setattr(module, "apply", record)
    return calls


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_no_peak_of_cifar_lies_in_the_padding(root, monkeypatch, backend):
    calls = recorded(monkeypatch)
    args = options(root, f"cifar10 {backend}", "-b", "30", "--saliency", "fine_grained")
    if backend == "pytorch":
        args = replace(args, workers=0)  # calls in a worker process could not be recorded
    epoch(train(args))
    images, peaks = calls[0]
    assert ((images == 0).all(axis=3)).mean() > 0.05
    assert not (images[np.arange(30), peaks[:, 0], peaks[:, 1]] == 0).all(axis=1).any()
    calls.clear()
    epoch(train(replace(args, crop_padding=0)))
    images, peaks = calls[0]
    assert peaks is None
    assert not (images == 0).all(axis=3).any()


def test_peaks_of_padded_images_move_with_the_crop(root):
    cifar, _ = read_cifar(root, "cifar10")
    indices = np.arange(30)
    before = PaddedImages(cifar, 0, "fine_grained").read(indices, 0, 0)[2]
    images, _, after = PaddedImages(cifar, 4, "fine_grained").read(indices, 0, 0)
    corners = set()
    for original, image, own, moved in zip(cifar.images, images, before, after, strict=True):
        padded = np.pad(original, [(4, 4), (4, 4), (0, 0)])
        places = [(y, x) for y, x in np.ndindex(9, 9) if np.array_equal(padded[y : y + 32, x : x + 32], image)]
        assert len(places) == 1
        assert moved.tolist() == (own + 4 - np.array(places[0])).clip(0, 31).tolist()
        corners |= set(places)
    assert {0, 8} <= {side for corner in corners for side in corner}
    again = PaddedImages(cifar, 4, "fine_grained").read(indices[::-1], 0, 0)[0][::-1]
    assert np.array_equal(again, images)  # the crop of an image does not depend on its place in the batch
    assert not np.array_equal(PaddedImages(cifar, 4, None).read(indices, 1, 0)[0], images)


def test_schemes_of_cifar_that_need_the_least_salient_pixel_do_without_padding(root):
    args = options(root, "cifar10 dali-cpu", "--source", "non_salient")
    with pytest.raises(ValueError, match="--source must not be non_salient with --crop-padding 4"):
        train(args)
    args = options(root, "cifar10 dali-cpu", "--source", "non_salient", "--crop-padding", "0")
    assert len(epoch(train(args))) == 7


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_labels_of_cifar_are_weighted_by_saliency_where_nothing_is_padded(root, backend):
    weigh = ("-b", "30", "--label-weight", "saliency")
    with pytest.raises(ValueError, match="--label-weight must be area with --crop-padding 4, got saliency"):
        train(options(root, f"cifar10 {backend}", *weigh))
    by_area, by_saliency = (
        epoch(train(options(root, f"cifar10 {backend}", *given, "--crop-padding", "0"))) for given in (weigh[:2], weigh)
    )
    for (pixels, _, _, lam), (same_pixels, _, _, weight) in zip(by_area, by_saliency, strict=True):
        assert torch.equal(pixels, same_pixels)
        assert ((lam == 1) <= (weight == 1)).all()
        assert not torch.equal(lam, weight)


def test_a_synthetic_batch_comes_again_and_again_without_any_data(tmp_path):
    args = options(tmp_path / "nowhere", "folder synthetic", "--synthetic-classes", "5", "--synthetic-steps", "6")
    data = open_data(args)
    assert len(data.classes) == 5
    batches = list(train(args, data=data))
    assert len(batches) == 6
    assert data.train_images == 24
    assert all(batch is batches[0] for batch in batches)
    assert [len(labels) for _, labels in data.val_loader(args, process())] == [4] * 6
    assert len(data.val_loader(replace(args, val_steps=2), process())) == 2


@pytest.mark.parametrize("option", ["train", "val"])
def test_a_list_says_which_images_there_are(root, tmp_path, option):
    everything = open_data(options(root))
    names = [str(Path(file).relative_to(root / option)) for file in getattr(everything, option).files]
    chosen = names[1::3]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(reversed(chosen)) + "\n\n")
    data = open_data(options(root, "folder dali-cpu", f"--{option}-list", str(listed)))
    assert data.classes == everything.classes
    part = getattr(data, option)
    assert part.files == [str(root / option / name) for name in chosen]
    assert part.labels == [everything.classes.index(name.split("/")[0]) for name in chosen]
    assert getattr(data, f"{option}_images") == len(chosen)
    for text, message in (
        ("no/such.jpg\n", f"--{option}-list {listed}, line 1: no such image in {root / option}: no/such.jpg"),
        (f"{names[0]}\n{names[0]}\n", f"line 2: the same image as in line 1: {names[0]}"),
        ("\n", f"--{option}-list {listed}: lists no images"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match="list") as raised:
            open_data(options(root, "folder dali-cpu", f"--{option}-list", str(listed)))
        assert message in str(raised.value)


def test_validation_alone_needs_no_training_images(root, tmp_path):
    (tmp_path / "val").symlink_to(root / "val")
    classes = open_data(options(root)).classes
    args = options(tmp_path)
    data = open_data(args, classes)
    assert (data.train_images, data.val_images, data.classes) == (0, 8, classes)
    assert len(ids(epoch(data.val_loader(args, process())))) == 8
    with pytest.raises(ValueError, match="is not one of the 7 known classes"):
        open_data(args, classes[1:])


def test_the_fingerprint_says_whether_the_images_are_the_same(root, tmp_path):
    def fingerprint(folder, *more):
        return open_data(options(folder, *more)).fingerprint

    assert fingerprint(root)["train_images"] == 32
    assert fingerprint(root)["val_images"] == 8
    make_sample_data(tmp_path / "same", train=4, val=1)
    assert fingerprint(root) == fingerprint(tmp_path / "same")
    assert fingerprint(root) != fingerprint(root, "folder pytorch")
    file = Path(open_data(options(tmp_path / "same")).train.files[3])
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert fingerprint(root) != fingerprint(tmp_path / "same")
    file.with_name("renamed.jpg").write_bytes(content)
    file.unlink()
    assert fingerprint(root) != fingerprint(tmp_path / "same")
    write_cifar(tmp_path / "a", "cifar10", seed=0)
    write_cifar(tmp_path / "b", "cifar10", seed=1)
    digests = [fingerprint(tmp_path / name, "cifar10 dali-cpu") for name in "aab"]
    assert digests[0] == digests[1] != digests[2]


def test_without_a_backend_dali_works_where_the_run_does(root):
    args = options(root)
    found = {
        device: chosen_backend(replace(args, data_backend=None, device=device)) for device in ("cpu", "cuda", "auto")
    }
    assert found == {
        "cpu": "dali-cpu",
        "cuda": "dali-gpu",
        "auto": found["cuda" if torch.cuda.is_available() else "cpu"],
    }


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("folder dali-gpu", "", "--data-backend dali-gpu needs a run on a GPU, but this one is on cpu"),
        ("folder pytorch", "-b 33", "--batch-size must be at most 32, .*32 images in .*, got 33"),
        ("cifar10 dali-cpu", "-b 31", "--batch-size must be at most 30, .* got 31"),
        ("cifar10 pytorch", "--train-crop-size 64", "--train-crop-size must be 32 with --dataset cifar10, got 64"),
    ],
)
def test_options_that_do_not_fit_are_named(root, kind, more, message):
    args = options(root, kind, *more.split())
    with pytest.raises(ValueError, match=message):
        train(args)


def test_too_few_validation_images_are_named(root):
    args = options(root, "folder pytorch")
    with pytest.raises(ValueError, match="8 validation images are too few for 9 processes"):
        open_data(args).val_loader(args, process(0, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image\n" * 50, "not an image"), (b"", "empty: zero bytes"), (None, "unreadable: No such file")],
    ids=["text", "empty", "gone"],
)
def test_pytorch_names_a_broken_file_in_one_line(tmp_path, content, message):
    make_sample_data(tmp_path, train=1, val=1)
    args = options(tmp_path, "folder pytorch", "--max-bad-batches", "0")
    data = open_data(args)
    broken = Path(data.train.files[5])
    broken.unlink() if content is None else broken.write_bytes(content)
    said = ""
    # Not pytest.raises, which keeps the frames: the workers would end only when the collector destroys their loader.
    try:
        epoch(train(args, data=data))
    except LoaderError as error:
        said = str(error)
    assert said.startswith(f"{broken}: {message}")
    assert "\n" not in said


def spoilt(data, folder, bad):
    """Return the data with broken training files, and the same data with each replaced by the file after it."""
    whole = Path(data.train.files[0]).read_bytes()
    huge = io.BytesIO()  # for this header Pillow raises an error that is not an OSError
    Image.new("RGB", (8, 8)).save(huge, "BMP")
    contents = [
        whole[: len(whole) // 2],
        b"no picture",
        huge.getvalue()[:18] + b"\xff\xff\0\0" * 2 + huge.getvalue()[26:],
    ]
    files, others, labels = list(data.train.files), list(data.train.files), list(data.train.labels)
    for index, content in zip(bad, contents, strict=True):
        files[index] = str(folder / f"{index}.{'bmp' if content[:2] == b'BM' else 'jpg'}")
        Path(files[index]).write_bytes(content)
        others[index], labels[index] = others[index + 1], labels[index + 1]
    return [
        replace(data, train=replace(data.train, files=f, labels=n))
        for f, n in ((files, data.train.labels), (others, labels))
    ]


def test_pytorch_leaves_bad_files_out_and_gives_the_same_batches_after_resuming(root, tmp_path, capfd):
    args = options(root, "folder pytorch", "-j", "2", "--max-bad-batches", "3", "--mix-prob", "0.6")
    bad = (5, 11, 20)
    with_bad, without = spoilt(numbered(open_data(args)), tmp_path, bad)
    loader, other = train(args, data=with_bad), train(args, data=without)
    batches, states = epochs_with_states(loader, 2)
    assert_equal_batches(batches, epoch(other) + epoch(other))
    assert sorted(loader.bad_files) == sorted(with_bad.train.files[index] for index in bad)
    said = capfd.readouterr().err.splitlines()
    assert [f"({number} of at most 3): " in line for number, line in enumerate(said, 1)] == [True] * 3
    assert all(sum(f"{file}: " in line for line in said) == 1 for file in loader.bad_files)
    for position in (4, 8, 11):
        restored = train(args, data=with_bad, state=pickle.loads(pickle.dumps(states[position - 1])))
        rest = epoch(restored)
        while len(rest) < len(batches) - position:
            rest += epoch(restored)
        assert_equal_batches(rest, batches[position:])
        assert sorted(restored.bad_files) == sorted(loader.bad_files)
    too_many = train(replace(args, max_bad_batches=2), data=with_bad)
    said = ""
    try:
        epoch(too_many)
    except LoaderError as error:
        said = str(error)
    assert said.endswith("; 3 batches have failed by now")
    assert len(too_many.bad_files) == 2


def test_all_backends_say_and_do_the_same_about_bad_files(root, tmp_path, capfd):
    said, given = [], []
    for backend in ("dali-cpu", "pytorch"):
        args = options(root, f"folder {backend}", "--max-bad-batches", "3", "-j", "1")
        with_bad, _ = spoilt(numbered(open_data(args)), tmp_path, (5, 11, 20))
        loader = replace(with_bad, val=with_bad.train).val_loader(args, process())
        given.append([ids(epoch(loader)) for _ in range(2)])
        # DALI's decoders write other lines, from C++.
        said.append([line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")])
    assert said[0] == said[1]
    assert [line.endswith("; its image is left out") for line in said[0]] == [True] * 3
    assert given[0] == given[1] == [[number for number in range(32) if number not in (5, 11, 20)]] * 2


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_a_file_that_stands_in_for_another_may_go_bad_too(root, tmp_path, capfd, backend):
    args = options(root, f"folder {backend}", "--max-bad-batches", "2")
    data = numbered(open_data(args))
    files = list(data.train.files)
    for index, content in ((5, b""), (6, Path(files[6]).read_bytes())):
        files[index] = str(tmp_path / f"{index}.jpg")
        Path(files[index]).write_bytes(content)
    loader = train(args, data=replace(data, train=replace(data.train, files=files)))
    assert sorted(ids(epoch(loader))) == [*range(5), 6, 6, *range(7, 32)]
    Path(files[6]).unlink()
    for _ in range(2):  # the first batches may have been prefetched before
        last = ids(epoch(loader))
    assert sorted(last) == [*range(5), 7, 7, *range(7, 32)]
    assert loader.bad_files == files[5:7]
    assert set(loader.state()["replaced"].items()) == {(5, 7), (6, 7)}
    assert f"(2 of at most 2): {files[6]}: unreadable: No such file" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, "folder dali-gpu", "cifar10 dali-gpu"])
def test_batches_arrive_on_the_gpu(root, kind):
    args = options(root, kind, "--channels-last")
    device = torch.device("cuda", 0)
    on_gpu = epoch(train(args, device=device))
    assert {tensor.device for batch in on_gpu for tensor in batch} == {device}
    assert on_gpu[0][0].is_contiguous(memory_format=torch.channels_last)
    data = numbered(open_data(args))
    assert {tensor.device for batch in data.val_loader(args, process(device=device)) for tensor in batch} == {device}
    if "dali-gpu" not in kind:  # the same work on the CPU; only the normalisation is on the other device
        for batch, other in zip(on_gpu, epoch(train(args)), strict=True):
            for ours, theirs in zip(batch, other, strict=True):
                assert torch.allclose(ours.cpu(), theirs, atol=1e-4)

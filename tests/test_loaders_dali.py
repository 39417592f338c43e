"""The DALI loaders: shards of unequal size, broken files, errors. What all loaders do is in test_loaders.py."""

from __future__ import annotations

import functools
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from shared.batches import assert_equal_batches, epoch, epochs_with_states, ids

from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.base import LoaderError
from dali_saliencymix.loaders.imagenet import training_loader, validation_loader
from dali_saliencymix.options import MixOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 32 images whose labels are their numbers; one is a BMP file, whose header is checked in advance."""
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    rare = root / "train" / "red_square" / "00003.jpg"
    Image.open(rare).convert("RGB").save(rare.with_suffix(".bmp"))
    rare.unlink()
    listed = list_image_folder(root / "train")
    return replace(listed, labels=list(range(len(listed))))


def first(folder, count):
    return replace(folder, files=folder.files[:count], labels=folder.labels[:count])


def train(folder, *, batch_size=4, device=CPU, **options):
    return training_loader(folder, batch_size=batch_size, num_threads=2, device=device, crop_size=24, **options)


def validate(folder, *, batch_size=4, **options):
    sizes = {"resize_size": 24, "crop_size": 24}
    return validation_loader(folder, batch_size=batch_size, num_threads=2, device=CPU, **sizes, **options)


@pytest.mark.parametrize(("images", "shards", "batch_size"), [(31, 2, 5), (29, 4, 3), (17, 2, 8), (13, 3, 1)])
def test_shards_are_disjoint_and_of_equal_length_in_every_epoch(folder, images, shards, batch_size):
    loaders = [
        train(first(folder, images), batch_size=batch_size, rank=rank, world_size=shards) for rank in range(shards)
    ]
    for _ in range(4):
        batches = [epoch(loader) for loader in loaders]
        assert {len(shard) for shard in batches} == {len(loaders[0])} == {images // shards // batch_size}
        seen = Counter(label for shard in batches for label in ids(shard))
        assert set(seen.values()) == {1}
        assert len(seen) == shards * len(loaders[0]) * batch_size


@pytest.mark.parametrize(("images", "shards", "batch_size"), [(31, 2, 5), (5, 4, 3), (21, 2, 10)])
def test_validation_gives_each_image_exactly_once(folder, images, shards, batch_size):
    loaders = [
        validate(first(folder, images), batch_size=batch_size, rank=rank, world_size=shards) for rank in range(shards)
    ]
    for _ in range(2):
        batches = [epoch(loader) for loader in loaders]
        assert len({len(shard) for shard in batches}) == 1
        assert sorted(label for shard in batches for label in ids(shard)) == list(range(images))


def test_the_state_of_another_pipeline_is_refused_in_one_line(folder):
    loader = train(folder)
    next(iter(loader))
    told = r"^the state to resume from does not fit this pipeline, .*--restart-epoch .*: .*name of an operator"
    with pytest.raises(LoaderError, match=told) as raised:
        train(folder, mix=MixOptions(), state=loader.state())
    assert "\n" not in str(raised.value)


def test_the_seed_decides_the_batches_and_ranks_augment_differently(folder):
    make = functools.partial(train, folder, mix=MixOptions(), batch_size=32)
    assert_equal_batches(epoch(make(seed=1)), epoch(make(seed=1)))
    assert ids(epoch(make(seed=1))) != ids(epoch(make(seed=2)))
    lams = [epoch(make(seed=1, batch_size=16, rank=rank, world_size=2))[0][3] for rank in (0, 1)]
    assert not torch.equal(*lams)


def damaged(folder, tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    return replace(folder, files=[*folder.files[:7], str(path)], labels=folder.labels[:8]), path


@pytest.mark.parametrize("kind", [train, validate])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("truncated.jpg", lambda whole: whole[: len(whole) // 2], "truncated"),
        ("text.jpg", lambda whole: b"not a picture at all\n" * 40, "not an image"),
        ("header.jpg", lambda whole: whole[:24], "Truncated File Read|cannot identify image file"),
        ("zero.jpg", lambda whole: b"", "empty: zero bytes"),
        ("gone.jpg", lambda whole: None, "No such file"),
    ],
)
def test_a_broken_file_is_named_in_one_line(folder, tmp_path, kind, name, content, message):
    with open(folder.files[0], "rb") as stream:
        listed, path = damaged(folder, tmp_path, name, content(stream.read()))
    with pytest.raises(LoaderError) as raised:
        epoch(kind(listed, batch_size=8))
    assert str(raised.value).startswith(f"{path}: ")
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)


def spoilt(folder, tmp_path, bad):
    """Return the data set with broken files, and the same one with each replaced by the file after it."""
    whole = Path(folder.files[0]).read_bytes()
    contents = [whole[: len(whole) // 2], b"no picture\n" * 40, b"", None, whole[:24]]
    files, stand_ins, labels = list(folder.files), list(folder.files), list(folder.labels)
    for index, content in zip(bad, contents, strict=False):
        files[index] = str(tmp_path / f"{index}.jpg")
        if content is not None:
            Path(files[index]).write_bytes(content)
        stand_in = (index + 1) % len(files)
        stand_ins[index], labels[index] = folder.files[stand_in], folder.labels[stand_in]
    return replace(folder, files=files), replace(folder, files=stand_ins, labels=labels)


@pytest.mark.parametrize("bad", [[0, 4, 9, 14, 20], [30, 2, 12, 7, 17]])
def test_a_bad_file_is_left_out_and_nothing_else_changes_from_there_on_and_after_resuming(folder, tmp_path, capfd, bad):
    with_bad, without = spoilt(folder, tmp_path, bad)
    make = functools.partial(train, mix=MixOptions(prob=0.6), seed=7, max_bad_batches=5)
    loader, other = make(with_bad), make(without)
    batches, states = epochs_with_states(loader, 2)
    assert_equal_batches(batches, epoch(other) + epoch(other))
    assert sorted(loader.bad_files) == sorted(with_bad.files[index] for index in bad)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: a batch failed")]
    assert [f"({number} of at most 5)" in line for number, line in enumerate(lines, start=1)] == [True] * 5
    assert all(any(f": {file}: " in line for line in lines) for file in loader.bad_files)
    for position in (1, 6, 11):
        restored = make(with_bad, state=states[position - 1])
        rest = epoch(restored)
        while len(rest) < len(batches) - position:
            rest += epoch(restored)
        assert_equal_batches(rest, batches[position:])


def test_a_bad_file_on_one_shard_leaves_all_shards_with_as_many_batches(folder, tmp_path):
    with_bad, _ = spoilt(folder, tmp_path, [5])
    for rank in (0, 1):
        loader = train(with_bad, rank=rank, world_size=2, max_bad_batches=1)
        for _ in range(2):
            assert len(epoch(loader)) == len(loader) == 4
        assert loader.bad_files == [with_bad.files[5]]


def test_more_bad_files_than_are_allowed_end_with_their_count(folder, tmp_path):
    with_bad, _ = spoilt(folder, tmp_path, [3, 11, 22])
    loader = train(with_bad, max_bad_batches=2)
    with pytest.raises(LoaderError, match=r"/\d+\.jpg: .*; 3 batches have failed by now$"):
        epoch(loader)
    assert len(loader.bad_files) == 2


def test_validation_leaves_out_the_image_of_a_bad_file_and_counts_the_others_once(folder, tmp_path):
    with_bad, _ = spoilt(folder, tmp_path, [3, 17])
    loader = validate(with_bad, batch_size=5, max_bad_batches=2)
    for _ in range(2):
        assert sorted(ids(epoch(loader))) == [number for number in range(32) if number not in (3, 17)]


def test_a_data_set_that_has_vanished_is_an_error_that_names_a_file(folder, tmp_path):
    root = shutil.copytree(folder.root, tmp_path / "train")
    loader = train(list_image_folder(root), max_bad_batches=5)
    shutil.rmtree(root)
    with pytest.raises(LoaderError, match=f"^{root}/.*jpg: "):
        epoch(loader)


def test_what_a_detector_raises_arrives_as_one_line(folder):
    def broken(images):
        msg = "no saliency\ntoday"
        raise ValueError(msg)

    with pytest.raises(LoaderError, match=r"^no saliency today$"):
        epoch(train(folder, mix=MixOptions(saliency=broken)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: train(folder, batch_size=33), "batch_size must be at most 32, .* 1 processes.* got 33"),
        (lambda folder: train(folder, batch_size=17, world_size=2), "batch_size must be at most 16, .* got 17"),
        (lambda folder: train(folder, seed=-1), "seed must be at least 0, .* got -1"),
        (lambda folder: validate(first(folder, 3), world_size=4), "3 images are too few for 4 processes"),
        (lambda folder: train(folder, mix=MixOptions(alpha=-1)), "alpha must be .* got -1"),
    ],
)
def test_wrong_arguments_are_named(folder, make, message):
    with pytest.raises(ValueError, match=message):
        make(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder):
    with pytest.raises(ValueError, match="device must be 'cpu' if no CUDA GPU is found, got 'cuda:0'"):
        train(folder, device=torch.device("cuda", 0))

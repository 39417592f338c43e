"""CIFAR's archives: what is read, what is wrong with a file, and that no file runs code."""

from __future__ import annotations

import codecs
import os
import pickle

import numpy as np
import pytest
from shared.cifar_files import python2_pickle, write_cifar

from dali_saliencymix.datasets.cifar import read_cifar


class Hostile:
    """When unpickled, call a function."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "given", "named"),
    [
        (os.system, "touch {}", "posix.system"),
        (os.mkdir, "{}", "posix.mkdir"),
        (eval, "__import__('os').mkdir({!r})", "(__builtin__|builtins).eval"),
        (np.savetxt, "{}", r"numpy\S*.savetxt"),
    ],
    ids=["system", "mkdir", "eval", "numpy"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_archive_is_refused_before_it_does_anything(tmp_path, function, given, named, protocol):
    folder, witness = write_cifar(tmp_path, "cifar10"), tmp_path / "witness"
    more = ([1.0],) if function is np.savetxt else ()
    attack = pickle.dumps({"data": Hostile(function, given.format(str(witness)), *more)}, protocol=protocol)
    (folder / "data_batch_3").write_bytes(attack)
    with pytest.raises(ValueError, match=rf"data_batch_3: cannot be read: it refers to {named}, but only arrays"):
        read_cifar(tmp_path, "cifar10")
    assert not witness.exists()
    pickle.loads(attack)  # check that the attack works with plain pickle
    assert witness.exists()


def test_only_the_one_codec_of_arrays_is_run(tmp_path):
    folder = write_cifar(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Hostile(codecs.encode, "abc", "rot13")}, protocol=2))
    with pytest.raises(ValueError, match="test_batch: cannot be read: it refers to the codec rot13"):
        read_cifar(tmp_path, "cifar10")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_archives_are_read_as_they_are_written(tmp_path, dataset):
    folder = write_cifar(tmp_path, dataset)
    for root in (tmp_path, folder):
        train_part, test_part = read_cifar(root, dataset)
        assert (len(train_part), len(test_part)) == (40, 15)
        assert train_part.classes[3] == "kind 3"
    names = [f"data_batch_{number}" for number in range(1, 6)] if dataset == "cifar10" else ["train"]
    contents = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    rows = np.concatenate([content["data"] for content in contents])
    # The first 1024 bytes of a row are the red pixels of the image, row by row.
    for channel in range(3):
        assert np.array_equal(
            train_part.images[7, :, :, channel].ravel(), rows[7, 1024 * channel : 1024 * (channel + 1)]
        )
    key = "labels" if dataset == "cifar10" else "fine_labels"
    assert train_part.labels.tolist() == [label for content in contents for label in content[key]]
    # Python 3 pickles an array differently in the same protocol.
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    assert np.array_equal(read_cifar(tmp_path, dataset)[0].images, train_part.images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", b"\x80\x02", "data_batch_2: cannot be read: damaged, or not a pickle"),
        ("data_batch_2", python2_pickle({"labels": [1]}), "its 'data' is not a uint8 array with 3072 columns"),
        ("data_batch_2", python2_pickle({"data": np.zeros((2, 10), np.uint8), "labels": [1, 2]}), "with 3072 columns"),
        ("test_batch", python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "a list of 2 labels"),
        (
            "test_batch",
            python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
            r"not a list of 2 labels in \[0, 10\)",
        ),
        ("batches.meta", python2_pickle({}), "it has no list 'label_names'"),
        ("batches.meta", python2_pickle({})[:2] + b"].", "it does not hold a dictionary"),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(tmp_path, name, content, message):
    folder = write_cifar(tmp_path, "cifar10")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_cifar(tmp_path, "cifar10")
    assert str(raised.value).startswith(str(folder / name))


def test_an_archive_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cifar100 here; .* a folder cifar-100-python"):
        read_cifar(tmp_path, "cifar100")
    folder = write_cifar(tmp_path, "cifar10")
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4"):
        read_cifar(tmp_path, "cifar10")

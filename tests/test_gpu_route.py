"""The defaults on a GPU: kernels, and an operator that normalises."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from nvidia.dali import fn

from dali_saliencymix._routes import route_of
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders import imagenet
from dali_saliencymix.loaders.imagenet import training_pipeline
from dali_saliencymix.options import MixOptions


def test_auto_means_kernels_on_a_gpu():
    routes = [route_of(algorithm, SimpleNamespace(__name__="cupy")) for algorithm in ("auto", "kernel", "array")]
    assert routes == ["cuda", "cuda", "array"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=1, val=1)
    return list_image_folder(root / "train")


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("places", "numba", "normalises"),
    [
        (("gpu", "gpu"), False, True),
        (("cpu", "gpu"), True, False),  # the copied pixels are still bytes
        (("cpu", "cpu"), True, True),
        (("cpu", "cpu"), False, False),
    ],
)
def test_who_normalises(monkeypatch, folder, places, numba, normalises, channels_last, fp16):
    given = []

    def mix_nodes(images, labels, options, *, peaks, normalise):
        given.append(normalise)
        return images, labels, labels, fn.constant(fdata=[1.0], shape=[])

    monkeypatch.setattr("dali_saliencymix._routes._numba_is_installed", lambda: numba)
    monkeypatch.setattr(imagenet, "mix_nodes", mix_nodes)
    process_on, device = places
    options = {"batch_size": 2, "num_threads": 1, "device_id": 0, "mix": MixOptions()}
    options |= {"process_on": process_on, "device": device, "channels_last": channels_last, "fp16": fp16}
    training_pipeline(folder.files, folder.labels, **options)
    if not normalises or (fp16 and device == "cpu"):
        assert given == [None]
    else:
        (normalise,) = given
        assert normalise.layout == ("HWC" if channels_last else "CHW")
        assert np.dtype(normalise.dtype) == (np.float16 if fp16 else np.float32)
        assert normalise.mirror is not None

"""Loaders and mixes of other packages produce valid batches, or say which package is missing."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

from benchmarks import loaders, peers
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data

BATCH, SIZE, CLASSES = 4, 16, 8
PACKAGES = {
    "torch: torchvision.io": "torchvision",
    "torch: torchcodec": "torchcodec",
    "torch: torchvision.io, GPU": "torchvision",
    "torch: torchcodec, GPU": "torchcodec",
    "spdl": "spdl",
    "after: timm cutmix": "timm",
    "after: kornia cutmix": "kornia",
    "after: mixup saliencymix": "mixup",
}
ON_GPU = ["torch: torchvision.io, GPU", "torch: torchcodec, GPU"]
LEAST, MOST = (-0.485 / 0.229, 1 - 0.406) / np.float64([1, 0.225])

# Warnings of other packages: torchvision 0.29 about its decoders, kornia before 0.9 about its compilation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sample_data(folder, train=2, val=1)
    listed = list_image_folder(folder / "train")
    return loaders.Setting(listed, BATCH, 1, SIZE, torch.device("cpu"), num_classes=CLASSES)


def made(make, setting):
    """Return a stream, or skip the test where its package is not installed."""
    try:
        return make(setting)
    except ImportError as error:
        pytest.skip(str(error))


def images_of(batch, setting):
    """Return the images of a batch after checking what all loaders have in common."""
    images = batch[0]
    assert images.shape == (BATCH, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert images.device.type == setting.device.type
    assert LEAST - 1e-4 <= images.min() < 0 < images.max() <= MOST + 1e-4
    assert images.std() > 0.2
    return images


@pytest.mark.parametrize("name", ["torch", "torch: cutmix", "torch: opencv"])
def test_a_loader_of_pytorch_gives_normalised_images_and_mixes(setting, name):
    stream = made(loaders.makers()[name], setting)
    images, labels, *of_sources = next(stream.batches)
    images_of((images,), setting)
    if name == "torch: cutmix":
        torch.testing.assert_close(labels.sum(1), torch.ones(BATCH))
        return
    assert set(labels.tolist()) <= set(setting.folder.labels)
    assert [part.shape for part in of_sources] == [(BATCH,)] * (2 if name == "torch: opencv" else 0)


def test_every_way_is_described_and_belongs_to_a_package():
    assert peers.makers().keys() == PACKAGES.keys()
    for name in PACKAGES:
        assert f"\n``{name}``" in peers.__doc__
    assert not peers.makers().keys() & loaders.makers().keys()


@pytest.mark.parametrize("name", [name for name in PACKAGES if not name.startswith("after: ")])
def test_a_loader_gives_normalised_images_and_their_labels(setting, name):
    if name in ON_GPU:
        pytest.skip("decodes on a GPU")
    stream = made(peers.makers()[name], setting)
    seen = set()
    for _ in range(8):
        images, labels = next(stream.batches)
        images_of((images,), setting)
        assert labels.dtype == torch.int64
        assert labels.shape == (BATCH,)
        seen |= set(labels.tolist())
    assert seen <= set(setting.folder.labels)
    assert len(seen) > 2
    assert stream.ahead >= 2
    stream.batches.close()


@pytest.mark.parametrize("name", ON_GPU)
def test_what_is_decoded_batch_by_batch_is_decoded_on_a_cpu_too(setting, name):
    try:
        decoders = peers._decoders(PACKAGES[name])
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match="decodes on a GPU"):
        peers.makers()[name](setting)
    stream = peers._decoded_in_this_process(setting, decoders.decode_jpeg)
    images, labels = next(stream.batches)
    images_of((images,), setting)
    assert set(labels.tolist()) <= set(setting.folder.labels)
    stream.batches.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(PACKAGES))
def test_batches_lie_on_the_gpu(setting, name):
    on_gpu = loaders.Setting(setting.folder, BATCH, 1, SIZE, torch.device("cuda", 0), num_classes=CLASSES)
    stream = made(peers.makers()[name], on_gpu)
    for _ in range(3):
        images_of(next(stream.batches), on_gpu)
    stream.batches.close()


@pytest.mark.parametrize("name", ["after: timm cutmix", "after: mixup saliencymix"])
def test_a_mix_gives_targets(setting, name):
    stream = made(peers.makers()[name], setting)
    for _ in range(3):
        images, targets = next(stream.batches)
        images_of((images,), setting)
        assert targets.shape == (BATCH, CLASSES)
        torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))
    assert (targets > 0).sum() > BATCH


def test_kornia_gives_two_labels_and_lam(setting):
    stream = made(peers.makers()["after: kornia cutmix"], setting)
    for _ in range(3):
        images, labels = next(stream.batches)
        images_of((images,), setting)
        assert labels.shape == (1, BATCH, 3)
        assert set(labels[..., :2].flatten().tolist()) <= set(setting.folder.labels)
        lam = labels[..., 2].double() * SIZE**2
        torch.testing.assert_close(lam, lam.round())


@pytest.mark.parametrize("package", sorted(set(PACKAGES.values()) - {"torchvision"}))
def test_a_package_that_is_not_installed_is_named(monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name, make in peers.makers().items():
        if PACKAGES[name] == package:
            with pytest.raises(ImportError, match=rf"^{package} is not installed$"):
                make(setting)
    if package == "mixup":
        with pytest.raises(ImportError, match=r"^mixup is not installed$"):
            peers.ops_variants(np.zeros((2, 8, 8, 3), np.uint8), gpu=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise OSError('no\\n libx.so')", "torchcodec does not load: OSError: no libx.so"),
        ("import nowhere", "torchcodec does not load: ModuleNotFoundError: No module named 'nowhere'"),
        ("", "this torchcodec decodes videos only: images need torchcodec 0.16"),
    ],
)
def test_a_package_that_does_not_fit_is_named(monkeypatch, tmp_path, setting, text, reason):
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").touch()
    (tmp_path / "torchcodec" / "decoders.py").write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(ImportError) as raised:
        peers.makers()["torch: torchcodec"](setting)
    assert str(raised.value) == reason
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        del sys.modules[module]


def test_operations_mix_a_batch():
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    try:
        variants = peers.ops_variants(images, gpu=False)
    except ImportError as error:
        pytest.skip(str(error))
    ((name, call),) = variants.items()
    assert name == "mix saliencymix of mixup | mixup, torch"
    mixed, _ = call()
    assert mixed.shape == (BATCH, 3, SIZE, SIZE)
    assert mixed.dtype == torch.float32
    assert call()[0] is not mixed

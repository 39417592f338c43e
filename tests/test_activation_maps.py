"""Class activation maps: their defining property, known maps, and the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from dali_saliencymix.datasets.image_folder import ImageFolder
from dali_saliencymix.loaders.imagenet import validation_loader
from dali_saliencymix.pixels import IMAGENET_MEAN, IMAGENET_STD
from dali_saliencymix.training.activation_maps import _centre_crop, class_activation_maps, save_activation_maps
from dali_saliencymix.training.models import WideResNet, make_model

SIZES = {"resize_size": 72, "crop_size": 64}
NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Brightness(nn.Module):
    """Feature k is channel k averaged over cells of 8x8 pixels; class c sees channel c."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(3, 3)
        nn.init.eye_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.avgpool(nn.functional.avg_pool2d(images, 8)).flatten(1))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.fixture
def picture_file(tmp_path):
    """A wide photo-like JPEG whose upper right part is red and whose rest is dark."""
    pixels = np.random.default_rng(0).integers(0, 40, (80, 120, 3), np.uint8)
    pixels[:40, 60:, 0] = 250
    path = tmp_path / "n01440764_10026.JPEG.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    return path


@pytest.mark.parametrize("label", [None, 3])
def test_the_mean_of_a_map_and_the_bias_make_the_logit(resnet, label):
    images = torch.randn(4, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    found = class_activation_maps(resnet, images, label=label)
    logits = resnet(images).detach()
    assert found.maps.shape == (4, 3, 2)
    assert found.labels.tolist() == (logits.argmax(dim=1).tolist() if label is None else [label] * 4)
    means = found.maps.mean(dim=(1, 2)) + resnet.fc.bias[found.labels].detach()
    torch.testing.assert_close(means, logits.gather(1, found.labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert found.maps.std(dim=(1, 2)).min() > 0  # a constant map would have the right mean too
    probabilities = logits.softmax(dim=1).gather(1, found.labels[:, None])[:, 0]
    torch.testing.assert_close(found.probabilities, probabilities)
    assert not resnet.avgpool._forward_hooks


@pytest.mark.parametrize(
    ("make", "size"),
    [(lambda: make_model("cifar_resnet18", 10), 4), (lambda: WideResNet(10, 1, 10), 8)],
    ids=["cifar_resnet18", "wide"],
)
def test_networks_for_cifar_have_maps_too(make, size):
    model = make().eval()
    images = torch.randn(2, 3, 32, 32)
    found = class_activation_maps(model, images)
    assert found.maps.shape == (2, size, size)
    means = found.maps.mean(dim=(1, 2)) + model.fc.bias[found.labels].detach()
    torch.testing.assert_close(means, model(images).detach().amax(dim=1), rtol=1e-4, atol=1e-4)


def test_the_map_lies_where_the_class_is():
    images = torch.zeros(2, 3, 32, 48)
    images[0, 1, 8:16, 40:] = 1  # one cell of green
    images[1, 2, 24:, :8] = 1  # one cell of blue
    found = class_activation_maps(Brightness(), images)
    assert found.labels.tolist() == [1, 2]
    expected = torch.zeros(2, 4, 6)
    expected[0, 1, 5] = expected[1, 3, 0] = 1
    torch.testing.assert_close(found.maps, expected)


def test_a_network_that_ends_in_another_way_is_refused():
    model = torchvision.models.vgg11(num_classes=3).eval()
    with pytest.raises(ValueError, match=r"'avgpool' and a linear layer 'fc', .* got VGG"):
        class_activation_maps(model, torch.zeros(1, 3, 64, 64))


def test_a_picture_shows_the_crop_and_over_it_the_map(picture_file, tmp_path):
    classes = ["red", "green", "blue"]
    (path,) = save_activation_maps(
        Brightness(), [picture_file], tmp_path / "cam", classes=classes, label=0, **SIZES, **NORMALISED
    )
    assert path.name == "n01440764_10026.JPEG.png"
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    width = drawn.shape[1]
    plain, overlaid = drawn[:, : width // 2], drawn[:, width // 2 :]

    def quarter_means(half, channel):
        ys, xs = np.nonzero((half != 255).any(axis=2) & (half.max(axis=2) > 0))
        inner = half[ys.min() + 12 : ys.max() - 4, xs.min() + 8 : xs.max() - 8, channel]
        middle, centre = inner.shape[0] // 2, inner.shape[1] // 2
        return inner[8 : middle - 8, centre + 8 :].mean(), inner[middle + 8 :, : centre - 8].mean()

    upper_right, lower_left = quarter_means(plain, 0)
    assert upper_right > 200 > 60 > lower_left
    # In the overlay, the peak is red and pixels far from it are dark blue.
    upper_right, lower_left = quarter_means(overlaid, 0)
    assert upper_right > lower_left + 80


def test_the_crop_is_that_of_a_validation(picture_file):
    crop = _centre_crop(picture_file, 72, 64)
    folder = ImageFolder(picture_file.parent, ["any"], [str(picture_file)], [0])
    ((images, _),) = validation_loader(folder, batch_size=1, num_threads=1, device=torch.device("cpu"), **SIZES)
    pixels = 255 * (images[0].permute(1, 2, 0).numpy() * IMAGENET_STD + IMAGENET_MEAN)
    assert crop.shape == pixels.shape == (64, 64, 3)
    assert np.abs(crop - pixels).mean() < 1  # of 255
    assert np.abs(np.roll(crop, 1, axis=1) - pixels).mean() > 5


def test_a_picture_on_its_side_is_turned(picture_file, tmp_path):
    turned = tmp_path / "turned.jpg"
    image = Image.open(picture_file)
    exif = image.getexif()
    exif[0x0112] = 6  # display rotated by 90 degrees clockwise
    image.save(turned, exif=exif, quality=95)
    crop = _centre_crop(turned, 72, 64)
    assert crop[40:, 40:, 0].mean() > 200 > 60 > crop[:24, :24, 0].mean()


def test_pictures_are_not_overwritten_and_a_class_can_be_named(picture_file, tmp_path, resnet):
    other = tmp_path / "other" / picture_file.name
    other.parent.mkdir()
    other.write_bytes(picture_file.read_bytes())
    names = [f"class {label}" for label in range(7)]
    paths = save_activation_maps(
        resnet, [picture_file, other], tmp_path / "cam", classes=names, label=2, **SIZES, **NORMALISED
    )
    assert [path.name for path in paths] == ["n01440764_10026.JPEG.png", "n01440764_10026.JPEG-2.png"]
    again = save_activation_maps(resnet, [other], tmp_path / "cam", classes=names, **SIZES, **NORMALISED)
    assert [path.name for path in again] == ["n01440764_10026.JPEG-3.png"]
    assert paths[0].read_bytes() != again[0].read_bytes()


def test_a_file_that_is_no_image_is_named_before_anything_is_written(picture_file, tmp_path, resnet):
    broken = tmp_path / "text.jpg"
    broken.write_text("no image")
    with pytest.raises(ValueError, match=r"text.jpg: not an image"):
        save_activation_maps(resnet, [picture_file, broken], tmp_path / "cam", classes=["a"] * 7, **SIZES, **NORMALISED)
    assert not (tmp_path / "cam").exists()

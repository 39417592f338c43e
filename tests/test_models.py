"""The classifiers: numbers of parameters as published, feature sizes for small images, dropout."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from dali_saliencymix.training.arguments import parse_arguments
from dali_saliencymix.training.models import WideResNet, check_image_sizes, make_model, model_names
from dali_saliencymix.training.optimisation import parameter_groups
from dali_saliencymix.training.options import OptimizerOptions


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def convolution(inputs, outputs, kernel):
    """Return the number of weights of a convolution without bias."""
    return inputs * outputs * kernel**2


def resnet_parameters(block, counts, num_classes):
    """Count the parameters by the table of He et al., with a 3x3 stem."""
    total = convolution(3, 64, 3) + 2 * 64
    inputs = 64
    for group, count in enumerate(counts):
        width = 64 * 2**group
        for _ in range(count):
            if block == "basic":
                outputs = width
                total += convolution(inputs, width, 3) + convolution(width, width, 3) + 4 * width
            else:
                outputs = 4 * width
                total += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, outputs, 1)
                total += 4 * width + 2 * outputs
            if inputs != outputs:
                total += convolution(inputs, outputs, 1) + 2 * outputs
            inputs = outputs
    return total + inputs * num_classes + num_classes


def wide_parameters(depth, width, num_classes):
    """Count the parameters by the table of Zagoruyko and Komodakis."""
    count = (depth - 4) // 6
    total, inputs = convolution(3, 16, 3), 16
    for outputs in (16 * width, 32 * width, 64 * width):
        total += 2 * inputs + convolution(inputs, outputs, 3) + 2 * outputs + convolution(outputs, outputs, 3)
        total += convolution(inputs, outputs, 1)
        total += (count - 1) * (4 * outputs + 2 * convolution(outputs, outputs, 3))
        inputs = outputs
    return total + 2 * inputs + inputs * num_classes + num_classes


# In millions, as published: WRN-28-10 in its paper, ResNets for CIFAR in the repositories that compare them.
@pytest.mark.parametrize(
    ("name", "classes", "expected", "millions"),
    [
        ("cifar_resnet18", 10, resnet_parameters("basic", [2, 2, 2, 2], 10), 11.17),
        ("cifar_resnet18", 100, resnet_parameters("basic", [2, 2, 2, 2], 100), 11.22),
        ("cifar_resnet50", 10, resnet_parameters("bottleneck", [3, 4, 6, 3], 10), 23.52),
        ("wrn_28_10", 10, wide_parameters(28, 10, 10), 36.48),
        ("wrn_28_10", 100, wide_parameters(28, 10, 100), 36.54),
    ],
)
def test_models_for_small_images_have_their_published_sizes(name, classes, expected, millions):
    with torch.device("meta"):
        model = make_model(name, classes)
    assert parameters(model) == expected
    assert round(expected / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("cifar_resnet18", 4, 512), ("cifar_resnet50", 4, 2048), ("wrn_28_10", 8, 640)]
)
def test_features_of_small_images_stay_large(name, size, channels):
    with torch.device("meta"):
        model = make_model(name, 10).eval()
        images = torch.zeros(2, 3, 32, 32)
    seen = []
    last = model.bn if name == "wrn_28_10" else model.layer4
    last.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    assert model(images).shape == (2, 10)
    assert seen == [(2, channels, size, size)]


def test_a_wide_network_is_its_blocks_one_after_the_other():
    torch.manual_seed(0)
    model = WideResNet(10, 2, 5).eval()
    images = torch.randn(2, 3, 16, 16)
    x = model.conv1(images)
    for block in model.blocks:
        active = block.bn1(x).clamp(min=0)
        kept = x if x.shape[1] == block.conv2.out_channels else block.shortcut(active)
        x = block.conv2(block.bn2(block.conv1(active)).clamp(min=0)) + kept
    expected = model.fc(model.bn(x).clamp(min=0).flatten(2).mean(2))
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert [block.conv1.stride for block in model.blocks] == [(1, 1), (2, 2), (2, 2)]


def test_the_wide_network_drops_values_in_training_only():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    for dropout, alike in ((0.0, True), (0.5, False)):
        model = WideResNet(10, 1, 5, dropout=dropout)
        assert torch.equal(model.train()(images), model.train()(images)) is alike
        assert torch.equal(model.eval()(images), model.eval()(images))
    with torch.device("meta"):
        default, other = make_model("wrn_28_10", 10), make_model("wrn_28_10", 10, dropout=0.1)
    for model, expected in ((default, 0.3), (other, 0.1)):
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {expected}


def test_a_small_network_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, images, labels = WideResNet(10, 1, 4), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# One network of each family and its image size; the tests below use other sizes.
FAMILIES = {
    **dict.fromkeys(("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"), 64),
    **dict.fromkeys(("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"), 64),
    **dict.fromkeys(("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16"), 64),
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "vit_b_32": 96,
}


def made_without_weights(name, classes=10, **options):
    """Return a model without memory for its weights, except RegNet, which computes its shape with tensors."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return make_model(name, classes, **options).to("meta")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_of_torchvision_gives_logits_in_training_and_has_each_parameter_in_one_group(name):
    size = FAMILIES[name]
    model = made_without_weights(name, image_size=size)
    assert model.training
    with torch.device("meta"):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)
    decays = OptimizerOptions(weight_decay=1.0, norm_weight_decay=2.0, bias_weight_decay=3.0)
    groups = parameter_groups(model, decays)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    assert {name for name, decay in found if decay == 3} == {name for name in names.values() if name.endswith("bias")}
    layers = dict(model.named_modules())
    norms = {name for name, decay in found if decay == 2}
    assert all("Norm" in type(layers[name.rpartition(".")[0]]).__name__ for name in norms)
    assert bool(norms) is (name not in ("alexnet", "squeezenet1_1"))


def test_all_classification_models_of_torchvision_are_made_by_their_names():
    names = model_names()
    assert {*FAMILIES, "resnext50_32x4d", "wide_resnet50_2"} <= set(names)
    assert len(names) == len(set(names)) >= 83
    with torch.device("meta"):
        assert parameters(make_model("resnet50", 1000)) == 25_557_032  # as torchvision documents it
        assert parameters(make_model("convnext_tiny", 1000)) == 28_589_128


@pytest.mark.parametrize("name", ["vit_b_16", "efficientnet_b0", "mobilenet_v2"])
def test_dropout_is_what_torchvision_s_own_argument_sets(name):
    with torch.device("meta"):
        ours, theirs = (
            make_model(name, 10, dropout=0.3),
            torchvision.models.get_model(name, num_classes=10, dropout=0.3),
        )
    assert str(ours) == str(theirs)
    assert "p=0.3" in str(ours)


def sizes_fit(name, options):
    size = parse_arguments(["data", *options.split()]).data.train_crop_size
    model = made_without_weights(name, image_size=size)
    check_image_sizes(model, parse_arguments(["data", "-a", name, *options.split()]))
    assert model.training


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_b_32", "--train-crop-size 224"),
        ("vit_b_32", "--train-crop-size 64 --training-only"),
        ("vit_b_32", "--dataset cifar10"),
        ("resnet18", "--train-crop-size 64 --progressive-size 32@0 96@3"),
        ("alexnet", f"--train-crop-size 32 --evaluate --pretrained {__file__}"),
    ],
)
def test_image_sizes_that_a_model_takes_are_accepted(name, options):
    sizes_fit(name, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_b_32", "--val-crop-size 256", "--val-crop-size 256: vit_b_32 made for --train-crop-size 224 does not"),
        (
            "vit_b_32",
            f"--val-crop-size 256 --evaluate --pretrained {__file__}",
            "--val-crop-size 256: vit_b_32 made for --train-cr",
        ),
        (
            "maxvit_t",
            "--progressive-size 160@0",
            "--progressive-size 160@0: maxvit_t made for --train-crop-size 224 does not accept",
        ),
        (
            "alexnet",
            "--train-crop-size 32",
            "--train-crop-size 32: alexnet does not accept images of this size: .* small",
        ),
        ("vit_b_32", "--train-crop-size 100", r"image_size \(--train-crop-size\) must be one that vit_b_32 .* got 100"),
        ("maxvit_t", "--train-crop-size 128", r"image_size \(--train-crop-size\) must be one that maxvit_t .* got 128"),
    ],
)
def test_image_sizes_that_a_model_does_not_take_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        sizes_fit(name, options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model("vgg61", 10), r"name must be cifar_resnet18, .* got 'vgg61'; nearest: vgg1"),
        (lambda: make_model("resnet18", 10, dropout=0.1), "dropout must be left out for resnet18, .* got 0.1"),
        (lambda: made_without_weights("convnext_tiny", dropout=0.1), "dropout must be left out for convnext_tiny"),
        (lambda: make_model("wrn_28_10", 10, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: WideResNet(27, 10, 10), r"depth must be 6 n \+ 4 .* got 27"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

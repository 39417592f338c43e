"""The recipes in configs/: each says what to expect and why, agrees with its source, and runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from shared.cifar_files import write_cifar
from shared.programs import REPOSITORY
from shared.training_fixtures import read_log

from dali_saliencymix.training.arguments import parse_arguments

pytest_plugins = ["shared.training_fixtures"]

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# Recipes that are not from the paper, with their published accuracies.
OTHERS = {"imagenet-resnet50-16epochs": ["73.8"], "imagenet-convnext-tiny": ["82.52"], "imagenette": []}
PAPERS = [name for name in RECIPES if name not in OTHERS]
MIXES = ("saliencymix", "cutmix", "none")
# Fewer images and pixels for a CPU, and the learning rate in proportion; everything else is as in the file.
SMALL = (
    "--device",
    "cpu",
    "-b",
    "2",
    "--lr",
    "0.001",
    "-j",
    "1",
    "-p",
    "1",
    "--max-steps",
    "2",
    "--training-only",
    "--no-checkpoints",
)

# arXiv:2006.01791v2. Table 1: top-1 errors of baseline, CutMix and SaliencyMix, each C10, C10+, C100, C100+.
TABLE_1 = {
    "resnet18": {
        "none": "10.63+-0.26 4.72+-0.21 36.68+-0.57 22.46+-0.31",
        "cutmix": "9.44+-0.34 3.78+-0.12 34.42+-0.27 19.42+-0.23",
        "saliencymix": "7.59+-0.22 3.65+-0.10 28.73+-0.13 19.29+-0.21",
    },
    "resnet50": {
        "none": "12.14+-0.95 4.98+-0.14 36.48+-0.50 21.58+-0.43",
        "cutmix": "9.16+-0.38 3.61+-0.13 31.65+-0.61 18.72+-0.23",
        "saliencymix": "6.81+-0.30 3.46+-0.08 24.89+-0.39 18.57+-0.29",
    },
    "wrn-28-10": {
        "none": "6.97+-0.22 3.87+-0.08 26.06+-0.22 18.80+-0.08",
        "cutmix": "5.18+-0.20 2.87+-0.16 23.21+-0.20 16.66+-0.20",
        "saliencymix": "4.04+-0.13 2.76+-0.07 19.45+-0.32 16.56+-0.17",
    },
}
# Table 2: top-1 and top-5 errors on ImageNet.
TABLE_2 = {
    "resnet50": {"none": "23.68/7.05", "cutmix": "21.40/5.92", "saliencymix": "21.26/5.76"},
    "resnet101": {"none": "21.87/6.29", "cutmix": "20.17/5.24", "saliencymix": "20.09/5.15"},
}
STEPS = {"momentum": 0.9, "nesterov": True, "lr": 0.1, "lr_scheduler": "step", "lr_warmup_epochs": 0, "batch_size": 256}
ON_CIFAR = {
    **STEPS,
    "epochs": 200,
    "weight_decay": 5e-4,
    "lr_milestones": [60, 120, 160],
    "lr_gamma": 0.2,
    "crop_padding": 4,
    "hflip_prob": 0.5,
    "train_crop_size": 32,
}
ON_IMAGENET = {
    **STEPS,
    "epochs": 300,
    "weight_decay": 1e-4,
    "lr_milestones": [75, 150, 225],
    "lr_gamma": 0.1,
    "color_jitter": 0.4,
    "hflip_prob": 0.5,
    "train_crop_size": 224,
    "val_resize_size": 256,
    "val_crop_size": 224,
}
MIX_OPTIONS = ("mix", "mix_alpha", "mix_prob", "preset")
ARCHES = {"resnet18": "cifar_resnet18", "resnet50": "cifar_resnet50", "wrn-28-10": "wrn_28_10"}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    for dataset in ("cifar10", "cifar100"):
        write_cifar(root, dataset, train=10, test=4)
    return root


def path_of(name):
    return CONFIGS / f"{name}.yaml"


def parsed(name, *more):
    return parse_arguments(["DATA", "--config", str(path_of(name)), *more])


def comment(name):
    """Return the fields of the comment at the start of a recipe, with its first line as "title"."""
    lines = [line[1:] for line in path_of(name).read_text().splitlines() if line.startswith("#")]
    fields, key = {"title": lines[0].strip()}, "title"
    for line in lines[1:]:
        begins = re.match(r" (\w+): (.*)", line)
        if begins:
            key = begins[1]
            assert key not in fields
        fields[key] = begins[2] if begins else f"{fields[key]} {line.strip()}"
    return fields


def numbers(text):
    return re.findall(r"\d+\.\d+", text)


def test_there_is_each_recipe_that_was_promised():
    on_cifar = [f"cifar{count}-{net}" for count in (10, 100) for net in TABLE_1]
    on_imagenet = [f"imagenet-{net}" for net in TABLE_2]
    assert sorted([*on_cifar, *on_imagenet, *OTHERS]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_to_expect_and_whence(name):
    fields = comment(name)
    assert {"Expected", "Source", "Hardware", "Differs"} <= set(fields)
    assert "not measured with this project" in fields["Source"]
    assert all(f"--mix {mix}" in fields["title"] for mix in ("cutmix", "none"))
    dataset, _, net = name.partition("-")
    if name in OTHERS:
        assert "nothing published" in fields["Expected"]
        assert set(OTHERS[name]) <= set(numbers(fields["Expected"]))
    elif dataset == "imagenet":
        assert "2006.01791, table 2" in fields["Source"]
        assert numbers(fields["Expected"]) == [number for mix in MIXES for number in numbers(TABLE_2[net][mix])]
    else:
        assert "2006.01791, table 1" in fields["Source"]
        expected = []
        for mix in MIXES:
            columns = TABLE_1[net][mix].split()
            plain, augmented = columns[:2] if dataset == "cifar10" else columns[2:]
            expected += numbers(augmented) + numbers(plain)
        assert numbers(fields["Expected"]) == expected


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_hyper_parameters_of_the_paper(name, mix):
    args = parsed(name, "--mix", mix).config
    dataset, _, net = name.partition("-")
    expected = ON_IMAGENET if dataset == "imagenet" else ON_CIFAR
    assert {option: args[option] for option in expected} == expected
    assert args["dataset"] == ("folder" if dataset == "imagenet" else dataset)
    assert args["arch"] == (net if dataset == "imagenet" else ARCHES[net])
    assert args["dropout"] == (0.3 if net == "wrn-28-10" else None)
    assert args["mix"] == mix
    if mix != "none":
        assert (args["mix_alpha"], args["mix_prob"]) == (1.0, 1.0 if dataset == "imagenet" else 0.5)
    if mix == "saliencymix":
        assert args["preset"] == "paper"
        assert [args[option] for option in ("saliency", "source", "destination", "box", "per_batch")] == [None] * 5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_mixes_as_the_paper_does_unless_it_is_told_otherwise(name):
    assert parsed(name).config == parsed(name, "--mix", "saliencymix").config
    configs = [parsed(name, "--mix", mix).config for mix in MIXES]
    common = [{option: config[option] for option in config if option not in MIX_OPTIONS} for config in configs]
    assert common[0] == common[1] == common[2]


# The options of torchvision's command for ConvNeXt (8 processes) that have the same name and meaning here.
TORCHVISION = """--model convnext_tiny --batch-size 128 --opt adamw --lr 1e-3 --lr-warmup-epochs 5 --epochs 600
    --auto-augment ta_wide --random-erase 0.1 --label-smoothing 0.1 --weight-decay 0.05 --norm-weight-decay 0.0
    --train-crop-size 176 --model-ema --val-resize-size 232"""


def test_the_recipe_for_convnext_is_torchvision_s():
    name = "imagenet-convnext-tiny"
    ours, theirs = parsed(name).config, parse_arguments(["DATA", *TORCHVISION.split()]).config
    assert {option for option in ours if ours[option] != theirs[option]} == {"config", "model_ema_decay"}
    # torchvision updates its EMA every 32 steps with 0.99998, and adjusts the decay by batch size, steps and epochs.
    every_32_steps = 1 - (1 - 0.99998) * 8 * 128 * 32 / 600
    assert ours["model_ema_decay"] ** 32 == pytest.approx(every_32_steps, abs=1e-5)


def test_the_short_recipe_is_modern():
    args = parsed("imagenet-resnet50-16epochs")
    assert 16 <= args.schedule.epochs <= 40
    assert args.model.precision == "bf16"
    assert args.model.channels_last
    assert args.optimizer.lr == pytest.approx(1.7 * args.data.batch_size / 4096, rel=0.01)  # scaled from FFCV


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("imagenet-convnext-tiny", "saliencymix"),
        ("imagenet-resnet50-16epochs", "saliencymix"),
        ("imagenet-resnet50", "cutmix"),
        ("imagenette", "saliencymix"),
        ("cifar100-resnet18", "none"),
    ],
)
def test_a_recipe_trains_for_two_steps(name, mix, train_here, data_folder, cifar, tmp_path):
    small = [*SMALL, "--config", path_of(name), "--mix", mix, "--output-dir", tmp_path / "out"]
    if name.startswith("imagenet"):
        small += ["--train-crop-size", "32"]
        small += ["--progressive-size", "32@0", "48@12"] if "16epochs" in name else []
    ended = train_here(data_folder if name.startswith("imagenet") else cifar, *small)
    assert ended.status == 0, ended.err
    start, epoch = read_log(tmp_path / "out")
    assert start["config"]["epochs"] == parsed(name).schedule.epochs
    assert epoch["train"]["images"] == 4
    assert 0 < epoch["train"]["loss"] < math.inf


def page():
    return (REPOSITORY / "docs" / "recipes.md").read_text()


def test_the_page_of_recipes_has_the_command_of_each_of_them_with_its_figures():
    rows = dict(re.findall(r"^\| `(?:DATA|CIFAR) -c configs/([\w-]+)\.yaml` \|(.*)", page(), re.MULTILINE))
    assert sorted(rows) == RECIPES
    for name, row in rows.items():
        figures = OTHERS[name] if name in OTHERS else numbers(comment(name)["Expected"])
        assert numbers(row.partition("arXiv")[0]) == figures, name
    assert all(Path(CONFIGS, name).exists() for name in re.findall(r"configs/([\w./-]+)", page()))

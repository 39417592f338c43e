"""The options of train.py: names, meaning, and errors."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.arguments import _MIX_OPTIONS, parse_arguments, save_config
from dali_saliencymix.training.checkpoints import DATA_OPTIONS, LAST, changed_data, save_checkpoint

# Option and value on the command line, name and value of the result.
OPTIONS = [
    ("-a resnet18", "arch", "resnet18"),
    ("--arch convnext_tiny", "arch", "convnext_tiny"),
    ("-b 32", "batch_size", 32),
    ("--batch-size 32", "batch_size", 32),
    ("-j 2", "workers", 2),
    ("--workers 2", "workers", 2),
    ("--prefetch 4", "prefetch", 4),
    ("--hw-decoder-load 0.9", "hw_decoder_load", 0.9),
    ("--model resnet18", "arch", "resnet18"),
    ("-a cifar_resnet18", "arch", "cifar_resnet18"),
    ("--dropout 0.1", "dropout", 0.1),
    ("--epochs 7", "epochs", 7),
    ("--accumulation-steps 4", "accumulation_steps", 4),
    ("--norm-weight-decay 0", "norm_weight_decay", 0.0),
    ("--bias-weight-decay 0", "bias_weight_decay", 0.0),
    ("--label-smoothing 0.1", "label_smoothing", 0.1),
    ("--clip-grad-norm 1", "clip_grad_norm", 1.0),
    ("--model-ema", "model_ema", True),
    ("--model-ema-decay 0.99", "model_ema_decay", 0.99),
    ("--lr 0.4", "lr", 0.4),
    ("--wd 5e-5", "weight_decay", 5e-5),
    ("--weight-decay 5e-5", "weight_decay", 5e-5),
    ("--opt adamw", "opt", "adamw"),
    ("--optimizer adamw", "opt", "adamw"),
    ("--momentum 0.5", "momentum", 0.5),
    ("--no-nesterov", "nesterov", False),
    ("--lr-scheduler step", "lr_scheduler", "step"),
    ("--lr-warmup-epochs 5", "lr_warmup_epochs", 5.0),
    ("--lr-milestones 30 60", "lr_milestones", [30.0, 60.0]),
    ("--lr-gamma 0.2", "lr_gamma", 0.2),
    ("--mix cutmix", "mix", "cutmix"),
    ("--mix mixup", "mix", "mixup"),
    ("--mix none", "mix", "none"),
    ("--mix-alpha 0.2", "mix_alpha", 0.2),
    ("--mix-prob 0.5", "mix_prob", 0.5),
    ("--beta 0.2", "mix_alpha", 0.2),
    ("--salmix_prob 0.5", "mix_prob", 0.5),
    ("--mix-off-epochs 20", "mix_off_epochs", 20),
    ("--saliency fine_grained", "saliency", "fine_grained"),
    ("--preset paper", "preset", "paper"),
    ("--source non_salient", "source", "non_salient"),
    ("--label-weight saliency", "label_weight", "saliency"),
    ("--destination random", "destination", "random"),
    ("--box clip", "box", "clip"),
    ("--per-batch", "per_batch", True),
    ("--amp", "amp", True),
    ("--amp-dtype fp16", "amp_dtype", "fp16"),
    ("--amp-dtype float16", "amp_dtype", "fp16"),
    ("--compile", "compile", True),
    ("--deterministic", "deterministic", True),
    ("--channels-last", "channels_last", True),
    ("--device cpu", "device", "cpu"),
    ("--seed 3", "seed", 3),
    ("--output-dir out", "output_dir", Path("out")),
    ("--resume auto", "resume", "auto"),
    (f"--pretrained {__file__}", "pretrained", Path(__file__)),
    ("--profile-loader", "profile_loader", True),
    ("--max-nan-steps 9", "max_nan_steps", 9),
    ("--checkpoint-every 500", "checkpoint_every", 500),
    ("--checkpoint-interval 5", "checkpoint_interval", 5.0),
    ("--keep-checkpoints 3", "keep_checkpoints", 3),
    ("--max-bad-batches 0", "max_bad_batches", 0),
    ("--stall-timeout 60", "stall_timeout", 60.0),
    ("--tensorboard", "tensorboard", True),
    ("--log-wandb", "log_wandb", True),
    ("--wandb-project mine", "wandb_project", "mine"),
    ("--save-images 8", "save_images", 8),
    ("--max-steps 50", "max_steps", 50),
    ("--prof 50", "max_steps", 50),
    ("--training-only", "training_only", True),
    ("--no-checkpoints", "no_checkpoints", True),
    ("-p 100", "print_freq", 100),
    ("--print-freq 100", "print_freq", 100),
    ("--train-dir here", "train_dir", Path("here")),
    ("--val-dir there", "val_dir", Path("there")),
    ("--train-crop-size 176", "train_crop_size", 176),
    ("--min-crop-area 0.35", "min_crop_area", 0.35),
    ("--progressive-size 128@0 160@6", "progressive_size", ["128@0", "160@6"]),
    ("--data-backend pytorch", "data_backend", "pytorch"),
    ("--train-list some.txt", "train_list", Path("some.txt")),
    ("--val-list some.txt", "val_list", Path("some.txt")),
    ("--hflip-prob 0", "hflip_prob", 0.0),
    ("--auto-augment ra", "auto_augment", "ra"),
    ("--aa ta_wide", "auto_augment", "ta_wide"),
    ("--color-jitter 0.4", "color_jitter", 0.4),
    ("--random-erase 0.25", "random_erase", 0.25),
    ("--reprob 0.25", "random_erase", 0.25),
    ("--crop-padding 2", "crop_padding", 2),
    ("--synthetic-classes 10", "synthetic_classes", 10),
    ("--synthetic-steps 10", "synthetic_steps", 10),
    ("--mean 0.5 0.4 0.3", "mean", [0.5, 0.4, 0.3]),
    ("--std 0.2 0.3 0.4", "std", [0.2, 0.3, 0.4]),
    ("--val-steps 5", "val_steps", 5),
    ("--val-resize-size 232", "val_resize_size", 232),
    ("--val-crop-size 200", "val_crop_size", 200),
]


@pytest.mark.parametrize(("given", "name", "value"), OPTIONS, ids=[given for given, _, _ in OPTIONS])
def test_every_option_is_there_and_changes_what_it_says(given, name, value):
    data = ["data", *USED_WITH.get(name, "").split()]
    without, with_it = parse_arguments(data), parse_arguments([*data, *given.split()])
    assert with_it.config[name] == (str(value) if isinstance(value, Path) else value)
    assert {key for key in without.config if without.config[key] != with_it.config[key]} == {name}
    if name == "mix":
        mix = with_it.data.mix
        assert mix == (None if value == "none" else MixOptions(modes={value: 1.0}))
        return
    name = {"mix_alpha": "alpha", "mix_prob": "prob"}.get(name, name)
    before, after = in_groups(without), in_groups(with_it)
    changed = {key for key in before if before[key] != after[key]}
    if name == "preset":  # which determines what is None
        changed -= {"MixOptions saliency"}
    assert changed == {key for key in before if key.split()[1] == name} != set()
    assert {after[key] for key in changed} == {tuple(value) if isinstance(value, list) else value}


# Other options that an option needs to have an effect.
USED_WITH = {
    **dict.fromkeys(("lr_milestones", "lr_gamma"), "--lr-scheduler step"),
    **dict.fromkeys(("opt_betas", "opt_eps"), "--opt adamw"),
    "amp_dtype": "--amp",
    "crop_padding": "--dataset cifar10",
    "model_ema_decay": "--model-ema",
    "ra_magnitude": "--auto-augment ra",
    "wandb_project": "--log-wandb",
}


def in_groups(options):
    """Return the value of each field, by the names of its group and field."""
    groups = [group for group in (*vars(options).values(), options.data.mix) if is_dataclass(group)]
    return {
        f"{type(group).__name__} {name}": vars(group)[name] for group in groups for name in vars(group) if name != "mix"
    }


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of a training run with non-default options."""
    config = {"arch": "resnet18", "val_crop_size": 48, "val_resize_size": 64, "model_ema": True, "lr": 7.0}
    config |= {"dropout": None, "mean": [0.5, 0.4, 0.3]}
    save_checkpoint({"model": {}, "epoch": 3, "config": config}, tmp_path / LAST)
    return tmp_path / LAST


def test_evaluate_takes_network_and_sizes_from_the_checkpoint_unless_they_are_given(trained, tmp_path):
    for flag in ("-e", "--evaluate", "--test-only"):
        for resume in (("--resume", str(trained)), ("--resume", "auto", "--output-dir", str(tmp_path))):
            options = parse_arguments(["data", flag, *resume])
            data = options.data
            assert options.run.evaluate
            assert (options.run.resume, options.run.output_dir) == (str(trained), tmp_path)
            assert (options.model.arch, data.val_crop_size, data.val_resize_size) == ("resnet18", 48, 64)
            assert (data.mean, data.std) == ((0.5, 0.4, 0.3), (0.229, 0.224, 0.225))  # older than --std
            assert options.optimizer.model_ema
            assert options.optimizer.lr == 0.1  # options that do not affect evaluation are not taken over
            assert data.train_dir == data.val_dir == Path("data/val")
    assert parse_arguments(["data", "--resume", str(trained)]).model.arch == "resnet50"
    file = tmp_path / "options.yaml"
    file.write_text("val-crop-size: 40\nval-resize-size: 41\noutput-dir: elsewhere\n")
    given = ["data", "-c", str(file), "--evaluate", "--resume", str(trained), "--val-crop-size", "24"]
    options = parse_arguments([*given, "--no-model-ema"])
    assert (options.data.val_crop_size, options.data.val_resize_size) == (24, 41)
    assert (options.run.output_dir, options.optimizer.model_ema) == (Path("elsewhere"), False)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("val_crop_size", "large", "argument --val-crop-size: must be a whole number of at least 1, got large"),
        ("val_crop_size", [1, 2], "val_crop_size must be one value, got [1, 2]"),
        ("dataset", "mnist", "argument --dataset: invalid choice: 'mnist'"),
        ("std", [1.0, 2.0], "std must be 3 values, got [1.0, 2.0]"),
        ("mean", [0.5, 0.5, 0.5, "--help"], "mean must be 3 values, got [0.5, 0.5, 0.5, '--help']"),
        ("mean", [0.5, 0.5, "--help"], "mean must hold values, got [0.5, 0.5, '--help']"),
        ("model_ema", 3, "model_ema must be true or false, got 3"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_checked(tmp_path, capsys, name, value, what):
    save_checkpoint({"model": {}, "config": {"arch": "resnet18", name: value}}, tmp_path / LAST)
    with pytest.raises(SystemExit):
        parse_arguments(["data", "--evaluate", "--resume", str(tmp_path / LAST)])
    assert f"error: {tmp_path / LAST}: {what}" in capsys.readouterr().err


def test_the_folders_follow_from_the_data_folder():
    args = parse_arguments(["some/data"]).data
    assert (args.train_dir, args.val_dir) == (Path("some/data/train"), Path("some/data/val"))
    args = parse_arguments(["some/data", "--val-dir", "other"]).data
    assert (args.train_dir, args.val_dir) == (Path("some/data/train"), Path("other"))
    args = parse_arguments(["--train-dir", "a", "--val-dir", "b"]).data
    assert (args.train_dir, args.val_dir) == (Path("a"), Path("b"))
    for option in ("--data-dir", "--data-path"):
        assert parse_arguments([option, "some/data"]).data.train_dir == Path("some/data/train")


def test_cifar_is_one_folder_of_small_images_and_synthetic_data_is_none():
    args = parse_arguments(["some/data", "--dataset", "cifar10"]).data
    assert (args.data, args.train_dir, args.val_dir) == (Path("some/data"), None, None)
    assert args.train_crop_size == 32
    args = parse_arguments(["--data-backend", "synthetic"]).data
    assert (args.data, args.train_dir, args.train_crop_size) == (None, None, 224)


def test_the_options_that_must_not_change_on_resuming_exist():
    assert set(DATA_OPTIONS) < set(parse_arguments(["data"]).config)
    assert set(_MIX_OPTIONS.values()) < set(DATA_OPTIONS)


def test_a_checkpoint_from_before_an_option_goes_on_where_that_is_at_its_default():
    trained = parse_arguments(["data", "--preset", "paper"])
    saved = {"config": {**trained.config, "world_size": 1}, "data": {}, "epoch": 0}
    for name in ("color_jitter", "label_weight"):
        del saved["config"][name]
    assert changed_data(None, saved, {**trained.config, "world_size": 1}, {}, trained) == []
    other = parse_arguments(["data", "--preset", "paper", "--label-weight", "saliency"])
    with pytest.raises(ValueError, match=r"cannot resume with changed data: label_weight .*saliency"):
        changed_data(None, saved, {**other.config, "world_size": 1}, {}, other)


WRONG = [
    ("", "DATA is needed, or --train-dir"),
    ("--train-dir here", "DATA is needed, or --val-dir"),
    ("data -b 0", "argument -b/--batch-size: must be a whole number of at least 1, got 0"),
    ("data -b many", "-b/--batch-size"),
    ("data -j -1", "argument -j/--workers: must be a whole number of at least 1, got -1"),
    ("data --epochs 0", "argument --epochs: must be a whole number of at least 1, got 0"),
    ("data -p 0", "argument -p/--print-freq: must be a whole number of at least 1, got 0"),
    ("data --train-crop-size 0", "argument --train-crop-size: must be a whole number of at least 1, got 0"),
    ("data --val-steps 0", "argument --val-steps: must be a whole number of at least 1, got 0"),
    ("data --lr fast", "argument --lr: invalid float value: 'fast'"),
    ("data --mix resizemix", "argument --mix: invalid choice: 'resizemix'"),
    ("data --preset timm", "argument --preset: invalid choice: 'timm'"),
    ("data --mix cutmix --saliency fine_grained", "--saliency does nothing with --mix cutmix: leave it out"),
    ("data --mix cutmix --label-weight saliency", "--label-weight does nothing with --mix cutmix: leave it out"),
    ("data --mix none --label-weight saliency", "--label-weight does nothing with --mix none: leave it out"),
    ("data --label-weight mass", "argument --label-weight: invalid choice: 'mass'"),
    ("data --mix mixup --box clip", "--box does nothing with --mix mixup: leave it out"),
    ("data --mix none --mix-alpha 0.2", "--mix-alpha does nothing with --mix none: leave it out"),
    ("data --mix none --per-batch", "--per-batch does nothing with --mix none: leave it out"),
    ("data --saliency deep", "argument --saliency: invalid choice: 'deep'"),
    ("data --box round", "argument --box: invalid choice: 'round'"),
    ("data --lr-scheduler linear", "argument --lr-scheduler: invalid choice: 'linear'"),
    ("data -a vgg61", "--arch must be cifar_resnet18, cifar_resnet50, wrn_28_10 or one of torchvision.models.list_"),
    ("data -a ResNet18", "got 'ResNet18'; nearest: resnet18, "),
    ("data --evaluate", "--evaluate needs --resume, the checkpoint to validate, or --pretrained, the weights"),
    ("data --evaluate --resume /no/such.pt", "--resume: /no/such.pt: no such checkpoint"),
    ("data --evaluate --resume auto", "--resume auto: output/checkpoint_last.pt: no such checkpoint"),
    ("data --resume /no/such.pt", "--resume: /no/such.pt: no such file"),
    ("data --resume /", "--resume: /: is a folder, not a file"),
    ("data --pretrained /no/such.pth", "--pretrained: /no/such.pth: no such file"),
    ("data --lr-milestones 5", "--lr-milestones does nothing with --lr-scheduler cosine: leave it out"),
    ("data --amp-dtype fp16", "--amp-dtype does nothing without --amp: leave it out"),
    ("data --dataset cifar10 --val-crop-size 48", "--val-crop-size does nothing with --dataset cifar10: leave it out"),
    ("data --batch-siz 4", "unrecognized arguments: --batch-siz 4; nearest: --batch-size"),
    ("data --dataset cifar10 --color-jitter 0.4", "--color-jitter does nothing with --dataset cifar10: leave it out"),
    ("data more", "unrecognized arguments: more"),
    ("data --dataset cifar10 --progressive-size 24@1", "--progressive-size does nothing with --dataset cifar10"),
    ("data --seed -1", "argument --seed: must be a whole number of at least 0, got -1"),
    ("data --epochs 5 --lr-warmup-epochs 5", "--lr-warmup-epochs must be "),
    ("data --optimizer adam", "argument --opt/--optimizer: invalid choice: 'adam'"),
    ("data --opt-betas 0.8 0.9", "--opt-betas does nothing with --opt sgd: leave it out"),
    ("data --opt-eps 1e-6", "--opt-eps does nothing with --opt sgd: leave it out"),
    ("data --opt adamw --momentum 0.8", "--momentum does nothing with --opt adamw: leave it out"),
    ("data --opt adamw --no-nesterov", "--nesterov does nothing with --opt adamw: leave it out"),
    ("data --opt adamw --opt-betas 0.9", "argument --opt-betas: expected 2 arguments"),
    ("data --opt adamw --opt-betas 0.9 1", "--opt-betas must be in [0, 1), got 1.0"),
    ("data --opt adamw --opt-eps 0", "--opt-eps must be a positive number, got 0.0"),
    ("data --epoch 5", "unrecognized arguments: --epoch"),
    ("data --mix-alpha inf", "--mix-alpha must be a positive number, got inf"),
    ("data --mix-prob nan", "--mix-prob must be in [0, 1], got nan"),
    ("data --momentum 1", "--momentum must be in [0, 1), got 1.0"),
    ("data --norm-weight-decay -1", "--norm-weight-decay must be a number of at least 0, got -1.0"),
    ("data --label-smoothing 1", "--label-smoothing must be in [0, 1), got 1.0"),
    ("data --clip-grad-norm 0", "--clip-grad-norm must be a positive number, got 0.0"),
    ("data --model-ema --model-ema-decay 1", "--model-ema-decay must be in (0, 1), got 1.0"),
    ("data --stall-timeout -1", "--stall-timeout must be in [0, 1e6], got -1.0"),
    ("data --checkpoint-interval nan", "--checkpoint-interval must be a number of at least 0, got nan"),
    ("data --mix-off-epochs 301", "--mix-off-epochs must be at most --epochs 300, got 301"),
    ("data --mix none --mix-off-epochs 3", "--mix-off-epochs does nothing with --mix none"),
    ("data --progressive-size 128:0", "argument --progressive-size: must be SIZE@EPOCH, such as 160@6, got 128:0"),
    ("data --progressive-size 128@6 160@6", "--progressive-size must have increasing epochs, got 128@6 160@6"),
    ("data --prefetch 0", "argument --prefetch: must be a whole number of at least 1, got 0"),
    ("--data-backend synthetic --prefetch 4", "--prefetch does nothing with --data-backend synthetic: leave it out"),
    ("data --hw-decoder-load 1.5", "--hw-decoder-load must be in [0, 1], got 1.5"),
    ("data --device cpu --hw-decoder-load 0.9", "--hw-decoder-load does nothing with --device cpu: leave it out"),
    (
        "data --data-backend pytorch --hw-decoder-load 0.9",
        "--hw-decoder-load does nothing with --data-backend pytorch: leave it out",
    ),
    (
        "data --dataset cifar10 --hw-decoder-load 0.9",
        "--hw-decoder-load does nothing with --dataset cifar10: leave it out",
    ),
    ("data --aa imagenet", "argument --auto-augment/--aa: invalid choice: 'imagenet'"),
    ("data --ra-magnitude 5", "--ra-magnitude does nothing with --auto-augment none: leave it out"),
    ("data --aa ta_wide --ra-magnitude 5", "--ra-magnitude does nothing with --auto-augment ta_wide: leave it out"),
    ("data --aa ra --ra-magnitude 31", "--ra-magnitude must be in [0, 30], got 31"),
    ("data --random-erase 25", "--random-erase must be in [0, 1], got 25.0"),
    ("data --mean 123.7 116.3 103.5", "--mean must be in [0, 1], got 123.7"),
    ("data --mean 0.5", "argument --mean: expected 3 arguments"),
    ("data --std 0.2 0 0.2", "--std must be a positive number, got 0.0"),
    ("data --amp-dtype fp8", "argument --amp-dtype: invalid choice: 'fp8'"),
    ("data --data-backend ffcv", "argument --data-backend: invalid choice: 'ffcv'"),
    ("--dataset cifar10", "DATA is needed"),
    ("data --dataset cifar10 --val-dir d", "--val-dir is for folders of images, not for --dataset cifar10"),
    ("data --config /no/such.yaml", "/no/such.yaml: No such file or directory"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[given or "nothing" for given, _ in WRONG])
def test_a_wrong_option_ends_the_script_with_one_line_that_names_it(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(given.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert message in line
    assert out == ""


def test_no_option_is_without_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for given, _, _ in OPTIONS:
        assert given.split()[0] in out
    assert "(default: 256)" in out
    assert "images per step in each process (GPU)" in out


CONFIG = """
# a comment
arch: resnet18
batch-size: 32
lr: 1e-2
lr-scheduler: step
lr_milestones: [30, 60.5]
wd: 5e-5
mix: none
amp: true
nesterov: off
no-checkpoints: yes
progressive-size: [128@0, 160@6]
clip-grad-norm: null
"""


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a configuration file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_configuration_file_says_what_the_command_line_would(config):
    path = config(CONFIG)
    command_line = (
        "-a resnet18 -b 32 --lr 0.01 --lr-scheduler step --lr-milestones 30 60.5 --wd 5e-5 --mix none --amp "
        "--no-nesterov --no-checkpoints --progressive-size 128@0 160@6"
    )
    for option in ("-c", "--config"):
        args = parse_arguments(["data", option, path])
        expected = parse_arguments(["data", *command_line.split()])
        assert replace(args, config=args.config | {"config": None}) == expected


def test_the_command_line_comes_before_the_configuration_file(config):
    path = config(CONFIG + "data: some/data\n")
    args = parse_arguments(["--no-amp", "--lr", "0.5", "--config", path, "--weight-decay", "7"])
    assert (args.model.amp, args.optimizer.lr, args.optimizer.weight_decay) == (False, 0.5, 7.0)
    assert (args.data.batch_size, args.data.train_dir) == (32, Path("some/data/train"))
    assert parse_arguments(["other", "--config", path]).data.train_dir == Path("other/train")


def test_a_recipe_can_be_tried_with_another_mode(config):
    path = config("{mix: saliencymix, saliency: fine_grained, mix-alpha: 0.5, destination: random}")
    args = parse_arguments(["data", "--config", path, "--mix", "cutmix"])
    assert args.data.mix == MixOptions(modes={"cutmix": 1.0}, alpha=0.5)
    assert (args.config["saliency"], args.config["destination"]) == (None, None)
    none = parse_arguments(["data", "--config", path, "--mix", "none"])
    assert (none.data.mix, none.config["mix_alpha"]) == (None, 1)


def test_what_the_command_line_says_is_never_left_out(config, capsys):
    path = config("{mix: saliencymix, opt: sgd, lr-scheduler: step, lr-gamma: 0.2}")
    for given, option in (
        ("--mix none --mix-alpha 2", "--mix-alpha"),
        ("--opt adamw --momentum 0.5", "--momentum"),
        ("--lr-scheduler cosine --lr-gamma 0.5", "--lr-gamma"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(["data", "--config", path, *given.split()])
        assert f"{option} does nothing with" in capsys.readouterr().err


def test_what_follows_from_the_data_set_is_not_that_of_another_one(config):
    path = config("{dataset: folder, mean: [0.4, 0.4, 0.4], train-crop-size: 176, color-jitter: 0.4}")
    data = parse_arguments(["data", "--config", path, "--dataset", "cifar10"]).data
    assert (data.train_crop_size, data.color_jitter) == (32, 0.0)
    assert data.mean == parse_arguments(["data", "--dataset", "cifar10"]).data.mean
    assert parse_arguments(["data", "--config", path]).data.mean == (0.4, 0.4, 0.4)


def test_a_recipe_can_be_tried_with_another_policy(config):
    path = config("{auto-augment: ra, ra-magnitude: 5}")
    assert parse_arguments(["data", "--config", path]).data.ra_magnitude == 5
    data = parse_arguments(["data", "--config", path, "--aa", "ta_wide"]).data
    assert (data.auto_augment, data.ra_magnitude) == ("ta_wide", 9)
    data = parse_arguments(["data", "--config", path, "--aa", "none"]).data
    assert (data.auto_augment, data.ra_magnitude) == ("none", 9)


def test_a_recipe_can_be_tried_with_another_optimiser(config):
    sgd = config("{nesterov: false, momentum: 0.8}")
    assert parse_arguments(["data", "--config", sgd]).optimizer.momentum == 0.8
    adamw = parse_arguments(["data", "--config", sgd, "--opt", "adamw", "--opt-betas", "0.8", "0.9"]).optimizer
    assert (adamw.opt, adamw.momentum, adamw.nesterov, adamw.opt_betas) == ("adamw", 0.9, True, (0.8, 0.9))
    path = config("{opt: adamw, opt-betas: [0.7, 0.9], opt-eps: 1e-6}")
    adamw = parse_arguments(["data", "--config", path]).optimizer
    assert (adamw.opt_betas, adamw.opt_eps) == ((0.7, 0.9), 1e-6)
    assert parse_arguments(["data", "--config", path, "--opt", "sgd"]).optimizer.opt_betas == (0.9, 0.999)


WRONG_CONFIGS = [
    ("learning-rate: 0.1", "config.yaml: unknown option learning-rate"),
    ("lr: fast", "config.yaml: argument --lr: invalid float value: 'fast'"),
    ("batch_size: 0", "config.yaml: argument -b/--batch-size: must be a whole number of at least 1, got 0"),
    ("mix: resizemix", "config.yaml: argument --mix: invalid choice: 'resizemix'"),
    ("no-amp: true", "config.yaml: unknown option no-amp; nearest: amp"),
    ("amp: 1", "config.yaml: amp must be true or false, got 1"),
    ("lr: [0.1, 0.2]", "config.yaml: lr must be one value, got [0.1, 0.2]"),
    ("lr: {a: 1}", "config.yaml: lr must be a value, got {'a': 1}"),
    ("config: other.yaml", "config.yaml: unknown option config"),
    ("help: true", "config.yaml: unknown option help"),
    ("data-dir: here", "config.yaml: unknown option data-dir; nearest: train-dir, val-dir, data"),
    ("progressive-size: [128@0, -b8]", "config.yaml: progressive-size must hold values, got ['128@0', '-b8']"),
    ("{lr: 0.1, lr: 0.2}", "config.yaml: lr is given twice, first as lr"),
    ("{wd: 0.1, weight_decay: 0.2}", "config.yaml: weight_decay is given twice, first as wd"),
    ("- lr", "config.yaml: must hold options as 'name: value'"),
    ("", "config.yaml: must hold options as 'name: value'"),
    ("lr: [", "config.yaml: not YAML"),
    ("progressive-size: [128:0]", "config.yaml: argument --progressive-size: must be SIZE@EPOCH"),
    ("{mix: none, mix-alpha: 0.2}", "--mix-alpha does nothing with --mix none: leave it out"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_CONFIGS, ids=[text or "empty" for text, _ in WRONG_CONFIGS])
def test_a_wrong_configuration_file_is_named_with_what_is_wrong_in_it(config, text, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["data", "--config", config(text)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_saved_configuration_gives_the_same_run_and_follows_another_data_folder(tmp_path, config):
    given = ["some/data", "--config", config(CONFIG), "--val-dir", "held out", "--seed", "3", "--color-jitter", "0.2"]
    args = parse_arguments(given)
    saved = tmp_path / "args.yaml"
    save_config(args, saved)
    again = parse_arguments(["--config", str(saved)])
    assert replace(again, config={}) == replace(args, config={})
    assert again.config | {"config": None} == args.config | {"config": None}
    other = parse_arguments(["other", "--config", str(saved)]).data
    assert (other.train_dir, other.val_dir) == (Path("other/train"), Path("held out"))


def test_all_options_can_stand_in_a_configuration_file(config, capsys):
    """This covers all present and future options: all are read in the same way."""
    args = parse_arguments(["data"]).config
    text = "".join(f"{name}: null\n" for name in args if name != "config")
    assert parse_arguments(["data", "--config", config(text)]).config | {"config": None} == args


def test_where_nothing_is_validated_the_class_folders_may_be_data_itself(tmp_path, capsys):
    def folders(*line):
        data = parse_arguments(list(line), validates=False).data
        return data.train_dir, data.val_dir, data.val_list

    assert folders() == (None, None, None)
    assert folders("--train-dir", "a", "--val-list", "b") == (Path("a"), Path("a"), None)
    assert folders(str(tmp_path)) == (tmp_path, tmp_path, None)
    (tmp_path / "train").mkdir()
    assert folders(str(tmp_path)) == (tmp_path / "train", tmp_path / "train", None)
    with pytest.raises(SystemExit):
        parse_arguments(["--lr", "0"], prog="the command", validates=False)
    assert capsys.readouterr().err.startswith("the command: error: --lr must be a positive number")

"""The options of train.py: which there are, what they mean, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from dali_saliencymix.training.arguments import DATA_OPTIONS, parse_arguments

# Option and value as given, name and value that come out.
OPTIONS = [
    ("-a resnet18", "arch", "resnet18"),
    ("--arch resnext50_32x4d", "arch", "resnext50_32x4d"),
    ("-b 32", "batch_size", 32),
    ("--batch-size 32", "batch_size", 32),
    ("-j 2", "workers", 2),
    ("--workers 2", "workers", 2),
    ("--epochs 7", "epochs", 7),
    ("--lr 0.4", "lr", 0.4),
    ("--wd 5e-5", "weight_decay", 5e-5),
    ("--weight-decay 5e-5", "weight_decay", 5e-5),
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
    ("--saliency fine_grained", "saliency", "fine_grained"),
    ("--preset paper", "preset", "paper"),
    ("--source non_salient", "source", "non_salient"),
    ("--destination random", "destination", "random"),
    ("--box clip", "box", "clip"),
    ("--per-batch", "per_batch", True),
    ("--amp", "amp", True),
    ("--channels-last", "channels_last", True),
    ("--device cpu", "device", "cpu"),
    ("--seed 3", "seed", 3),
    ("--output-dir out", "output_dir", Path("out")),
    ("--resume auto", "resume", "auto"),
    ("--profile-loader", "profile_loader", True),
    ("-p 100", "print_freq", 100),
    ("--print-freq 100", "print_freq", 100),
    ("--train-dir here", "train_dir", Path("here")),
    ("--val-dir there", "val_dir", Path("there")),
    ("--train-crop-size 176", "train_crop_size", 176),
    ("--min-crop-area 0.35", "min_crop_area", 0.35),
    ("--val-resize-size 232", "val_resize_size", 232),
    ("--val-crop-size 200", "val_crop_size", 200),
]


@pytest.mark.parametrize(("given", "name", "value"), OPTIONS, ids=[given for given, _, _ in OPTIONS])
def test_every_option_is_there_and_changes_what_it_says(given, name, value):
    without, with_it = vars(parse_arguments(["data"])), vars(parse_arguments(["data", *given.split()]))
    assert with_it[name] == value
    changed = {key for key in without if without[key] != with_it[key]}
    assert changed == {name}


def test_evaluate_goes_with_resume():
    for flag in ("-e", "--evaluate"):
        assert parse_arguments(["data", flag, "--resume", "auto"]).evaluate


def test_the_folders_follow_from_the_data_folder():
    args = parse_arguments(["some/data"])
    assert (args.train_dir, args.val_dir) == (Path("some/data/train"), Path("some/data/val"))
    args = parse_arguments(["some/data", "--val-dir", "other"])
    assert (args.train_dir, args.val_dir) == (Path("some/data/train"), Path("other"))
    args = parse_arguments(["--train-dir", "a", "--val-dir", "b"])
    assert (args.train_dir, args.val_dir) == (Path("a"), Path("b"))


def test_the_options_that_must_not_change_on_resuming_exist():
    assert set(DATA_OPTIONS) < set(vars(parse_arguments(["data"])))


WRONG = [
    ("", "DATA is needed, or --train-dir"),
    ("--train-dir here", "DATA is needed, or --val-dir"),
    ("data -b 0", "argument -b/--batch-size: must be a whole number of at least 1, got 0"),
    ("data -b many", "-b/--batch-size"),
    ("data -j -1", "argument -j/--workers: must be a whole number of at least 1, got -1"),
    ("data --epochs 0", "argument --epochs: must be a whole number of at least 1, got 0"),
    ("data -p 0", "argument -p/--print-freq: must be a whole number of at least 1, got 0"),
    ("data --train-crop-size 0", "argument --train-crop-size: must be a whole number of at least 1, got 0"),
    ("data --lr fast", "argument --lr: invalid float value: 'fast'"),
    ("data --mix resizemix", "argument --mix: invalid choice: 'resizemix'"),
    ("data --preset timm", "argument --preset: invalid choice: 'timm'"),
    ("data --mix cutmix --saliency fine_grained", "--saliency does nothing with --mix cutmix: leave it out"),
    ("data --mix mixup --box clip", "--box does nothing with --mix mixup: leave it out"),
    ("data --mix none --mix-alpha 0.2", "--mix-alpha does nothing with --mix none: leave it out"),
    ("data --mix none --per-batch", "--per-batch does nothing with --mix none: leave it out"),
    ("data --saliency deep", "argument --saliency: invalid choice: 'deep'"),
    ("data --box round", "argument --box: invalid choice: 'round'"),
    ("data --lr-scheduler linear", "argument --lr-scheduler: invalid choice: 'linear'"),
    ("data -a vgg16", "--arch must be one of resnet101, resnet152, resnet18"),
    ("data -a ResNet18", "got 'ResNet18'"),
    ("data --evaluate", "--evaluate needs --resume"),
    ("data --resume /no/such.pt", "--resume: /no/such.pt: no such file"),
    ("data --epochs 5 --lr-warmup-epochs 5", "--lr-warmup-epochs must be "),
    ("data --optimizer adam", "unrecognized arguments: --optimizer"),
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
    assert "images of each process (GPU) in a step" in out

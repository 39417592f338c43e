"""The options of the training script."""

from __future__ import annotations

import argparse
from pathlib import Path

import torchvision

from dali_saliencymix.boxes import BOXES
from dali_saliencymix.params import MODES
from dali_saliencymix.placement import DESTINATIONS, PRESETS, SOURCES
from dali_saliencymix.saliency import DETECTORS

# The options that decide which batches a run sees: a run that goes on has to keep them.
DATA_OPTIONS = (
    *("batch_size", "seed", "train_crop_size", "min_crop_area"),
    *("mix", "mix_alpha", "mix_prob", "preset", "saliency", "source", "destination", "box", "per_batch"),
)

_OF_SALIENCYMIX = ("preset", "saliency", "source", "destination")
# The options that a way to mix has no use for.
_UNUSED = {
    "cutmix": _OF_SALIENCYMIX,
    "mixup": (*_OF_SALIENCYMIX, "box"),
    "none": (*_OF_SALIENCYMIX, "box", "per_batch", "mix_alpha", "mix_prob"),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options of the training script, and end it with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        description="Train a torchvision ResNet on a folder of images, mixed by SaliencyMix inside DALI.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder that holds train/ and val/")
    data.add_argument("--train-dir", type=Path, help="folder of training images, instead of DATA/train")
    data.add_argument("--val-dir", type=Path, help="folder of validation images, instead of DATA/val")
    data.add_argument("-b", "--batch-size", type=_positive_int, default=256, help="images per process and step")
    data.add_argument("-j", "--workers", type=_positive_int, default=4, help="DALI threads per process")
    data.add_argument("--train-crop-size", type=_positive_int, default=224, help="size of training images")
    data.add_argument("--min-crop-area", type=float, default=0.08, help="least area of the random crop, of 1")
    data.add_argument("--val-resize-size", type=_positive_int, default=256, help="short side of validation images")
    data.add_argument("--val-crop-size", type=_positive_int, default=224, help="centre crop of validation images")

    mix = parser.add_argument_group("mixing")
    mix.add_argument("--mix", choices=(*MODES, "none"), default="saliencymix", help="how to mix")
    mix.add_argument("--mix-alpha", type=float, default=1.0, help="lam is drawn from Beta(alpha, alpha)")
    mix.add_argument("--mix-prob", type=float, default=1.0, help="probability that an image is mixed")
    mix.add_argument(
        "--preset", choices=list(PRESETS), default="default", help="of saliencymix: defaults of what follows"
    )
    mix.add_argument("--saliency", choices=sorted(DETECTORS), help="saliency detector")
    mix.add_argument("--source", choices=SOURCES, help="what to cut out of the source")
    mix.add_argument("--destination", choices=DESTINATIONS, help="where to paste it")
    mix.add_argument("--box", choices=BOXES, help="move or cut boxes that stick out; with cutmix clip by default")
    mix.add_argument("--per-batch", action="store_true", default=None, help="one box for the whole batch")

    model = parser.add_argument_group("model and optimiser")
    model.add_argument("-a", "--arch", default="resnet50", help="a ResNet of torchvision")
    model.add_argument("--epochs", type=_positive_int, default=300, help="length of the training")
    model.add_argument("--lr", type=float, default=0.1, help="learning rate for the global batch, not scaled")
    model.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    model.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="Nesterov momentum")
    model.add_argument("--wd", "--weight-decay", type=float, default=1e-4, dest="weight_decay", help="weight decay")
    model.add_argument("--lr-scheduler", choices=("cosine", "step"), default="cosine", help="how the rate falls")
    model.add_argument("--lr-warmup-epochs", type=float, default=0.0, help="epochs of linear warm-up")
    model.add_argument("--lr-milestones", type=float, nargs="+", default=[75, 150, 225], help="epochs of the steps")
    model.add_argument("--lr-gamma", type=float, default=0.1, help="factor of each step")

    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    run.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    run.add_argument("--channels-last", action="store_true", help="channels-last memory, straight from DALI")
    run.add_argument("--seed", type=int, default=0, help="seed of weights, file order and augmentation")
    run.add_argument("--output-dir", type=Path, default=Path("output"), help="folder for checkpoints and log")
    run.add_argument("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: from the output folder's")
    run.add_argument("-e", "--evaluate", action="store_true", help="only validate the checkpoint named by --resume")
    run.add_argument("--profile-loader", action="store_true", help="only measure whether the loader is the bottleneck")
    run.add_argument("-p", "--print-freq", type=_positive_int, default=10, help="steps between two displays")
    args = parser.parse_args(arguments)

    for option, name in (("train_dir", "train"), ("val_dir", "val")):
        if getattr(args, option) is None:
            if args.data is None:
                parser.error(f"DATA is needed, or --{name}-dir")
            setattr(args, option, args.data / name)
    for option in _UNUSED.get(args.mix, ()):
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} does nothing with --mix {args.mix}: leave it out")
    if args.evaluate and not args.resume:
        parser.error("--evaluate needs --resume, the checkpoint to validate")
    if args.resume and args.resume != "auto" and not Path(args.resume).is_file():
        parser.error(f"--resume: {args.resume}: no such file")
    if not 0 <= args.lr_warmup_epochs < args.epochs:
        parser.error(f"--lr-warmup-epochs must be in [0, --epochs {args.epochs}), got {args.lr_warmup_epochs:g}")
    known = [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]
    if args.arch not in known:
        parser.error(f"--arch must be one of {', '.join(known)}, got {args.arch!r}")
    return args


def _positive_int(text: str) -> int:
    """Read a positive integer."""
    if not text.strip().isdecimal() or int(text) < 1:
        msg = f"must be a whole number of at least 1, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)

"""Train a network on CIFAR-10 many times with several mixing modes, and compare: run what the file of -o lacks."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import machine, program
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.data import read_images
from benchmarks.accuracy.run import NETWORKS, WIDTH, Trainer, operations_of
from benchmarks.accuracy.study import Settings, Study, read_runs
from benchmarks.accuracy.summary import TABLES

_TEST_IMAGES = 10_000
_TRAINING_IMAGES = 50_000
_LEAST_STEPS = 5  # minimum for the learning rate schedule


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    msg = f"must be I/N with I from 1 to N, got {text!r}"
    raise argparse.ArgumentTypeError(msg)


def _arguments() -> argparse.Namespace:
    """Return the options; those that are fields of `Settings` have the same names."""
    parser = program.parser(__doc__, "output", "device", "batch_size", batch_size=128)
    option, positive, number = parser.add_argument, program.positive, program.positive_number
    option(
        "data",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="CIFAR-10, its files or mosaics; without it, only print the tables of -o",
    )
    option("--network", choices=NETWORKS, default="resnet9", help="default: %(default)s")
    option("--width", type=positive, help=f"width of resnet9 (default: {WIDTH})")
    option("--epochs", type=positive, default=24, help="default: %(default)s")
    each_class = "training images, equally many of each class (default: all)"
    option("--images", type=positive, default=_TRAINING_IMAGES, help=each_class)
    option("--lr", type=number, help="default: 0.1 per 128 images of a batch")
    option("--weight-decay", type=number, default=5e-4, help="default: %(default)s")
    option("--prob", type=program.share, default=0.5, help="probability of mixing (default: %(default)s)")
    option("--no-augment", dest="augment", action="store_false", help="neither crop nor flip")
    option("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    option("--evaluate-every", type=positive, default=1, metavar="EPOCHS", help="default: %(default)s")
    option("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    option("--seeds", type=positive, default=5, help="runs of each arm (default: %(default)s)")
    option("--minutes", type=number, default=math.inf, help="start no run that would probably end later")
    option("--part", type=_part, default=(1, 1), metavar="I/N", help="run as the I-th of N processes that write to -o")
    option("--plan", type=number, metavar="TFLOPS", help="do not train; print how long it would take at TFLOPS")
    option("--dry", action="store_true", help="test that everything runs, with two steps and 100 test images")
    parser.set_defaults(max_steps=None, test_images=None)
    options = parser.parse_args()
    if options.output is None and options.plan is None:
        parser.error("-o must be given: the file of the study")
    if options.width is not None and options.network != "resnet9":
        parser.error(f"--width must be left out with --network {options.network}, got {options.width}")
    if options.network == "resnet9":
        options.width = options.width or WIDTH
    options.lr = options.lr or 0.1 * options.batch_size / 128
    if options.dry:
        options.epochs, options.max_steps, options.test_images = 1, 2, 100
    if options.images // options.batch_size * options.epochs < _LEAST_STEPS:
        parser.error(
            f"--images must fill at least {_LEAST_STEPS} batches of {options.batch_size} in {options.epochs} epochs, "
            f"got {options.images}"
        )
    return options


def _operations_of_run(settings: Settings) -> float:
    """Return the floating-point operations of a run: training, evaluations, and FGSM with one backward pass."""
    forward = operations_of(settings.network, settings.width)
    steps = settings.images // settings.batch_size
    trained = settings.epochs * min(steps, settings.max_steps or steps) * settings.batch_size
    evaluations = math.ceil(settings.epochs / settings.evaluate_every)
    return forward * (3 * trained + (evaluations + 3 + 2) * (settings.test_images or _TEST_IMAGES))


def _plan(options: argparse.Namespace, settings: Settings) -> None:
    runs = len(options.arms) * options.seeds
    if options.output is not None:
        runs = len(Study(options.output, settings).missing(options.arms, options.seeds, options.part))
    operations = _operations_of_run(settings)
    seconds = operations / (options.plan * 1e12)
    sys.stdout.write(
        f"A run takes {operations / 1e12:,.1f} TFLOP. At {options.plan:g} TFLOP/s, an assumption, that is "
        f"{seconds:.1f} s, and {runs} runs are {runs * seconds / 60:.1f} minutes.\n"
    )


def _run_missing(options: argparse.Namespace, study: Study, settings: Settings) -> None:
    end = time.monotonic() + 60 * options.minutes
    pairs = study.missing(options.arms, options.seeds, options.part)
    if not pairs:
        return
    device = torch.device("cuda" if machine.wants_gpu(options) else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # FGSM needs the signs of small gradients, which TF32 rounds to 0
    trainer = Trainer(*read_images(options.data), settings, device)
    surroundings = machine.surroundings(gpu=device.type == "cuda")
    conditions = {
        **machine.identity(surroundings),
        **{name: surroundings[name] for name in ("cpu", "cores", "torch_threads", "versions")},
        "command": machine.command(options),
    }
    for done, (arm, seed) in enumerate(pairs):
        if time.monotonic() + study.seconds_of_run(conditions["device"]) > end:
            program.say(f"{len(pairs) - done} runs are left for a later call: --minutes {options.minutes:g}")
            return
        run = study.add((arm, seed), trainer.run(arm, seed), conditions)
        left = (len(pairs) - done - 1) * study.seconds_of_run(conditions["device"]) / 60
        program.say(
            f"[{done + 1}/{len(pairs)}] seed {seed}, {arm}: top-1 {run['top1_last']:.2f} %, {run['seconds']:.0f} s; "
            f"about {left:.0f} minutes left"
        )


def main() -> None:
    """Run what is missing, and print the tables of the file."""
    options = _arguments()
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    if options.plan is not None:
        _plan(options, settings)
        return
    if options.data is None:
        runs = read_runs(options.output)
    else:
        study = Study(options.output, settings)
        _run_missing(options, study, settings)
        runs = study.runs
    sys.stdout.write("\n\n".join(table(runs) for table in TABLES.values()) + "\n")


if __name__ == "__main__":
    program.run(main)

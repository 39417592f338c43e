"""Train a network on CIFAR-10 many times with several mixing modes, and compare: run what the file of -o lacks."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, program
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.data import read_images
from benchmarks.accuracy.networks import NETWORKS, WIDTH, operations_of
from benchmarks.accuracy.run import Trainer
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
    parser = program.parser(__doc__, "output", "device", "batch_size", batch_size=128)
    positive, share = program.positive, program.share
    parser.add_argument(
        "data",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="CIFAR-10, its files or mosaics; without it, only print the tables of -o",
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet9", help="default: %(default)s")
    parser.add_argument("--width", type=positive, help=f"width of resnet9 (default: {WIDTH})")
    parser.add_argument("--epochs", type=positive, default=24, help="default: %(default)s")
    parser.add_argument(
        "--images",
        type=positive,
        default=_TRAINING_IMAGES,
        help="training images, equally many of each class (default: all)",
    )
    parser.add_argument("--lr", type=program.positive_number, help="default: 0.1 per 128 images of a batch")
    parser.add_argument("--weight-decay", type=program.positive_number, default=5e-4, help="default: %(default)s")
    parser.add_argument("--prob", type=share, default=0.5, help="probability of mixing (default: %(default)s)")
    parser.add_argument("--no-augment", action="store_true", help="neither crop nor flip")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--evaluate-every", type=positive, default=1, metavar="EPOCHS", help="default: %(default)s")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=program.positive_number, default=math.inf, help="start no run that would probably end later"
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="run as the I-th of N processes that write to one file",
    )
    parser.add_argument(
        "--plan",
        type=program.positive_number,
        metavar="TFLOPS",
        help="do not train; print how long it would take at TFLOPS",
    )
    parser.add_argument(
        "--dry", action="store_true", help="test that everything runs, with two steps and 100 test images"
    )
    options = parser.parse_args()
    if options.output is None and options.plan is None:
        parser.error("-o must be given: the file of the study")
    if options.width is not None and options.network != "resnet9":
        parser.error(f"--width must be left out with --network {options.network}, got {options.width}")
    if options.dry:
        options.epochs = 1
    if options.images // options.batch_size * options.epochs < _LEAST_STEPS:
        parser.error(
            f"--images must fill at least {_LEAST_STEPS} batches of {options.batch_size} in {options.epochs} epochs, "
            f"got {options.images}"
        )
    return options


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        network=options.network,
        width=(options.width or WIDTH) if options.network == "resnet9" else None,
        epochs=options.epochs,
        images=options.images,
        batch_size=options.batch_size,
        lr=options.lr or 0.1 * options.batch_size / 128,
        weight_decay=options.weight_decay,
        prob=options.prob,
        augment=not options.no_augment,
        precision=options.precision,
        evaluate_every=options.evaluate_every,
        max_steps=2 if options.dry else None,
        test_images=100 if options.dry else None,
    )


def operations_of_run(settings: Settings) -> float:
    """Return the floating-point operations of a run: training, evaluations, and FGSM with one backward pass."""
    forward = operations_of(settings.network, settings.width or 0)
    steps = settings.images // settings.batch_size
    trained = settings.epochs * min(steps, settings.max_steps or steps) * settings.batch_size
    evaluations = math.ceil(settings.epochs / settings.evaluate_every)
    return forward * (3 * trained + (evaluations + 3 + 2) * (settings.test_images or _TEST_IMAGES))


def _plan(options: argparse.Namespace, settings: Settings) -> None:
    runs = len(options.arms) * options.seeds
    if options.output is not None:
        runs = len(Study(options.output, settings).missing(options.arms, options.seeds, options.part))
    operations = operations_of_run(settings)
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
    conditions: dict[str, Any] = {
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
    settings = _settings(options)
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

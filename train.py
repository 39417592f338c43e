"""Train a torchvision ResNet on a folder of images, mixed by SaliencyMix inside DALI.

One process, on a GPU if there is one:

    python train.py DATA -a resnet50 -b 256 --epochs 300 --output-dir runs/r50

All GPUs of a machine:

    torchrun --nproc_per_node=8 train.py DATA -a resnet50 -b 128 --lr 0.4 --amp --channels-last

DATA holds train/ and val/, each with a folder of images for each class. The output folder gets checkpoint_last.pt and
checkpoint_best.pt (by validation top-1), each with the weights under "model" as plain torchvision loads them, and
log.jsonl, whose first line holds the configuration, the versions and the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dali_saliencymix import fn as mix_fn
from dali_saliencymix.bottleneck import Monitor
from dali_saliencymix.bottleneck.command import profile_training
from dali_saliencymix.image_folder import list_image_folder
from dali_saliencymix.training import checkpoints, distributed, logs, metrics
from dali_saliencymix.training.arguments import DATA_OPTIONS, parse_arguments
from dali_saliencymix.training.distributed import Processes
from dali_saliencymix.training.schedule import learning_rate
from pipelines.imagenet import Mix
from pipelines.loader import Loader, LoaderError, training_loader, validation_loader

# What a checkpoint holds: see Trainer.checkpoint.
ENTRIES = ("model", "optimizer", "epoch", "best_top1", "config", "classes", "train_images", "loaders")


def mix_operator(args: argparse.Namespace) -> Mix | None:
    """Return the DALI operator that mixes, with its options."""
    if args.mix == "none":
        return None
    options = {"alpha": args.mix_alpha, "prob": args.mix_prob, "per_batch": args.per_batch}
    if args.mix == "saliencymix":
        options |= {name: getattr(args, name) for name in ("preset", "saliency", "source", "destination", "box")}
    elif args.mix == "cutmix":
        options["box"] = args.box or "clip"
    return functools.partial(getattr(mix_fn, args.mix), **options)


class Trainer:
    """Everything that one process holds during a run."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args = args
        self.processes = processes
        self.config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.config["world_size"] = processes.world_size

        self.train_folder = list_image_folder(args.train_dir)
        if len(self.train_folder.classes) < 2:
            msg = f"{args.train_dir}: one class only, {self.train_folder.classes[0]!r}; there must be at least two"
            raise ValueError(msg)
        self.val_folder = list_image_folder(args.val_dir, classes=self.train_folder.classes)

        torch.manual_seed(args.seed)
        model = torchvision.models.get_model(args.arch, num_classes=len(self.train_folder.classes))
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(processes.device, memory_format=self.memory_format)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            nesterov=args.nesterov and args.momentum > 0,
            weight_decay=args.weight_decay,
        )
        self.epoch = 0
        self.best_top1 = -math.inf
        # Every process watches its own loader; the main one's words are enough.
        self.monitor = Monitor(say=functools.partial(logs.warn, enabled=processes.is_main))

    def restore(self, path: Path) -> dict[str, Any]:
        """Take over the weights of a checkpoint, and its place in the training unless it is only evaluated."""
        checkpoint = checkpoints.load_checkpoint(path, ENTRIES)
        arch, classes = checkpoint["config"]["arch"], checkpoint["classes"]
        if arch != self.args.arch:
            msg = f"{path}: holds a {arch}, which --arch has to say, got {self.args.arch!r}"
            raise ValueError(msg)
        if classes != self.train_folder.classes:
            pairs = itertools.zip_longest(classes, self.train_folder.classes)
            was, now = next(pair for pair in pairs if pair[0] != pair[1])
            msg = f"{path}: its classes are not those of {self.train_folder.root}: there was {was!r}, there is {now!r}"
            raise ValueError(msg)
        self.model.load_state_dict(checkpoint["model"])
        if self.args.evaluate:
            return checkpoint
        for option in (*DATA_OPTIONS, "world_size"):
            if checkpoint["config"][option] != self.config[option]:
                was, now = checkpoint["config"][option], self.config[option]
                msg = f"{path}: cannot go on with other data: {option} was {was}, is now {now}"
                raise ValueError(msg)
        if checkpoint["train_images"] != len(self.train_folder):
            was, now = checkpoint["train_images"], len(self.train_folder)
            msg = f"{path}: cannot go on with other data: there were {was} training images, there are now {now}"
            raise ValueError(msg)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.epoch, self.best_top1 = checkpoint["epoch"], checkpoint["best_top1"]
        return checkpoint

    def checkpoint(self, loader: Loader) -> dict[str, Any]:
        """Return all that is needed to go on after this epoch; every process has to call this."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best_top1": self.best_top1,
            "config": self.config,
            "classes": self.train_folder.classes,
            "train_images": len(self.train_folder),
            "loaders": distributed.gather_from_processes(loader.state()),
        }

    def train_loader(self, checkpoint: dict[str, Any] | None) -> Loader:
        """Return this process's training batches, from where the checkpoint stands."""
        return training_loader(
            self.train_folder,
            **self.loader_options(),
            seed=self.args.seed,
            crop_size=self.args.train_crop_size,
            min_crop_area=self.args.min_crop_area,
            mix=mix_operator(self.args),
            state=checkpoint["loaders"][self.processes.rank] if checkpoint else None,
        )

    def val_loader(self) -> Loader:
        """Return this process's validation batches."""
        sizes = {"resize_size": self.args.val_resize_size, "crop_size": self.args.val_crop_size}
        return validation_loader(self.val_folder, **self.loader_options(), **sizes)

    def loader_options(self) -> dict[str, Any]:
        """Return what both loaders have in common."""
        return {
            "batch_size": self.args.batch_size,
            "num_threads": self.args.workers,
            "device": self.processes.device,
            "rank": self.processes.rank,
            "world_size": self.processes.world_size,
            "channels_last": self.args.channels_last,
        }

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward passes."""
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.args.amp)

    def train_epoch(self, network: nn.Module, loader: Loader) -> dict[str, float]:
        """Train for one epoch; `network` is the model, wrapped for several processes where there are several."""
        args, device = self.args, self.processes.device
        network.train()
        totals = metrics.Totals("loss", "correct", "images", device=device)
        watch = logs.Stopwatch()
        progress = logs.Progress(f"epoch {self.epoch + 1}/{args.epochs}", len(loader), enabled=self.processes.is_main)
        lr = args.lr
        for step, (images, labels, source_labels, lam) in enumerate(self.monitor.watch(watch.timed(loader))):
            lr = self.set_learning_rate(self.epoch + step / len(loader))
            with self.autocast():
                logits = network(images)
                loss = metrics.mixed_cross_entropy(logits, labels, source_labels, lam)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            totals.add(loss * len(images), metrics.mixed_correct(logits, labels, source_labels, lam), len(images))
            progress.advance()
            if (step + 1) % args.print_freq == 0 or step + 1 == len(loader):
                shown = loss.item()
                if not math.isfinite(shown):
                    msg = f"the loss became {shown} in epoch {self.epoch + 1}, step {step + 1}; a smaller --lr may help"
                    raise ValueError(msg)
                rate = (step + 1) * len(images) * self.processes.world_size / watch.seconds
                left = (args.epochs - self.epoch) * len(loader) - step - 1
                progress.show(
                    loss=f"{shown:.3f}",
                    images_s=f"{rate:.0f}",
                    data_wait=f"{watch.wait_share:.0%}",
                    eta=logs.duration(left * watch.seconds / (step + 1)),
                )
        progress.close()
        seconds = watch.seconds
        sums = totals.over_processes()
        return {
            "loss": sums["loss"] / sums["images"],
            "mixed_top1": 100 * sums["correct"] / sums["images"],
            "images": int(sums["images"]),
            "images_per_second": sums["images"] / seconds,
            "data_wait_share": watch.wait_share,
            "lr": lr,
            "seconds": seconds,
        }

    def set_learning_rate(self, epoch: float) -> float:
        """Set the learning rate for a point of the training, and return it."""
        args = self.args
        lr = learning_rate(
            epoch,
            base=args.lr,
            epochs=args.epochs,
            scheduler=args.lr_scheduler,
            warmup_epochs=args.lr_warmup_epochs,
            milestones=sorted(args.lr_milestones),
            gamma=args.lr_gamma,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def validate(self, loader: Loader) -> dict[str, float]:
        """Return loss, top-1 and top-5 in percent over all validation images, each counted once."""
        distributed.copy_buffers_from_main(self.model)
        self.model.eval()
        totals = metrics.Totals("loss", "top1", "top5", "images", device=self.processes.device)
        progress = logs.Progress("validation", len(loader), enabled=self.processes.is_main)
        for images, labels in loader:
            if len(images):  # a shard that ends early gives empty batches
                with self.autocast():
                    logits = self.model(images)
                    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                right = (metrics.correct_in_top(logits, labels, top) for top in (1, 5))
                totals.add(loss, *right, len(images))
            progress.advance()
        progress.close()
        sums = totals.over_processes()
        count = sums["images"]
        return {
            "loss": sums["loss"] / count,
            "top1": 100 * sums["top1"] / count,
            "top5": 100 * sums["top5"] / count,
            "images": int(count),
        }


def banner(trainer: Trainer, loader: Loader) -> str:
    """Say in two lines what is about to run."""
    args, processes = trainer.args, trainer.processes
    environment = logs.environment(processes.device)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    mixing = args.mix if args.mix == "none" else f"{args.mix} (alpha {args.mix_alpha:g}, prob {args.mix_prob:g})"
    return (
        f"{environment['device']} x {processes.world_size}  |  {versions}\n"
        f"{args.arch}, {len(trainer.train_folder.classes)} classes, {len(trainer.train_folder)} images, "
        f"global batch {args.batch_size * processes.world_size}, {len(loader)} steps per epoch, mix {mixing}, "
        f"{args.workers} DALI threads"
    )


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Train, or only validate or measure the loader, in one process of the run."""
    if args.profile_loader:
        profile_training(args, processes)
        return
    last = args.output_dir / checkpoints.LAST
    resume = checkpoints.find_checkpoint(args.resume, args.output_dir) if args.resume else None
    if args.evaluate and resume is None:
        msg = f"{last}: no such checkpoint"
        raise ValueError(msg)
    if not args.evaluate and last.exists() and (resume is None or not last.samefile(resume)):
        msg = f"{last}: would be overwritten; give --resume auto or another --output-dir"
        raise ValueError(msg)
    if args.resume and resume is None:
        logs.say(f"no {last} yet: starting anew", enabled=processes.is_main)
    trainer = Trainer(args, processes)
    checkpoint = trainer.restore(resume) if resume else None
    val_loader = trainer.val_loader()
    if args.evaluate:
        val = trainer.validate(val_loader)
        result = f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} % of {val['images']} validation images"
        logs.say(result, enabled=processes.is_main)
        return

    loader = trainer.train_loader(checkpoint)
    network: nn.Module = trainer.model
    if processes.world_size > 1:
        network = nn.parallel.DistributedDataParallel(trainer.model)
    if processes.is_main:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    log = logs.JsonLines(args.output_dir / "log.jsonl" if processes.is_main else None, anew=resume is None)
    log.write("resume" if resume else "start", config=trainer.config, **logs.environment(processes.device))
    logs.say(banner(trainer, loader), enabled=processes.is_main)

    while trainer.epoch < args.epochs:
        train = trainer.train_epoch(network, loader)
        val = trainer.validate(val_loader)
        trainer.epoch += 1
        best = val["top1"] > trainer.best_top1
        trainer.best_top1 = max(val["top1"], trainer.best_top1)
        saved = trainer.checkpoint(loader)
        if processes.is_main:
            checkpoints.save_checkpoint(saved, args.output_dir / checkpoints.LAST)
            if best:
                checkpoints.save_checkpoint(saved, args.output_dir / checkpoints.BEST)
        log.write("epoch", epoch=trainer.epoch, train=train, val=val, best_top1=trainer.best_top1)
        logs.say(
            f"epoch {trainer.epoch}/{args.epochs}  "
            f"val top-1 {val['top1']:.2f}  top-5 {val['top5']:.2f}  loss {val['loss']:.3f}  |  "
            f"train loss {train['loss']:.3f}  lam-weighted top-1 {train['mixed_top1']:.2f}  |  "
            f"{train['images_per_second']:.0f} images/s  data wait {train['data_wait_share']:.0%}",
            enabled=processes.is_main,
        )
    result = f"best validation top-1 {trainer.best_top1:.2f} % after {trainer.epoch} epochs: {args.output_dir}"
    logs.say(result, enabled=processes.is_main)


def main() -> int:
    """Run from the command line; return the exit status."""
    args = parse_arguments()
    try:
        run(args, distributed.start_processes(args.device))
    except (LoaderError, OSError, ValueError) as error:
        sys.stderr.write(f"train.py: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("train.py: interrupted; --resume auto goes on from the last whole epoch\n")
        return 130
    finally:
        distributed.stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())

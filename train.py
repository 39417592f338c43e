"""Train a classification model of torchvision on a folder of images, mixed by SaliencyMix inside DALI.

One process, on a GPU if there is one:

    python train.py DATA -a resnet50 -b 256 --epochs 300 --output-dir runs/r50

All GPUs of a machine:

    torchrun --nproc_per_node=8 train.py DATA -a resnet50 -b 128 --lr 0.4 --amp --channels-last

DATA holds train/ and val/, each with one folder of images per class. The output folder gets

- checkpoint_last.pt and checkpoint_best.pt (the whole epoch with the best validation top-1), which hold the weights
  under "model", as plain torchvision loads them;
- args.yaml with all options of the run;
- log.jsonl, whose first line holds the configuration, the versions and the device.

A step is one batch in each process. An update changes the weights, every --accumulation-steps steps.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from dali_saliencymix.packages import require_or_exit

require_or_exit("nvidia.dali", "torch", "torchvision", "tqdm", "PIL", "yaml")

from dali_saliencymix.training.arguments import parse_arguments, save_config

if __name__ == "__main__":  # before the import of PyTorch, which takes seconds: --help and wrong options end here
    BEGUN, OPTIONS = time.monotonic(), parse_arguments()

import torch
from torch import nn

from dali_saliencymix._errors import flush_stdout, prepare_stdout, wants_traceback
from dali_saliencymix._versions import versions
from dali_saliencymix.bottleneck import Monitor
from dali_saliencymix.bottleneck.command import profile_training
from dali_saliencymix.loaders.base import Batches, chosen_backend, validated
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.environment import counted
from dali_saliencymix.measure.processes import gather
from dali_saliencymix.training import checkpoints, distributed, evaluation, metrics, report
from dali_saliencymix.training.folder_lock import FolderLock
from dali_saliencymix.training.lockstep import EXIT_PREEMPTED, Interruptible, Lockstep, Preempted
from dali_saliencymix.training.models import as_trained, check_image_sizes, choose_kernels, model_on
from dali_saliencymix.training.optimisation import DivergenceWatch, Updater, train_on
from dali_saliencymix.training.options import AS_TRAINED, TrainingOptions
from dali_saliencymix.training.pretrained import load_pretrained
from dali_saliencymix.training.run_log import Progress, RunLog, StartUp, duration, say, warn
from dali_saliencymix.training.samples import save_samples
from dali_saliencymix.training.schedule import Phase, accumulation_group, learning_rate, phase_at

# Entries that a checkpoint has to hold; Trainer.checkpoint lists all entries.
ENTRIES = (
    *("model", "optimizer", "scaler", "epoch", "step", "totals", "best_top1"),
    *("config", "classes", "data", "loaders"),
)
Figures = dict[str, float]


class Trainer:
    """Hold the state of one process during a run.

    Parameters
    ----------
    options : TrainingOptions
        Options of the run.
    processes : Processes
        Rank, world size and device of this process.
    resume : path, optional
        Checkpoint to resume from, or to validate.
    start_up : StartUp, optional
        Timer of the start-up, until the first batch.

    Attributes
    ----------
    epoch, step : int
        Completed epochs, and completed steps of the current epoch.
    totals : Totals
        Sums of this process over these steps.
    """

    def __init__(
        self,
        options: TrainingOptions,
        processes: Processes,
        resume: Path | None = None,
        start_up: StartUp | None = None,
    ) -> None:
        self.start_up = start_up or StartUp()
        self.options = options
        self.processes = processes
        self.config = {**options.config, "world_size": processes.world_size}
        data, run = options.data, options.run
        saved = checkpoints.load_checkpoint(resume, ENTRIES) if resume else None

        # Validation needs no training images: classes come from the checkpoint, or from the validation folders.
        self.data = open_data(data, classes=saved["classes"] if run.evaluate and saved else None)
        self.start_up.end_of("data set")

        torch.manual_seed(data.seed)
        self.model = self.new_model(resume)
        # All processes start with the same weights, but draw different random numbers in a step, such as dropout.
        torch.manual_seed(int(torch.randint(2**62, ())) + processes.rank)
        self.updater = Updater(self.model, options.optimizer, options.model)
        self.epoch = self.step = 0
        self.restarts = 0  # number of --restart-epoch resumes
        folders = [folder for folder in (data.data, data.train_dir, data.val_dir) if folder]
        self.lockstep = Lockstep(processes, run, folders)
        self.best_top1 = -math.inf
        self.totals = self.new_totals()
        self.divergence = DivergenceWatch(run.max_nan_steps, processes.device, run.output_dir / checkpoints.LAST)
        self.steps_run = 0  # by this process, without those of resumed runs
        self.loader: Batches | None = None
        self.loader_phase: Phase | None = None
        self.sampled: Batches | None = None  # the last loader whose first batch --save-images has drawn
        self.log = RunLog(None, {})
        self.lock = FolderLock(None)
        self.loader_state: Any = None
        self.resumed_from = resume
        if saved and resume:
            with checkpoints.taken_from(resume):
                self.restore(saved, resume)

        self.network = as_trained(self.model, options.model, distributed=processes.world_size > 1 and not run.evaluate)
        # Every process monitors its own loader, but only the main process prints a warning.
        self.monitor = Monitor(say=warn)
        self.start_up.end_of("model")

    def new_model(self, resume: Path | None) -> nn.Module:
        """Return the model, with the weights of --pretrained unless a checkpoint is resumed."""
        options, classes = self.options, len(self.data.classes)
        size, run = options.data.train_crop_size, options.run
        model = model_on(self.processes.device, options.model, classes, image_size=size)
        check_image_sizes(model, options)
        if run.pretrained and resume:
            warn(f"resuming from {resume}: --pretrained is ignored")
        elif run.pretrained:
            loaded, config = load_pretrained(model, run.pretrained, classes, with_head=run.evaluate)
            warn(f"{run.pretrained}: {loaded}")
            names = {*AS_TRAINED} - {"model_ema"} if run.evaluate else ("mean", "std")
            self.say_what_differs(run.pretrained, config, names)
        return model

    def say_what_differs(self, path: Path, config: dict[str, Any], names: Collection[str]) -> None:
        """Report which of the named options differ from those that the weights in a file were trained with."""
        if others := checkpoints.changed_options(config, self.config, names):
            warn(f"{path}: options differ from its training: {'; '.join(others)}")

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Load the weights of a checkpoint, and also its training state unless it is only evaluated."""
        arch, classes = self.options.model.arch, self.data.classes
        run = self.options.run
        if run.evaluate:
            self.say_what_differs(path, saved["config"], AS_TRAINED)
        checkpoints.check_model(path, saved, arch=arch, classes=classes, root=self.data.root)
        self.model.load_state_dict(saved["model"])
        if self.updater.ema and "model_ema" not in saved:
            if run.evaluate:
                msg = f"{path}: has no EMA of the weights, which --model-ema needs"
                raise ValueError(msg)
            warn(f"{path}: has no EMA of the weights; the EMA starts from its weights")
        self.epoch, self.step, self.best_top1 = saved["epoch"], saved["step"], saved["best_top1"]
        if run.evaluate:
            self.updater.restore_average(saved)
            return
        checkpoints.check_optimizer(path, saved, opt=self.options.optimizer.opt)
        self.updater.restore(saved)
        changed = checkpoints.changed_data(path, saved, self.config, self.data.fingerprint, self.options)
        if others := checkpoints.changed_options(saved["config"], self.config):
            what = "options differ from the checkpoint, and the new values apply"
            warn(f"warning: {path}: {what}: {'; '.join(others)}")
        self.restarts = saved.get("restarts", 0)
        if run.restart_epoch:
            self.step = 0
            self.restarts += 1
            why = f" with other data: {'; '.join(changed)}" if changed else ""
            warn(f"epoch {self.epoch + 1} starts again{why}")
            return
        say(f"resumed from {path} at epoch {self.epoch + 1}, step {self.step}")
        for change in checkpoints.differences(saved.get("versions", {}), versions()):
            warn(f"warning: results may not be bit-identical to an uninterrupted run: {change}")
        self.totals.restore(saved["totals"][self.processes.rank])
        self.loader_state = saved["loaders"][self.processes.rank]
        checkpoints.restore_random_state(saved["random"][self.processes.rank], self.processes.device)

    def checkpoint(self) -> dict[str, Any]:
        """Return the state to resume from, between two updates; every process has to call this."""
        assert self.loader is not None
        return {
            "model": self.model.state_dict(),
            **self.updater.state(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": gather(self.totals.state()),
            "best_top1": self.best_top1,
            "restarts": self.restarts,
            "random": gather(checkpoints.random_state(self.processes.device)),
            "versions": versions(),
            "config": self.config,
            "classes": self.data.classes,
            "data": self.data.fingerprint,
            "loaders": gather(self.loader.state()),
        }

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint, between two updates; every process has to call this."""
        run = self.options.run
        if run.no_checkpoints:
            return
        self.lockstep.writing(self.step)
        self.divergence.check_weights(self.updater, self.epoch, self.step)
        self.lock.check()
        saved = self.checkpoint()
        if self.processes.is_main:
            checkpoints.save_progress(saved, run.output_dir, keep=run.keep_checkpoints, best=is_best)

    def train_loader(self) -> Batches:
        """Return this process's loader, at the current position; each phase has a new one."""
        schedule, data = self.options.schedule, self.options.data
        epoch = min(self.epoch, schedule.epochs - 1)  # after the last epoch, keep its loader
        phase = phase_at(epoch, schedule, crop_size=data.train_crop_size)
        if self.loader is not None and self.loader_phase == phase:
            return self.loader
        self.loader = None
        gc.collect()  # free the memory of the old pipeline first
        # DALI cannot restore the state of one phase's pipeline into that of another phase. So each phase has its own
        # seed, and with it its own order of the files.
        seed = data.seed + phase.begin * self.processes.world_size + self.restarts * 1_000_003
        state = self.loader_state if (phase.begin, 0) != (self.epoch, self.step) else None  # None after a restart
        options = phase.applied_to(replace(data, seed=seed))
        with contextlib.nullcontext() if state is None else checkpoints.taken_from(self.resumed_from):
            self.loader = self.data.train_loader(options, self.processes, state=state)
        if self.step > len(self.loader):
            msg = f"{self.resumed_from}: is at step {self.step}, but an epoch has {len(self.loader)} steps here"
            raise ValueError(msg)
        self.loader_phase, self.loader_state = phase, None
        return self.loader

    def train_epoch(self) -> Figures:
        """Train to the end of the epoch, or to --max-steps; return its figures over all processes."""
        loader, monitor, begun, epochs = self.train_loader(), self.monitor, self.step, self.options.schedule.epochs
        self.network.train()
        with Progress(f"epoch {self.epoch + 1}/{epochs}", len(loader), done=begun) as progress:
            lr = self.train_steps(loader, progress)
        seconds = monitor.seconds
        sums = self.totals.over_processes()
        done = (self.step - begun) * self.options.data.batch_size * self.processes.world_size
        return {
            "loss": sums["loss"] / sums["images"],
            "mixed_top1": 100 * sums["correct"] / sums["images"],
            "images": int(sums["images"]),
            "images_per_second": done / seconds,
            "data_wait_share": monitor.waited / seconds,
            "lr": lr,
            "seconds": seconds,
        }

    def train_steps(self, loader: Batches, progress: Progress) -> float:
        """Train on the remaining batches of an epoch; return the learning rate of the last update."""
        options, monitor, steps, begun = self.options, self.monitor, len(loader), self.step
        epochs, accumulated = options.schedule.epochs, options.optimizer.accumulation_steps
        lr = self.set_learning_rate(self.epoch + accumulation_group(max(begun - 1, 0), steps, accumulated)[0] / steps)
        # If a run was stopped during validation, no step is left, and its loader is already at the next epoch.
        for batch in self.lockstep.batches(loader if begun < steps else (), monitor):
            if not self.steps_run:
                self.start_up.end_of("making the batch")
                if line := self.start_up.summary():
                    say(line)
            if loader is not self.sampled:
                self.save_samples(*batch)
                self.sampled = loader
            group = accumulation_group(self.step, steps, accumulated)
            is_update = self.step == group[-1]
            lr = self.set_learning_rate(self.epoch + group[0] / steps)
            loss, logits = train_on(
                self.network,
                self.updater,
                batch,
                batches=group[-1] + 1 - max(group[0], begun),  # fewer where a run resumes with other groups
                is_last=is_update,
            )
            images = len(logits)
            self.totals.add(loss * images, metrics.mixed_correct(logits, *batch[1:]), images)
            self.divergence.count(loss)
            self.step += 1
            self.steps_run += 1
            progress.advance()
            if self.step % options.run.print_freq == 0 or self.step == steps:
                shown, mean = loss.item(), self.totals.mean("loss", "images")
                share, pace = monitor.epoch_wait_share, monitor.seconds / (self.step - begun)
                self.divergence.check_loss(shown, self.epoch + 1, self.step)
                rate = images * self.processes.world_size / pace
                left = (epochs - self.epoch) * steps - self.step
                self.log.write_step(self.total_steps, loss=shown, lr=lr, images_per_second=rate, data_wait_share=share)
                progress.show(
                    loss=f"{shown:.3f} ({mean:.3f})",  # of this batch, and the mean of the epoch so far
                    lr=f"{lr:.3g}",
                    images_s=f"{rate:.0f}",
                    data_wait=f"{share:.0%}",
                    eta=duration(left * pace),
                )
            # A run may only be saved or stopped between two updates. After the last step of an epoch, the loader has
            # to reach the end of the epoch first.
            if is_update and self.step < steps:
                if self.is_over:
                    break
                if self.lockstep.checkpoint_is_due(self.step):
                    self.save()
                self.lockstep.stop_if_asked()
        return lr

    def save_samples(self, images: torch.Tensor, *of_samples: torch.Tensor) -> None:
        """Draw the first batch of each phase of this run for --save-images."""
        run = self.options.run
        if not run.save_images or not self.processes.is_main:
            return
        path = run.output_dir / f"samples_epoch{self.epoch:03d}.jpg"
        try:
            save_samples(
                path,
                images,
                *of_samples,
                classes=self.data.classes,
                mean=self.data.mean,
                std=self.data.std,
                count=run.save_images,
            )
        except OSError as error:
            warn(f"warning: {path}: cannot be written, training continues without it: {error}")

    @property
    def total_steps(self) -> int:
        """Completed steps over all epochs."""
        return self.epoch * len(self.train_loader()) + self.step

    def end_epoch(self) -> None:
        """Count the epoch if all of its steps are done."""
        if self.step == len(self.train_loader()):
            self.epoch, self.step = self.epoch + 1, 0
            self.totals = self.new_totals()

    @property
    def is_over(self) -> bool:
        """Whether --max-steps or --epochs is reached."""
        last = self.options.run.max_steps
        return self.epoch >= self.options.schedule.epochs or (last is not None and self.steps_run >= last)

    def new_totals(self) -> metrics.Totals:
        """Return empty sums for a new epoch."""
        return metrics.Totals("loss", "correct", "images", device=self.processes.device)

    def set_learning_rate(self, epoch: float) -> float:
        """Set the learning rate for a fractional epoch, and return it."""
        lr = learning_rate(epoch, self.options.schedule, base=self.options.optimizer.lr)
        self.updater.set_learning_rate(lr)
        return lr

    def validate(self, loader: Batches, model: nn.Module, per_class: evaluation.PerClass | None = None) -> Figures:
        """Return loss, top-1 and top-5 in percent of a model over all validation images, each counted once."""
        batches = Interruptible(loader, self.lockstep)
        return evaluation.evaluate(model, batches, self.processes, self.options.model, per_class)


def open_log(trainer: Trainer, *, resumed: bool) -> RunLog:
    """Open the log files of a run and print its settings, in the main process only."""
    options, processes, data = trainer.options, trainer.processes, trainer.data
    run = options.run
    if not processes.is_main:
        return RunLog(None, {})
    save_config(options, run.output_dir / "args.yaml")
    counts = {"classes": len(data.classes), "train_images": data.train_images}
    counts["val_images"] = len(validated(data.val_images, options.data, processes))
    steps, backend = len(trainer.train_loader()), chosen_backend(options.data)
    facts = report.run_facts(options, processes, data=counts, steps_per_epoch=steps, backend=backend)
    say(report.banner(options, facts))
    return RunLog(
        run.output_dir,
        {"config": trainer.config, **facts},
        epoch=trainer.epoch,
        step=trainer.total_steps,
        resumed=resumed,
        tensorboard=run.tensorboard,
        wandb_project=run.wandb_project if run.log_wandb else None,
    )


def run(options: TrainingOptions, processes: Processes, start_up: StartUp | None = None) -> None:
    """Train, validate or profile the loader in one process of the run."""
    started = time.monotonic()
    if options.run.profile_loader:
        profile_training(options, processes)
        return
    if crowded := report.oversubscribed(options, processes):
        warn(f"warning: {crowded}")
    is_writer = processes.is_main and not options.run.evaluate
    with FolderLock(options.run.output_dir if is_writer else None) as lock:
        resume, *_ = gather(checkpoints.find_resume(options.run) if processes.is_main else None)  # of the main process
        trainer = Trainer(options, processes, resume, start_up)
        if options.run.evaluate:
            path = resume or options.run.pretrained
            assert path is not None
            models = {"val": trainer.model}
            if trainer.updater.ema and resume:
                models["val_ema"] = trainer.updater.ema.module
            place = {"epoch": trainer.epoch, "step": trainer.step} if resume else {}
            report.report_on_checkpoint(path, place, models, trainer.data, options, processes, trainer.validate)
            return
        trainer.lock = lock
        val_loader = None if options.run.training_only else trainer.data.val_loader(options.data, processes)
        with trainer.lockstep, open_log(trainer, resumed=resume is not None) as trainer.log:
            trainer.start_up.end_of("loaders")
            train(trainer, val_loader)
    took = f"in {duration(time.monotonic() - started)}"
    best = trainer.best_top1
    result = "no whole epoch validated after" if best == -math.inf else f"best validation top-1 {best:.2f} % of"
    say(f"{result} {counted(trainer.epoch, 'epochs')}, {took}: {options.run.output_dir}")


def train(trainer: Trainer, val_loader: Batches | None) -> None:
    """Train and validate epoch by epoch, to the end of the run."""
    epochs = trainer.options.schedule.epochs
    while not trainer.is_over:
        figures = trainer.train_epoch()
        if trainer.step < len(trainer.train_loader()) and val_loader:
            ended = f"--max-steps {trainer.options.run.max_steps}: stopped after step {trainer.step}"
            warn(f"{ended} of epoch {trainer.epoch + 1}, validating")
        validation_started = time.perf_counter()
        val = ema = None
        try:
            if val_loader:
                val = trainer.validate(val_loader, trainer.model)
                ema = trainer.validate(val_loader, trainer.updater.ema.module) if trainer.updater.ema else None
        except Preempted:
            trainer.save()  # the trained epoch; the resumed run validates it
            raise
        val_seconds = time.perf_counter() - validation_started if val else 0.0
        bad_files = gather(getattr(trainer.train_loader(), "bad_files", []))
        trainer.end_epoch()
        judged = ema or val
        is_best = judged is not None and not trainer.step and judged["top1"] > trainer.best_top1  # whole epochs only
        if judged and is_best:
            trainer.best_top1 = judged["top1"]
        trainer.divergence.check_weights(trainer.updater, trainer.epoch, trainer.step)
        memory = report.gpu_memory(trainer.processes.device)
        trainer.log.write_epoch(
            trainer.epoch,
            trainer.step,
            trainer.total_steps,
            train=figures,
            val=val,
            val_ema=ema,
            val_seconds=val_seconds,
            best_top1=trainer.best_top1,  # null in the log until something is validated
            bad_files=sorted({file for files in bad_files for file in files}),
            resources=report.resources_in_use(),
            **memory,
        )
        # After the log: a run killed between the two writes the line twice rather than never.
        trainer.save(is_best=is_best)
        left = None if trainer.step else (epochs - trainer.epoch) * (figures["seconds"] + val_seconds)
        say(report.epoch_line(trainer.epoch, epochs, trainer.step, figures, val, ema, memory, left))
    if trainer.epoch < epochs:
        trainer.log.status = "stopped"


def main(options: TrainingOptions | None = None, begun: float | None = None) -> int:
    """Run the program and return its exit status; `begun` is its start by ``time.monotonic()``."""
    start_up = StartUp(begun)
    prepare_stdout()
    try:
        options = options or parse_arguments()
        start_up.end_of("imports")
        choose_kernels(deterministic=options.model.deterministic)
        processes = distributed.start_processes(options.data.device)
        start_up.end_of("processes")
        run(options, processes, start_up)
        flush_stdout()
    except Preempted as signal:
        return distributed.end(f"stopped by {signal}{resuming(options)}", EXIT_PREEMPTED)
    except KeyboardInterrupt:
        return distributed.end(f"interrupted{resuming(options)}", 130)
    except Exception as error:
        return distributed.fail(error, with_traceback=wants_traceback(sys.argv))
    finally:
        distributed.stop_processes()
    return 0


def resuming(options: TrainingOptions | None) -> str:
    """Return how to resume a stopped run; without options, nothing has run yet."""
    if options is None:
        return ""
    last = options.run.output_dir / checkpoints.LAST
    return f"; --resume auto resumes from {last}" if last.exists() else "; there is no checkpoint to resume from yet"


if __name__ == "__main__":
    sys.exit(main(OPTIONS, BEGUN))

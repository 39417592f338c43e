"""What a run is and how it goes, in words: before it begins, and after each epoch."""

from __future__ import annotations

from typing import Any

from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import logs
from dali_saliencymix.training.options import TrainingOptions

Figures = dict[str, float]


def run_facts(
    options: TrainingOptions, processes: Processes, *, data: dict[str, Any], steps_per_epoch: int, backend: str
) -> dict[str, Any]:
    """Return what decides the result and the speed of a run; ``log.jsonl`` and ``report.json`` begin with it.

    Parameters
    ----------
    options : TrainingOptions
        Options of the run.
    processes : Processes
        Which process this is.
    data : dict
        ``classes``, ``train_images`` and ``val_images``: how many there are.
    steps_per_epoch : int
        Batches of each process in an epoch.
    backend : str
        Who makes the batches.
    """
    return {
        "environment": logs.environment(processes.device),
        "data": {**data, "backend": backend, "threads": options.data.workers},
        "hardware_decoder": logs.has_hardware_decoder(processes.device) if backend == "dali-gpu" else None,
        "processes": processes.world_size,
        "global_batch": options.data.batch_size * processes.world_size * options.optimizer.accumulation_steps,
        "steps_per_epoch": steps_per_epoch,
        "precision": options.model.precision,
        "memory_format": "channels_last" if options.model.channels_last else "contiguous",
    }


def banner(options: TrainingOptions, facts: dict[str, Any]) -> str:
    """Return four lines for the user: device, network and batch, mixing, data."""
    environment, data = facts["environment"], facts["data"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    driver = f", driver {environment['driver']}" if environment["driver"] and environment["cuda"] else ""
    schedule, mix, accumulated = options.schedule, options.data.mix, options.optimizer.accumulation_steps
    sizes = [f"{options.data.batch_size} a process", f"{facts['processes']} process{'es' * (facts['processes'] > 1)}"]
    sizes += [f"{accumulated} steps an update"] if accumulated > 1 else []
    mixing = "none" if mix is None else f"{mix.mode}, alpha {mix.alpha:g}, prob {mix.prob:g}"
    if schedule.mix_off_epochs:
        mixing += f", not in the last {schedule.mix_off_epochs} epochs"
    growing = f"  |  sizes {' '.join(schedule.progressive_size)}" if schedule.progressive_size else ""
    engine = {True: "yes", False: "no", None: "unknown" if data["backend"] == "dali-gpu" else "not used"}
    return "\n".join(
        [
            f"{environment['device']} x {facts['processes']}{driver}  |  {versions}",
            f"{options.model.arch}, {facts['precision']}, {facts['memory_format']}  |  "
            f"global batch {facts['global_batch']} ({', '.join(sizes)}), "
            f"{facts['steps_per_epoch']} steps per epoch, {schedule.epochs} epochs",
            f"mix {mixing}{growing}",
            f"{data['classes']} classes, {data['train_images']} images, {data['val_images']} for validation  |  "
            f"batches by {data['backend']}, {data['threads']} threads, hardware decoder: "
            f"{engine[facts['hardware_decoder']]}",
        ]
    )


def epoch_line(
    epoch: int,
    epochs: int,
    step: int,
    train: Figures,
    val: Figures | None,
    ema: Figures | None,
    memory: Figures,
    seconds_left: float | None,
) -> str:
    """Say in one line how an epoch went, and when all will be done, at the pace of this one.

    `epoch` is the number of whole epochs done; `step` is 0, or where a run has stopped in the next one.
    """
    line = f"epoch {epoch}/{epochs}  "
    if step:
        line = f"epoch {epoch + 1}/{epochs}, stopped after step {step}  "
    if val:
        line += f"val top-1 {val['top1']:.2f}  top-5 {val['top5']:.2f}  loss {val['loss']:.3f}  |  "
    if ema:
        line += f"moving average top-1 {ema['top1']:.2f}  top-5 {ema['top5']:.2f}  loss {ema['loss']:.3f}  |  "
    line += (
        f"train loss {train['loss']:.3f}  lam-weighted top-1 {train['mixed_top1']:.2f}  |  "
        f"{train['images_per_second']:.0f} images/s  data wait {train['data_wait_share']:.0%}"
    )
    if memory:
        line += f"  GPU memory {memory['gpu_peak_mib']:.0f} MiB"
    return line + (f"  eta {logs.duration(seconds_left)}" if seconds_left else "")

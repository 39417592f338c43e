"""What a run is and how it goes, in words: before it begins, and after each epoch."""

from __future__ import annotations

import argparse
from typing import Any

from dali_saliencymix.training import logs
from dali_saliencymix.training.distributed import Processes

Figures = dict[str, float]


def run_facts(
    args: argparse.Namespace, processes: Processes, *, data: dict[str, Any], steps_per_epoch: int, backend: str
) -> dict[str, Any]:
    """Return what decides the result and the speed of a run; ``log.jsonl`` and ``report.json`` begin with it.

    Parameters
    ----------
    args : argparse.Namespace
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
        "data": {**data, "backend": backend, "threads": args.workers},
        "hardware_decoder": logs.has_hardware_decoder(processes.device) if backend == "dali-gpu" else None,
        "processes": processes.world_size,
        "global_batch": args.batch_size * processes.world_size * args.accumulation_steps,
        "steps_per_epoch": steps_per_epoch,
        "precision": args.amp_dtype if args.amp else "fp32",
        "memory_format": "channels_last" if args.channels_last else "contiguous",
    }


def banner(args: argparse.Namespace, facts: dict[str, Any]) -> str:
    """Return four lines for the user: device, network and batch, mixing, data."""
    environment, data = facts["environment"], facts["data"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    driver = f", driver {environment['driver']}" if environment["driver"] and environment["cuda"] else ""
    sizes = [f"{args.batch_size} a process", f"{facts['processes']} process{'es' * (facts['processes'] > 1)}"]
    sizes += [f"{args.accumulation_steps} steps an update"] if args.accumulation_steps > 1 else []
    mixing = args.mix if args.mix == "none" else f"{args.mix}, alpha {args.mix_alpha:g}, prob {args.mix_prob:g}"
    if args.mix != "none" and args.mix_off_epochs:
        mixing += f", not in the last {args.mix_off_epochs} epochs"
    growing = f"  |  sizes {' '.join(args.progressive_size)}" if args.progressive_size else ""
    engine = {True: "yes", False: "no", None: "unknown" if data["backend"] == "dali-gpu" else "not used"}
    return "\n".join(
        [
            f"{environment['device']} x {facts['processes']}{driver}  |  {versions}",
            f"{args.arch}, {facts['precision']}, {facts['memory_format']}  |  global batch {facts['global_batch']} "
            f"({', '.join(sizes)}), {facts['steps_per_epoch']} steps per epoch, {args.epochs} epochs",
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

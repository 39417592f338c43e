"""Report on a run: facts and banner at its start, a line after each epoch, and the evaluation of a checkpoint."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dali_saliencymix._errors import try_writing
from dali_saliencymix.loaders.base import Batches, Data, chosen_backend, validated
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.environment import counted, environment, oversubscription, resident_mib
from dali_saliencymix.measure.results import write_json
from dali_saliencymix.training import evaluation
from dali_saliencymix.training.activation_maps import last_layers, save_activation_maps
from dali_saliencymix.training.options import TrainingOptions
from dali_saliencymix.training.robustness import attacked_accuracy
from dali_saliencymix.training.run_log import duration, say

Figures = dict[str, float]

_ROOM = 2**18  # bytes, more than a result needs


def run_facts(
    options: TrainingOptions, processes: Processes, *, data: dict[str, Any], steps_per_epoch: int, backend: str
) -> dict[str, Any]:
    """Return the facts that affect the result and speed of a run, with which ``log.jsonl`` and ``report.json`` begin.

    `data` holds the numbers of ``classes``, ``train_images`` and ``val_images``; `backend` is the data backend.
    """
    return {
        "environment": environment(str(processes.device), "tensorboard", "wandb"),
        "data": {**data, "backend": backend, "threads": options.data.workers},
        "hardware_decoder": has_hardware_decoder(processes.device) if backend == "dali-gpu" else None,
        "processes": processes.world_size,
        "global_batch": options.data.batch_size * processes.world_size * options.optimizer.accumulation_steps,
        "steps_per_epoch": steps_per_epoch,
        "precision": options.model.precision,
        "memory_format": "channels_last" if options.model.channels_last else "contiguous",
    }


def banner(options: TrainingOptions, facts: dict[str, Any]) -> str:
    """Return five lines for the user: device, network and batch, optimiser, augmentation, and data."""
    here, data = facts["environment"], facts["data"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    driver = f", driver {here['driver']}" if here["driver"] and here["cuda"] else ""
    schedule, mix, accumulated = options.schedule, options.data.mix, options.optimizer.accumulation_steps
    sizes = [f"{options.data.batch_size} per process", counted(facts["processes"], "processes")]
    sizes += [f"{accumulated} steps per update"] if accumulated > 1 else []
    mixing = "none" if mix is None else f"{mix.mode}, alpha {mix.alpha:g}, prob {mix.prob:g}"
    if schedule.mix_off_epochs:
        mixing += f", not in the last {schedule.mix_off_epochs} epochs"
    optimizer, augmented = options.optimizer, options.data
    updates = [f"{optimizer.opt}, lr {optimizer.lr:g}, {schedule.lr_scheduler}"]
    updates += [f"{schedule.lr_warmup_epochs:g} epochs of warm-up"] if schedule.lr_warmup_epochs else []
    updates += [f"weight decay {optimizer.weight_decay:g}"]
    updates += [f"EMA {optimizer.model_ema_decay:g}"] if optimizer.model_ema else []
    mixing += f"  |  auto-augment {augmented.auto_augment}" if augmented.auto_augment != "none" else ""
    mixing += f"  |  random erasing {augmented.random_erase:g}" if augmented.random_erase else ""
    growing = f"  |  sizes {' '.join(schedule.progressive_size)}" if schedule.progressive_size else ""
    engine = {True: "yes", False: "no", None: "unknown" if data["backend"] == "dali-gpu" else "not used"}
    return "\n".join(
        [
            f"{here['device']} x {facts['processes']}{driver}  |  {versions}",
            f"{options.model.arch}, {facts['precision']}, {facts['memory_format']}  |  "
            f"global batch {facts['global_batch']} ({', '.join(sizes)}), "
            f"{counted(facts['steps_per_epoch'], 'steps')} per epoch, {counted(schedule.epochs, 'epochs')}",
            ", ".join(updates),
            f"mix {mixing}{growing}",
            f"{data['classes']} classes, {data['train_images']} images, {data['val_images']} for validation  |  "
            f"data backend {data['backend']}, {counted(data['threads'], 'threads')}, hardware decoder: "
            f"{engine[facts['hardware_decoder']]}",
        ]
    )


def oversubscribed(options: TrainingOptions, processes: Processes) -> str | None:
    """Return a warning if the processes of this machine have more threads than cores; call it in all processes."""
    backend, threads = chosen_backend(options.data), options.data.workers
    called = "worker processes" if backend == "pytorch" else "DALI threads"
    return oversubscription(
        None if backend == "synthetic" else threads, called, computes=processes.device.type == "cpu"
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
    """Return one line with the results of an epoch, and the remaining time of the run at the speed of this epoch.

    `epoch` is the number of complete epochs. `step` is 0, or the step in the next epoch at which the run stopped.
    """
    line = f"epoch {epoch + 1}/{epochs}, stopped after step {step}  " if step else f"epoch {epoch}/{epochs}  "
    for name, figures in (("val", val), ("EMA", ema)):
        if figures:
            top1, top5, loss = (figures[key] for key in ("top1", "top5", "loss"))
            line += f"{name} top-1 {top1:.2f}  top-5 {top5:.2f}  loss {loss:.3f}  |  "
    line += (
        f"train loss {train['loss']:.3f}  lam-weighted top-1 {train['mixed_top1']:.2f}  |  "
        f"{train['images_per_second']:.0f} images/s  data wait {train['data_wait_share']:.0%}"
    )
    if memory:
        line += f"  GPU memory {memory['gpu_peak_mib']:.0f} MiB"
    return line + (f"  eta {duration(seconds_left)}" if seconds_left else "")


def gpu_memory(device: torch.device) -> Figures:
    """Return the memory use of a GPU in MiB; {} on a CPU.

    ``gpu_peak_mib`` is the peak memory of PyTorch's tensors since the last call, without DALI's memory.
    ``gpu_used_mib`` is the memory that all programs use now.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_peak_mib": round(peak / 2**20, 1), "gpu_used_mib": round((total - free) / 2**20, 1)}


def resources_in_use() -> dict[str, float]:
    """Return figures that show leaks: resident memory in MiB and the number of open files; {} without Linux's /proc."""
    resident = resident_mib()
    if resident is None:
        return {}
    open_files = len(os.listdir("/proc/self/fd")) - 1  # without the one of `listdir`
    return {"resident_mb": round(resident), "open_files": open_files}


def has_hardware_decoder(device: torch.device) -> bool | None:
    """Return whether a GPU has a hardware JPEG decoder that DALI can use, by decoding a small image with it.

    None on a CPU, or if that cannot be determined.
    """
    if device.type != "cuda":
        return None
    try:
        from nvidia import nvimgcodec
        from PIL import Image

        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
        engine = nvimgcodec.Backend(nvimgcodec.BackendKind.HW_GPU_ONLY)
        decoder = nvimgcodec.Decoder(device_id=device.index or 0, backends=[engine])
        return decoder.decode(jpeg.getvalue()) is not None
    except Exception:  # another version of the library may raise anything, and training does not depend on it
        return None


def check_writable(folder: Path) -> None:
    """Create a folder, and raise an OSError that names it if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder, _ROOM)
    except OSError as error:
        msg = f"{folder}: {error.strerror}; choose another --output-dir"
        raise OSError(msg) from error


def report_on_checkpoint(
    path: Path,
    place: dict[str, int],
    models: dict[str, nn.Module],
    data: Data,
    options: TrainingOptions,
    processes: Processes,
    validate: Callable[[Batches, nn.Module, evaluation.PerClass | None], Figures],
) -> None:
    """Validate the networks of a checkpoint, and print and write the results; call it in all processes.

    `place` is the position of the checkpoint: the number of complete epochs as ``"epoch"``, and the ``"step"`` in the
    next one. It is empty for the weights of --pretrained. `models` holds the network as ``"val"`` and, if there is an
    EMA of the weights, the network with the EMA as ``"val_ema"``. Results besides top-1 and top-5 are those of the last
    network.
    `validate` validates one network; its third argument counts the predictions per class.
    """
    classes, asked, output_dir = data.classes, options.evaluation, options.run.output_dir
    if asked.cam_class is not None and asked.cam_class not in classes:
        msg = f"--cam-class must be one of the {len(classes)} classes of {path}, got {asked.cam_class!r}"
        raise ValueError(msg)
    target = asked.report or evaluation.unused_path(output_dir / "evaluation.json")
    if processes.is_main:  # now, not after minutes of validation
        for folder in (target.parent, *([output_dir] if asked.per_class_csv or asked.cam else [])):
            check_writable(folder)
    loader, backend = data.val_loader(options.data, processes), chosen_backend(options.data)
    *_, (judged, model) = models.items()
    if asked.cam:
        last_layers(model)  # fail before anything is computed
    counts = evaluation.PerClass(len(classes), processes.device) if asked.per_class_csv else None
    images = str(options.data.val_dir or options.data.data or backend)
    resize_size, crop_size = options.data.val_resize_size, options.data.val_crop_size
    sizes = f"resized to {resize_size} and cropped to {crop_size} pixels"
    if options.data.dataset != "folder":
        resize_size = crop_size = options.data.train_crop_size
        sizes = f"{crop_size} pixels, not resized"

    report: dict[str, Any] = {
        "checkpoint": str(path),
        "arch": options.model.arch,
        **place,
        "images": images,
        "backend": backend,
        "resize_size": resize_size,
        "crop_size": crop_size,
        "mean": data.mean,
        "std": data.std,
        "amp": options.model.amp_dtype if options.model.amp else None,
    }
    network = f"{options.model.arch}, {options.model.precision}, {len(classes)} classes"
    normalisation = "mean {} {} {}, std {} {} {}".format(*(f"{value:.3g}" for value in (*data.mean, *data.std)))
    after = f", after {place['epoch']} epochs and {place['step']} steps" if place else ""
    say(f"{path}: {network}{after}")
    count = len(validated(data.val_images, options.data, processes))
    say(f"{images}: {count} images by {backend}, {sizes}, {normalisation}")
    for name in models:
        val = report[name] = validate(loader, models[name], counts if name == judged else None)
        result = f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} %, loss {val['loss']:.3f}"
        result += f" on {val['images']} validation images"
        say(("EMA: " if name == "val_ema" else "") + result)
    if asked.fgsm is not None:
        found = report["fgsm"] = attacked_accuracy(
            model, loader, processes, epsilon=asked.fgsm, mean=data.mean, std=data.std
        )
        result = f"top-1 {found['attacked_top1']:.2f} % attacked, {found['clean_top1']:.2f} % clean"
        say(f"FGSM with epsilon {asked.fgsm:.4g}: {result}")
    per_class = counts.over_processes() if counts else None
    if not processes.is_main:
        return

    if per_class:
        table = evaluation.unused_path(output_dir / "per_class.csv")
        evaluation.write_per_class(table, classes, *per_class)
        report["per_class_csv"] = str(table)
    if asked.cam:
        pictures = save_activation_maps(
            model,
            asked.cam,
            output_dir / "cam",
            classes=classes,
            label=None if asked.cam_class is None else classes.index(asked.cam_class),
            resize_size=resize_size,
            crop_size=crop_size,
            mean=data.mean,
            std=data.std,
        )
        report["cam"] = [str(picture) for picture in pictures]
    write_json(target, report)
    say(f"result: {target}")

"""What ``--evaluate`` tells of a checkpoint: accuracy, by class and under attack, and class activation maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dali_saliencymix.loaders.base import Batches, Data
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.training import evaluation, logs
from dali_saliencymix.training.activation_maps import save_activation_maps
from dali_saliencymix.training.options import TrainingOptions
from dali_saliencymix.training.robustness import attacked_accuracy

# Validates a network on a loader, and counts its answers class by class where it is given a third argument.
Validate = Callable[[Batches, nn.Module, evaluation.PerClass | None], dict[str, float]]


def report_on_checkpoint(
    path: Path,
    models: dict[str, nn.Module],
    data: Data,
    options: TrainingOptions,
    processes: Processes,
    validate: Validate,
) -> None:
    """Validate the networks of a checkpoint, say and write what comes out; all processes have to call this.

    Parameters
    ----------
    path : path
        The checkpoint.
    models : dict of str to torch.nn.Module
        ``"val"``: the trained network; ``"val_ema"``: the moving average of its weights, where there is one. What is
        asked for beyond top-1 and top-5 is of the last of them.
    data : Data
        Whose validation images are taken.
    options : TrainingOptions
        Options of the run.
    processes : Processes
        Which process this is.
    validate : callable
        Validates one network.
    """
    classes, asked, output_dir = data.classes, options.evaluation, options.run.output_dir
    if asked.cam_class is not None and asked.cam_class not in classes:
        msg = f"--cam-class must be one of the {len(classes)} classes of {path}, got {asked.cam_class!r}"
        raise ValueError(msg)
    loader = data.val_loader(options.data, processes)
    *_, (judged, model) = models.items()
    counts = evaluation.PerClass(len(classes), processes.device) if asked.per_class_csv else None
    mean, std = data.mean, data.std

    report: dict[str, Any] = {"checkpoint": str(path), "arch": options.model.arch}
    report["amp"] = options.model.amp_dtype if options.model.amp else None
    for name in models:
        val = report[name] = validate(loader, models[name], counts if name == judged else None)
        result = f"top-1 {val['top1']:.2f} %, top-5 {val['top5']:.2f} % of {val['images']} validation images"
        logs.say(("moving average: " if name == "val_ema" else "") + result, enabled=processes.is_main)
    if asked.fgsm is not None:
        robustness = attacked_accuracy(model, loader, processes, epsilon=asked.fgsm, mean=mean, std=std)
        report["fgsm"] = robustness
        clean, attacked = robustness["clean_top1"], robustness["attacked_top1"]
        result = f"FGSM with epsilon {asked.fgsm:.4g}: top-1 {attacked:.2f} % attacked, {clean:.2f} % clean"
        logs.say(result, enabled=processes.is_main)
    per_class = counts.over_processes() if counts else None
    if not processes.is_main:
        return

    output_dir.mkdir(parents=True, exist_ok=True)
    if per_class:
        table = evaluation.unused_path(output_dir / "per_class.csv")
        evaluation.write_per_class(table, classes, *per_class)
        report["per_class_csv"] = str(table)
    if asked.cam:
        small = options.data.train_crop_size if options.data.dataset != "folder" else None  # of CIFAR: as they are
        pictures = save_activation_maps(
            model,
            asked.cam,
            output_dir / "cam",
            classes=classes,
            resize_size=small or options.data.val_resize_size,
            crop_size=small or options.data.val_crop_size,
            mean=mean,
            std=std,
            label=None if asked.cam_class is None else classes.index(asked.cam_class),
        )
        report["cam"] = [str(picture) for picture in pictures]
    target = asked.report or evaluation.unused_path(output_dir / "evaluation.json")
    evaluation.write_report(target, report)
    logs.say(f"result: {target}")

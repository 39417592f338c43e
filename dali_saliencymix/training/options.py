"""The options of the training script in groups, each for the functions that need it, with their defaults.

An option has the name of its flag; its values are checked where the command line is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dali_saliencymix.loaders.options import DataOptions


@dataclass(frozen=True)
class ModelOptions:
    """The network, and how it computes.

    Attributes
    ----------
    arch : str
        Name of a classifier that `dali_saliencymix.training.models.make_model` knows.
    dropout : float, optional
        Its dropout, in [0, 1), where it has one.
    amp : bool
        Compute in 16 bits where that is safe.
    amp_dtype : {"bf16", "fp16"}
        Which 16 bits.
    channels_last : bool
        Channels-last memory.
    compile : bool
        Compile with ``torch.compile``.
    deterministic : bool
        Take kernels that always give the same bits.
    """

    arch: str = "resnet50"
    dropout: float | None = None
    amp: bool = False
    amp_dtype: str = "bf16"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False

    @property
    def precision(self) -> str:
        """``"fp32"``, or the 16 bits that are in use."""
        return self.amp_dtype if self.amp else "fp32"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients could vanish in these 16 bits, so that the loss has to be scaled."""
        return self.precision == "fp16"


@dataclass(frozen=True)
class OptimizerOptions:
    """From the gradients to new weights.

    Attributes
    ----------
    accumulation_steps : int
        Steps whose gradients make one update.
    lr : float
        Base learning rate.
    momentum : float
        Of SGD, in [0, 1).
    nesterov : bool
        Nesterov momentum, where there is a momentum.
    weight_decay, norm_weight_decay, bias_weight_decay : float
        See `dali_saliencymix.training.optimisation.parameter_groups`.
    label_smoothing : float
        Smoothing of the mixed labels, in [0, 1).
    clip_grad_norm : float, optional
        Largest norm of the gradients.
    model_ema : bool
        Keep an exponential moving average (EMA) of the weights.
    model_ema_decay : float
        How much of it stays at each update, in (0, 1).
    """

    accumulation_steps: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9999


@dataclass(frozen=True)
class ScheduleOptions:
    """What changes in the course of a training.

    Attributes
    ----------
    epochs : int
        Length of the training.
    lr_scheduler : {"cosine", "step"}
        The learning rate falls to 0 along half a cosine, or is multiplied by `lr_gamma` at each of `lr_milestones`.
    lr_warmup_epochs : float
        For so many epochs it rises linearly from 0.
    lr_milestones : sequence of float
        Epochs, in any order.
    lr_gamma : float
        Positive.
    progressive_size : sequence of str
        ``"SIZE@EPOCH"`` in the order of the epochs: the size of training images from that epoch on.
    mix_off_epochs : int
        There is no mixing in so many epochs at the end.
    """

    epochs: int = 300
    lr_scheduler: str = "cosine"
    lr_warmup_epochs: float = 0.0
    lr_milestones: tuple[float, ...] = (75.0, 150.0, 225.0)
    lr_gamma: float = 0.1
    progressive_size: tuple[str, ...] = ()
    mix_off_epochs: int = 0


@dataclass(frozen=True)
class RunOptions:
    """What a run does beside the training itself: checkpoints, faults, displays, and where it ends.

    Attributes
    ----------
    output_dir : path
        Folder for checkpoints and log.
    resume : str, optional
        Checkpoint to resume from; ``"auto"`` is the last one of `output_dir`, if there is one.
    evaluate : bool
        Only validate it.
    restart_epoch : bool
        Begin the epoch of the checkpoint anew.
    checkpoint_every : int, optional
        Steps between two checkpoints of an epoch.
    checkpoint_interval : float
        Minutes between them; 0 is never.
    keep_checkpoints : int
        How many of them to keep.
    stall_timeout : float
        Seconds without progress that end the run; 0 waits for ever.
    max_nan_steps : int
        Steps in a row whose loss is no number that end it.
    tensorboard, log_wandb : bool
        Write for TensorBoard, and for Weights & Biases.
    wandb_project : str
        Project to write to there.
    save_images : int
        How many images of the first batch to draw.
    print_freq : int
        Steps between two displays.
    profile_loader : bool
        Only measure whether the loader is the bottleneck.
    max_steps : int, optional
        Steps after which the run ends.
    training_only : bool
        Do not validate.
    no_checkpoints : bool
        Save none.
    """

    output_dir: Path = Path("output")
    resume: str | None = None
    evaluate: bool = False
    restart_epoch: bool = False
    checkpoint_every: int | None = None
    checkpoint_interval: float = 30.0
    keep_checkpoints: int = 2
    stall_timeout: float = 600.0
    max_nan_steps: int = 3
    tensorboard: bool = False
    log_wandb: bool = False
    wandb_project: str = "dali-saliencymix"
    save_images: int = 0
    print_freq: int = 10
    profile_loader: bool = False
    max_steps: int | None = None
    training_only: bool = False
    no_checkpoints: bool = False


@dataclass(frozen=True)
class EvaluationOptions:
    """What ``--evaluate`` tells beyond top-1 and top-5.

    Attributes
    ----------
    report : path, optional
        File for the result.
    per_class_csv : bool
        Write the accuracy of each class.
    fgsm : float, optional
        Attack each pixel value by at most this, of 1.
    cam : sequence of str, optional
        Images to draw class activation maps of.
    cam_class : str, optional
        Of this class; by default of the predicted one.
    """

    report: Path | None = None
    per_class_csv: bool = False
    fgsm: float | None = None
    cam: tuple[str, ...] | None = None
    cam_class: str | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """All options of a training.

    Attributes
    ----------
    data, model, optimizer, schedule, run, evaluation
        The groups.
    config : dict
        What was given, by the names of the flags, as files and checkpoints hold it: paths are text, and what was left
        out for a preset to decide is None.
    """

    data: DataOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    run: RunOptions
    evaluation: EvaluationOptions
    config: dict[str, Any] = field(repr=False)

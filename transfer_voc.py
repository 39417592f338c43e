"""Fine-tune torchvision's Faster R-CNN on Pascal VOC, with the backbone of a classifier trained by train.py.

    python transfer_voc.py VOC --checkpoint runs/r50/checkpoint_best.pt --output-dir runs/r50-voc

VOC is the folder that holds VOCdevkit/VOC2007 and VOCdevkit/VOC2012. The default settings are those of the paper's
table 3: training on 2007 and 2012 trainval, batch 8, 41 000 iterations, learning rate 4e-3, divided by ten after 33 000
iterations, and the test on 2007 test. The script runs in one process, on a GPU if there is one. The output folder gets
checkpoint_last.pt, log.jsonl and, at the end, voc.json with the average precision of each class.
"""

from __future__ import annotations

import argparse
import math
import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

from dali_saliencymix._errors import add_traceback, flush_stdout, prepare_stdout, wants_traceback
from dali_saliencymix.options import HelpFormatter, whole_number
from dali_saliencymix.packages import require_or_exit


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser(
        description="Fine-tune torchvision's Faster R-CNN on Pascal VOC, with the backbone of a trained classifier.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="VOC", help="folder that holds VOCdevkit/")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint of the classifier that provides the backbone"
    )
    parser.add_argument(
        "--train-sets", nargs="+", default=["2007:trainval", "2012:trainval"], metavar="YEAR:SET", help="training sets"
    )
    parser.add_argument("--test-set", default="2007:test", metavar="YEAR:SET", help="test set")
    parser.add_argument("--iterations", type=whole_number(1), default=41000, help="number of training iterations")
    parser.add_argument("-b", "--batch-size", type=whole_number(1), default=8, help="images per batch")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate")
    parser.add_argument(
        "--lr-milestones",
        type=whole_number(0),
        nargs="*",
        default=[33000],
        help="iterations at which --lr is multiplied by --lr-gamma",
    )
    parser.add_argument("--lr-gamma", type=float, default=0.1, help="factor at each milestone")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    parser.add_argument("--wd", "--weight-decay", type=float, default=1e-4, dest="weight_decay", help="weight decay")
    parser.add_argument(
        "--trainable-layers",
        type=whole_number(0, 5),
        default=3,
        help="number of trainable stages of the backbone, counted from the last one",
    )
    parser.add_argument(
        "--min-size", type=whole_number(1), default=800, help="short side of the resized images, in pixels"
    )
    parser.add_argument("--max-size", type=whole_number(1), default=1333, help="maximum of the long side, in pixels")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on")
    parser.add_argument(
        "-j",
        "--workers",
        type=whole_number(0),
        default=4,
        help="worker processes that decode images; 0: the main process",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of new weights, order of images and flips"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("output-voc"), help="folder for checkpoint, log and result"
    )
    parser.add_argument(
        "--resume", choices=("auto",), help="resume from the checkpoint in the output folder, if there is one"
    )
    parser.add_argument("--save-freq", type=whole_number(1), default=1000, help="iterations between checkpoints")
    parser.add_argument(
        "-p", "--print-freq", type=whole_number(1), default=50, help="iterations between lines of progress"
    )
    add_traceback(parser)
    args = parser.parse_args(arguments)
    if args.max_size < args.min_size:
        parser.error(f"--max-size must be at least --min-size {args.min_size}, got {args.max_size}")
    for name in ("lr", "lr_gamma", "momentum", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number of at least 0, got {getattr(args, name)}")
    return args


if __name__ == "__main__":  # before the import of PyTorch, which takes seconds: --help and wrong options end here
    ARGUMENTS = parse_arguments()

require_or_exit("PIL", "torch", "torchvision", "tqdm")

import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from dali_saliencymix.bottleneck import Monitor
from dali_saliencymix.measure.environment import environment
from dali_saliencymix.measure.results import write_json
from dali_saliencymix.training import checkpoints, distributed
from dali_saliencymix.training.folder_lock import FolderLock
from dali_saliencymix.training.run_log import LOG, Progress, say, write_event
from dali_saliencymix.training.voc import (
    CLASSES,
    Detections,
    VocImages,
    as_lists,
    average_precision,
    training_order,
    training_target,
)

ENTRIES = ("model", "optimizer", "iteration", "config", "random")
# Options that affect the training: a resumed run has to keep them.
TRAINING_OPTIONS = (
    *("train_sets", "batch_size", "lr", "lr_milestones", "lr_gamma", "momentum", "weight_decay"),
    *("trainable_layers", "min_size", "max_size", "seed", "arch"),
)


def build_detector(
    classifier: dict[str, Any],
    path: Path,
    *,
    trainable_layers: int,
    min_size: int,
    max_size: int,
    **options: Any,
) -> tuple[FasterRCNN, int]:
    """Build a Faster R-CNN with a feature pyramid network on the backbone of a classifier.

    Parameters
    ----------
    classifier : dict
        A checkpoint of train.py.
    path : Path
        Path of the checkpoint, for messages.
    trainable_layers : int
        Number of trainable stages of the backbone, 0 to 5, counted from the last one.
    min_size, max_size : int
        Short side of the resized images and maximum of the long side, in pixels.
    **options
        Other arguments of torchvision's ``FasterRCNN``.

    Returns
    -------
    model : FasterRCNN
        The detector. All weights after the backbone are new. The backbone's batch normalisation is frozen, both
        statistics and affine parameters, as is usual with small batches.
    taken : int
        Number of tensors loaded from the classifier: all tensors of the backbone.

    Raises
    ------
    ValueError
        If the classifier is not a ResNet of torchvision, or its tensors do not match those of the backbone.
    """
    arch = classifier["config"].get("arch")
    if arch not in torchvision.models.list_models(torchvision.models) or "resne" not in arch:
        msg = f"{path}: the backbone has to be a ResNet of torchvision, got {arch!r}"
        raise ValueError(msg)
    backbone = resnet_fpn_backbone(
        backbone_name=arch, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=trainable_layers
    )
    taken = take_backbone(backbone.body, classifier["model"], path)
    return FasterRCNN(backbone, 1 + len(CLASSES), min_size=min_size, max_size=max_size, **options), taken


def take_backbone(body: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> int:
    """Load all layers of a classifier except the last one, with exact matching; return the number of tensors."""
    # The last layer has other classes, and frozen batch normalisation has no num_batches_tracked.
    taken = {
        name: value
        for name, value in weights.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    wanted = body.state_dict()
    wrong = sorted(taken.keys() ^ wanted.keys())
    wrong += [name for name in wanted if name in taken and taken[name].shape != wanted[name].shape]
    if wrong:
        msg = f"{path}: {len(wrong)} tensors are missing, left over or have another shape than in the backbone; "
        msg += f"the first is {wrong[0]!r}"
        raise ValueError(msg)
    body.load_state_dict(taken)
    return len(taken)


class Transfer:
    """Hold the detector, the optimiser and the training state."""

    def __init__(self, args: argparse.Namespace, device: torch.device, lock: FolderLock) -> None:
        self.args, self.device, self.lock = args, device, lock
        self.config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        classifier = checkpoints.load_checkpoint(args.checkpoint, ("model", "config"))
        self.config["arch"] = classifier["config"].get("arch")
        torch.manual_seed(args.seed)
        sizes = {name: getattr(args, name) for name in ("trainable_layers", "min_size", "max_size")}
        with checkpoints.taken_from(args.checkpoint):
            model, self.taken = build_detector(classifier, args.checkpoint, **sizes)
        self.model = model.to(device)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )
        self.iteration = 0

    def restore(self, path: Path) -> None:
        """Restore the state from a checkpoint of this script."""
        saved = checkpoints.load_checkpoint(path, ENTRIES)
        was, now = ({name: each.get(name) for name in TRAINING_OPTIONS} for each in (saved["config"], self.config))
        if changed := checkpoints.differences(was, now):
            msg = f"{path}: cannot resume with other options: {'; '.join(changed)}"
            raise ValueError(msg)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.iteration = saved["iteration"]
        # The detector samples its training regions at random; the order of the images needs no state.
        torch.set_rng_state(saved["random"]["cpu"])
        if self.device.type == "cuda" and saved["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)

    def save(self) -> None:
        """Write a checkpoint to resume from."""
        self.lock.check()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "config": self.config,
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }
        checkpoints.save_checkpoint(checkpoint, self.args.output_dir / checkpoints.LAST)

    def train(self, images: VocImages, log: Path) -> None:
        """Train to the last iteration."""
        args = self.args
        order = training_order(
            len(images), batch_size=args.batch_size, seed=args.seed, start=self.iteration, stop=args.iterations
        )
        # A separate generator keeps the loader from advancing the global one, from which the detector draws.
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=order,
            collate_fn=as_lists,
            num_workers=args.workers,
            generator=torch.Generator(),
        )
        self.model.train()
        monitor = Monitor()
        with Progress("training", args.iterations - self.iteration) as progress:
            for batch, objects in monitor.watch(loader):
                lr = args.lr * args.lr_gamma ** bisect_right(sorted(args.lr_milestones), self.iteration)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                targets = [training_target(each, self.device) for each in objects]
                losses = self.model([image.to(self.device) for image in batch], targets)
                loss = sum(losses.values())
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.iteration += 1
                progress.advance()
                at_the_end = self.iteration == args.iterations
                saved = self.iteration % args.save_freq == 0 or at_the_end
                if self.iteration % args.print_freq == 0 or saved:
                    figures = {name: value.item() for name, value in {"loss": loss, **losses}.items()}
                    if not math.isfinite(figures["loss"]):
                        where = f"in iteration {self.iteration}"
                        msg = f"the loss became {figures['loss']} {where}; a smaller --lr may help"
                        raise ValueError(msg)
                    share = monitor.epoch_wait_share
                    write_event(log, "train", iteration=self.iteration, lr=lr, data_wait_share=share, **figures)
                    progress.show(loss=f"{figures['loss']:.3f}", lr=f"{lr:g}", data_wait=f"{share:.0%}")
                if saved:
                    self.save()

    @torch.inference_mode()
    def test(self, images: VocImages) -> dict[str, Any]:
        """Return the average precision of each class, and the means over the classes that have objects."""
        self.model.eval()
        loader = torch.utils.data.DataLoader(
            images,
            sampler=[(number, False) for number in range(len(images))],
            batch_size=self.args.batch_size,
            collate_fn=as_lists,
            num_workers=self.args.workers,
            generator=torch.Generator(),
        )
        found: list[Detections] = []
        with Progress("test", len(loader)) as progress:
            for batch, _ in loader:
                for each in self.model([image.to(self.device) for image in batch]):
                    found.append(Detections(*(each[name].cpu() for name in ("boxes", "labels", "scores"))))
                progress.advance()
        classes = {
            name: average_precision(found, images.objects, label)._asdict() for label, name in enumerate(CLASSES, 1)
        }
        occurring = [each for each in classes.values() if each["objects"]]
        if not occurring:
            msg = f"{self.args.test_set}: the {len(images)} images of this set have no objects"
            raise ValueError(msg)
        means = {
            f"map_{form}": sum(each[form] for each in occurring) / len(occurring) for form in ("eleven_point", "area")
        }
        return {**means, "classes_with_objects": len(occurring), "images": len(images), "classes": classes}


def run(args: argparse.Namespace) -> None:
    """Lock the output folder, then train and test."""
    processes = distributed.start_processes(args.device)
    if processes.world_size > 1:
        msg = f"this script runs in one process, got {processes.world_size} from torchrun"
        raise ValueError(msg)
    with FolderLock(args.output_dir, prog="transfer_voc.py") as lock:
        run_alone(args, processes.device, lock)


def run_alone(args: argparse.Namespace, device: torch.device, lock: FolderLock) -> None:
    """Train, test and write the results, while this process holds the lock of the output folder."""
    last = args.output_dir / checkpoints.LAST
    if last.exists() and not args.resume:
        msg = f"{last}: would be overwritten; give --resume auto or another --output-dir"
        raise ValueError(msg)
    train_images, test_images = VocImages(args.data, args.train_sets), VocImages(args.data, [args.test_set])
    transfer = Transfer(args, device, lock)
    resumed = last.exists()
    if resumed:
        with checkpoints.taken_from(last):
            transfer.restore(last)
    log = args.output_dir / LOG
    if not resumed:
        log.write_text("")
    write_event(log, "resume" if resumed else "start", config=transfer.config, **environment(str(device)))
    say(
        f"Faster R-CNN, {transfer.config['arch']} with a feature pyramid: all {transfer.taken} tensors of its backbone "
        f"loaded from {args.checkpoint}\n{len(train_images)} images to train on, {len(test_images)} to test on, "
        f"iterations {transfer.iteration} to {args.iterations}"
    )
    if transfer.iteration < args.iterations:
        transfer.train(train_images, log)
    result = transfer.test(test_images)
    report = args.output_dir / "voc.json"
    write_json(report, {"iteration": transfer.iteration, "test_set": args.test_set, **result})
    write_event(log, "test", iteration=transfer.iteration, **{key: result[key] for key in result if key != "classes"})
    say(
        f"mAP at an overlap of 0.5 over {result['classes_with_objects']} classes: {result['map_eleven_point']:.2f} % "
        f"(11-point, VOC 2007), {result['map_area']:.2f} % (area, VOC 2010); {report}"
    )


def main(args: argparse.Namespace | None = None) -> int:
    """Run the program; return its exit status."""
    prepare_stdout()
    try:
        run(args or parse_arguments())
        flush_stdout()
    except KeyboardInterrupt:
        sys.stderr.write("transfer_voc.py: interrupted; --resume auto resumes from the last checkpoint\n")
        return 130
    except Exception as error:
        return distributed.fail(error, prog="transfer_voc.py", with_traceback=wants_traceback(sys.argv))
    finally:
        distributed.stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))

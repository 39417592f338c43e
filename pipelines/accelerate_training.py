"""Train with Hugging Face Accelerate, DALI and SaliencyMix, in one or several processes.

    python pipelines/accelerate_training.py DATA
    accelerate launch pipelines/accelerate_training.py DATA --output weights.pt
    accelerate launch pipelines/accelerate_training.py DATA --epochs 90 --checkpoints FOLDER

DATA is a folder with one folder of images for each class. With --checkpoints, the same command resumes a training that
was killed, in the middle of the epoch, and neither repeats nor skips images.

``accelerator.prepare`` wraps the model and the optimizer, but not the loader. DALI already gives each process its own
shard of the files, and returns tensors on its device; a prepared loader would shard and move each batch again. So this
example does itself what Accelerate does for a prepared loader: it saves the position in the epoch next to the state of
the Accelerator, and updates the weights at the end of an epoch, even if fewer batches are accumulated by then.
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from dali_saliencymix.packages import require_or_exit

require_or_exit("accelerate", "nvidia.dali", "torch", "torchvision")

import torch
import torchvision
from accelerate import Accelerator
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import nn
from torch.nn.functional import cross_entropy

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.fn import saliencymix, soft_labels
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


@pipeline_def(enable_checkpointing=True)
def training_pipeline(folder: ImageFolder, size: int, gpu: bool, rank: int, processes: int) -> tuple[DataNode, ...]:
    """Read this process's shard of the files, decode a random crop, resize, mix, flip horizontally, normalise."""
    # All processes shuffle with one seed, because shards must not overlap. All other draws use the pipeline's seed.
    encoded, labels = fn.readers.file(
        files=folder.files, labels=folder.labels, shard_id=rank, num_shards=processes, pad_last_batch=True,
        shuffle_after_epoch=True, shuffle_after_epoch_seed=0, name="reader",
    )  # fmt: skip
    images = fn.decoders.image_random_crop(encoded, device="mixed" if gpu else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, soft_labels(labels, source_labels, lam, num_classes=len(folder.classes))


class Checkpoints:
    """Folders such as ``update_00000100``, with the state of the Accelerator and of each process's data pipeline.

    A process may be killed at any time, so a folder gets its final name after all processes have written to it.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, settings: dict[str, Any]) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.settings = settings  # DALI would load a state saved with other settings without an error
        self.latest = max(folder.glob("update_*"), default=None)
        self.name_of_place = f"place_{accelerator.process_index}.pt"

    def place(self) -> dict[str, Any] | None:
        """Return what this process saved last, or None; raise an error if the settings have changed."""
        if self.latest is None:
            return None
        saved = torch.load(self.latest / "place_0.pt", weights_only=True)["settings"]
        changed = [f"{name} was {saved[name]}, is {now}" for name, now in self.settings.items() if saved[name] != now]
        if changed:
            msg = f"{self.latest}: cannot resume with other batches: {'; '.join(changed)}"
            raise ValueError(msg)
        return torch.load(self.latest / self.name_of_place, weights_only=True)

    def save(self, update: int, place: dict[str, Any]) -> None:
        """Save a checkpoint after `update` updates, and remove the older ones; call it in all processes."""
        partial = self.folder / "partial"
        self.latest = self.folder / f"update_{update:08d}"
        self.accelerator.save_state(partial)
        torch.save({"settings": self.settings, **place}, partial / self.name_of_place)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            partial.rename(self.latest)
            for older in set(self.folder.glob("update_*")) - {self.latest}:
                shutil.rmtree(older)


def train(
    folder: ImageFolder, accelerator: Accelerator, *, epochs: int, batch_size: int, size: int, lr: float,
    checkpoints: Path | None = None, checkpoint_every: int = 100,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    """Train a ResNet-18; return the unwrapped model and the loss of each epoch, averaged over all processes.

    Each update of the weights accumulates ``accelerator.gradient_accumulation_steps`` batches, or fewer at the end of
    an epoch. With `checkpoints`, training saves a checkpoint in that folder every `checkpoint_every` updates, and
    resumes from the last one in it.
    """
    rank, processes, accumulated = (
        accelerator.process_index, accelerator.num_processes, accelerator.gradient_accumulation_steps,
    )  # fmt: skip
    steps = len(folder) // processes // batch_size
    if not steps:
        limit = f"the share that each of {processes} processes has of the {len(folder)} images in {folder.root}"
        msg = f"batch_size must be at most {len(folder) // processes}, {limit}, got {batch_size}"
        raise ValueError(msg)
    settings = {"images": len(folder), "processes": processes, "batch_size": batch_size, "size": size}
    saving = None
    if checkpoints is not None:
        saving = Checkpoints(accelerator, checkpoints, settings | {"gradient_accumulation_steps": accumulated})
    place = saving.place() if saving else None

    gpu = accelerator.device.type == "cuda"
    pipeline = training_pipeline(
        folder, size, gpu, rank, processes,
        batch_size=batch_size, num_threads=4, device_id=accelerator.device.index or 0 if gpu else None, seed=rank,
        checkpoint=place["pipeline"] if place else None,
    )  # fmt: skip
    # With a prefetched batch, a checkpoint at the end of an epoch would lose that batch and the end of the epoch.
    loader = DALIGenericIterator(
        [pipeline], ["images", "targets"], reader_name="reader", auto_reset=True, prepare_first_batch=False
    )
    model = torchvision.models.resnet18(num_classes=len(folder.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)

    losses, step, update, total = [], 0, 0, torch.zeros((), device=accelerator.device)
    if saving and place:
        accelerator.load_state(saving.latest)
        losses, step, update, total = place["losses"], place["step"], place["update"], total + place["total"]
        accelerator.print(f"resumes in epoch {len(losses) + 1} after {step} steps: {saving.latest}")
    while len(losses) < epochs:
        for (batch,) in loader:
            if step == steps:  # DALI pads this batch: skip it, but read it, so that every shard ends its epoch
                continue
            window = min(accumulated, steps - step // accumulated * accumulated)  # batches of the update
            step += 1
            # Accelerate sets this itself only for a prepared loader.
            accelerator.sync_gradients = step % accumulated == 0 or step == steps
            with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = cross_entropy(model(batch["images"]), batch["targets"])
                accelerator.backward(loss * (accumulated / window))  # backward divides by `accumulated`
            optimizer.step()  # Accelerate skips this line and the next one unless `sync_gradients` is true
            optimizer.zero_grad()
            total += loss.detach()
            if not accelerator.sync_gradients:
                continue
            update += 1
            if saving and update % checkpoint_every == 0:
                (state,) = loader.checkpoints()
                here = {"losses": losses, "step": step, "update": update, "total": total.cpu(), "pipeline": state}
                saving.save(update, here)
        losses.append(accelerator.reduce(total / steps, reduction="mean").item())
        step, total = 0, torch.zeros_like(total)
        accelerator.print(f"epoch {len(losses)}/{epochs}  {steps} steps  loss {losses[-1]:.3f}")
    return accelerator.unwrap_model(model), losses


def positive(text: str) -> int:
    """Parse the value of an option that must be at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    """Parse the command line, train, and write the weights."""
    parser = argparse.ArgumentParser(description="Train a ResNet-18 with Accelerate and SaliencyMix.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("-b", "--batch-size", type=positive, default=32, help="batch size of each process")
    parser.add_argument("--accumulation-steps", type=positive, default=1, help="batches per update of the weights")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--size", type=positive, default=224, help="height and width of the images")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even if there is a GPU")
    parser.add_argument("--output", type=Path, help="file for the weights")
    parser.add_argument("--checkpoints", type=Path, help="folder to save checkpoints in and to resume from")
    parser.add_argument("--checkpoint-every", type=positive, default=100, help="updates between two checkpoints")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulation_steps)
    names = ("epochs", "batch_size", "size", "lr", "checkpoints", "checkpoint_every")
    try:
        folder = list_image_folder(args.data)
        model, _ = train(folder, accelerator, **{name: getattr(args, name) for name in names})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.output is not None:
        accelerator.save(model.state_dict(), args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()

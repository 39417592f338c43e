"""Check training, resuming, validation, memory and the exit of programs on a GPU.

    python -m benchmarks.gpu_checks DATA -o benchmarks/results/NAME.json

DATA holds train/ and val/. The checks are of correctness, not of speed: several runs of train.py run at a time. The
tests marked gpu use a few small batches; these checks use whole programs and batches of full size.

Each check is one of the parts of the result, with its conditions. If the file exists, the parts are added to it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import bench_ops, machine, program
from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.dali import Loader
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.imagenet import training_loader
from dali_saliencymix.loaders.options import DataOptions
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.results import one_line, read_json, shortened
from dali_saliencymix.options import MixOptions
from dali_saliencymix.training.checkpoints import find_checkpoint, load_checkpoint
from dali_saliencymix.training.models import make_model

BACKENDS = ("dali-gpu", "dali-cpu", "pytorch")

# Programs that take a batch from a pipeline on a GPU and exit without releasing it.
TAKES_A_BATCH = {
    "iterator": """
import sys, torch
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.loaders.imagenet import training_loader
from dali_saliencymix.options import MixOptions
loader = training_loader(list_image_folder(sys.argv[1]), batch_size=8, num_threads=2, crop_size=64,
                         device=torch.device("cuda", 0), mix=MixOptions())
images, *_ = next(iter(loader))
print(list(images.shape))
""",
    "pipeline": """
import sys
from nvidia.dali import fn, pipeline_def
import dali_saliencymix.fn as dsfn
@pipeline_def(batch_size=8, num_threads=2, device_id=0)
def mixed():
    encoded, labels = fn.readers.file(file_root=sys.argv[1], random_shuffle=True)
    images = fn.resize(fn.decoders.image(encoded, device="mixed"), size=(64, 64))
    return dsfn.saliencymix(images, labels)
pipeline = mixed()
print(pipeline.run()[0].shape())
""",
}

_TOGETHER = 3  # training runs at a time
_TRAINED = ("--epochs", 1000, "--training-only", "--amp", "--channels-last")

_TRAININGS = {
    "saliencymix, compiled": ("--compile",),  # first, since it takes the longest
    "none": ("--mix", "none"),
    "cutmix": ("--mix", "cutmix"),
    "saliencymix spectral_residual": ("--saliency", "spectral_residual"),
    "saliencymix fine_grained": ("--saliency", "fine_grained"),
    "saliencymix, fp16": ("--amp-dtype", "fp16"),
}
# Options with which the network learns something before its predictions are compared.
_VALIDATED = ("--mix", "none", "--lr", 0.05, "--lr-warmup-epochs", 2, "--min-crop-area", 0.35)

# Lines that show the progress of training; all other lines on stderr are warnings or errors.
_PROGRESS = re.compile(r"^(epoch \d+/\d+|validation)\b")

Result = dict[str, Any]


def main() -> None:
    """Run the checks, and write the result after each of them."""
    parser = program.parser(__doc__, "output", "device", "batch_size", "crop_size", batch_size=256, crop_size=224)
    parser.add_argument("data", type=Path, metavar="DATA", help="photographs in class folders, in train/ and val/")
    for name, every in (("--checks", list(CHECKS)), ("--trainings", list(_TRAININGS))):
        parser.add_argument(name, nargs="+", choices=every, default=every, metavar="NAME", help="default: all")
    parser.add_argument("-a", "--arch", default="resnet50", help="network to train (default: %(default)s)")
    counts = {"steps": (60, "steps of each training run"), "batches": (500, "batches while memory is read")}
    counts["programs"] = (20, "programs that have to exit")
    for name, (default, about) in counts.items():
        text = f"{about} (default: {default})"
        parser.add_argument(f"--{name}", type=program.positive, default=default, help=text)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="folder for the output of the training runs")
    options = parser.parse_args()
    conditions = machine.conditions(options)
    options.device = torch.device("cuda", 0) if machine.wants_gpu(options) else torch.device("cpu")
    parts, bad = earlier_parts(options.output), []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.checks:
            program.say(f"---- {name}")
            start = time.monotonic()
            try:
                found = CHECKS[name](options, Path(folder))
            except Exception as error:  # the other checks can still run
                found = {"wrong": [one_line(error)]}
            seconds = round(time.monotonic() - start)
            parts.append({"check": name, "conditions": conditions, "seconds": seconds, **found})
            bad += [f"{name}: {wrong}" for wrong in found["wrong"]]
            program.write({"benchmark": "gpu_checks", "parts": parts}, options.output)
            program.say(json.dumps(found, indent=1))
            gc.collect()
    if bad:
        raise RuntimeError("; ".join(bad))


def earlier_parts(output: Path | None) -> list[Result]:
    if output is None or not output.exists():
        return []
    earlier = read_json(output)
    if earlier.get("benchmark") != "gpu_checks":
        msg = f"-o must name a result of gpu_checks or a new file, got {output}"
        raise ValueError(msg)
    return earlier["parts"]


# ---- trainings -------------------------------------------------------------------------------------------------------


def command(options: argparse.Namespace, output: Path, *more: object) -> list[str]:
    """Return the arguments for Python to run train.py."""
    size, device = options.crop_size, options.device.type
    line = ("train.py", options.data, "-a", options.arch, "-b", options.batch_size, "-j", min(8, cores()))
    line += ("--device", device, "--data-backend", "dali-gpu" if device == "cuda" else "dali-cpu")
    line += ("--train-crop-size", size, "--val-resize-size", resize_size(options), "--val-crop-size", size)
    return [*map(str, (*line, "--output-dir", output, *more))]


def resize_size(options: argparse.Namespace) -> int:
    """Return the short side of validation images: 256 for a crop of 224."""
    return options.crop_size * 8 // 7


def trained(options: argparse.Namespace, output: Path, *more: object, steps: int | None = None) -> Result:
    """Train for some steps; return the mean loss of each epoch, and the lines on stderr other than progress."""
    line = command(options, output, *_TRAINED, "--max-steps", steps or options.steps, *more)
    done = program.python(*line)
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", output.name)
        (options.logs / f"{name}.txt").write_text(f"{line}\n{done.stdout}\n{done.stderr}")
    epochs = program.logged(output, "epoch")
    return {
        "exit_status": done.returncode,
        "said": said(done.stderr),
        "steps": epochs[-1]["total_steps"] if epochs else 0,
        "losses": [epoch["train"]["loss"] for epoch in epochs],
        "gpu_peak_mib": max((epoch.get("gpu_peak_mib", 0) for epoch in epochs), default=0),
    }


def said(text: str) -> list[str]:
    """Return the lines that train.py has written to stderr, without progress."""
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    return [shortened(line) for line in lines if line and not _PROGRESS.match(line)]


def wrong_with(name: str, found: Result, steps: int) -> list[str]:
    wrong = []
    if found["exit_status"] != 0:
        wrong.append(f"{name}: exit status {found['exit_status']}: {' | '.join(found['said'][-3:])}")
    elif found["steps"] != steps:
        wrong.append(f"{name}: {found['steps']} steps instead of {steps}")
    if not all(loss is not None and math.isfinite(loss) for loss in found["losses"]):
        wrong.append(f"{name}: losses of {found['losses']}")
    return wrong


def check_trainings(options: argparse.Namespace, folder: Path) -> Result:
    """Train with each mixing mode, compiled, in bfloat16 and in float16."""
    with concurrent.futures.ThreadPoolExecutor(_TOGETHER) as pool:
        runs = {name: pool.submit(trained, options, folder / name, *_TRAININGS[name]) for name in options.trainings}
        found = {name: run.result() for name, run in runs.items()}
    return {"runs": found, "wrong": [text for name in found for text in wrong_with(name, found[name], options.steps)]}


def check_killed(options: argparse.Namespace, folder: Path) -> Result:
    """Compare the weights of a run that was killed and resumed with those of an uninterrupted run."""
    same = ("--deterministic", "--checkpoint-every", max(options.steps // 6, 1))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        unbroken = pool.submit(trained, options, folder / "unbroken", *same)
        killed_at = kill(options, folder / "killed", *same)
        # --max-steps counts the steps of this run only.
        left = options.steps - killed_at
        resumed = trained(options, folder / "killed", *same, "--resume", "auto", steps=left)
        found = {"unbroken": unbroken.result(), "killed_after": killed_at, "resumed": resumed}
    wrong = [text for name in ("unbroken", "resumed") for text in wrong_with(name, found[name], options.steps)]
    if not wrong:
        saved = [load_checkpoint(folder / name / "checkpoint_last.pt")["model"] for name in ("unbroken", "killed")]
        pairs = [[weights[name].double() for weights in saved] for name in saved[0]]
        largest = found["largest_difference_of_weights"] = max((a - b).abs().max().item() for a, b in pairs)
        wrong += [f"weights differ by up to {largest:.3g}"] if largest else []
    return {**found, "wrong": wrong}


def kill(options: argparse.Namespace, output: Path, *more: str | int) -> int:
    """Kill a training run after its second checkpoint; return the step that it resumes from."""
    line = command(options, output, *_TRAINED, *more)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    training = subprocess.Popen([sys.executable, *line], cwd=program.ROOT, **quiet)
    try:
        while len(list(output.glob("checkpoint_e*.pt"))) < 2:
            if training.poll() is not None:
                msg = f"the training run ended before it was killed, with status {training.returncode}"
                raise RuntimeError(msg)
            time.sleep(0.05)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    newest = find_checkpoint("auto", output, program.say)
    saved = load_checkpoint(newest, ("epoch", "step"))
    images = len(list_image_folder(options.data / "train"))
    return saved["epoch"] * (images // options.batch_size) + saved["step"]


# ---- validation ------------------------------------------------------------------------------------------------------


def check_validation(options: argparse.Namespace, folder: Path) -> Result:
    """Validate a checkpoint with each backend, and compare pixels and logits with those of the first backend."""
    training = trained(options, folder / "validated", *_VALIDATED)
    if wrong := wrong_with("training", training, options.steps):
        return {"training": training, "wrong": wrong}
    checkpoint = folder / "validated" / "checkpoint_last.pt"
    device = options.device
    backends = BACKENDS if device.type == "cuda" else BACKENDS[1:]
    with concurrent.futures.ThreadPoolExecutor(len(backends)) as pool:
        ended = pool.map(lambda backend: evaluated(options, checkpoint, backend), backends)
        found: dict[str, Result] = dict(zip(backends, ended, strict=True))
    for backend, part in found.items():
        if status := part.pop("exit_status"):
            wrong.append(f"{backend}: exit status {status}: {' | '.join(part['said'][-3:])}")
    saved = load_checkpoint(checkpoint, ("model", "classes"))
    model = make_model(options.arch, len(saved["classes"])).to(device).eval()
    model.load_state_dict(saved["model"])
    first_images, first_logits, first_labels = answers(options, model, backends[0])
    for backend in backends[1:]:
        images, logits, labels = answers(options, model, backend)
        if not torch.equal(labels, first_labels):
            wrong.append(f"{backend}: labels differ, or their order")
            continue
        pixels = (images - first_images).abs()
        found[backend][f"compared_with_{backends[0]}"] = {
            "largest_difference_of_logits": (logits - first_logits).abs().max().item(),
            "standard_deviation_of_logits": first_logits.std().item(),
            "other_answers": int((logits.argmax(1) != first_logits.argmax(1)).sum()),
            # The pixels are normalised: 1 is a standard deviation of ImageNet's pixels, 57 grey levels.
            "mean_difference_of_pixels": pixels.mean().item(),
            "largest_mean_difference_of_an_image": pixels.mean(dim=(1, 2, 3)).max().item(),
            "largest_difference_of_a_pixel": pixels.max().item(),
        }
    return {"training": training, "backends": found, "wrong": wrong}


def evaluated(options: argparse.Namespace, checkpoint: Path, backend: str) -> Result:
    """Validate a checkpoint; return the figures, the lines on stderr, and the exit status."""
    report = checkpoint.parent / f"{backend}.json"
    more = ("--evaluate", "--resume", checkpoint, "--data-backend", backend, "--report", report)
    done = program.python(*command(options, checkpoint.parent / backend, *more))
    val = read_json(report)["val"] if report.exists() else {}
    figures = {name: val.get(name) for name in ("top1", "images")}
    return {**figures, "said": said(done.stderr), "exit_status": done.returncode}


@torch.no_grad()
def answers(options: argparse.Namespace, model: torch.nn.Module, backend: str) -> tuple[torch.Tensor, ...]:
    """Return the pixels, logits and labels of all validation images, in host memory."""
    wanted = DataOptions(
        data_backend=backend,
        train_dir=options.data / "train",
        val_dir=options.data / "val",
        batch_size=32,
        val_resize_size=resize_size(options),
        val_crop_size=options.crop_size,
        device=options.device.type,
    )
    loader = open_data(wanted).val_loader(wanted, Processes(0, 0, 1, options.device))
    parts = [(images.cpu(), model(images).cpu(), labels.cpu()) for images, labels in loader if len(images)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def check_memory(options: argparse.Namespace, folder: Path) -> Result:
    """Measure memory over many batches, with one image much larger than the others, and of the mix itself."""
    listed = list_image_folder(options.data / "train")
    readings = watched(loader_of(options, listed, options.batch_size), options.batches)
    found: Result = {"over_batches": {"as it is": readings}}
    wrong = growth(readings)
    gc.collect()
    found["one_large_image"] = one_large_image(options, folder / "large")
    if not found["one_large_image"]["pixels_are_numbers"]:
        wrong.append("one large image: pixels are not finite")
    if options.device.type == "cuda":
        inputs, taken = bench_ops.Inputs(options.crop_size, options.batch_size), {}
        for detector in ("spectral_residual", "fine_grained"):
            taken |= bench_ops.peak_memory(bench_ops.package_variants(inputs, "cupy", detector, steps=False), inputs)
        found["peak_relative_to_batch"] = taken
    return {**found, "wrong": wrong}


def loader_of(options: argparse.Namespace, listed: ImageFolder, batch_size: int) -> Loader:
    size, device = options.crop_size, options.device
    return training_loader(
        listed, batch_size=batch_size, num_threads=cores(), device=device, crop_size=size, mix=MixOptions()
    )


def watched(loader: Iterable[Any], batches: int) -> list[dict[str, float]]:
    """Take batches, epoch after epoch; return ten readings of the memory in use."""
    readings, every = [], max(batches // 10, 1)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    for taken, _ in enumerate(itertools.islice(endless, batches), start=1):
        if taken % every == 0:
            readings.append({"batches": taken, **in_use()})
    return readings


def in_use() -> dict[str, float]:
    """Return the resident memory of this process and the memory in use on the GPU by all processes, in MB."""
    found = {"resident_mb": machine.resident_mb()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found["gpu_mb"] = round((total - free) / 1e6, 1)
    return found


def growth(readings: list[dict[str, float]]) -> list[str]:
    """Return the readings that grew by more than 10 % and more than 100 MB from a third of the batches to the end."""
    then, now = readings[len(readings) // 3], readings[-1]
    return [
        f"{name} grew from {then[name]:g} to {now[name]:g}"
        for name in then
        if name != "batches" and now[name] > max(1.1 * then[name], then[name] + 100)
    ]


def one_large_image(options: argparse.Namespace, folder: Path) -> Result:
    """Return the memory in use before and after batches in which one image has 9000x9000 pixels."""
    make_sample_data(folder, train=8, val=1)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8))
    listed = list_image_folder(folder / "train")
    small.resize((9000, 9000)).save(listed.files[5], "JPEG")
    before = in_use()
    loader = loader_of(options, listed, min(64, len(listed)))
    images = [batch[0] for _ in range(3) for batch in loader]
    whole = all(bool(batch.isfinite().all()) for batch in images)
    return {"before": before, "afterwards": in_use(), "batches": len(images), "pixels_are_numbers": whole}


# ---- programs that end -----------------------------------------------------------------------------------------------


def check_ends(options: argparse.Namespace, folder: Path) -> Result:
    """Run programs that take a batch and exit without releasing anything."""
    make_sample_data(folder / "sample", train=8, val=1)
    code = TAKES_A_BATCH if options.device.type == "cuda" else {"iterator": _on_a_cpu(TAKES_A_BATCH["iterator"])}
    names = [list(code)[number % len(code)] for number in range(options.programs)]
    with concurrent.futures.ThreadPoolExecutor(max(cores() // 2, 1)) as pool:
        found = list(pool.map(lambda name: took_a_batch(code[name], folder / "sample" / "train"), names))
    wrong = [f"{name}: {text}" for name, (status, text, _) in zip(names, found, strict=True) if status != 0]
    longest = max(seconds for _, _, seconds in found)
    return {"programs": len(names), "ended_well": len(names) - len(wrong), "longest_seconds": longest, "wrong": wrong}


def _on_a_cpu(code: str) -> str:
    return code.replace('"cuda", 0', '"cpu"')


def took_a_batch(code: str, folder: Path, seconds: float = 90) -> tuple[int | None, str, float]:
    """Return the exit status of a program (None if it hangs), the end of its stderr, and its seconds."""
    start = time.monotonic()
    try:
        done = program.python("-c", code, folder, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, "it did not exit", seconds
    return done.returncode, shortened(done.stderr), round(time.monotonic() - start, 1)


CHECKS: dict[str, Callable[[argparse.Namespace, Path], Result]] = {
    "ends": check_ends,
    "trainings": check_trainings,
    "validation": check_validation,
    "killed": check_killed,
    "memory": check_memory,
}


if __name__ == "__main__":
    program.run(main)

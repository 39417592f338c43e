"""The command line: ``python -m pipelines.examples NAME [DATA]`` runs an example and prints what comes out of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from pipelines.examples import records

OUTPUTS = ("images", "labels", "source_labels", "lam", "targets")

# Writes samples to a file and its index.
Writer = Callable[[list[records.Sample], Path, Path], None]


def main(arguments: list[str] | None = None) -> int:
    """Run one example; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.examples", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=sorted(EXAMPLES), help="one of " + ", ".join(sorted(EXAMPLES)))
    parser.add_argument(
        "root", nargs="?", type=Path, metavar="DATA",
        help="folder of class folders, or of train/ with these; without it a small data set is made",
    )  # fmt: skip
    parser.add_argument("-b", "--batch-size", type=_positive, default=8, help="images in a batch")
    parser.add_argument("-n", "--batches", type=_positive, default=3, help="batches to run")
    parser.add_argument("--images", type=_positive, default=256, help="use at most this many of DATA, evenly spread")
    parser.add_argument("--size", type=_positive, default=224, help="size of the images in pixels")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where images are processed")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    args = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _folder(args.root, args.images, Path(scratch))
            if len(folder) < args.batch_size:
                msg = f"{folder.root}: a batch of {args.batch_size} images needs as many, there are {len(folder)}"
                raise ValueError(msg)
            _run(args, folder, Path(scratch))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"{parser.prog} {args.name}: error: {error}\n")
        return 1
    return 0


def _run(args: argparse.Namespace, folder: ImageFolder, scratch: Path) -> None:
    """Build the example on `folder` in each of its variants, and print a few batches of each."""
    definition = import_module(f"pipelines.examples.{args.name}").training_pipeline
    for positional, options in EXAMPLES[args.name](folder, scratch):
        pipeline = definition(
            *positional,
            **options,
            size=args.size,
            device=args.device,
            batch_size=args.batch_size,
            num_threads=2,
            device_id=0 if args.device == "gpu" else None,
            seed=args.seed,
        )
        for batch in range(args.batches):
            form = f", form {options['form']}" if "form" in options else ""
            sys.stdout.write(f"{args.name}{form}, batch {batch}\n{_described(_next(pipeline))}")


def _next(pipeline: Any) -> list[np.ndarray[Any, Any]]:
    """Run the pipeline once; begin the next epoch where this one has ended, as only external sources do."""
    try:
        outputs = pipeline.run()
    except StopIteration:
        pipeline.reset()
        outputs = pipeline.run()
    return [np.array(output.as_cpu().as_tensor()) for output in outputs]


def _described(outputs: list[np.ndarray[Any, Any]]) -> str:
    text = ""
    for name, array in zip(OUTPUTS, outputs, strict=False):
        values = " " + " ".join(f"{value:.3f}" for value in array) if name == "lam" else ""
        text += f"  {name:<13} {array.shape} {array.dtype}{values}\n"
    return text


def _folder(root: Path | None, limit: int, scratch: Path) -> ImageFolder:
    if root is None:
        make_sample_data(scratch / "data", train=4, val=1)
        root = scratch / "data"
    folder = list_image_folder(root / "train" if (root / "train").is_dir() else root)
    chosen = np.unique(np.linspace(0, len(folder) - 1, min(limit, len(folder))).round().astype(int)).tolist()
    files, labels = ([values[number] for number in chosen] for values in (folder.files, folder.labels))
    return ImageFolder(folder.root, folder.classes, files, labels)


# The arguments of a pipeline: positional ones and options.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _from_files(folder: ImageFolder, scratch: Path) -> Iterator[Arguments]:
    yield (folder.files, folder.labels), {}


def _from_records(write: Writer) -> Callable[[ImageFolder, Path], Iterator[Arguments]]:
    def convert(folder: ImageFolder, scratch: Path) -> Iterator[Arguments]:
        samples = [(Path(file).read_bytes(), label) for file, label in zip(folder.files, folder.labels, strict=True)]
        write(samples, scratch / "records", scratch / "index")
        yield (str(scratch / "records"), str(scratch / "index")), {}

    return convert


def _from_arrays(folder: ImageFolder, scratch: Path) -> Iterator[Arguments]:
    from PIL import Image

    from pipelines.examples.external_source import ShuffledArrays

    images = []
    for file in folder.files:
        with Image.open(file) as image:
            images.append(np.array(image.convert("RGB")))
    yield (ShuffledArrays(images, folder.labels),), {}


def _with_each_form(folder: ImageFolder, scratch: Path) -> Iterator[Arguments]:
    """Give the folder's labels in three forms; as multi-label vectors each image has its class and the next one."""
    num_classes = len(folder.classes)
    one_hot = np.eye(num_classes, dtype=np.float32)
    for form in ("class_ids", "one_hot", "multi_label"):
        tags = np.maximum(one_hot, np.roll(one_hot, 1, axis=1)) if form == "multi_label" else None
        yield (folder.files, folder.labels), {"form": form, "num_classes": num_classes, "tags": tags}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        msg = f"must be an integer of at least 1, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


# Name of an example -> what makes its pipeline's arguments, once or for several variants, from a folder of images.
EXAMPLES: Mapping[str, Callable[[ImageFolder, Path], Iterator[Arguments]]] = MappingProxyType(
    {
        "auto_augment": _from_files,
        "conditionals": _from_files,
        "external_source": _from_arrays,
        "float16": _from_files,
        "label_forms": _with_each_form,
        "mxnet_recordio": _from_records(records.write_recordio),
        "tfrecord": _from_records(records.write_tfrecord),
        "webdataset": _from_records(records.write_tar),
    }
)


if __name__ == "__main__":
    sys.exit(main())

"""Images per second of the training pipeline, with and without mixing in the graph.

    python benchmarks/bench_pipeline.py DATA -o benchmarks/results/NAME.json

The variants take turns within each round, so that what else the machine does hits all of them alike. A figure is the
median over the rounds, with the least and the largest, and so is a ratio, which is taken within each round. DATA is a
folder of class folders; without it sample data are made. Files are listed as often as it takes for two batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from dali_saliencymix import DETECTORS
from dali_saliencymix import fn as mix_fn
from dali_saliencymix.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.sample_data import make_sample_data
from dali_saliencymix.training.logs import environment
from pipelines.loader import Loader, training_loader


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of class folders")
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-j", "--workers", type=int, default=2, help="DALI threads")
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=4, help="batches of a variant in each round")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_sample_data(folder)
        listed = list_image_folder(args.data or Path(folder, "train"))
        result = measure(listed, args)
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


def measure(folder: ImageFolder, args: argparse.Namespace) -> dict[str, object]:
    """Return images/s of each variant and the conditions of the measurement."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    repeats = -(-2 * args.batch_size // len(folder))
    repeated = ImageFolder(folder.root, folder.classes, folder.files * repeats, folder.labels * repeats)
    mixes = {"none": None, "cutmix": mix_fn.cutmix}
    mixes |= {name: functools.partial(mix_fn.saliencymix, saliency=name) for name in sorted(DETECTORS)}
    loaders = {
        name: training_loader(
            repeated,
            batch_size=args.batch_size,
            num_threads=args.workers,
            device=device,
            crop_size=args.crop_size,
            mix=mix,
        )
        for name, mix in mixes.items()
    }
    batches = {name: endless(loader) for name, loader in loaders.items()}
    rates: dict[str, list[float]] = {name: [] for name in mixes}
    for number in tqdm(range(args.rounds + 1), unit="round"):
        for name, stream in batches.items():
            next(stream)  # what was made in advance during the other variants' turns
            next(stream)
            next(stream)
            start = time.perf_counter()
            for _ in range(args.batches):
                next(stream)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                rates[name].append(args.batches * args.batch_size / (time.perf_counter() - start))
    # Within a round the variants follow each other closely: their ratio is steadier than the rates are.
    ratios = {name: [rate / none for rate, none in zip(rates[name], rates["none"], strict=True)] for name in mixes}
    return {
        "images_per_second": {name: spread(values, digits=1) for name, values in rates.items()},
        "relative_to_none": {name: spread(values, digits=3) for name, values in ratios.items()},
        "conditions": {
            **environment(device),
            "images": len(folder),
            "batch_size": args.batch_size,
            "crop_size": args.crop_size,
            "dali_threads": args.workers,
            "rounds": args.rounds,
            "batches_per_round": args.batches,
            "command": "python benchmarks/bench_pipeline.py "
            f"DATA -b {args.batch_size} -j {args.workers} --crop-size {args.crop_size} "
            f"--rounds {args.rounds} --batches {args.batches}",
        },
    }


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Return median, least and largest value."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def endless(loader: Loader):
    """Give batches epoch after epoch."""
    while True:
        yield from loader


if __name__ == "__main__":
    main()

"""What each saliency detector costs, where its peaks lie, and how far they are from those of `fine_grained`.

    python benchmarks/bench_detectors.py DATA -o benchmarks/results/NAME.json

Images are resized to a short side of 8/7 of the size and cropped at the centre, as for validation. Times are those of
the detector alone on a batch that lies in memory, on NumPy and, where there is a GPU, on CuPy; detectors take turns
within each round. Peaks are those that mixing takes. DATA is a folder of class folders; without it sample data are
made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from dali_saliencymix import DETECTORS, saliency_peaks
from dali_saliencymix.image_folder import list_image_folder
from dali_saliencymix.sample_data import make_sample_data
from dali_saliencymix.training.logs import environment

REFERENCE = "fine_grained"  # the paper's choice


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of class folders")
    parser.add_argument("-b", "--batch-size", type=int, default=128, help="images in a batch that is timed")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--images", type=int, default=1000, help="most images to take peaks of, picked evenly")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_sample_data(folder)
        files = list_image_folder(args.data or Path(folder, "train")).files
        picked = [files[i * len(files) // min(args.images, len(files))] for i in range(min(args.images, len(files)))]
        images = decoded(picked, args.size)
    text = json.dumps(measure(images, args), indent=2) + "\n"
    sys.stdout.write(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


def decoded(files: list[str], size: int) -> np.ndarray:
    """Decode, resize the short side to 8/7 of `size` and crop the centre: (N, size, size, 3) uint8."""

    @pipeline_def(batch_size=32, num_threads=2, device_id=None, prefetch_queue_depth=1)
    def centres():
        encoded, _ = fn.readers.file(files=files, pad_last_batch=True)
        images = fn.resize(fn.decoders.image(encoded), resize_shorter=round(size * 8 / 7))
        return fn.crop(images, crop=(size, size))

    pipeline = centres()
    batches = [np.array(pipeline.run()[0].as_tensor()) for _ in range(-(-len(files) // 32))]
    return np.concatenate(batches)[: len(files)]


def measure(images: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Return cost and peaks of each detector, and the conditions of the measurement."""
    batch = images[np.arange(args.batch_size) % len(images)]
    times = {"numpy": timed(batch, args.rounds, lambda: None)}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        import cupy

        times["cupy"] = timed(cupy.asarray(batch), args.rounds, cupy.cuda.Device().synchronize)

    peaks = {name: peak_positions(detector, images) for name, detector in DETECTORS.items()}
    return {
        "milliseconds_per_batch": times,
        "share_of_peaks": {
            "uniform": {"border_ring": 0.234, "central_quarter": 0.25},
            **{name: places(positions) for name, positions in peaks.items()},
        },
        f"agreement_with_{REFERENCE}": {
            "peaks_of_other_images": agreement(other_pairs(peaks[REFERENCE])),
            **{name: agreement(positions - peaks[REFERENCE]) for name, positions in peaks.items()},
        },
        "conditions": {
            **environment(device),
            "cpu_threads": torch.get_num_threads(),
            "images": len(images),
            "batch_size": args.batch_size,
            "size": args.size,
            "rounds": args.rounds,
            "command": "python benchmarks/bench_detectors.py "
            f"DATA -b {args.batch_size} --size {args.size} --images {args.images} --rounds {args.rounds}",
        },
    }


def timed(batch: Any, rounds: int, wait: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Return the milliseconds that each detector takes for `batch`, an array of NumPy or CuPy."""
    times: dict[str, list[float]] = {name: [] for name in DETECTORS}
    for number in tqdm(range(rounds + 1), unit="round"):
        for name, detector in DETECTORS.items():
            wait()
            start = time.perf_counter()
            detector(batch)
            wait()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: spread(values, digits=2) for name, values in times.items()}


def peak_positions(detector: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Return the centre of each peak's pixel as a fraction of the side: (N, 2)."""
    size = images.shape[1]
    peaks = [saliency_peaks(detector(images[i : i + 128]), size, size) for i in range(0, len(images), 128)]
    return (np.concatenate(peaks) + 0.5) / size


def places(positions: np.ndarray) -> dict[str, float]:
    """Return the share of peaks in the outer 1/16 along each side, and in the central quarter of the area."""
    from_centre = np.abs(positions - 0.5).max(axis=1)
    shares = {"border_ring": from_centre > 1 / 2 - 1 / 16, "central_quarter": from_centre < 1 / 4}
    return {name: round(float(share.mean()), 3) for name, share in shares.items()}


def agreement(differences: np.ndarray) -> dict[str, float]:
    """Return the mean length of `differences` (N, 2) between peaks, and the share of those under 1/8 of the side."""
    distance = np.hypot(*differences.T)
    return {
        "mean_distance": round(float(distance.mean()), 3),
        "within_an_eighth": round(float((distance < 1 / 8).mean()), 3),
    }


def other_pairs(positions: np.ndarray) -> np.ndarray:
    """Return the differences between the peaks of all pairs of different images: what chance would give."""
    differences = positions[:, None] - positions
    return differences[~np.eye(len(positions), dtype=bool)]


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Return median, least and largest value."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


if __name__ == "__main__":
    main()

"""Measure the cost of each saliency detector, where its peaks are, and how far they are from those of `fine_grained`.

    python -m benchmarks.bench_detectors DATA -o benchmarks/results/NAME.json

Images are resized to a short side of 8/7 of the size and cropped at the centre, as for validation. The times are of the
detector alone, on a batch in memory: on NumPy and, if there is a GPU, on CuPy. The peaks are those that mixing uses.
Detectors that OpenCV also has are compared with OpenCV's, map by map. DATA is a folder of class folders; without it,
the script makes images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def

from benchmarks import data, machine, opencv, program
from benchmarks.record import Record, figures_of
from benchmarks.timing import Timed, array_library
from dali_saliencymix import DETECTORS, saliency_peaks
from dali_saliencymix.datasets.damage import find_unusable
from dali_saliencymix.measure.figures import significant

REFERENCE = "fine_grained"  # the paper's choice


def main() -> None:
    parser = program.parser(__doc__, *program.ROUNDS, "data", "batch_size", batch_size=128)
    parser.add_argument("--size", type=program.positive, default=224, help="height and width of the images")
    most = "maximum number of images to find peaks in, picked evenly"
    # With a single image there are no peaks of other images to compare with.
    parser.add_argument("--images", type=program.at_least_two, default=1000, help=most)
    options = parser.parse_args()

    with data.images_of(options) as folder:
        options.images = min(options.images, len(folder))
        chosen = [folder.files[i * len(folder) // options.images] for i in range(options.images)]
        images = decoded(chosen, options.size)
    record = Record("detectors", options)
    record.add(peaks(images))
    record.add({"against_opencv": against_opencv(images, record.not_measured)})
    batch = images[np.arange(options.batch_size) % len(images)]
    measure_times(record, batch, gpu=False)
    if machine.wants_gpu(options):
        measure_times(record, batch, gpu=True)
    record.end()


def decoded(files: list[str], size: int) -> np.ndarray:
    """Decode, resize the short side to 8/7 of `size` and crop the centre: (N, size, size, 3) uint8."""
    if bad := find_unusable(files):  # the decoder's error would not name the file
        msg = ": ".join(next(iter(bad.items())))
        raise ValueError(msg)

    @pipeline_def(batch_size=32, num_threads=2, device_id=None, prefetch_queue_depth=1)
    def centres():
        encoded, _ = fn.readers.file(files=files, pad_last_batch=True)
        images = fn.resize(fn.decoders.image(encoded), resize_shorter=round(size * 8 / 7))
        return fn.crop(images, crop=(size, size))

    pipeline = centres()
    batches = [np.array(pipeline.run()[0].as_tensor()) for _ in range(-(-len(files) // 32))]
    return np.concatenate(batches)[: len(files)]


def measure_times(record: Record, batch: np.ndarray, *, gpu: bool) -> None:
    """Measure the milliseconds that each detector takes for a batch, of NumPy or of CuPy."""
    xp = array_library(gpu)
    library, batch = xp.__name__, xp.asarray(batch)
    calls = {
        name: Timed(functools.partial(find, batch), gpu=gpu)
        for name, find in DETECTORS.items()
        if record.ask_for(f"{library} / {name}", "milliseconds_per_batch", library, name)
    }
    record.measure(calls, lambda times: {"milliseconds_per_batch": {library: figures_of(times)}}, where=f"{library} / ")


def peaks(images: np.ndarray) -> dict[str, Any]:
    """Return where the peaks of each detector are, and how far they are from those of the reference."""
    found = {name: peak_positions(detector, images) for name, detector in DETECTORS.items()}
    return {
        "share_of_peaks": {
            "uniform": {"border_ring": 0.234, "central_quarter": 0.25},
            **{name: places(positions) for name, positions in found.items()},
        },
        f"agreement_with_{REFERENCE}": {
            "peaks_of_other_images": agreement(other_pairs(found[REFERENCE])),
            **{name: agreement(positions - found[REFERENCE]) for name, positions in found.items()},
        },
    }


def against_opencv(images: np.ndarray, not_measured: dict[str, str]) -> dict[str, Any]:
    """Return the differences between our maps and OpenCV's, for the detectors that both have; maps are in [0, 1].

    Our maps are resized to OpenCV's size if they are smaller, with OpenCV's own interpolation.
    """
    if reason := opencv.why_not():
        not_measured["against_opencv"] = reason
        return {}
    import cv2

    height, width = images.shape[1:3]
    found = {}
    for name in opencv.DETECTORS:
        theirs = np.stack(opencv.saliency_maps(images, name))
        maps = DETECTORS[name](images)
        ours = np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR_EXACT) for one in maps])
        own, other = (saliency_peaks(one, height, width) for one in (maps, theirs))
        found[name] = {
            "equal_maps": _share((ours == theirs).all(axis=(1, 2))),
            "largest_difference": significant(float(np.abs(ours - theirs).max()), 2),
            "same_peak": _share([one.argmax() == two.argmax() for one, two in zip(ours, theirs, strict=True)]),
            "peak_of_mixing_within_a_pixel": _share(np.abs(own - other).max(axis=1) <= 1),
        }
    return found


def _share(found: Any) -> float:
    return round(float(np.mean(found)), 3)


def peak_positions(detector: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Return the centre of the pixel of each peak as a fraction of the side: (N, 2)."""
    size = images.shape[1]
    peaks = [saliency_peaks(detector(images[i : i + 128]), size, size) for i in range(0, len(images), 128)]
    return (np.concatenate(peaks) + 0.5) / size


def places(positions: np.ndarray) -> dict[str, float]:
    """Return the share of peaks in the outer 1/16 along each side and in the central quarter of the area."""
    from_centre = np.abs(positions - 0.5).max(axis=1)
    return {"border_ring": _share(from_centre > 1 / 2 - 1 / 16), "central_quarter": _share(from_centre < 1 / 4)}


def agreement(differences: np.ndarray) -> dict[str, float]:
    """Return the mean length of `differences` (N, 2) between peaks, and the share of those under 1/8 of the side."""
    distance = np.hypot(*differences.T)
    return {"mean_distance": round(float(distance.mean()), 3), "within_an_eighth": _share(distance < 1 / 8)}


def other_pairs(positions: np.ndarray) -> np.ndarray:
    """Return the differences between the peaks of all pairs of different images: the level of chance."""
    differences = positions[:, None] - positions
    return differences[~np.eye(len(positions), dtype=bool)]


if __name__ == "__main__":
    program.run(main)

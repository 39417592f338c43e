"""What each step of the mix costs, on arrays that lie in memory: NumPy, CuPy, kernels for both, OpenCV by image.

    python -m benchmarks.bench_ops -o benchmarks/results/NAME.json

Images are noise: no step's cost depends on what they show. `bytes` is the least that a step has to move, what it reads
and what it gives counted once; their rate is compared with that of copying a large array in the same run. On a GPU the
inputs take turns, so that they do not stay in its cache, and the memory that the whole mix takes is measured too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import dali_saliencymix as ds
from benchmarks import machine, measure, opencv
from dali_saliencymix.normalise import paste_normalised

_NUM_CLASSES = 1000
_ROTATED_BYTES = 256 * 2**20  # several times the cache of a GPU


class Variant(NamedTuple):
    """One way to do one step."""

    call: Callable[[], Any]
    bytes_moved: int
    on_gpu: bool


def main() -> None:
    """Measure and write the result."""
    parser = measure.parser_of_rounds(__doc__)
    parser.add_argument("--sizes", type=measure.positive, nargs="+", default=[224, 32], help="height and width")
    parser.add_argument("-b", "--batches", type=measure.positive, nargs="+", default=[128, 1, 8, 32, 512])
    parser.add_argument("--detectors", nargs="+", choices=list(ds.DETECTORS), default=list(ds.DETECTORS))
    parser.add_argument("--cpu-up-to", type=measure.positive, default=512, help="largest batch measured on the CPU")
    parser.add_argument(
        "--copy-megabytes", type=measure.positive, help="array for the bandwidth; 256 or, on a GPU, 2048"
    )
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    options.copy_megabytes = options.copy_megabytes or (2048 if gpu else 256)

    result: dict[str, Any] = {"benchmark": "ops", "milliseconds_per_batch": {}, "not_measured": {}}
    result["conditions"] = machine.conditions(options, gpu=gpu)
    devices = ["cpu", "gpu"] if gpu else ["cpu"]
    megabytes = {"cpu": min(options.copy_megabytes, 256), "gpu": options.copy_megabytes}
    result["copy_gigabytes_per_second"] = {
        device: measure.memory_bandwidth(gpu=device == "gpu", megabytes=megabytes[device]) for device in devices
    }
    if gpu:
        result["peak_memory_relative_to_batch"] = {}
    if why_not := opencv.why_not():
        result["not_measured"]["opencv"] = why_not
    processes = None if why_not else opencv.Processes(machine.cores())
    places = list(itertools.product(options.sizes, options.batches))
    budget = measure.Budget(options.seconds, len(places))
    try:
        for size, batch in places:
            measure_place(result, size, batch, options, gpu, processes, budget.next_part())
    finally:
        if processes:
            processes.close()
    measure.write(result, options.output)
    measure.show(result)


def measure_place(
    result: dict[str, Any],
    size: int,
    batch: int,
    options: Any,
    gpu: bool,
    processes: opencv.Processes | None,
    seconds: float,
) -> None:
    """Measure all steps at one size of images and batches, and put them into `result`."""
    place = f"{size} px, batch {batch}"
    inputs = Inputs(size, batch)
    variants: dict[str, Variant] = {}
    if batch <= options.cpu_up_to:
        variants |= package_variants(inputs, "numpy", options.detectors)
        if processes:
            variants |= opencv_variants(inputs, processes, options.detectors)
    else:
        result["not_measured"][f"{place} / on the CPU"] = f"--cpu-up-to {options.cpu_up_to}"
    if gpu:
        variants |= package_variants(inputs, "cupy", options.detectors)
        result["peak_memory_relative_to_batch"][place] = peak_memory(variants, inputs)

    reasons: dict[str, str] = {}
    timed = {name: measure.Timed(variant.call, gpu=variant.on_gpu) for name, variant in variants.items()}
    copies = result["copy_gigabytes_per_second"]
    for values in measure.in_turns(timed, options.rounds, seconds=seconds, not_measured=reasons):
        found: dict[str, dict[str, Any]] = {}
        for name, times in values.items():
            step, _, implementation = name.partition(" | ")
            rate = variants[name].bytes_moved / measure.figure(times)["median"] / 1e6
            found.setdefault(step, {})[implementation] = {
                **measure.figure(times),
                "bytes": variants[name].bytes_moved,
                "share_of_copy_rate": measure.significant(
                    rate / copies["gpu" if variants[name].on_gpu else "cpu"]["median"], 3
                ),
            }
        result["milliseconds_per_batch"][place] = found
        measure.write(result, options.output)
    result["not_measured"] |= {f"{place} / {name}": reason for name, reason in reasons.items()}


class Inputs:
    """A batch and the draws for it, in NumPy."""

    def __init__(self, size: int, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
        self.source_index, self.lam = ds.draw_params(rng, batch)
        self.labels = rng.integers(0, _NUM_CLASSES, batch)


def package_variants(inputs: Inputs, library: str, detectors: list[str]) -> dict[str, Variant]:
    """Return each step as this package does it with one array library, named ``step | implementation``."""
    on_gpu = library == "cupy"
    xp: Any = np
    if on_gpu:
        import cupy as xp
    copies = min(16, math.ceil(_ROTATED_BYTES / inputs.images.nbytes)) if on_gpu else 1
    batches = itertools.cycle([xp.asarray(inputs.images).copy() for _ in range(copies)])
    size = inputs.images.shape[1:3]
    source_index, lam, labels = (xp.asarray(array) for array in (inputs.source_index, inputs.lam, inputs.labels))
    images = next(batches)

    variants: dict[str, Variant] = {}

    def add(
        step: str, function: Callable[..., Any], call: Callable[..., Any], moved: int, offers: Callable[..., Any]
    ) -> None:
        for implementation, chosen in implementations(offers, library):
            made = functools.partial(call, functools.partial(function, **chosen))
            variants[f"{step} | {implementation}"] = Variant(made, moved, on_gpu)

    maps = {}
    for name in detectors:
        with contextlib.suppress(Exception):  # what is wrong with it will be said when its turn comes
            maps[name] = ds.DETECTORS[name](images)
        moved = images.nbytes + (maps[name].nbytes if name in maps else 0)
        detector = ds.DETECTORS[name]
        add(f"saliency {name}", detector, lambda function: function(next(batches)), moved, detector)
    for made in {made.shape: made for made in maps.values()}.values():
        step = f"peak of {made.shape[1]}x{made.shape[2]} maps"
        moved = made.nbytes + 8 * len(made)
        add(step, ds.saliency_peaks, lambda function, made=made: function(made, *size), moved, ds.saliency_peaks)
    peaks = xp.asarray(np.random.default_rng(1).integers(0, size, (len(images), 2)))
    boxes = ds.boxes_at(peaks, lam, *size)

    def boxes_and_lam(function: Callable[..., Any]) -> Any:
        found = function(peaks, lam, *size)
        return found, ds.kept_fraction(found, *size)

    def pasted(function: Callable[..., Any]) -> Any:
        return function(next(batches), source_index, boxes)

    def targets(function: Callable[..., Any]) -> Any:
        return function(labels, labels, lam, num_classes=_NUM_CLASSES)

    moved = peaks.nbytes + boxes.nbytes + 2 * lam.nbytes
    add("boxes and lam", ds.boxes_at, boxes_and_lam, moved, ds.boxes_at)
    add("paste", ds.paste_boxes, pasted, 2 * images.nbytes, ds.paste_boxes)
    options: dict[str, Any] = {"mean": [124, 116, 104], "std": [58, 57, 57], "mirror": labels % 2}
    # New memory for a result of this size would cost more than the work: a loader has it already.
    options["out"] = xp.empty((len(images), 3, *size), xp.float32)

    def normalised(function: Callable[..., Any]) -> Any:
        return function(next(batches), source_index, boxes, **options)

    add("paste, mirror, normalise", paste_normalised, normalised, 5 * images.nbytes, paste_normalised)
    moved = 2 * labels.nbytes + lam.nbytes + 4 * len(labels) * _NUM_CLASSES
    add("labels", ds.soft_labels, targets, moved, ds.soft_labels)
    for name in detectors:
        mix = functools.partial(ds.saliencymix, saliency=name)
        add(
            f"mix {name}",
            mix,
            lambda function: function(next(batches), source_index, lam),
            2 * images.nbytes,
            ds.DETECTORS[name],
        )  # its algorithm is the detector's
    return variants


def implementations(function: Callable[..., Any], library: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the implementations that a function offers for arrays of a library, with the options that choose them."""
    if "algorithm" not in inspect.signature(function).parameters:
        yield library, {}
        return
    yield library, {"algorithm": "array"}
    yield "gpu kernel" if library == "cupy" else "cpu kernel", {"algorithm": "kernel"}


def opencv_variants(inputs: Inputs, processes: opencv.Processes, detectors: list[str]) -> dict[str, Variant]:
    """Return OpenCV's detectors in this process and in as many as there are cores."""
    images = inputs.images
    path, moved = processes.share(images), images.nbytes + 4 * math.prod(images.shape[:3])
    variants = {}
    for name in set(opencv.DETECTORS) & set(detectors):
        here = functools.partial(opencv.saliency_maps, images, name)
        there = functools.partial(processes.saliency_maps, path, len(images), name)
        variants[f"saliency {name} | opencv"] = Variant(here, moved, on_gpu=False)
        variants[f"saliency {name} | opencv, {processes.count} processes"] = Variant(there, moved, on_gpu=False)
    return variants


def peak_memory(variants: dict[str, Variant], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Return the GPU memory that each mix takes from a pool of its own, as a multiple of the batch's bytes.

    The pool keeps what it has taken, so its size afterwards is the most that was in use, in CuPy's blocks, the result
    included. What lives on between calls, as constants and plans of FFTs, is there before and not counted.
    """
    import cupy

    found: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        step, _, implementation = name.partition(" | ")
        if not (variant.on_gpu and step.startswith("mix ")):
            continue
        try:
            variant.call()
            pool = cupy.cuda.MemoryPool()
            with cupy.cuda.using_allocator(pool.malloc):
                variant.call()
            cupy.cuda.get_current_stream().synchronize()
        except Exception as error:  # the timing says why, and goes on with the others
            measure.say(f"not measured: {name}: {measure.one_line(error)}")
            continue
        taken = pool.total_bytes() / inputs.images.nbytes
        found.setdefault(step, {})[implementation] = measure.significant(taken, 3)
    return found


if __name__ == "__main__":
    measure.run(main)

"""Measure the cost of each step of the mix on arrays in memory: NumPy, CuPy, kernels for both, OpenCV image by image.

    python -m benchmarks.bench_ops -o benchmarks/results/NAME.json

The images are noise: the cost of a step does not depend on their content. `bytes` is the minimum that a step has to
move: what it reads and what it returns, counted once. The rate of these bytes is compared with that of copying a large
array in the same run. On a GPU the calls rotate over several inputs, so that these do not stay in the cache, and the
memory of the whole mix is measured too. There each step is timed as it is called and as a CUDA graph, which leaves out
the host; one row of the CPU is included for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import dali_saliencymix as ds
from benchmarks import machine, opencv, peers, program
from benchmarks.record import Record
from benchmarks.timing import Graph, Timed, array_library
from dali_saliencymix import _cuda as cuda
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.figures import figure, significant
from dali_saliencymix.measure.results import one_line
from dali_saliencymix.pixels import paste_normalised

_NUM_CLASSES = 1000
_ROTATED_BYTES = 256 * 2**20  # several times the cache of a GPU


class Variant(NamedTuple):
    """One implementation of one step."""

    call: Callable[[], Any]
    bytes_moved: int
    on_gpu: bool


def main() -> None:
    parser = program.parser(__doc__, *program.ROUNDS, "detectors")
    parser.add_argument("--sizes", type=program.positive, nargs="+", default=[224, 32], help="height and width")
    batches = "default: 256 128 32 512 1, without a GPU 128 1 8 32 512"
    parser.add_argument("-b", "--batches", type=program.positive, nargs="+", help=batches)
    array = "size of the array whose copy rate is measured (default: 256, on a GPU 2048)"
    parser.add_argument("--copy-megabytes", type=program.positive, help=array)
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    options.batches = options.batches or ([256, 128, 32, 512, 1] if gpu else [128, 1, 8, 32, 512])
    options.copy_megabytes = options.copy_megabytes or (2048 if gpu else 256)

    record = Record("ops", options)
    rate_of_copy = copy_rate(gpu=gpu, megabytes=options.copy_megabytes)
    record.add({"copy_gigabytes_per_second": {"gpu" if gpu else "cpu": rate_of_copy}})
    with contextlib.ExitStack() as stack:
        processes = None
        if why_not := "it is measured without a GPU" if gpu else opencv.why_not():
            record.not_measured["opencv"] = why_not
        else:
            processes = stack.enter_context(contextlib.closing(opencv.Processes(cores())))
        for size, batch in itertools.product(options.sizes, options.batches):
            inputs = Inputs(size, batch)
            for detector in options.detectors:
                measure_group(record, inputs, detector, options, gpu, processes, rate_of_copy["median"])
                gc.collect()
    record.end()


def measure_group(
    record: Record,
    inputs: Inputs,
    detector: str,
    options: argparse.Namespace,
    gpu: bool,
    processes: opencv.Processes | None,
    rate_of_copy: float,
) -> None:
    """Measure a detector and its mix at one image and batch size; with the first detector also all other steps."""
    count, size = inputs.images.shape[:2]
    place = f"{size} px, batch {count}"
    first, steps = (size, count) == (options.sizes[0], options.batches[0]), detector == options.detectors[0]
    record.ask_for(f"{place} / {detector}", "milliseconds_per_batch", place, f"mix {detector}")
    if record.seconds_left() < 0:
        return
    variants: dict[str, Variant] = {}
    with record.attempt(f"{place} / {detector}"):
        variants = package_variants(inputs, "cupy" if gpu else "numpy", detector, steps=steps)
    if not variants:
        return
    if gpu and first and steps:  # array operations, since compiling CPU kernels would use up GPU time
        reference = f"mix {detector} | numpy"
        variants[reference] = package_variants(inputs, "numpy", detector, steps=False)[reference]
    if processes:
        variants |= opencv_variants(inputs, processes, detector)
    if steps:
        with record.attempt(f"{place} / mixes of other packages"):
            for name, call in peers.ops_variants(inputs.images, gpu=gpu).items():
                variants[name] = Variant(call, 8 * inputs.images.size, gpu)  # float32 in, float32 out
    variants = {
        name: variant
        for name, variant in variants.items()
        if record.ask_for(f"{place} / {name}", "milliseconds_per_batch", place, *name.split(" | "))
    }
    if gpu and variants:
        record.add({"peak_memory_relative_to_batch": {place: peak_memory(variants, inputs)}})

    def result_of(values: dict[str, list[float]]) -> dict[str, Any]:
        of_place: dict[str, dict[str, Any]] = {}
        for name, times in values.items():
            step, _, implementation = name.partition(" | ")
            of_place.setdefault(step, {})[implementation] = with_share(times, variants[name], gpu, rate_of_copy)
        return {"milliseconds_per_batch": {place: of_place}}

    timed = {name: Timed(variant.call, gpu=variant.on_gpu) for name, variant in variants.items()}
    record.measure(timed, result_of, where=f"{place} / ")


def copy_rate(*, gpu: bool, megabytes: int, rounds: int = 5) -> dict[str, float]:
    """Return the gigabytes per second of copying a large array; reads and writes both count."""
    xp = array_library(gpu)
    source = xp.ones(megabytes * 2**20 // 8, xp.float64)
    target = xp.zeros_like(source)
    timed = Timed(lambda: xp.copyto(target, source), gpu=gpu, least_ms=20)
    return figure([2 * source.nbytes / timed() / 1e6 for _ in range(rounds)])


def with_share(times: list[float], variant: Variant, gpu: bool, rate_of_copy: float) -> dict[str, float]:
    """Return the figure of a variant with its bytes, and its rate relative to that of a copy."""
    found = {**figure(times), "bytes": variant.bytes_moved}
    if variant.on_gpu is gpu:
        rate = variant.bytes_moved / found["median"] / 1e6
        found["share_of_copy_rate"] = significant(rate / rate_of_copy, 3)
    return found


class Inputs:
    """A batch and its random draws, as NumPy arrays."""

    def __init__(self, size: int, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
        self.source_index, self.lam = ds.draw_params(rng, batch)
        self.labels = rng.integers(0, _NUM_CLASSES, batch)


def package_variants(inputs: Inputs, library: str, detector: str, *, steps: bool) -> dict[str, Variant]:
    """Return this package's implementations for one array library, named ``step | implementation``."""
    gpu = library == "cupy"
    xp = array_library(gpu)
    copies = min(16, math.ceil(_ROTATED_BYTES / inputs.images.nbytes)) if gpu else 1
    batches = itertools.cycle([xp.asarray(inputs.images).copy() for _ in range(copies)])
    size = inputs.images.shape[1:3]
    source_index, lam, labels = (xp.asarray(array) for array in (inputs.source_index, inputs.lam, inputs.labels))
    images = next(batches)

    variants: dict[str, Variant] = {}

    def add(step: str, implementation: str, call: Callable[[], Any], moved: int) -> None:
        """Add one implementation of a step; on a GPU also as a CUDA graph."""
        name = f"{step} | {implementation}"
        variants[name] = Variant(call, moved, gpu)
        if gpu:
            variants[f"{name}, graph"] = Variant(Graph(call, copies), moved, gpu)

    def add_all(
        step: str, function: Callable[..., Any], call: Callable[..., Any], moved: int, offers: Any = None
    ) -> None:
        """Add a step with all implementations of `function`, or with those that `offers` has."""
        for implementation, chosen in implementations(offers or function, library):
            add(step, implementation, functools.partial(call, functools.partial(function, **chosen)), moved)

    find = ds.DETECTORS[detector]
    maps = find(images)
    add_all(f"saliency {detector}", find, lambda function: function(next(batches)), images.nbytes + maps.nbytes)
    add_all(
        f"mix {detector}",
        functools.partial(ds.saliencymix, saliency=detector),
        lambda function: function(next(batches), source_index, lam),
        2 * images.nbytes,
        find,  # the algorithm is the detector's
    )
    step = f"peak of {maps.shape[1]}x{maps.shape[2]} maps"
    moved = maps.nbytes + 8 * len(maps)
    add_all(step, ds.saliency_peaks, lambda function: function(maps, *size), moved)
    if not steps:
        return variants
    peaks = xp.asarray(np.random.default_rng(1).integers(0, size, (len(images), 2), np.int32))
    boxes = ds.boxes_at(peaks, lam, *size)

    def boxes_and_lam(function: Callable[..., Any]) -> Any:
        found = function(peaks, lam, *size)
        return found, ds.kept_fraction(found, *size)

    def pasted(function: Callable[..., Any]) -> Any:
        return function(next(batches), source_index, boxes)

    options: dict[str, Any] = {"mean": [124, 116, 104], "std": [58, 57, 57], "mirror": labels % 2 == 1}
    if not gpu:
        # Allocating this much would cost more than the work. Loaders reuse their buffers, and so does CuPy's pool.
        options["out"] = np.empty((len(images), 3, *size), np.float32)

    def normalised(function: Callable[..., Any]) -> Any:
        return function(next(batches), source_index, boxes, **options)

    def targets(function: Callable[..., Any]) -> Any:
        return function(labels, labels, lam, num_classes=_NUM_CLASSES)

    of_boxes = peaks.nbytes + boxes.nbytes + 2 * lam.nbytes
    if gpu:  # the public functions of these two steps have no option for the kernel
        given = (peaks, source_index, lam, *size)
        add("boxes and lam", "gpu kernel", functools.partial(cuda.boxes_at_peaks, *given), of_boxes)
        add("paste", "gpu kernel", functools.partial(pasted, cuda.paste_boxes), 2 * images.nbytes)
    add_all("boxes and lam", ds.boxes_at, boxes_and_lam, of_boxes)
    add_all("paste", ds.paste_boxes, pasted, 2 * images.nbytes)
    add_all("paste, mirror, normalise", paste_normalised, normalised, 5 * images.nbytes)
    add_all("labels", ds.soft_labels, targets, 2 * labels.nbytes + lam.nbytes + 4 * len(labels) * _NUM_CLASSES)
    return variants


def implementations(function: Callable[..., Any], library: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the implementations of a function for arrays of a library, with the options that select them."""
    if "algorithm" not in inspect.signature(function).parameters:
        yield library, {}
        return
    yield "gpu kernel" if library == "cupy" else "cpu kernel", {"algorithm": "kernel"}
    yield library, {"algorithm": "array"}


def opencv_variants(inputs: Inputs, processes: opencv.Processes, detector: str) -> dict[str, Variant]:
    """Return OpenCV's detector of that name, if it has one, in this process and in one process per core."""
    if detector not in opencv.DETECTORS:
        return {}
    images = inputs.images
    path, moved = processes.share(images), images.nbytes + 4 * math.prod(images.shape[:3])
    here = functools.partial(opencv.saliency_maps, images, detector)
    there = functools.partial(processes.saliency_maps, path, len(images), detector)
    return {
        f"saliency {detector} | opencv": Variant(here, moved, on_gpu=False),
        f"saliency {detector} | opencv, {processes.count} processes": Variant(there, moved, on_gpu=False),
    }


def peak_memory(variants: dict[str, Variant], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Return the GPU memory that each mix allocates from a separate pool, as a multiple of the batch's bytes.

    A pool does not shrink, so its final size is the peak, in CuPy's blocks and including the result. Constants and FFT
    plans, which stay between calls, are allocated before and not counted.
    """
    import cupy

    found: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        step, _, implementation = name.partition(" | ")
        if not (variant.on_gpu and step.startswith("mix ") and implementation in ("cupy", "gpu kernel")):
            continue
        try:
            variant.call()
            pool = cupy.cuda.MemoryPool()
            with cupy.cuda.using_allocator(pool.malloc):
                variant.call()
            cupy.cuda.get_current_stream().synchronize()
        except Exception as error:  # the timing records the reason; the other mixes are still measured
            program.say(f"not measured: {name}: {one_line(error)}")
            continue
        taken = pool.total_bytes() / inputs.images.nbytes
        found.setdefault(step, {})[implementation] = significant(taken, 3)
    return found


if __name__ == "__main__":
    program.run(main)

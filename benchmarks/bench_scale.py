"""Measure how the cost grows with batch size, image size, detector size, threads, and the share of the JPEG engine.

    python -m benchmarks.bench_scale DATA -o benchmarks/results/NAME.json

On the first three axes, the figures are times of `saliencymix` on arrays in memory; on the other two, images per second
of the whole loader. On the axis `detector_size`, the detector sees only every second, third, ... pixel.

For times, `linear_from` is the smallest point from which on the cost per image, or per pixel, stays within 20 % of that
at the largest point. For threads, `linear_to` is the largest number up to which the rate per thread is at least 80 % of
that of the smallest number.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

import dali_saliencymix as ds
from benchmarks import data, loaders, machine, program
from benchmarks.record import Record
from benchmarks.timing import Timed, array_library
from dali_saliencymix.measure.environment import cores
from dali_saliencymix.measure.figures import figure
from dali_saliencymix.options import MixOptions

_TOLERANCE = 0.2
_ON_ARRAYS = ("batch", "size", "detector_size")
_OF_LOADERS = ("threads", "hw_decoder_load")

Variants = dict[str, Callable[[], float]]  # named ``curve @ point``


def main() -> None:
    common = ("data", "batch_size", "crop_size", "workers", "detectors")
    parser = program.parser(
        __doc__,
        *(*program.ROUNDS, *common),
        detectors=["spectral_residual", "fine_grained"],
        batch_size=128,
        crop_size=224,
    )
    parser.epilog = "-b, --crop-size and -j hold on the axes that do not vary them"
    parser.add_argument("--axes", nargs="+", choices=[*_ON_ARRAYS, *_OF_LOADERS], default=[*_ON_ARRAYS, "threads"])
    powers = [2**n for n in range(cores().bit_length()) if 2**n <= cores()]
    points: dict[str, tuple[Callable[[str], float], list[float], str]] = {
        "batch": (program.positive, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], "N"),
        "size": (program.positive, [32, 64, 96, 128, 160, 224, 320, 448], "PX"),
        "every": (program.positive, [1, 2, 3, 4, 7], "STEP"),
        "threads": (program.positive, powers, "N"),
        "hw-decoder-load": (program.share, [0.0, 0.3, 0.65, 0.8, 0.95], "X"),
    }
    for name, (kind, default, metavar) in points.items():
        about = "the detector sees every STEP-th pixel" if name == "every" else "points of that axis"
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=default, metavar=metavar, help=about)
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    if not gpu and "hw_decoder_load" in options.axes:
        msg = "--axes must not name hw_decoder_load without a GPU, got hw_decoder_load"
        raise ValueError(msg)

    with contextlib.ExitStack() as stack:
        conditions, folder = {}, None
        if set(options.axes) & set(_OF_LOADERS):
            folder = stack.enter_context(data.images_of(options))
            conditions = data.described(folder)
        record = Record("scale", options, **conditions)
        for axis in options.axes:
            if record.ask_for(axis, "curves", axis) and record.seconds_left() > 0:
                with record.attempt(axis):
                    measure_curves(record, axis, folder, options, gpu)
                gc.collect()  # pipelines are in reference cycles
    record.end()


def measure_curves(record: Record, axis: str, folder: Any, options: argparse.Namespace, gpu: bool) -> None:
    """Measure all points of an axis, interleaved."""
    on_arrays = axis in _ON_ARRAYS
    variants = array_variants(axis, options, gpu) if on_arrays else loader_variants(axis, folder, options)

    def result_of(values: dict[str, list[float]]) -> dict[str, Any]:
        curves: dict[str, dict[str, Any]] = {}
        for name, measured in values.items():
            curve, _, point = name.rpartition(" @ ")
            curves.setdefault(curve, {})[point] = figure(measured)
        found = {
            "unit": "ms" if on_arrays else "images/s",
            "points": curves,
            "linear": {name: linear(axis, of_curve) for name, of_curve in curves.items()},
        }
        return {"curves": {axis: found}}

    # Half of the time that is left, so that the later axes get some.
    record.measure(variants, result_of, share=0.5 if axis != options.axes[-1] else 1.0, where=f"{axis} / ")


def linear(axis: str, points: dict[str, Any]) -> dict[str, float]:
    """Return where a curve is linear; see the docstring of the module."""
    at = sorted((float(point), found["median"]) for point, found in points.items())
    if axis == "hw_decoder_load":
        return {}
    if axis == "threads":
        within = [x for x, rate in at if rate / x >= (1 - _TOLERANCE) * at[0][1] / at[0][0]]
        beyond = [x for x, _ in at if x not in within]
        return {"linear_to": max(x for x in within if not beyond or x < min(beyond))}
    power = 1 if axis == "batch" else 2  # cost by image, or by pixel
    per_unit = [(x, cost / x**power) for x, cost in at]
    largest = per_unit[-1][1]
    beyond = [x for x, cost in per_unit if abs(cost / largest - 1) > _TOLERANCE]
    return {"linear_from": min(x for x, _ in per_unit if not beyond or x > max(beyond))}


def array_variants(axis: str, options: argparse.Namespace, gpu: bool) -> Variants:
    """Return the mix at each point of an axis."""
    xp = array_library(gpu)
    variants: Variants = {}
    largest = {"batch": options.batch_size, "size": options.crop_size}
    for point in options.every if axis == "detector_size" else getattr(options, axis):
        shape = {**largest, axis: point}
        rng = np.random.default_rng(0)
        images = xp.asarray(rng.integers(0, 256, (shape["batch"], shape["size"], shape["size"], 3), np.uint8))
        draws = tuple(map(xp.asarray, ds.draw_params(rng, len(images))))
        for name in options.detectors:
            detector: Any = name
            at = point
            if axis == "detector_size":
                detector = functools.partial(_every, ds.DETECTORS[name], point)
                at = -(-options.crop_size // point)
            mix = functools.partial(ds.saliencymix, images, *draws, saliency=detector)
            variants[f"{name} @ {at}"] = Timed(mix, gpu=gpu)
    return variants


def _every(detector: Callable[..., Any], step: int, images: Any) -> Any:
    # Contiguous: the gaps must not change a detector's time.
    return detector(images[:, ::step, ::step].copy())


def loader_variants(axis: str, folder: Any, options: argparse.Namespace) -> Variants:
    """Return the loader at each point of an axis; for threads also with mixing."""
    mixes: dict[str, Any] = {"none": None}
    if axis == "threads":
        mixes |= {name: MixOptions(saliency=name) for name in options.detectors}
    changed = "workers" if axis == "threads" else axis
    variants: Variants = {}
    for point in getattr(options, axis):
        setting = loaders.setting_of(options, folder, **{"hw_decoder_load": 0.65, changed: point})
        for name, mix in mixes.items():
            stream = loaders.in_graph(setting, mix=mix)
            variants[f"{name} @ {point:g}"] = functools.partial(loaders.images_per_second, stream, batches=4)
    return variants


if __name__ == "__main__":
    program.run(main)

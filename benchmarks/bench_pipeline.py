"""Images per second of a loader alone, by what mixes and where: in DALI's graph, after it, or in torch's workers.

    python -m benchmarks.bench_pipeline DATA -o benchmarks/results/NAME.json

benchmarks/loaders.py and benchmarks/peers.py say what the variants are. They are measured in groups. In each round
every variant of a group gives a number of batches in its turn, and ratios are taken within a round. DATA is a folder of
class folders; without it images are made.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, loaders, machine, measure, peers
from benchmarks.record import Record

_REFERENCE = "none"


def main() -> None:
    """Measure and write the result."""
    makers = loaders.makers() | peers.makers()
    parser = measure.parser_of_rounds(__doc__)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of class folders")
    parser.add_argument("-b", "--batch-size", type=measure.positive, default=128)
    threads = "DALI threads, or worker processes of torch (default: all cores)"
    parser.add_argument("-j", "--workers", type=measure.positive, default=machine.cores(), help=threads)
    parser.add_argument("--crop-size", type=measure.positive, default=224)
    parser.add_argument("--batches", type=measure.positive, default=4, help="least batches of a variant in each round")
    parser.add_argument("--hw-decoder-load", type=measure.share, default=0.65, help="share for a GPU's JPEG engine")
    named = "one group of these; by default all, in groups; the one called none is measured in each"
    parser.add_argument("--variants", nargs="+", choices=list(makers), metavar="NAME", help=named)
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    groups = [options.variants] if options.variants else default_groups(gpu=gpu)

    with data.images_of(options) as folder:
        record = Record("pipeline", machine.conditions(options, gpu=gpu) | data.described(folder), options)
        setting = loaders.Setting(
            data.repeated(folder, 20 * options.batch_size),
            options.batch_size,
            options.workers,
            options.crop_size,
            torch.device("cuda", 0) if gpu else torch.device("cpu"),
            hw_decoder_load=options.hw_decoder_load,
        )
        for group in groups:
            lacking = record.lacking("images_per_second", group)
            if lacking and record.seconds_left() > 0:
                measure_group({_REFERENCE, *lacking}, makers, setting, record, options)
                gc.collect()  # pipelines are parts of cycles
    record.end()


def default_groups(*, gpu: bool) -> list[list[str]]:
    """Return the names of all that is compared on a device, those that matter most first."""
    others = [name for name in peers.makers() if gpu or not name.endswith("GPU")]
    return [*loaders.groups(gpu=gpu), others]


def measure_group(
    names: set[str], makers: dict[str, loaders.Maker], setting: loaders.Setting, record: Record, options: Any
) -> None:
    """Measure the loaders of these names in turns; those that cannot be made are listed with the reason."""
    variants: dict[str, Callable[[], float]] = {}
    for name, make in makers.items():
        if name not in names:
            continue
        try:
            stream = make(setting)
        except Exception as error:  # whatever it is: the others can be measured all the same
            record.leave_out(name, error)
        else:
            variants[name] = functools.partial(loaders.images_per_second, stream, setting, options.batches)
    if variants.keys() <= {_REFERENCE} < names:
        return
    loaders.say_memory(setting.device)
    record.begin_group()
    kept = {"seconds": record.seconds_left(), "not_measured": record.not_measured}
    for rates in measure.in_turns(variants, options.rounds, **kept):
        figures = {name: measure.figure(values) for name, values in rates.items()}
        record.add({"images_per_second": figures, "relative_to_none": measure.ratios(rates, _REFERENCE)})


if __name__ == "__main__":
    measure.run(main)

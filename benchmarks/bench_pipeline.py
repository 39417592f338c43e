"""Images per second of a loader alone, by what mixes and where: in DALI's graph, after it, or in torch's workers.

    python -m benchmarks.bench_pipeline DATA -o benchmarks/results/NAME.json

benchmarks/loaders.py says what the variants are. In each round every variant gives a number of batches in its turn;
ratios are taken within a round. DATA is a folder of class folders; without it images are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, loaders, machine, measure

_REFERENCE = "none"


def main() -> None:
    """Measure and write the result."""
    parser = measure.parser_of_rounds(__doc__)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of class folders")
    parser.add_argument("-b", "--batch-size", type=measure.positive, default=128)
    threads = "DALI threads, or worker processes of torch (default: all cores)"
    parser.add_argument("-j", "--workers", type=measure.positive, default=machine.cores(), help=threads)
    parser.add_argument("--crop-size", type=measure.positive, default=224)
    parser.add_argument("--batches", type=measure.positive, default=4, help="least batches of a variant in each round")
    parser.add_argument("--hw-decoder-load", type=measure.share, default=0.65, help="share for a GPU's JPEG engine")
    named = "see loaders.py; for ratios the one that is called none has to be among them"
    parser.add_argument("--variants", nargs="+", choices=list(loaders.makers()), metavar="NAME", help=named)
    options = parser.parse_args()
    budget = measure.Budget(options.seconds, 1)
    gpu = machine.wants_gpu(options)
    options.variants = options.variants or loaders.default_names(gpu=gpu)

    result: dict[str, Any] = {
        "benchmark": "pipeline",
        "images_per_second": {},
        "relative_to_none": {},
        "not_measured": {},
    }
    with data.images_of(options) as folder:
        result["conditions"] = machine.conditions(options, gpu=gpu) | data.described(folder)
        setting = loaders.Setting(
            data.repeated(folder, 20 * options.batch_size),
            options.batch_size,
            options.workers,
            options.crop_size,
            torch.device("cuda", 0) if gpu else torch.device("cpu"),
            hw_decoder_load=options.hw_decoder_load,
        )
        variants = made(loaders.makers(), options.variants, setting, options.batches, result["not_measured"])
        kept = {"seconds": budget.next_part(), "not_measured": result["not_measured"]}
        for rates in measure.in_turns(variants, options.rounds, **kept):
            result["images_per_second"] = {name: measure.figure(values) for name, values in rates.items()}
            result["relative_to_none"] = measure.ratios(rates, _REFERENCE)
            measure.write(result, options.output)
    measure.write(result, options.output)
    measure.show(result)


def made(
    makers: dict[str, loaders.Maker],
    names: list[str],
    setting: loaders.Setting,
    batches: int,
    not_measured: dict[str, str],
) -> dict[str, Callable[[], float]]:
    """Make the loaders of these names; those that cannot be made are listed with the reason."""
    variants = {}
    for name, make in makers.items():
        if name not in names:
            continue
        try:
            stream = make(setting)
        except Exception as error:  # whatever it is: the others can be measured all the same
            not_measured[name] = measure.one_line(error)
            measure.say(f"not measured: {name}: {not_measured[name]}")
        else:
            variants[name] = functools.partial(loaders.images_per_second, stream, setting, batches)
    return variants


if __name__ == "__main__":
    measure.run(main)

"""Measure the images per second of loaders alone, which mix in DALI's graph, after it, or in PyTorch's workers.

    python -m benchmarks.bench_pipeline DATA -o benchmarks/results/NAME.json

benchmarks/loaders.py and benchmarks/peers.py describe the variants. They are measured in groups. In each round every
variant of a group produces a number of batches, and ratios are taken within a round. DATA is a folder of class folders;
without it, the script makes images.
"""

from __future__ import annotations

import functools

from benchmarks import data, loaders, machine, peers, program
from benchmarks.record import Record, figures_of
from dali_saliencymix.measure.figures import ratios

_REFERENCE = "none"


def main() -> None:
    makers = loaders.makers() | peers.makers()
    parser = program.parser(__doc__, *program.ROUNDS, *loaders.OPTIONS, batch_size=128, crop_size=224)
    least = "minimum number of batches of a variant in each round (default: %(default)s)"
    parser.add_argument("--batches", type=program.positive, default=4, help=least)
    loaders.add_variants(parser, makers)
    options = parser.parse_args()
    groups = [options.variants] if options.variants else default_groups(gpu=machine.wants_gpu(options))

    with data.images_of(options) as folder:
        record = Record("pipeline", options, **data.described(folder))
        setting = loaders.setting_of(options, folder)
        for names in record.groups("images_per_second", groups, _REFERENCE):
            measure_group(record, names, makers, setting, options.batches)
    record.end()


def default_groups(*, gpu: bool) -> list[list[str]]:
    """Return the names of all loaders that are compared on a device, the most important first."""
    others = [name for name in peers.makers() if gpu or not name.endswith("GPU")]
    return [*loaders.groups(gpu=gpu), others]


def measure_group(
    record: Record, names: list[str], makers: dict[str, loaders.Maker], setting: loaders.Setting, batches: int
) -> None:
    """Measure the loaders of these names, interleaved."""
    streams = record.made(names, lambda name: makers[name](setting))
    if streams.keys() <= {_REFERENCE} < set(names):
        return
    loaders.say_memory(setting.device)
    variants = {name: functools.partial(loaders.images_per_second, stream, batches) for name, stream in streams.items()}
    record.measure(
        variants, lambda rates: {"images_per_second": figures_of(rates), "relative_to_none": ratios(rates, _REFERENCE)}
    )


if __name__ == "__main__":
    program.run(main)

"""Images per second of training: on one batch over and over, behind the loader, and behind the loader that mixes.

    python -m benchmarks.bench_train DATA -o benchmarks/results/NAME.json

The rate on a constant batch, which lies on the device, is what the network can do. The ratio of the loader's rate to it
says whether the loader holds the training back, and that of mixing to no mixing what mixing costs a training run.

Then the loaders run alone, and a probe measures for how long each batch holds the GIL: benchmarks/gil.py. The
difference to the loader that does not mix is the operator's. The calls of the operator are timed during the training.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn.functional import cross_entropy

from benchmarks import data, gil, loaders, machine, measure
from benchmarks.record import Record
from dali_saliencymix import DETECTORS

_CONSTANT, _UNMIXED = "constant batch", "none"


def main() -> None:
    """Measure and write the result."""
    parser = measure.parser_of_rounds(__doc__)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of class folders")
    parser.add_argument("-a", "--arch", help="of torchvision (default: resnet50, without a GPU resnet18)")
    parser.add_argument("-b", "--batch-size", type=measure.positive, help="default: 256, without a GPU 32")
    parser.add_argument("-j", "--workers", type=measure.positive, default=machine.cores(), help="DALI threads")
    parser.add_argument("--crop-size", type=measure.positive, help="default: 224, without a GPU 64")
    parser.add_argument(
        "--steps", type=measure.positive, help="of a variant in each round; default: 20, without a GPU 8"
    )
    detectors = ["spectral_residual", "fine_grained"]
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=detectors)
    parser.add_argument("--hw-decoder-load", type=measure.share, default=0.65, help="share for a GPU's JPEG engine")
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    defaults = ("resnet50", 256, 224, 20) if gpu else ("resnet18", 32, 64, 8)
    for name, default in zip(("arch", "batch_size", "crop_size", "steps"), defaults, strict=True):
        setattr(options, name, getattr(options, name) or default)
    if options.arch not in torchvision.models.list_models(torchvision.models):
        msg = f"--arch must be a classification network of torchvision, got {options.arch!r}"
        raise ValueError(msg)

    with data.images_of(options) as folder:
        conditions = machine.conditions(options, gpu=gpu) | data.described(folder)
        conditions |= {"torch_threads": torch.get_num_threads()}
        conditions |= {"precision": "bfloat16 autocast", "memory_format": "channels_last"}
        record = Record("train", conditions, options)
        repeated = data.repeated(folder, 20 * options.batch_size)
        setting = loaders.Setting(
            repeated,
            options.batch_size,
            options.workers,
            options.crop_size,
            device,
            hw_decoder_load=options.hw_decoder_load,
        )
        step = training_step(options.arch, setting)
        for group in groups(options.detectors, gpu=gpu):
            lacking = record.lacking("images_per_second", group)
            if lacking and record.seconds_left() > 0:
                names = list(dict.fromkeys([_UNMIXED, *lacking]))
                measure_group(record, names, step, setting, options)
                gc.collect()  # pipelines are parts of cycles
    record.end()


def groups(detectors: list[str], *, gpu: bool) -> list[list[str]]:
    """Return the names of the loaders, those that matter most first; `benchmarks.loaders` says what they are."""
    first = [_UNMIXED, "none, again"]
    if not gpu:
        return [[*first, *(f"saliencymix {detector}" for detector in detectors)]]
    mixing = [loaders.routes(detector) for detector in detectors]
    return [[*first, *mixing[0]], *mixing[1:], list(loaders.DECODER_LOADS)]


def measure_group(
    record: Record, names: list[str], step: Callable[..., None], setting: loaders.Setting, options: Any
) -> None:
    """Measure the training behind each of these loaders, then for how long each holds the GIL."""
    calls: dict[str, list[gil.Call]] = {}
    streams: dict[str, loaders.Stream] = {}
    makers = loaders.makers()
    for name in names:
        try:
            with gil.recorded_calls() as calls[name]:
                streams[name] = makers[name](setting, channels_last=True)
        except Exception as error:  # whatever it is: the others can be measured all the same
            record.leave_out(name, error)
    if _UNMIXED not in streams:
        return
    loaders.say_memory(setting.device)
    record.begin_group()
    found = measure_training(record, streams, calls, step, setting, options)
    measure_lock(record, found, streams, setting, options)


def measure_training(
    record: Record,
    streams: dict[str, loaders.Stream],
    calls: dict[str, list[gil.Call]],
    step: Callable[..., None],
    setting: loaders.Setting,
    options: Any,
) -> dict[str, Any]:
    """Train behind each stream in turns; return the rates, their ratios and the operator's calls."""
    batch = next(streams[_UNMIXED].batches)
    constant = loaders.Stream(itertools.repeat(tuple(part.clone() for part in batch)), 2)
    of_turns: dict[str, list[gil.Call]] = {name: [] for name in streams if name.startswith("saliencymix")}
    variants = {
        name: functools.partial(
            rate_of_turn, stream, setting, options, step, calls.get(name, []), of_turns.get(name, [])
        )
        for name, stream in {_CONSTANT: constant, **streams}.items()
    }
    found: dict[str, Any] = {}
    kept = {"seconds": 0.8 * record.seconds_left(), "not_measured": record.not_measured}
    for rates in measure.in_turns(variants, options.rounds, **kept):
        found["images_per_second"] = {name: measure.figure(values) for name, values in rates.items()}
        found["relative_to_constant_batch"] = measure.ratios(rates, _CONSTANT)
        without_constant = {name: values for name, values in rates.items() if name != _CONSTANT}
        found["relative_to_none"] = measure.ratios(without_constant, _UNMIXED)
        found["operator_call_ms"] = {
            name: {
                "wall": measure.figure([1000 * call.wall_seconds for call in turns[1:]]),
                "cpu": measure.figure([1000 * call.cpu_seconds for call in turns[1:]]),
            }
            for name, turns in of_turns.items()
            if turns[1:]  # the first one warms up
        }
        record.add(found)
    for name, turns in of_turns.items():
        if not turns:
            record.not_measured[f"operator_call_ms / {name}"] = "no call of it was seen"
    return found


def training_step(arch: str, setting: loaders.Setting) -> Callable[..., None]:
    """Return a function that trains a network on a batch."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    device = setting.device
    model = torchvision.models.get_model(arch, num_classes=setting.num_classes)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(images: torch.Tensor, labels: torch.Tensor, source_labels: torch.Tensor, lam: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images)
            own, other = (cross_entropy(logits, ids, reduction="none") for ids in (labels, source_labels))
            loss = (lam * own + (1 - lam) * other).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def rate_of_turn(
    stream: loaders.Stream,
    setting: loaders.Setting,
    options: Any,
    step: Callable[..., None],
    made: list[gil.Call],
    of_turns: list[gil.Call],
) -> float:
    """Train for a turn, and return its rate; the median of the calls that were `made` in it goes to `of_turns`."""
    made.clear()
    rate = loaders.images_per_second(stream, setting, options.steps, use=step)
    if made:
        of_turns.append(gil.Call(*map(statistics.median, zip(*made, strict=True))))
    return rate


def measure_lock(
    record: Record,
    found: dict[str, Any],
    streams: dict[str, loaders.Stream],
    setting: loaders.Setting,
    options: Any,
) -> None:
    """Take batches from each loader in turns; add to `found` the time that each batch holds the GIL."""
    variants = {
        name: functools.partial(milliseconds_held, stream, setting, options.steps) for name, stream in streams.items()
    }
    kept = {"seconds": record.seconds_left(), "not_measured": record.not_measured}
    for held in measure.in_turns(variants, options.rounds, **kept):
        found["lock_held_ms_per_batch"] = {name: measure.figure(values) for name, values in held.items()}
        found["lock_held_ms_per_batch_more_than_none"] = {
            name: measure.figure([one - other for one, other in zip(values, held[_UNMIXED], strict=True)])
            for name, values in held.items()
            if name != _UNMIXED and _UNMIXED in held
        }
        record.add(found)


def milliseconds_held(stream: loaders.Stream, setting: loaders.Setting, batches: int) -> float:
    """Return for how long each batch of a stream holds the GIL."""
    probe = gil.Probe()
    loaders.images_per_second(stream, setting, batches, watch=probe)
    return 1000 * probe.held_seconds / batches


if __name__ == "__main__":
    measure.run(main)

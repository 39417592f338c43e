"""Measure the images per second of training on a constant batch and behind loaders, and of these loaders alone.

    python -m benchmarks.bench_train DATA -o benchmarks/results/NAME.json

The rate on a constant batch, which is on the device already, is the limit of the network. The ratio of the rate behind
a loader to it says whether training is input-bound; the ratio with mixing to without mixing is the cost of mixing.

The calls of the operator are timed during training. Then the loaders run alone, first for their rate. Then a probe
measures how long each batch holds the GIL; the difference to the loader that does not mix is due to the operator. On a
GPU the last groups vary the number of threads and the share of images for the JPEG engine.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torchvision
from torch.nn.functional import cross_entropy

from benchmarks import data, loaders, machine, program
from benchmarks.record import Record, figures_of
from dali_saliencymix._dali import python_operator
from dali_saliencymix.measure.figures import figure, ratios

_CONSTANT, _UNMIXED = "constant batch", "none"


def main() -> None:
    parser = program.parser(
        __doc__, *program.ROUNDS, *loaders.OPTIONS, "detectors", detectors=["spectral_residual", "fine_grained"]
    )
    parser.add_argument("-a", "--arch", help="network of torchvision (default: resnet50, without a GPU resnet18)")
    parser.add_argument("--steps", type=program.positive, help="training steps of a variant in each round")
    loaders.add_variants(parser, loaders.makers())
    parser.epilog = "defaults: -b 256, --crop-size 224, --steps 20; without a GPU 32, 64 and 8"
    options = parser.parse_args()
    gpu = machine.wants_gpu(options)
    defaults = ("resnet50", 256, 224, 20) if gpu else ("resnet18", 32, 64, 8)
    for name, default in zip(("arch", "batch_size", "crop_size", "steps"), defaults, strict=True):
        setattr(options, name, getattr(options, name) or default)
    if options.arch not in torchvision.models.list_models(torchvision.models):
        msg = f"--arch must be a classification network of torchvision, got {options.arch!r}"
        raise ValueError(msg)

    with data.images_of(options) as folder:
        conditions = data.described(folder) | {"torch_threads": torch.get_num_threads()}
        conditions |= {"precision": "bfloat16 autocast", "memory_format": "channels_last"}
        record = Record("train", options, **conditions)
        setting = loaders.setting_of(options, folder)
        step = training_step(options.arch, setting)
        wanted = [options.variants] if options.variants else groups(options.detectors, gpu=gpu)
        for names in record.groups("images_per_second", wanted, _UNMIXED):
            measure_group(record, names, step, setting, options.steps)
    record.end()


def groups(detectors: list[str], *, gpu: bool) -> list[list[str]]:
    """Return the names of the loaders, the most important first; `benchmarks.loaders` describes them."""
    first = [_UNMIXED, "none, again"]
    if not gpu:
        return [[*first, *(f"saliencymix {detector}" for detector in detectors)]]
    mixing = [loaders.ways(detector) for detector in detectors]
    decoding = list(loaders.decoder_settings())
    return [[*first, *mixing[0]], *mixing[1:], *(decoding[start : start + 4] for start in range(0, len(decoding), 4))]


def measure_group(
    record: Record, names: list[str], step: Callable[..., None], setting: loaders.Setting, steps: int
) -> None:
    """Measure training behind each loader, then the rate of each loader alone and how long it holds the GIL."""
    calls: dict[str, list[Call]] = {}
    makers = loaders.makers()

    def make(name: str) -> loaders.Stream:
        with recorded_calls() as calls[name]:
            return makers[name](setting, channels_last=True)

    streams = record.made(names, make)
    if _UNMIXED not in streams:
        return
    loaders.say_memory(setting.device)
    measure_training(record, streams, calls, step, steps)
    alone = {name: functools.partial(loaders.images_per_second, stream, steps) for name, stream in streams.items()}
    record.measure(alone, lambda rates: {"loader_images_per_second": figures_of(rates)})
    probed = [name for name in streams if name not in loaders.decoder_settings()]
    if len(probed) > 1:
        held = {name: functools.partial(milliseconds_held, streams[name], steps) for name in probed}
        record.measure(held, lock_held)


def measure_training(
    record: Record,
    streams: dict[str, loaders.Stream],
    calls: dict[str, list[Call]],
    step: Callable[..., None],
    steps: int,
) -> None:
    """Train behind the streams, interleaved; record the rates, their ratios and the operator's calls."""
    batch = next(streams[_UNMIXED].batches)
    constant = loaders.Stream(itertools.repeat(tuple(part.clone() for part in batch)), 2)
    of_turns: dict[str, list[Call]] = {name: [] for name in streams if name.startswith("saliencymix")}

    def rate_of_turn(name: str, stream: loaders.Stream) -> float:
        """Train for one turn; record the median of the operator's calls in it."""
        made = calls.get(name, [])
        made.clear()
        rate = loaders.images_per_second(stream, steps, use=step)
        if made and name in of_turns:
            of_turns[name].append(Call(*map(statistics.median, zip(*made, strict=True))))
        return rate

    def call_ms(turns: list[Call], kind: str) -> dict[str, float]:
        return figure([1000 * getattr(call, f"{kind}_seconds") for call in turns[1:]])  # the first turn is the warm-up

    def result_of(rates: dict[str, list[float]]) -> dict[str, Any]:
        without_constant = {name: values for name, values in rates.items() if name != _CONSTANT}
        return {
            "images_per_second": figures_of(rates),
            "relative_to_constant_batch": ratios(rates, _CONSTANT),
            "relative_to_none": ratios(without_constant, _UNMIXED),
            "operator_call_ms": {
                name: {kind: call_ms(turns, kind) for kind in ("wall", "cpu")}
                for name, turns in of_turns.items()
                if turns[1:]
            },
        }

    variants = {
        name: functools.partial(rate_of_turn, name, stream) for name, stream in {_CONSTANT: constant, **streams}.items()
    }
    record.measure(variants, result_of, share=0.8)
    for name, turns in of_turns.items():
        if not turns:
            record.not_measured[f"operator_call_ms / {name}"] = "no call of it was recorded"


def training_step(arch: str, setting: loaders.Setting) -> Callable[..., None]:
    """Return a function that performs one training step on a batch."""
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


def milliseconds_held(stream: loaders.Stream, batches: int) -> float:
    """Return the milliseconds for which each batch of a stream holds the GIL."""
    probe = Probe()
    loaders.images_per_second(stream, batches, watch=probe)
    return 1000 * probe.held_seconds / batches


def lock_held(held: dict[str, list[float]]) -> dict[str, Any]:
    """Return the time that each batch holds the GIL, and its difference to that without mixing."""
    unmixed = held.get(_UNMIXED, [])
    more = {
        name: [one - other for one, other in zip(values, unmixed, strict=True)]
        for name, values in held.items()
        if unmixed and name != _UNMIXED
    }
    return {"lock_held_ms_per_batch": figures_of(held), "lock_held_ms_per_batch_more_than_none": figures_of(more)}


# ---- the GIL: while one thread holds it, no other can run Python code, such as the step that feeds a GPU -------------


class Call(NamedTuple):
    """The wall-clock time of a call and the processor time of its thread; they differ if the call waited."""

    wall_seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Record the calls of the Python functions in pipelines that are defined inside this context.

    The list grows also after the context has ended. The work of DALI around a call, such as making an array of each
    sample, is not included.
    """
    calls: list[Call] = []
    original = python_operator._limited

    def timed(*arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        made = original(*arguments)
        calls.append(Call(time.perf_counter() - wall, time.thread_time() - cpu))
        return made

    # Every operator of the package is called through this function.
    with mock.patch.object(python_operator, "_limited", timed):
        yield calls


class Probe(threading.Thread):
    """Measure for how long other threads hold the GIL; used as a context manager.

    The probe sleeps for about a tenth of a millisecond again and again. A thread that wakes needs the GIL, so its delay
    is the time for which another thread still held it. Half of a usual sleep is added to each delay, for the part of
    the hold that the probe slept through.

    Limits: the probe may miss a hold that is shorter than a sleep, and counts between half and all of it otherwise.
    While the probe runs, the interpreter does not force a thread to release the GIL. If cores are scarce, waiting for a
    core counts as waiting for the GIL: compare with the same loader without the function in question, on an idle
    machine.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.held_seconds = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Probe:
        self._usual = statistics.median(self._slept() for _ in range(200))
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(10)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        sys.setswitchinterval(self._interval)

    def run(self) -> None:
        while not self._over.is_set():
            late = self._slept() - self._usual
            if late > self._usual:
                self.held_seconds += late + self._usual / 2

    @staticmethod
    def _slept() -> float:
        start = time.perf_counter()
        time.sleep(50e-6)
        return time.perf_counter() - start


if __name__ == "__main__":
    program.run(main)

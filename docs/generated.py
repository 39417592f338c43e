"""Markdown parts of the pages, generated during the build from the code and from benchmark results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import transfer_voc
from benchmarks.program import markdown_table
from benchmarks.render import opencv_table
from dali_saliencymix import DETECTORS, PRESETS
from dali_saliencymix.__main__ import main as package_main
from dali_saliencymix.options import PRESET_OPTIONS
from dali_saliencymix.training.arguments import parse_arguments

_FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "detectors-cpu-2-cores.json"
MEASURED = json.loads(_FILE.read_text())  # by benchmarks/bench_detectors.py


def parts() -> dict[str, str]:
    """Return the parts; pages include them by these names."""
    return {
        "presets": presets(),
        "detector_costs": detector_costs(),
        "detector_peaks": detector_peaks(),
        "detector_conditions": detector_conditions(),
        "detector_opencv": opencv_table(MEASURED),
        "help_package": help_of("python -m dali_saliencymix", package_main),
        **{
            f"help_{command.replace('-', '_')}": help_of("python -m dali_saliencymix", package_main, command)
            for command in ("sample-data", "scan", "bottleneck", "compare", "preview", "compile")
        },
        "help_train": help_of("train.py", parse_arguments),
        "help_transfer_voc": help_of("transfer_voc.py", transfer_voc.parse_arguments),
    }


def presets() -> str:
    """Return the options of each preset as a table."""
    rows = (
        [f"`{name}`", *(f"`{getattr(preset, option)}`" for option in PRESET_OPTIONS)]
        for name, preset in PRESETS.items()
    )
    return markdown_table(["preset", *(f"`{option}`" for option in PRESET_OPTIONS)], rows)


def detector_costs() -> str:
    """Return the time of each detector as a table."""
    batch = MEASURED["conditions"]["batch_size"]
    rows = []
    for name in DETECTORS:
        cost = MEASURED["milliseconds_per_batch"]["numpy"][name]
        spread = f"{cost['median']:.0f} ({cost['min']:.0f} to {cost['max']:.0f})"
        rows.append([f"`{name}`", spread, f"{cost['median'] / batch:.2f}"])
    return markdown_table(["detector", f"ms for a batch of {batch}", "ms for an image"], rows)


def detector_peaks() -> str:
    """Return the positions of each detector's peaks as a table."""
    other = MEASURED["agreement_with_fine_grained"]
    kinds = ("border_ring", "central_quarter")
    columns = ["detector", "in the border ring", "in the central quarter", "within 1/8 of those of `fine_grained`"]
    rows = []
    for name in DETECTORS:
        shares = [MEASURED["share_of_peaks"][name][kind] for kind in kinds]
        rows.append([f"`{name}`", *map(percent, shares), percent(other[name]["within_an_eighth"])])
    chance = [MEASURED["share_of_peaks"]["uniform"][kind] for kind in kinds]
    by_chance = percent(other["peaks_of_other_images"]["within_an_eighth"])
    rows.append(["*peaks anywhere, or of another image*", *map(percent, chance), by_chance])
    return markdown_table(columns, rows)


def detector_conditions() -> str:
    """Return the conditions of the measurements as a sentence."""
    conditions = MEASURED["conditions"]
    versions = conditions["versions"]
    return (
        f"{conditions['device']}; batches of {conditions['batch_size']} images of {conditions['size']}x"
        f"{conditions['size']}, median (minimum to maximum) of {conditions['rounds']} rounds; peaks of "
        f"{conditions['images']} photographs; NumPy {versions['numpy']}. `{conditions['command']}`"
    )


def percent(share: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * share:.1f} %"


def help_of(program: str, main: Callable[[list[str]], object], *command: str) -> str:
    """Return the output of ``--help`` as a block of text."""
    text = io.StringIO()
    plain = {"COLUMNS": "100", "NO_COLOR": "1"}
    with (
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
        mock.patch.object(sys, "argv", [program]),
        mock.patch.dict(os.environ, plain),
    ):
        main([*command, "--help"])
    return f"```text\n{text.getvalue()}```"

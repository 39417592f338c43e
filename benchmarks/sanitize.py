"""Run every CUDA kernel under compute-sanitizer: invalid memory access (memcheck) and races (racecheck).

    python -m benchmarks.sanitize -o OUT.json

A program that launches every kernel at odd sizes runs once under each tool. `python -m benchmarks.sanitize --kernels`
runs only this program. The result has the findings of each tool by kernel.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks import machine, program
from dali_saliencymix import _cuda as cuda
from dali_saliencymix._tables import MAP_SIZE, scaling
from dali_saliencymix.measure.results import shortened
from dali_saliencymix.pixels import DTYPES, LAYOUTS

# CuPy expects and handles some errors of the CUDA API; they are not errors of a kernel.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}

# Rows whose bytes are multiples of 16, of 4 and of 1; grey images; maps of 64x64 and smaller; more than one block in
# each grid; rows that fine_grained splits into several strips.
SHAPES = ((5, 37, 23, 3), (3, 70, 97, 1), (4, 66, 64, 3), (2, 65, 68, 3), (2, 34, 519, 3))

_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")
_HEADING = re.compile(
    r"^========= (?!\s|COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application)(.*)", re.MULTILINE
)
_SUMMARY = re.compile(r"^========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE)
_KERNEL = re.compile(r"\bat (?:void )?(\w+)[+(<]")


def launch_every_kernel(xp: Any) -> None:
    """Launch every kernel on arrays of the library `xp`, with boxes at all borders."""
    rng = np.random.default_rng(0)
    for count, height, width, channels in SHAPES:
        images = xp.asarray(rng.integers(0, 256, (count, height, width, channels), np.uint8))
        source_index, lam = xp.asarray(rng.permutation(count)), rng.random(count)
        corners = np.array([(0, 0), (height - 1, width - 1), (0, width - 1), (height - 1, 0)], np.int32)
        peaks, centres = (xp.asarray(corners[(np.arange(count) + start) % 4]) for start in (0, 1))
        for dtype in ("float64", "float32"):
            given = (peaks, source_index, xp.asarray(lam.astype(dtype)), height, width)
            boxes, source_boxes, _ = cuda.boxes_at_peaks(*given, centres=centres)
        cuda.paste_boxes(images, source_index, boxes)
        cuda.paste_boxes(images, source_index, boxes, source_boxes=source_boxes)
        mirror = xp.asarray(np.arange(count) % 2 == 1)
        tables = xp.asarray(scaling((120.0,) * channels, (60.0,) * channels))
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            patches = images, source_index, boxes, source_boxes, mirror
            cuda.paste_normalised(*patches, tables, np.dtype(dtype), layout)
        cuda.small_luma(images, min(height, 64), min(width, 64))
        if min(height, width) >= MAP_SIZE:
            cuda.spectral_residual(images)
            cuda.spectral_residual_peaks(images, height, width)
        cuda.fine_grained_peaks(images, least=True)
        cuda.saliency_peaks(cuda.fine_grained(images), height, width)


def findings(text: str) -> dict[str, Any]:
    """Return the findings of a tool: the number of errors (None if it did not finish), and each kind by kernel."""
    kinds: collections.Counter[str] = collections.Counter()
    for heading, after in itertools.pairwise([*_HEADING.finditer(text), None]):
        finding = text[heading.start() : after.start() if after else None]
        kernel = _KERNEL.search(finding)
        kinds[f"{kernel[1] if kernel else 'no kernel'}: {shortened(heading[1])}"] += 1
    summary = _SUMMARY.search(text)
    return {"errors": int(summary[1] or summary[2]) if summary else None, "kinds": dict(kinds.most_common(20))}


def run_tool(sanitizer: str, tool: str) -> dict[str, Any]:
    """Run the kernels under a tool of compute-sanitizer."""
    line = [sanitizer, "--tool", tool, *TOOLS[tool], "--print-limit", "1000"]
    command = [*line, sys.executable, "-m", "benchmarks.sanitize", "--kernels"]
    ended = subprocess.run(command, cwd=program.ROOT, capture_output=True, text=True, check=False)
    sys.stdout.write(ended.stdout + ended.stderr)
    found = findings(ended.stdout + ended.stderr)
    if ended.returncode and found["errors"] == 0:
        found["errors"] = None  # the program itself failed
    return found


def main() -> None:
    parser = program.parser(__doc__, "output", "device")
    parser.add_argument("--kernels", action="store_true", help="only launch the kernels, on a GPU")
    options = parser.parse_args()
    machine.check_gpu()
    if options.kernels:
        import cupy

        cupy.cuda.set_allocator(None)  # without a memory pool, so that the tools know where an array ends
        launch_every_kernel(cupy)
        cupy.cuda.Device().synchronize()
        return
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *_PLACES]))
    if sanitizer is None:
        msg = "compute-sanitizer is not installed"
        raise ImportError(msg)
    tools: dict[str, Any] = {}
    result = {"benchmark": "sanitize", "conditions": machine.conditions(options), "tools": tools}
    for tool in TOOLS:
        tools[tool] = run_tool(sanitizer, tool)
        program.write(result, options.output)
    sys.stdout.write(table(result) + "\n")
    if bad := [tool for tool, found in tools.items() if found["errors"] != 0]:
        msg = f"{', '.join(bad)}: errors were found, or the program did not finish"
        raise RuntimeError(msg)


def table(result: dict[str, Any]) -> str:
    rows = []
    for tool, found in result["tools"].items():
        errors = "did not end" if found["errors"] is None else found["errors"]
        rows += [[tool, errors, kind, times] for kind, times in (found["kinds"] or {"none": ""}).items()]
    return program.markdown_table(["tool", "errors", "finding", "times"], rows)


if __name__ == "__main__":
    program.run(main)

"""Ahead-of-time compilation of all Numba kernels, for all argument types that they support."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dali_saliencymix._numba.stopwatch import compile_seconds
from dali_saliencymix.boxes import saliency_peaks
from dali_saliencymix.pixels import paste_normalised
from dali_saliencymix.saliency import fine_grained, phase_spectrum, spectral_residual


def compile_kernels(say: Callable[[str], object]) -> None:
    """Compile the kernels that are not yet in Numba's cache; report progress through `say`, one line per call.

    Raises
    ------
    OSError
        If the compiled kernels cannot be written to the cache.
    """
    from dali_saliencymix._numba import contrast, kernel

    folder = kernel.folder_for(contrast.reduce_luma)
    say(f"Numba compiles kernels for this type of CPU and caches them in {folder}")
    kernel.compilations.silent = True
    images, maps = np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 8, 8), np.float32)
    boxes = np.zeros((2, 4), np.int64)
    kinds = images, images[..., :1].copy(), images[..., :1]  # RGB, grey, and not contiguous in memory
    groups: dict[str, list[Callable[[], Any]]] = {
        "grey levels": [functools.partial(phase_spectrum, each) for each in kinds],
        "fine_grained": [functools.partial(fine_grained, each) for each in kinds],
        "spectral_residual": [functools.partial(spectral_residual, each) for each in kinds],
        "peaks": [functools.partial(saliency_peaks, each, 64, 64) for each in (maps, maps[:, ::2])],
        "paste and normalise": [
            functools.partial(paste_normalised, images, boxes[:, 0], boxes, mean=[0] * 3, std=[1] * 3)
        ],
    }
    for name, calls in groups.items():
        before = compile_seconds()
        for call in calls:
            call()
        seconds = compile_seconds() - before
        say(f"{name}: {f'{seconds:.1f} s' if seconds else 'in the cache'}")
    kernel.check_all_kept()
    say(f"done, {compile_seconds():.1f} s in all")

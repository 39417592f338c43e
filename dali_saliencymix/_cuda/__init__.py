"""CUDA kernels: the ``.cu`` files in this folder, which CuPy compiles on first use.

Each function here has a reference implementation among the array functions. It takes CuPy arrays, does not check its
arguments and returns the same result. If a result is not bit-identical, the docstring says so. Functions enqueue all
work on CuPy's current stream and never wait for the GPU. They allocate only results and the scratch memory in this
table:

=========================================  ===================================  ========  ==================
function                                   reference                            launches  scratch per image
=========================================  ===================================  ========  ==================
`small_luma`                               ``saliency.grey.small_luma``         1         none
`spectral_residual` (64x64 maps)           ``spectral_residual``                1         none
`spectral_residual_peaks` (64x64 maps)     ``spectral_residual`` and            1         none
                                           ``saliency_peaks``
`fine_grained`                             ``fine_grained``                     3         9 H W bytes
`fine_grained_peaks`                       ``fine_grained`` and                 3         9 H W bytes
                                           ``saliency_peaks``
`saliency_peaks`                           ``saliency_peaks``                   1         none
`boxes_at_peaks`                           ``boxes_at``, ``boxes_moved_to``     1         none
                                           and ``kept_fraction``
`paste_boxes`                              ``paste_boxes``                      1         none
`paste_normalised`                         ``paste_normalised``                 1         none
=========================================  ===================================  ========  ==================

The tests compare the kernels with their reference implementations on a GPU, and, compiled as C++, on a CPU.
benchmarks/README.md has their speed on an H100.
"""

from __future__ import annotations

from dali_saliencymix._cuda.boxes import boxes_at_peaks, saliency_peaks
from dali_saliencymix._cuda.pixels import paste_boxes, paste_normalised
from dali_saliencymix._cuda.saliency import (
    fine_grained,
    fine_grained_peaks,
    small_luma,
    spectral_residual,
    spectral_residual_peaks,
)

__all__ = [
    "boxes_at_peaks",
    "fine_grained",
    "fine_grained_peaks",
    "paste_boxes",
    "paste_normalised",
    "saliency_peaks",
    "small_luma",
    "spectral_residual",
    "spectral_residual_peaks",
]

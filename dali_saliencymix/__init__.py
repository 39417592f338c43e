"""SaliencyMix for NVIDIA DALI: saliency-guided mixing of whole batches.

``dali_saliencymix.saliencymix`` works on NumPy and CuPy arrays, ``dali_saliencymix.fn.saliencymix`` inside DALI
pipelines. Importing the package needs NumPy alone; DALI is imported with ``dali_saliencymix.fn``.
"""

from __future__ import annotations

import importlib
from typing import Any

from dali_saliencymix.boxes import boxes_at, kept_fraction, saliency_peaks
from dali_saliencymix.core import Mixed, cutmix, saliencymix
from dali_saliencymix.mixing import paste_boxes, soft_labels
from dali_saliencymix.params import draw_params
from dali_saliencymix.saliency import DETECTORS, fine_grained, get_detector, spectral_residual

__version__ = "0.1.0"

__all__ = [
    "DETECTORS",
    "Mixed",
    "boxes_at",
    "cutmix",
    "draw_params",
    "fine_grained",
    "get_detector",
    "kept_fraction",
    "paste_boxes",
    "saliency_peaks",
    "saliencymix",
    "soft_labels",
    "spectral_residual",
]


def __getattr__(name: str) -> Any:
    if name == "fn":
        return importlib.import_module("dali_saliencymix.fn")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

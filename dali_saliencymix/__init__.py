"""SaliencyMix for NVIDIA DALI: saliency-guided mixing of whole batches.

``dali_saliencymix.saliencymix`` works on NumPy and CuPy arrays, ``dali_saliencymix.fn.saliencymix`` in DALI
pipelines, and ``dali_saliencymix.pytorch.SaliencyMix`` on batches of PyTorch tensors. Importing the package requires
only NumPy; ``fn`` imports DALI and ``pytorch`` imports PyTorch.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from dali_saliencymix.boxes import boxes_at, boxes_moved_to, kept_fraction, points_at, saliency_peaks
from dali_saliencymix.draw import MixParams, draw_mix_params, draw_params
from dali_saliencymix.labels import soft_labels
from dali_saliencymix.mix import Mixed, cutmix, mix, mixup, saliencymix
from dali_saliencymix.options import MODES, PRESETS, MixOptions
from dali_saliencymix.pixels import blend_images, paste_boxes, paste_normalised
from dali_saliencymix.saliency import (
    DETECTORS,
    fine_grained,
    frequency_tuned,
    get_detector,
    image_signature,
    phase_spectrum,
    spectral_residual,
)

try:
    __version__ = importlib.metadata.version("dali-saliencymix")
except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path but not installed
    __version__ = "unknown"

Placement = MixOptions  # the former name, from when the class held only the placement options

__all__ = [
    "DETECTORS",
    "MODES",
    "PRESETS",
    "MixOptions",
    "MixParams",
    "Mixed",
    "Placement",
    "blend_images",
    "boxes_at",
    "boxes_moved_to",
    "cutmix",
    "draw_mix_params",
    "draw_params",
    "fine_grained",
    "frequency_tuned",
    "get_detector",
    "image_signature",
    "kept_fraction",
    "mix",
    "mixup",
    "paste_boxes",
    "paste_normalised",
    "phase_spectrum",
    "points_at",
    "saliency_peaks",
    "saliencymix",
    "soft_labels",
    "spectral_residual",
]


def __getattr__(name: str) -> Any:
    if name in {"fn", "pytorch"}:
        return importlib.import_module(f"dali_saliencymix.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

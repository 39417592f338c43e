"""Saliency detectors: images (N, H, W, C) uint8 -> maps (N, h, w) float32, larger where more salient.

Each detector chooses h and w; they may differ from H and W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from dali_saliencymix._array import array_namespace
from dali_saliencymix._checks import check_choice, kind_of
from dali_saliencymix._routes import ALGORITHMS
from dali_saliencymix.saliency.contrast import fine_grained, frequency_tuned
from dali_saliencymix.saliency.spectral import image_signature, phase_spectrum, spectral_residual

if TYPE_CHECKING:
    from dali_saliencymix._array import Array

Detector = Callable[["Array"], "Array"]

DETECTORS: dict[str, Detector] = {
    "spectral_residual": spectral_residual,
    "phase_spectrum": phase_spectrum,
    "image_signature": image_signature,
    "fine_grained": fine_grained,
    "frequency_tuned": frequency_tuned,
}

__all__ = [
    "DETECTORS",
    "Detector",
    "fine_grained",
    "frequency_tuned",
    "get_detector",
    "image_signature",
    "phase_spectrum",
    "saliency_maps",
    "spectral_residual",
]


# The detectors with the option `algorithm`.
_WITH_KERNELS = {"spectral_residual", "phase_spectrum", "fine_grained"}


def get_detector(saliency: str | Detector, *, algorithm: str = "auto") -> Detector:
    """Return the detector with a given name, or `saliency` itself if it is callable.

    Parameters
    ----------
    saliency : str or callable
        A name in `DETECTORS`, or a function from images (N, H, W, C) uint8 to maps (N, h, w) of a real dtype. The
        function must not modify the images. The maps must be in the same array library, on the same device and on the
        current stream.
    algorithm : {"auto", "array", "kernel"}
        Array operations, or a kernel for the detectors that have one; see `fine_grained`.

    Raises
    ------
    ValueError
        If the name of the detector or of the algorithm is unknown.
    TypeError
        If `saliency` is neither a string nor callable.

    Examples
    --------
    >>> get_detector("fine_grained") is fine_grained
    True
    """
    check_choice(algorithm, "algorithm", ALGORITHMS)
    if callable(saliency):
        return saliency
    if not isinstance(saliency, str):
        msg = f"saliency must be the name of a detector or a callable, got {saliency!r}"
        raise TypeError(msg)
    if saliency not in DETECTORS:
        msg = f"saliency must be one of {', '.join(sorted(DETECTORS))}, or a callable, got {saliency!r}"
        raise ValueError(msg)
    detector: Callable[..., Array] = DETECTORS[saliency]
    if algorithm == "auto" or saliency not in _WITH_KERNELS:
        return detector
    return functools.partial(detector, algorithm=algorithm)


def saliency_maps(images: Array, saliency: str | Detector, *, algorithm: str = "auto") -> Array:
    """Return the maps of a detector for `images`; check them, since the detector may be the user's."""
    saliency_map = get_detector(saliency, algorithm=algorithm)(images)
    shape: tuple[int, ...] = getattr(saliency_map, "shape", ())
    if array_namespace(saliency_map) is not array_namespace(images) or len(shape) != 3 or shape[0] != len(images):
        msg = (
            f"saliency must return maps of shape ({len(images)}, h, w), in the array library of the images, "
            f"got {kind_of(saliency_map)} of shape {shape}"
        )
        raise ValueError(msg)
    return saliency_map

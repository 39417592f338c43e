"""The arms of the study: mixing methods that share all random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.accuracy.released import as_released
from dali_saliencymix import cutmix, get_detector, saliency_peaks, saliencymix
from dali_saliencymix._array import array_namespace
from dali_saliencymix.mix import Mixed

if TYPE_CHECKING:
    from dali_saliencymix._array import Array

    Mix = Callable[..., Mixed]
    Paste = Callable[..., Array]


class Arm(NamedTuple):
    """A mixing function and its description.

    Attributes
    ----------
    mix : callable
        ``(images, source_index, lam, point, algorithm=, paste=) -> Mixed``, the arrays as for `dali_saliencymix.mix`.
    about : str
        What the arm does, for a table.
    """

    mix: Mix
    about: str


def _none(images: Array, source_index: Array, lam: Array, point: Array, *, paste: Paste, **_: object) -> Mixed:
    xp = array_namespace(images)
    nowhere = xp.zeros((len(images), 4), xp.int32)
    return Mixed(paste(images, source_index, nowhere), xp.ones(len(images), xp.float32), nowhere, nowhere)


def _cutmix(images: Array, source_index: Array, lam: Array, point: Array, *, algorithm: str, **options: Any) -> Mixed:
    return cutmix(images, source_index, lam, point, **options)


def _saliencymix(images: Array, source_index: Array, lam: Array, point: Array, **options: Any) -> Mixed:
    return saliencymix(images, source_index, lam, **options)


def _shuffled_peaks(
    images: Array, source_index: Array, lam: Array, point: Array, *, algorithm: str, **options: Any
) -> Mixed:
    maps = get_detector("fine_grained", algorithm=algorithm)(images)
    peaks = saliency_peaks(maps, *images.shape[1:3], algorithm=algorithm)
    others = array_namespace(peaks).concatenate([peaks[1:], peaks[:1]])  # a batch is in random order
    return saliencymix(images, source_index, lam, peaks=others, algorithm=algorithm, **options)


_with = functools.partial(functools.partial, _saliencymix)

# In the order of the runs of a seed, and of the table.
ARMS = {
    "none": Arm(_none, "no mixing"),
    "cutmix": Arm(_cutmix, "CutMix, with a box and a weight for each sample"),
    "random peak": Arm(
        functools.partial(_cutmix, box="fit"),
        "the boxes of SaliencyMix, moved inside the image, around uniformly random points",
    ),
    "shuffled peaks": Arm(
        _shuffled_peaks, "the same boxes around the peak of `fine_grained` in another image of the batch"
    ),
    "saliencymix paper": Arm(_with(preset="paper"), "boxes around the peaks of `fine_grained`: preset `paper`"),
    "saliencymix default": Arm(_with(), "boxes around the peaks of `spectral_residual`: preset `default`"),
    "as released": Arm(
        _with(preset="released-code", saliency=as_released),
        "preset `released-code` with the saliency that the authors' released code computes",
    ),
    "saliencymix released-code": Arm(
        _with(preset="released-code"),
        "boxes around the peaks of `fine_grained`, clipped at the border, one for each batch: preset `released-code`",
    ),
    "cutmix per batch": Arm(
        functools.partial(_cutmix, per_batch=True), "CutMix as published, with a box and a weight for each batch"
    ),
    "saliency labels": Arm(
        _with(label_weight="saliency"), "preset `default`, labels weighted by saliency instead of area"
    ),
}
REFERENCE = "cutmix"

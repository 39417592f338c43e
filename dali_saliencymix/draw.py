"""Random draws for a batch, for use outside DALI.

In DALI pipelines, DALI's own operators draw the random numbers, so that its checkpoints include their state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dali_saliencymix._checks import check_at_least, check_fraction, check_positive
from dali_saliencymix.options import MODES, MixOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class MixParams(NamedTuple):
    """Random arguments of `dali_saliencymix.mix` for one batch, in the order of its parameters.

    Attributes
    ----------
    source_index : ndarray of shape (N,), int64
        Index of each image's source: a random permutation, so an image may be its own source.
    lam : ndarray of shape (N,), float32
        Weight of each receiver; 1 for images that are not mixed.
    mode : ndarray of shape (N,), int64
        Index into `MODES`.
    point : ndarray of shape (N, 2), float64
        Fractions (y, x) of height and width, drawn uniformly from [0, 1).
    """

    source_index: NDArray[np.int64]
    lam: NDArray[np.float32]
    mode: NDArray[np.int64]
    point: NDArray[np.float64]


def draw_params(
    rng: np.random.Generator, batch_size: int, *, alpha: float = 1.0, prob: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw the sources and mixing weights for one batch.

    Parameters
    ----------
    rng : numpy.random.Generator
        Random number generator.
    batch_size : int
        N, the number of images.
    alpha : float
        Parameter of Beta(alpha, alpha), the distribution of `lam`; 1 is the uniform distribution of the paper.
    prob : float
        Probability in [0, 1] that an image is mixed.

    Returns
    -------
    source_index : ndarray of shape (N,), int64
        Index of each image's source: a random permutation, so an image may be its own source.
    lam : ndarray of shape (N,), float32
        Weight of each receiver; 1 for images that are not mixed.

    Examples
    --------
    >>> import numpy as np
    >>> source_index, lam = draw_params(np.random.default_rng(0), 4, prob=0.0)
    >>> sorted(source_index.tolist()), lam.tolist()
    ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])
    """
    check_at_least(batch_size, "batch_size", 1)
    alpha, prob = check_positive(alpha, "alpha"), check_fraction(prob, "prob")
    source_index = rng.permutation(batch_size)
    lam = rng.beta(alpha, alpha, batch_size)
    mixed = rng.random(batch_size) < prob
    return source_index, np.where(mixed, lam, 1).astype(np.float32)


def draw_mix_params(
    rng: np.random.Generator,
    batch_size: int,
    *,
    modes: Mapping[str, float],
    alpha: float | Mapping[str, float] = 1.0,
    prob: float = 1.0,
    choose: str = "sample",
) -> MixParams:
    """Draw the sources, mixing weights and mixing modes for one batch.

    Parameters
    ----------
    rng : numpy.random.Generator
        Random number generator.
    batch_size : int
        N, the number of images.
    modes : mapping from str to float
        Mixing modes, among `MODES`, with their relative probabilities, which need not sum to 1.
    alpha : float or mapping from str to float
        Parameter of Beta(alpha, alpha), the distribution of `lam`: one number for all modes, or one per mode.
    prob : float
        Probability in [0, 1] that an image is mixed.
    choose : {"sample", "batch"}
        Whether to draw a mode for each image or one for the whole batch.

    Returns
    -------
    MixParams
        Named tuple (source_index, lam, mode, point), the arguments of `mix`.

    Raises
    ------
    ValueError
        If an option is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> modes = {"saliencymix": 0.5, "mixup": 0.5}
    >>> params = draw_mix_params(np.random.default_rng(1), 4, modes=modes, alpha={"saliencymix": 1.0, "mixup": 0.2})
    >>> [MODES[mode] for mode in params.mode]
    ['saliencymix', 'mixup', 'saliencymix', 'saliencymix']
    """
    check_at_least(batch_size, "batch_size", 1)
    return draw(rng, batch_size, MixOptions(modes=modes, alpha=alpha, prob=prob, choose=choose))


def draw(rng: np.random.Generator, batch_size: int, options: MixOptions) -> MixParams:
    """Return what `draw_mix_params` returns."""
    probabilities, alphas = options.probabilities, options.alphas
    source_index = rng.permutation(batch_size)
    size = batch_size if options.choose == "sample" else 1
    drawn = rng.choice(len(probabilities), size=size, p=list(probabilities.values()))
    which = np.broadcast_to(drawn, batch_size)
    beta = np.array(list(alphas.values()))[which]
    lam = rng.beta(beta, beta)
    mixed = rng.random(batch_size) < options.prob
    mode = np.array([MODES.index(name) for name in probabilities])[which]
    point = rng.random((batch_size, 2))
    return MixParams(source_index, np.where(mixed, lam, 1).astype(np.float32), mode, point)

"""Random draws for use outside DALI. Inside DALI its own operators draw, so that checkpoints cover them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._checks import check_alpha, check_prob

if TYPE_CHECKING:
    from numpy.typing import NDArray


def draw_params(
    rng: np.random.Generator, batch_size: int, *, alpha: float = 1.0, prob: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw partners and mixing weights for one batch.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the randomness.
    batch_size : int
        N, the number of images.
    alpha : float
        `lam` is drawn from Beta(alpha, alpha); 1 is the uniform law of the paper.
    prob : float
        Probability in [0, 1] that an image is mixed.

    Returns
    -------
    source_index : ndarray of shape (N,), int64
        A random permutation; an image may be its own partner.
    lam : ndarray of shape (N,), float32
        Weight of the receiving image; 1 where an image is not to be mixed.

    Examples
    --------
    >>> import numpy as np
    >>> source_index, lam = draw_params(np.random.default_rng(0), 4, prob=0.0)
    >>> sorted(source_index.tolist()), lam.tolist()
    ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])
    """
    alpha, prob = check_alpha(alpha), check_prob(prob)
    source_index = rng.permutation(batch_size)
    lam = rng.beta(alpha, alpha, batch_size)
    mixed = rng.random(batch_size) < prob
    return source_index, np.where(mixed, lam, 1).astype(np.float32)

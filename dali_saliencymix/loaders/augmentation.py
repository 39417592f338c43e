"""Augmentation of images one by one in a DALI graph: by a policy before the mix, by an erased rectangle after it."""

from __future__ import annotations

import warnings

from nvidia.dali.auto_aug.rand_augment import rand_augment
from nvidia.dali.auto_aug.trivial_augment import trivial_augment_wide
from nvidia.dali.pipeline import DataNode


# DALI has to convert this function: the policies have an `if` for each image.
def auto_augmented(images: DataNode, policy: str, ra_magnitude: int, size: int, ta_translation: float) -> DataNode:
    """Return images (H, W, C), uint8, each changed as a policy says: see `AUTO_AUGMENT`.

    `size` is their height and width, and `ta_translation` the longest translation of ``"ta_wide"`` as a share of it.
    The pipeline needs ``enable_conditionals=True``.
    """
    shape = (size, size)
    # DALI 2.4 calls operators by names that it has deprecated, and shows its warnings whatever the filters say.
    with warnings.catch_warnings(record=True):
        if policy == "ra":
            images = rand_augment(images, n=2, m=ra_magnitude, shape=shape)
        else:
            images = trivial_augment_wide(images, shape=shape, max_translate_rel=ta_translation)
    return images

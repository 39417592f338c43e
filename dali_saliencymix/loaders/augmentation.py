"""Augmentation of images one by one in a DALI graph: by a policy before the mix, by an erased rectangle after it."""

from __future__ import annotations

import warnings

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug.rand_augment import rand_augment
from nvidia.dali.auto_aug.trivial_augment import trivial_augment_wide
from nvidia.dali.pipeline import DataNode, do_not_convert

from dali_saliencymix.loaders.options import ERASED_AREA, ERASED_ASPECT_RATIO


# DALI has to convert this function: the policies have an `if` for each image.
def auto_augmented(images: DataNode, policy: str, ra_magnitude: int, size: int, ta_translation: float) -> DataNode:
    """Return images augmented by a policy; the pipeline needs ``enable_conditionals=True``.

    Parameters
    ----------
    images : DataNode
        HWC, uint8, on the CPU or a GPU.
    policy : {"ra", "ta_wide"}
        RandAugment with two operations, or TrivialAugmentWide.
    ra_magnitude : int
        Magnitude of RandAugment, in [0, 30].
    size : int
        Height and width of the images.
    ta_translation : float
        Longest translation of TrivialAugmentWide, as a share of `size`.

    Returns
    -------
    DataNode
        As `images`. What comes in from beyond an image is grey 128.
    """
    shape = (size, size)
    # DALI 2.4 calls operators by names that it has deprecated, and shows its warnings whatever the filters say.
    with warnings.catch_warnings(record=True):
        if policy == "ra":
            images = rand_augment(images, n=2, m=ra_magnitude, shape=shape)
        else:
            images = trivial_augment_wide(images, shape=shape, max_translate_rel=ta_translation)
    return images


@do_not_convert
def erased(images: DataNode, probability: float, size: int, *, fp16: bool = False) -> DataNode:
    """Return normalised images, some of them with a rectangle set to 0, which is the mean.

    The share of the area is uniform in [0.02, 0.33], the aspect ratio log-uniform in [0.3, 3.3]. A side that is longer
    than the image is cut to it.

    Parameters
    ----------
    images : DataNode
        CHW or HWC, with that layout, on the CPU or a GPU.
    probability : float
        Probability of a rectangle for each image, in [0, 1].
    size : int
        Height and width of the images.
    fp16 : bool
        The images are float16, else float32.

    Returns
    -------
    DataNode
        As `images`.
    """
    area = fn.random.uniform(range=ERASED_AREA)
    ratio = math.exp(fn.random.uniform(range=np.log(ERASED_ASPECT_RATIO).tolist()))
    place = fn.random.uniform(range=[0.0, 1.0], shape=[2])
    sides = fn.stack(math.sqrt(area * ratio), math.sqrt(area / ratio))
    sides = math.min(math.floor(sides * size + 0.5), size)
    corner = math.min(math.floor(place * (size - sides + 1)), size - sides)  # also where 1 is drawn
    sides *= fn.random.coin_flip(probability=probability)
    if fp16:  # which the operator does not know on a GPU; all of its bits are 0 in either type
        images = fn.reinterpret(images, dtype=types.INT16)
    images = fn.erase(images, anchor=corner, shape=sides, axis_names="HW")
    return fn.reinterpret(images, dtype=types.FLOAT16) if fp16 else images

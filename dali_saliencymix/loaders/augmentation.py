"""Per-image augmentation in a DALI graph: a policy before mixing, random erasing after it."""

from __future__ import annotations

import warnings

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug.rand_augment import rand_augment
from nvidia.dali.auto_aug.trivial_augment import trivial_augment_wide
from nvidia.dali.pipeline import DataNode, do_not_convert

from dali_saliencymix.loaders.options import ERASED_AREA, ERASED_ASPECT_RATIO


# Not decorated with `do_not_convert`: the policies branch per image, so DALI has to convert this function.
def auto_augmented(images: DataNode, policy: str, ra_magnitude: int, size: int, ta_translation: float) -> DataNode:
    """Apply an augmentation policy to images; the pipeline needs ``enable_conditionals=True``.

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
        Maximum translation of TrivialAugmentWide, as a fraction of `size`.

    Returns
    -------
    DataNode
        As `images`. Pixels from outside an image are filled with grey 128.
    """
    shape = (size, size)
    # DALI 2.4 uses its own deprecated operator names here, and shows the warnings regardless of the filters.
    with warnings.catch_warnings(record=True):
        if policy == "ra":
            images = rand_augment(images, n=2, m=ra_magnitude, shape=shape)
        else:
            images = trivial_augment_wide(images, shape=shape, max_translate_rel=ta_translation)
    return images


@do_not_convert
def erased(images: DataNode, probability: float, size: int, *, fp16: bool = False) -> DataNode:
    """Set a random rectangle of normalised images to 0, the mean.

    The area is a uniform fraction of the image in [0.02, 0.33]; the aspect ratio is log-uniform in [0.3, 3.3]. Sides
    longer than the image are clipped.

    Parameters
    ----------
    images : DataNode
        CHW or HWC, with that layout, on the CPU or a GPU.
    probability : float
        Probability that an image is erased, in [0, 1].
    size : int
        Height and width of the images.
    fp16 : bool
        Whether the images are float16; otherwise they are float32.

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
    corner = math.min(math.floor(place * (size - sides + 1)), size - sides)  # a draw of 1 would overshoot
    sides *= fn.random.coin_flip(probability=probability)
    if fp16:  # fn.erase does not support float16 on a GPU; 0 has the same bits in int16
        images = fn.reinterpret(images, dtype=types.INT16)
    images = fn.erase(images, anchor=corner, shape=sides, axis_names="HW")
    return fn.reinterpret(images, dtype=types.FLOAT16) if fp16 else images

"""For a job that uses one of DALI's automatic augmentations.

The SaliencyMix lines are the import and the call of `saliencymix`. It stands behind the augmentation, whose output is
still uint8, HWC and of one size: each image is augmented on its own, then the most salient part of one augmented image
goes into another. ``rand_augment`` and ``trivial_augment`` take the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import auto_augment
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


# DALI's automatic augmentations are made of conditionals.
@pipeline_def(enable_conditionals=True)
def training_pipeline(
    files: Sequence[str], labels: Sequence[int], *, size: int = 224, device: str = "cpu"
) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, augment, mix, mirror, normalise.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int32 of shape (1,) twice; float32 weights of `labels`.
    """
    encoded, labels = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images = auto_augment.auto_augment_image_net(images, shape=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels, prob=1.0)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam

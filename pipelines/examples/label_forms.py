"""For a job whose loss wants targets: from class ids, from one-hot vectors, from multi-label vectors.

The SaliencyMix lines are the import, the call of `saliencymix`, which takes labels of any form, and those that make
`targets`. Class ids need `num_classes`. Vectors become ``lam * labels + (1 - lam) * source_labels``, which for
multi-label ones is no distribution: a class of both images stays at 1, others get ``lam`` or ``1 - lam``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix, soft_labels

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


@pipeline_def
def training_pipeline(
    files: Sequence[str],
    ids: Sequence[int],
    *,
    form: str,
    num_classes: int,
    tags: np.ndarray[Any, Any] | None = None,
    size: int = 224,
    device: str = "cpu",
) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, mirror, normalise.

    Parameters
    ----------
    form : {"class_ids", "one_hot", "multi_label"}
        What the labels are when it comes to the mixing.
    tags : ndarray of shape (len(tags), num_classes), float32, optional
        For "multi_label": the vectors; `ids` say which row belongs to which file.

    Returns
    -------
    images, labels, source_labels, lam, targets : DataNode
        CHW float32; labels in that form, twice; float32 weights of `labels`; float32 of shape (num_classes,).
    """
    encoded, labels = fn.readers.file(files=files, labels=ids, random_shuffle=True, name="reader")
    if form == "one_hot":
        labels = fn.one_hot(labels, num_classes=num_classes)
    elif form == "multi_label":
        labels = types.Constant(tags, device="cpu")[labels[0]]
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    if form == "class_ids":
        targets = soft_labels(labels, source_labels, lam, num_classes=num_classes)
    else:
        targets = soft_labels(labels, source_labels, lam)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam, targets

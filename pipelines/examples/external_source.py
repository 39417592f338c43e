"""For a job whose images come from Python as arrays, out of a database or a format of one's own.

The SaliencyMix lines are the import and the call of `saliencymix`. The source is a function of the sample's index and
keeps no state, so a checkpoint of the pipeline covers the source and the mixing: a restored one goes on identically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


class ShuffledArrays:
    """Give image and label number ``info.idx_in_epoch`` of an order that `seed` and the number of the epoch decide.

    An epoch ends where no full batch is left; call ``pipeline.reset()`` then, as DALI's iterators do by themselves.
    """

    def __init__(self, images: Sequence[np.ndarray[Any, Any]], labels: Sequence[int], *, seed: int = 0) -> None:
        self.images, self.labels, self.seed = images, labels, seed

    def __call__(self, info: types.SampleInfo) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return one image and its label, of shape (1,)."""
        if info.idx_in_epoch >= len(self.images):
            raise StopIteration
        # Drawn anew for each sample, as nothing may be kept; for millions of images keep the last epoch's order.
        order = np.random.default_rng([self.seed, info.epoch_idx]).permutation(len(self.images))
        number = order[info.idx_in_epoch]
        return self.images[number], np.array([self.labels[number]], np.int32)


@pipeline_def(enable_checkpointing=True)
def training_pipeline(source: ShuffledArrays, *, size: int = 224, device: str = "cpu") -> tuple[DataNode, ...]:
    """Take arrays (H, W, 3) uint8 of any size, resize, mix, mirror, normalise.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int32 of shape (1,) twice; float32 weights of `labels`.
    """
    images, labels = fn.external_source(
        source, num_outputs=2, batch=False, dtype=[types.UINT8, types.INT32], layout=["HWC", ""], ndim=[3, 1]
    )
    images = fn.resize(images.gpu() if device == "gpu" else images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam

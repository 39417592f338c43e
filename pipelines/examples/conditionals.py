"""For a job with ``if`` in its graph.

The SaliencyMix lines are the import and everything from the second ``if`` to the end of its ``else``.

Behind a conditional nothing is special: the blurred and the sharp images are one batch again. Inside a branch the
operator sees only the samples that take the branch, so **partners are found among these**: here no image of
`unmixed_class` receives a patch or gives one. A sample that is alone in the branch is its own partner and so stays as
it is. To mix a random part of the samples with partners from the whole batch, no ``if`` is needed: that is ``prob``.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


@pipeline_def(enable_conditionals=True)
def training_pipeline(
    files: Sequence[str], labels: Sequence[int], *, unmixed_class: int = 0, size: int = 224, device: str = "cpu"
) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, blur half of the images, mix all but one class, mirror, normalise.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int32 of shape (1,) twice; float32 weights of `labels`, 1 for the images of `unmixed_class`.
    """
    encoded, labels = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    if fn.random.coin_flip(dtype=types.BOOL):
        images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=[0.1, 2.0]))
    if labels[0] != unmixed_class:
        images, labels, source_labels, lam = saliencymix(images, labels)
    else:  # every name that is used behind the conditional needs a value in both branches
        source_labels = labels
        lam = fn.constant(fdata=[1.0], shape=[], device=device)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam

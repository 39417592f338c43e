"""For a mixed-precision job with a channels-last network: float16 images in NHWC order.

The SaliencyMix lines are the import and the call of `saliencymix`; it does not change with the output's type, as it
stands where images still are uint8. In PyTorch ``images.permute(0, 3, 1, 2)`` then is a batch (N, C, H, W) in
channels-last memory format, without a copy. ``pad_output=True`` in the last operator adds a fourth channel of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


@pipeline_def
def training_pipeline(
    files: Sequence[str], labels: Sequence[int], *, size: int = 224, device: str = "cpu"
) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, mirror, normalise.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        HWC float16; int32 of shape (1,) twice; float32 weights of `labels`.
    """
    encoded, labels = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(
        images, dtype=types.FLOAT16, output_layout="HWC", mean=MEAN, std=STD, mirror=fn.random.coin_flip()
    )
    return images, labels, source_labels, lam

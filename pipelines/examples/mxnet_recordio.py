"""For a job that reads MXNet RecordIO files, as ``im2rec`` makes them.

The SaliencyMix lines are the import and the call of `saliencymix`. This format keeps labels as float32, which are cast
to class ids before the mixing; multi-label vectors stay float32 and are mixed as in `pipelines.examples.label_forms`.
"""

from __future__ import annotations

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


@pipeline_def
def training_pipeline(path: str, index: str, *, size: int = 224, device: str = "cpu") -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, mirror, normalise.

    Parameters
    ----------
    path : str
        The ``.rec`` file.
    index : str
        Its ``.idx`` file, from ``im2rec``, ``rec2idx`` or `pipelines.examples.records.write_recordio`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int32 of shape (1,) twice; float32 weights of `labels`.
    """
    encoded, labels = fn.readers.mxnet(path=path, index_path=index, random_shuffle=True, name="reader")
    labels = fn.cast(labels, dtype=types.INT32)
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam

"""For a job that reads TFRecord files with the feature names of the ImageNet conversion scripts.

The SaliencyMix lines are the import and the call of `saliencymix`. Labels are int64 here and pass through as they are.
The usual ImageNet TFRecords count classes from 1: with those, subtract 1 (``labels - 1``) for 1000 classes from 0.
"""

from __future__ import annotations

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import tfrecord as tfrec
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


@pipeline_def
def training_pipeline(path: str, index: str, *, size: int = 224, device: str = "cpu") -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, mirror, normalise.

    Parameters
    ----------
    path : str
        TFRecord file of ``tf.train.Example`` with ``image/encoded`` and ``image/class/label``.
    index : str
        Its index, from DALI's ``tfrecord2idx`` or `pipelines.examples.records.write_tfrecord`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int64 of shape (1,) twice; float32 weights of `labels`.
    """
    features = {
        "image/encoded": tfrec.FixedLenFeature((), tfrec.string, ""),
        "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
    }
    example = fn.readers.tfrecord(path=path, index_path=index, features=features, random_shuffle=True, name="reader")
    encoded, labels = example["image/encoded"], example["image/class/label"]
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam

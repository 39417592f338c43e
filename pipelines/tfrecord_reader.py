"""TFRecord files, with the feature names of the ImageNet conversion scripts.

    tfrecord2idx train.tfrecord train.idx
    python pipelines/tfrecord_reader.py train.tfrecord train.idx

The records are ``tf.train.Example`` messages with ``image/encoded`` and ``image/class/label``. The usual ImageNet files
count classes from 1: with those, subtract 1 (``labels - 1``) for 1000 classes from 0. Labels are int64 here.
"""

import argparse

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import tfrecord as tfrec
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS
FEATURES = {
    "image/encoded": tfrec.FixedLenFeature((), tfrec.string, ""),
    "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
}


@pipeline_def
def training_pipeline(path: str, index: str, size: int = 224) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, flip horizontally, normalise."""
    example = fn.readers.tfrecord(path=path, index_path=index, features=FEATURES, random_shuffle=True, name="reader")
    images = fn.resize(fn.decoders.image_random_crop(example["image/encoded"]), size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, example["image/class/label"])
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a batch of a TFRecord file.")
    parser.add_argument("path", help="TFRecord file")
    parser.add_argument("index", help="its index, from DALI's tfrecord2idx")
    args = parser.parse_args()
    pipeline = training_pipeline(args.path, args.index, batch_size=8, num_threads=4, device_id=None)
    images, labels, source_labels, lam = (np.array(output.as_tensor()) for output in pipeline.run())
    print(images.shape, "label, source label, lam:", np.column_stack([labels, source_labels, lam]), sep="\n")

"""MXNet RecordIO files, as ``im2rec`` makes them.

    python pipelines/recordio_reader.py train.rec train.idx

This format keeps labels as float32, which are cast to class ids in front of the mixing. Multi-label vectors stay
float32 and are mixed as in label_forms.py.
"""

import argparse

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


@pipeline_def
def training_pipeline(path: str, index: str, size: int = 224) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, flip horizontally, normalise."""
    encoded, labels = fn.readers.mxnet(path=path, index_path=index, random_shuffle=True, name="reader")
    images = fn.resize(fn.decoders.image_random_crop(encoded), size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, fn.cast(labels, dtype=types.INT32))
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a batch of an MXNet RecordIO file.")
    parser.add_argument("path", help=".rec file")
    parser.add_argument("index", help="its .idx file, from im2rec or DALI's rec2idx")
    args = parser.parse_args()
    pipeline = training_pipeline(args.path, args.index, batch_size=8, num_threads=4, device_id=None)
    images, labels, source_labels, lam = (np.array(output.as_tensor()) for output in pipeline.run())
    print(images.shape, "label, source label, lam:", np.column_stack([labels, source_labels, lam]), sep="\n")

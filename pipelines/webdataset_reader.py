"""WebDataset archives.

    wds2idx train.tar train.idx
    python pipelines/webdataset_reader.py train.tar train.idx

The archive holds ``KEY.jpg`` and ``KEY.cls`` side by side for each KEY. A ``.cls`` file is the class id as decimal
text, and labels have to be numbers: the text becomes one inside the graph.
"""

import argparse

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS
DIGITS = 6  # class ids of up to 999999


@pipeline_def
def training_pipeline(archive: str, index: str, size: int = 224) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, flip horizontally, normalise."""
    encoded, text = fn.readers.webdataset(
        paths=archive, index_paths=index, ext=["jpg", "cls"], missing_component_behavior="error",
        random_shuffle=True, name="reader",
    )  # fmt: skip
    labels = decimal_number(text)
    images = fn.resize(fn.decoders.image_random_crop(encoded), size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


def decimal_number(text: DataNode) -> DataNode:
    """Return the number that ASCII digits alone write, int32 scalars; zeros fill the places in front."""
    start = fn.cast(text.shape(), dtype=types.INT32) - DIGITS
    digits = fn.slice(text, start=start, shape=[DIGITS], axes=[0], out_of_bounds_policy="pad", fill_values=ord("0"))
    places = types.Constant([10**place for place in reversed(range(DIGITS))], dtype=types.INT32)
    return fn.reductions.sum((fn.cast(digits, dtype=types.INT32) - ord("0")) * places, axes=[0], dtype=types.INT32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a batch of a WebDataset archive.")
    parser.add_argument("archive", help="tar file of KEY.jpg and KEY.cls")
    parser.add_argument("index", help="its index, from DALI's wds2idx")
    args = parser.parse_args()
    pipeline = training_pipeline(args.archive, args.index, batch_size=8, num_threads=4, device_id=None)
    images, labels, source_labels, lam = (np.array(output.as_tensor()) for output in pipeline.run())
    print(images.shape, "label, source label, lam:", np.column_stack([labels, source_labels, lam]), sep="\n")

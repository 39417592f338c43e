"""An ``if`` in DALI's graph, with SaliencyMix behind it and inside a branch.

    python pipelines/conditionals.py DATA

DATA is a folder with one folder of images for each class.

Behind a conditional nothing changes: blurred and sharp images are one batch again. Inside a branch the operator sees
only the samples that take the branch, so partners are found among these: here no image of `unmixed_class` receives a
patch or gives one. A sample that is alone in the branch is its own partner and so stays as it is. To mix a random part
of the samples with partners from the whole batch use ``prob``, not an ``if``.
"""

import argparse

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


@pipeline_def(enable_conditionals=True)
def training_pipeline(root: str, unmixed_class: int = 0, size: int = 224) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, blur half of the images, mix all classes but one, normalise."""
    encoded, labels = fn.readers.file(file_root=root, random_shuffle=True, name="reader")
    images = fn.resize(fn.decoders.image_random_crop(encoded), size=(size, size))
    if fn.random.coin_flip(dtype=types.BOOL):
        images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=[0.1, 2.0]))
    if labels[0] != unmixed_class:
        images, labels, source_labels, lam = saliencymix(images, labels)
    else:  # every name that is used behind the conditional needs a value in both branches, on one device
        source_labels = labels
        lam = fn.constant(fdata=[1.0], shape=[], device="cpu")  # "gpu" where the images are on a GPU
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a batch, mixed inside a branch of the graph.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    pipeline = training_pipeline(parser.parse_args().data, batch_size=8, num_threads=4, device_id=None)
    images, labels, source_labels, lam = (np.array(output.as_tensor()) for output in pipeline.run())
    print(images.shape, "label, source label, lam:", np.column_stack([labels, source_labels, lam]), sep="\n")

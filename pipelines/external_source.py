"""Use SaliencyMix on arrays from Python, such as images from a database or a custom format: ``fn.external_source``.

    python pipelines/external_source.py DATA

DATA is a folder with one folder of images for each class. Pillow opens the files; replace it with your own code.

The source depends only on the sample's index and keeps no state. So DALI's checkpoints cover the source and the mixing:
a restored pipeline resumes with the same batches.
"""

import argparse
from typing import Any

from dali_saliencymix.packages import require_or_exit

require_or_exit("PIL", "nvidia.dali")

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from PIL import Image

from dali_saliencymix.datasets.image_folder import ImageFolder, list_image_folder
from dali_saliencymix.fn import saliencymix
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


class ShuffledImages:
    """Images and labels of a folder, shuffled in each epoch, in an order that depends on the seed and the epoch.

    The epoch ends when no full batch is left. DALI's iterators then start the next epoch. If you call
    ``pipeline.run()`` yourself, start it with ``pipeline.reset()``.
    """

    def __init__(self, folder: ImageFolder, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed

    def __call__(self, info: types.SampleInfo) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return one image (H, W, 3) uint8, of any size, and its label, of shape (1,)."""
        if info.idx_in_epoch >= len(self.folder):
            raise StopIteration
        # Recomputed for each sample, because the source keeps no state. For millions of images, cache it.
        order = np.random.default_rng([self.seed, info.epoch_idx]).permutation(len(self.folder))
        number = order[info.idx_in_epoch]
        with Image.open(self.folder.files[number]) as image:
            return np.array(image.convert("RGB")), np.array([self.folder.labels[number]], np.int32)


@pipeline_def(enable_checkpointing=True)
def training_pipeline(source: ShuffledImages, size: int = 224) -> tuple[DataNode, ...]:
    """Read arrays, resize, mix, flip horizontally, normalise."""
    images, labels = fn.external_source(
        source, num_outputs=2, batch=False, dtype=[types.UINT8, types.INT32], layout=["HWC", ""], ndim=[3, 1]
    )
    images = fn.resize(images, size=(size, size))  # on a GPU: images.gpu()
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mix a batch of arrays from Python and print its labels and weights.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    source = ShuffledImages(list_image_folder(parser.parse_args().data))
    pipeline = training_pipeline(source, batch_size=8, num_threads=4, device_id=None)
    images, labels, source_labels, lam = (np.array(output.as_tensor()) for output in pipeline.run())
    print(images.shape, "label, source label, lam:", np.column_stack([labels, source_labels, lam]), sep="\n")

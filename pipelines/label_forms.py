"""Targets for the loss, from class ids, from one-hot vectors and from multi-label vectors.

    python pipelines/label_forms.py DATA --form multi_label

DATA is a folder with one folder of images for each class.

`saliencymix` takes labels of any form. Class ids need `num_classes` to become targets. Vectors become
``lam * labels + (1 - lam) * source_labels``, which for multi-label ones is no distribution: a class that both images
have stays at 1, others get ``lam`` or ``1 - lam``.
"""

import argparse
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.fn import saliencymix, soft_labels
from dali_saliencymix.pixels import IMAGENET_IN_GREY_LEVELS

MEAN, STD = IMAGENET_IN_GREY_LEVELS


@pipeline_def
def training_pipeline(
    files: list[str], ids: list[int], form: str, num_classes: int, tags: np.ndarray[Any, Any], size: int = 224
) -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, make targets, flip horizontally, normalise.

    For the form "multi_label" each row of `tags`, float32 of shape (rows, num_classes), is a label, and `ids` say which
    row belongs to which file.
    """
    encoded, labels = fn.readers.file(files=files, labels=ids, random_shuffle=True, name="reader")
    images = fn.resize(fn.decoders.image_random_crop(encoded), size=(size, size))
    if form == "one_hot":
        labels = fn.one_hot(labels, num_classes=num_classes)
    elif form == "multi_label":
        labels = types.Constant(tags, device="cpu")[labels[0]]
    images, labels, source_labels, lam = saliencymix(images, labels)
    options = {"num_classes": num_classes} if form == "class_ids" else {}
    targets = soft_labels(labels, source_labels, lam, **options)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam, targets


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the targets of a batch.")
    parser.add_argument("data", metavar="DATA", help="folder with one folder of images for each class")
    parser.add_argument("--form", choices=("class_ids", "one_hot", "multi_label"), default="class_ids")
    args = parser.parse_args()
    folder = list_image_folder(args.data)
    num_classes = len(folder.classes)
    # In the place of tags of your own: each image has its class and the next one.
    tags = np.eye(num_classes, dtype=np.float32) + np.eye(num_classes, k=1, dtype=np.float32)
    pipeline = training_pipeline(
        folder.files, folder.labels, args.form, num_classes, tags, batch_size=8, num_threads=4, device_id=None
    )
    *_, targets = pipeline.run()
    print(np.array(targets.as_tensor()).round(3))

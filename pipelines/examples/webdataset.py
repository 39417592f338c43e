"""For a job that reads WebDataset tar files.

The SaliencyMix lines are the import and the call of `saliencymix`. The rest is one thing that DALI leaves to the job:
such files hold the class id as decimal text (``00000.cls``), and labels have to be numbers. Text becomes a number
inside the graph here; the mixing would permute text of one length just as well.
"""

from __future__ import annotations

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode

from dali_saliencymix.fn import saliencymix

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]

_DIGITS = 6  # class ids of up to 999999


@pipeline_def
def training_pipeline(tar: str, index: str, *, size: int = 224, device: str = "cpu") -> tuple[DataNode, ...]:
    """Read, decode a random crop, resize, mix, mirror, normalise.

    Parameters
    ----------
    tar : str
        Archive of ``KEY.jpg`` and ``KEY.cls``, side by side for each KEY.
    index : str
        Its index, from DALI's ``wds2idx`` or `pipelines.examples.records.write_tar`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        CHW float32; int32 scalars twice; float32 weights of `labels`.
    """
    encoded, text = fn.readers.webdataset(
        paths=tar, index_paths=index, ext=["jpg", "cls"], missing_component_behavior="error",
        random_shuffle=True, name="reader",
    )  # fmt: skip
    labels = decimal_number(text)
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(size, size))
    images, labels, source_labels, lam = saliencymix(images, labels)
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=MEAN, std=STD, mirror=fn.random.coin_flip())
    return images, labels, source_labels, lam


def decimal_number(text: DataNode) -> DataNode:
    """Return the number that ASCII digits alone write, int32 scalars; zeros fill the places in front."""
    start = fn.cast(text.shape(), dtype=types.INT32) - _DIGITS
    digits = fn.slice(text, start=start, shape=[_DIGITS], axes=[0], out_of_bounds_policy="pad", fill_values=ord("0"))
    places = types.Constant([10**place for place in reversed(range(_DIGITS))], dtype=types.INT32)
    return fn.reductions.sum((fn.cast(digits, dtype=types.INT32) - ord("0")) * places, axes=[0], dtype=types.INT32)

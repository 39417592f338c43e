"""CIFAR-style pipeline: small images, padded with zeros, cropped at random, mixed, mirrored, normalised.

The edge of a zero padding is what a saliency detector sees first: it draws two or three times as many peaks as its area
accounts for. So the peaks are found before the padding and move with the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import DataNode, do_not_convert

from dali_saliencymix.fn import saliency_peaks
from pipelines.reading import decode_window, read_files, to_device

MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)


@pipeline_def(enable_checkpointing=True)
def cifar_training_pipeline(
    files: Sequence[str],
    labels: Sequence[int],
    *,
    mix: Callable[..., tuple[DataNode, DataNode, DataNode, DataNode]],
    find_peaks: Callable[[DataNode], DataNode] | None = saliency_peaks,
    size: int = 32,
    padding: int = 4,
    device: str = "cpu",
    shard_id: int = 0,
    num_shards: int = 1,
    shuffle_seed: int = 0,
) -> tuple[DataNode, DataNode, DataNode, DataNode]:
    """Decode, pad, crop at random, mix, mirror at random, normalise.

    Parameters
    ----------
    files, labels : sequence
        Paths and labels of all images, which are `size` x `size`; each shard takes its share.
    mix : callable
        ``(images, labels, peaks=...) -> (images, labels, source_labels, lam)``, as `dali_saliencymix.fn.saliencymix`
        with its options bound by ``functools.partial``, but for `saliency`, which `find_peaks` decides.
    find_peaks : callable or None
        Finds the most salient pixel of the images as they were before the padding. None where `mix` takes no `peaks`:
        for `cutmix` and `mixup`.
    size : int
        Height and width of the images, before and after.
    padding : int
        Width of the border of zeros that a crop can reach into.
    device : {"cpu", "gpu"}
        Where images are decoded and processed.
    shard_id, num_shards, shuffle_seed
        As for `pipelines.imagenet.training_pipeline`.

    Returns
    -------
    images, labels, source_labels, lam : DataNode
        Normalised images, CHW float32; labels of shape (1,), int32; weights of `labels`, float32 scalars.
    """
    encoded, label = read_files(
        files, labels, shard_id, num_shards, shuffle_after_epoch=True, shuffle_after_epoch_seed=shuffle_seed
    )
    shape = fn.peek_image_shape(encoded)[:2]
    images = decode_window(encoded, shape * 0, shape, device)
    offsets = [float(offset) for offset in range(-padding, padding + 1)]
    corner = fn.stack(*(fn.cast(fn.random.uniform(values=offsets), dtype=types.INT32) for _ in range(2)))
    given = {} if find_peaks is None else {"peaks": _moved(find_peaks(images), corner, size)}
    images = fn.slice(
        images,
        corner,
        [size, size],
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    images, label, source_label, lam = mix(images, label, **given)
    images = fn.crop_mirror_normalize(
        images, mirror=fn.random.coin_flip(), mean=MEAN, std=STD, dtype=types.FLOAT, output_layout="CHW"
    )
    return tuple(to_device(device, node) for node in (images, label, source_label, lam))


@do_not_convert
def _moved(peaks: DataNode, corner: DataNode, size: int) -> DataNode:
    """Return where the peaks are in the crop, at its edge where they were cut off: never in the padding."""
    corner = corner.gpu() if peaks.device == "gpu" else corner
    return math.clamp(peaks - corner, 0, size - 1)

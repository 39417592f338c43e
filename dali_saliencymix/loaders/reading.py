"""What all pipelines begin with: files -> encoded images -> decoded windows of them."""

from __future__ import annotations

from collections.abc import Sequence

from nvidia.dali import fn
from nvidia.dali.pipeline import DataNode, do_not_convert

# The largest image of ImageNet's training set: with it the decoder allocates its buffers once.
_WIDTH_HINT, _HEIGHT_HINT = 5980, 6430


@do_not_convert
def read_files(
    files: Sequence[str], labels: Sequence[int], shard_id: int, num_shards: int, **shuffling: int
) -> tuple[DataNode, DataNode]:
    """Read encoded images and labels, with the name and the padding that `dali_saliencymix.loaders.dali.Loader` counts on."""
    return fn.readers.file(
        files=list(files),
        labels=list(labels),
        shard_id=shard_id,
        num_shards=num_shards,
        pad_last_batch=True,
        name="reader",
        **shuffling,
    )


@do_not_convert
def decode_window(
    encoded: DataNode, start: DataNode, shape: DataNode, device: str, hw_decoder_load: float = 0.65
) -> DataNode:
    """Decode the window of each image that begins at `start` and has `shape`, both (rows, columns).

    The window has to come from the image's header (``fn.peek_image_shape``): a file that is no image then fails
    there. In DALI 2.4's decoders it ends the batch while other threads still work on it, which can crash the process.
    """
    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        device="mixed" if device == "gpu" else "cpu",
        hw_decoder_load=hw_decoder_load,
        preallocate_width_hint=_WIDTH_HINT,
        preallocate_height_hint=_HEIGHT_HINT,
    )


@do_not_convert
def to_device(device: str, node: DataNode) -> DataNode:
    """Return a node on a device, "cpu" or "gpu"."""
    return node.gpu() if device == "gpu" else node

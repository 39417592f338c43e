"""A picture of mixed samples: what is received from where, and why from there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dali_saliencymix._checks import check_at_least
from dali_saliencymix.boxes import saliency_peaks
from dali_saliencymix.core import saliencymix
from dali_saliencymix.image_folder import list_image_folder, why_unreadable
from dali_saliencymix.params import draw_params
from dali_saliencymix.saliency import get_detector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dali_saliencymix.saliency import Detector


def draw_mixed(
    images: NDArray[np.uint8],
    source_index: NDArray[np.integer],
    lam: NDArray[np.floating],
    *,
    names: Sequence[str],
    saliency: str | Detector = "spectral_residual",
    box: str = "fit",
    per_batch: bool = False,
) -> Figure:
    """Mix a batch and draw one column for each sample: receiver, source, saliency map, result.

    Parameters
    ----------
    images, source_index, lam, saliency, box, per_batch
        As for `dali_saliencymix.saliencymix`, in host memory.
    names : sequence of str
        Class name of each image.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        msg = "pictures need Matplotlib, which is not installed: pip install 'dali-saliencymix[train]'"
        raise ImportError(msg) from error

    count, height, width, _ = images.shape
    mixed = saliencymix(images, source_index, lam, saliency=saliency, box=box, per_batch=per_batch)
    maps = get_detector(saliency)(images)
    peaks = saliency_peaks(maps, height, width)

    figure = Figure(figsize=(1.75 * count, 7.6), layout="constrained")
    axes = figure.subplots(4, count, squeeze=False)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # the map's cells over the image's pixels
    for column, (source, (y0, x0, y1, x1)) in enumerate(zip(source_index, mixed.boxes, strict=True)):
        receiver, giver, saliency_map, result = axes[:, column]
        for axis, pixels in ((receiver, images[column]), (giver, images[source]), (result, mixed.images[column])):
            axis.imshow(pixels.squeeze(), cmap="grey", vmin=0, vmax=255, extent=extent)
        saliency_map.imshow(maps[source], cmap="magma", extent=extent)
        # In a batch with one box for all, the box belongs to the first sample's source.
        peak = peaks[source_index[0] if per_batch else source]
        saliency_map.plot(peak[1], peak[0], "+", color="cyan", markersize=9, markeredgewidth=1.5)
        for axis in (giver, saliency_map, result):
            edge = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="cyan", linewidth=1.4)
            axis.add_patch(edge)
        receiver.set_title(names[column], fontsize=8)
        giver.set_title(names[source], fontsize=8)
        result.set_title(f"lam = {mixed.lam[column]:.2f}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, label in enumerate(("receiver", "source", "saliency of source", "mixed")):
        axes[row, 0].set_ylabel(label, fontsize=9)
    return figure


def save_preview(
    root: str | Path,
    path: str | Path,
    *,
    count: int = 8,
    size: int = 224,
    seed: int = 0,
    alpha: float = 1.0,
    saliency: str = "spectral_residual",
    box: str = "fit",
    per_batch: bool = False,
) -> None:
    """Write a picture of mixed samples of a data set.

    Parameters
    ----------
    root : path
        Folder with one folder of images per class, or with such a folder called ``train``.
    path : path
        Picture to write; the ending decides on its format.
    count : int
        Number of samples.
    size : int
        Height and width that random crops of the images are resized to, in pixels.
    seed : int
        Seed of all draws.
    alpha, saliency, box, per_batch
        As for `dali_saliencymix.fn.saliencymix`.

    Raises
    ------
    OSError
        If `root` is not there or holds no images, or `path` cannot be written.
    ValueError
        If an option is wrong.
    """
    check_at_least(count, "count", 1)
    check_at_least(size, "size", 1)
    check_at_least(seed, "seed", 0)
    root = Path(root)
    folder = list_image_folder(root / "train" if (root / "train").is_dir() else root)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(folder), size=count, replace=len(folder) < count)
    files = [folder.files[i] for i in chosen]
    for file in files:
        if why := why_unreadable(file):
            msg = f"{file}: {why}"
            raise ValueError(msg)
    images = _decoded(files, size, seed)
    source_index, lam = draw_params(rng, count, alpha=alpha)
    figure = draw_mixed(
        images,
        source_index,
        lam,
        names=[folder.classes[folder.labels[i]] for i in chosen],
        saliency=saliency,
        box=box,
        per_batch=per_batch,
    )
    figure.savefig(path, dpi=110)


def _decoded(files: Sequence[str], size: int, seed: int) -> NDArray[np.uint8]:
    """Decode a random crop of each file with DALI, as a training pipeline does: (N, size, size, 3) uint8."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(files), num_threads=2, device_id=None, seed=seed, prefetch_queue_depth=1)
    def crops():  # type: ignore[no-untyped-def]
        encoded, _ = fn.readers.file(files=list(files))
        images = fn.decoders.image_random_crop(encoded, random_area=[0.35, 1.0])
        return fn.resize(images, size=(size, size))

    (images,) = crops().run()
    return np.array(images.as_tensor())

"""Figures of mixed samples, with their sources, saliency maps and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_saliencymix._checks import check_at_least, check_fraction
from dali_saliencymix.boxes import boxes_at, saliency_peaks
from dali_saliencymix.datasets.damage import why_unusable
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.draw import MixParams, draw
from dali_saliencymix.mix import apply
from dali_saliencymix.options import MODES, SOURCES, MixOptions
from dali_saliencymix.packages import require
from dali_saliencymix.saliency import DETECTORS, saliency_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dali_saliencymix.saliency import Detector


def draw_mixed(
    images: NDArray[np.uint8],
    params: MixParams,
    *,
    names: Sequence[str],
    preset: str = "default",
    saliency: str | Detector | None = None,
    source: str | None = None,
    destination: str | None = None,
    box: str | None = None,
    per_batch: bool | None = None,
    label_weight: str = "area",
) -> Figure:
    """Mix a batch and plot one column per sample: receiver, source, saliency map, result.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The batch, in host memory.
    params : MixParams
        Sources, weights, modes and points, as returned by `dali_saliencymix.draw_mix_params`.
    names : sequence of str
        Class name of each image.
    preset, saliency, source, destination, box, per_batch, label_weight
        As for `dali_saliencymix.mix`.

    Returns
    -------
    matplotlib.figure.Figure
        Cyan boxes mark the patch in the source, in the source's map and in the mixed image. White boxes mark the
        destination in the receiver and in the receiver's map.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    options = MixOptions(
        preset=preset,
        saliency=saliency,
        source=source,
        destination=destination,
        box=box,
        per_batch=per_batch,
        label_weight=label_weight,
    )
    mixed = apply(options, images, *params)
    maps = saliency_maps(images, options.saliency)
    modes = [MODES[mode] for mode in params.mode]
    if options.per_batch:
        modes = modes[:1] * len(images)
    rows = ["receiver", "source", "mixed"]
    if "saliencymix" in modes:
        rows.insert(2, "saliency of source")
        if options.destination in SOURCES:
            rows.insert(1, "saliency of receiver")
    figure, axes = _panels(rows, len(images))
    for column, partner in enumerate(params.source_index):
        own, other = mixed.boxes[column], mixed.source_boxes[column]
        # With `per_batch`, the box comes from the maps of the first sample and its source.
        receiver, giver = (0, params.source_index[0]) if options.per_batch else (column, partner)
        panels = dict(zip(rows, axes[:, column], strict=True))
        for row, pixels, title, edges, colour in (
            ("receiver", images[column], names[column], own, "white"),
            ("source", images[partner], names[partner], other, "cyan"),
            ("mixed", mixed.images[column], f"{modes[column]}, lam = {mixed.lam[column]:.2f}", own, "cyan"),
        ):
            _show_image(panels[row], pixels, title)
            _show_box(panels[row], edges, colour)
        for row, index, which, edges, colour in (
            ("saliency of receiver", receiver, options.destination, own, "white"),
            ("saliency of source", giver, options.source, other, "cyan"),
        ):
            if row in panels and modes[column] == "saliencymix":
                _show_map(panels[row], maps[index], images.shape[1:3], least=which == "non_salient")
                _show_box(panels[row], edges, colour)
            elif row in panels:
                panels[row].axis("off")
    return figure


def draw_detectors(
    images: NDArray[np.uint8],
    *,
    names: Sequence[str],
    detectors: Mapping[str, Detector] = DETECTORS,
    lam: float = 0.75,
    box: str = "fit",
) -> Figure:
    """Plot the maps of several detectors for the same images: one row per detector, with its peaks and boxes.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8
        The batch, in host memory.
    names : sequence of str
        Class name of each image.
    detectors : mapping from str to callable
        Functions from images to maps (N, h, w), by name; by default all detectors of this package.
    lam : float
        Each box covers the share 1 - `lam` of the image.
    box : {"fit", "clip"}
        As for `dali_saliencymix.boxes_at`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    size = images.shape[1:3]
    share = np.full(len(images), check_fraction(lam, "lam"))
    figure, axes = _panels(["image", *detectors], len(images))
    for axis, pixels, name in zip(axes[0], images, names, strict=True):
        _show_image(axis, pixels, name)
    for row, detector in zip(axes[1:], detectors.values(), strict=True):
        maps = saliency_maps(images, detector)
        boxes = boxes_at(saliency_peaks(maps, *size), share, *size, box=box)
        for axis, saliency_map, edges in zip(row, maps, boxes, strict=True):
            _show_map(axis, saliency_map, size, least=False)
            _show_box(axis, edges, "cyan")
    return figure


def save_preview(
    root: str | Path,
    path: str | Path,
    *,
    count: int = 8,
    size: int = 224,
    min_crop_area: float = 0.08,
    seed: int = 0,
    compare: bool = False,
    modes: Sequence[str] = ("saliencymix",),
    alpha: float = 1.0,
    prob: float = 1.0,
    label_weight: str = "area",
    **options: Any,
) -> None:
    """Write a figure of mixed samples of a data set, or of the maps of all detectors.

    Parameters
    ----------
    root : path
        Folder with one folder of images per class, or a folder that contains such a folder called ``train``.
    path : path
        Image file to write; its suffix sets the format.
    count : int
        Number of samples.
    size : int
        Height and width that random crops of the images are resized to, in pixels.
    min_crop_area : float
        Minimum area fraction of the random crop.
    seed : int
        Random seed.
    compare : bool
        If true, plot the maps of all detectors for the same images instead of mixed samples.
    modes : sequence of str
        Mixing modes, among ``"saliencymix"``, ``"cutmix"`` and ``"mixup"``; each sample gets one of them.
    alpha, prob
        As for `dali_saliencymix.draw_mix_params`.
    label_weight : {"area", "saliency"}
        As for `dali_saliencymix.mix`: the meaning of the `lam` shown. ``"saliency"`` requires saliencymix in `modes`.
    **options
        `preset`, `saliency`, `source`, `destination`, `box`, `per_batch` as for `dali_saliencymix.mix`.

    Raises
    ------
    OSError
        If `root` does not exist or contains no images, or `path` cannot be written.
    ValueError
        If an option is invalid.
    """
    check_at_least(count, "count", 1)
    check_at_least(size, "size", 1)
    check_at_least(seed, "seed", 0)
    if not 0 < min_crop_area <= 1:
        msg = f"min_crop_area must be in (0, 1], got {min_crop_area}"
        raise ValueError(msg)
    root = Path(root)
    rng = np.random.default_rng(seed)
    policy = MixOptions(modes=dict.fromkeys(modes, 1.0), alpha=alpha, prob=prob, label_weight=label_weight)
    params = draw(rng, count, policy)
    folder = list_image_folder(root / "train" if (root / "train").is_dir() else root)
    chosen = rng.choice(len(folder), size=count, replace=len(folder) < count)
    files = [folder.files[i] for i in chosen]
    for file in files:
        if why := why_unusable(file):
            msg = f"{file}: {why}"
            raise ValueError(msg)
    images = _random_crops(files, size, min_crop_area, seed)
    names = [folder.classes[folder.labels[i]] for i in chosen]
    if compare:
        figure = draw_detectors(images, names=names, box=options.get("box") or "fit")
    else:
        figure = draw_mixed(images, params, names=names, label_weight=label_weight, **options)
    figure.savefig(path, dpi=110)


def _random_crops(files: Sequence[str], size: int, min_crop_area: float, seed: int) -> NDArray[np.uint8]:
    """Decode a random crop of each file with DALI, as training pipelines do: (N, size, size, 3) uint8."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(files), num_threads=2, device_id=None, seed=seed, prefetch_queue_depth=1)
    def crops():  # type: ignore[no-untyped-def]
        encoded, _ = fn.readers.file(files=list(files))
        images = fn.decoders.image_random_crop(
            encoded, random_area=[min_crop_area, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        return fn.resize(images, size=(size, size))

    (images,) = crops().run()
    return np.array(images.as_tensor())


def _panels(rows: Sequence[str], columns: int) -> tuple[Figure, NDArray[Any]]:
    """Return a figure with one labelled row of axes, without ticks, for each of `rows`."""
    require("matplotlib", by="drawing")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.75 * columns, 1.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row, fontsize=9)
    return figure, axes


def _show_image(axis: Axes, pixels: NDArray[np.uint8], title: str) -> None:
    axis.imshow(pixels.squeeze(axis=2) if pixels.shape[2] == 1 else pixels, cmap="grey", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8)


def _show_map(axis: Axes, saliency_map: NDArray[Any], size: tuple[int, ...], *, least: bool) -> None:
    """Show a map, scaled to the size of the image, and its peak."""
    height, width = size
    axis.imshow(saliency_map, cmap="magma", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    ((y, x),) = saliency_peaks(saliency_map[None], height, width, least=least)
    axis.plot(x, y, "+", color="cyan", markersize=9, markeredgewidth=1.5)


def _show_box(axis: Axes, box: NDArray[np.int32], colour: str) -> None:
    from matplotlib.patches import Rectangle

    y0, x0, y1, x1 = box
    if y0 < y1:
        edge = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4)
        axis.add_patch(edge)

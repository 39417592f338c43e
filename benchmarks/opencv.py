"""SaliencyMix without this package: OpenCV's detectors, image by image, on the images' 8-bit pixels.

This is the method as the paper describes it. The code that its authors released computes one map per batch, so that the
cost hardly shows, and passes normalised floats to the detector, which finds nothing in them: see the README. OpenCV
uses one thread in each process.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.machine import DEAF_TO_INTERRUPTS

DETECTORS = {"fine_grained": "FineGrained", "spectral_residual": "SpectralResidual"}


def why_not() -> str | None:
    """Return the reason why OpenCV's detectors cannot be measured here, or None if they can."""
    try:
        import cv2
    except ImportError:
        return "cv2 is not installed"
    if not hasattr(cv2, "saliency"):
        return "this cv2 has no saliency module, which is part of opencv-contrib-python"
    return None


def saliency_maps(images: np.ndarray, name: str) -> list[np.ndarray]:
    """Return OpenCV's maps of RGB images (N, H, W, 3) uint8."""
    import cv2

    cv2.setNumThreads(1)
    detector = getattr(cv2.saliency, f"StaticSaliency{DETECTORS[name]}_create")()
    return [detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1] for image in images]


def saliencymix(images: np.ndarray, source_index: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mixed RGB images (N, H, W, 3) uint8 and their lam, computed one image at a time as in the paper."""
    mixed, lam = images.copy(), lam.copy()
    size = height, width = images.shape[1:3]
    for i, source in enumerate(source_index):
        peak = np.unravel_index(saliency_maps(images[source : source + 1], "fine_grained")[0].argmax(), size)
        sides = [math.floor(side * math.sqrt(1 - lam[i])) for side in size]
        y, x = (min(max(at - cut // 2, 0), side - cut) for at, cut, side in zip(peak, sides, size, strict=True))
        box = (i, slice(y, y + sides[0]), slice(x, x + sides[1]))
        mixed[box] = images[(source, *box[1:])]
        lam[i] = 1 - sides[0] * sides[1] / (height * width)
    return mixed, lam


class Processes:
    """OpenCV's detectors in several processes, which read the images from a file that stays in the page cache."""

    def __init__(self, count: int) -> None:
        self.count = count
        spawn = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(count, spawn, **DEAF_TO_INTERRUPTS)
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        self._pool.shutdown()
        self._folder.cleanup()

    def share(self, images: np.ndarray) -> Path:
        """Save a batch for the processes and return the path of its file."""
        path = Path(self._folder.name, f"{'x'.join(map(str, images.shape))}.npy")
        np.save(path, images)
        return path

    def saliency_maps(self, path: Path, count: int, name: str) -> None:
        """Compute the maps of the `count` images in a file; the maps are not returned to this process."""
        parts = np.linspace(0, count, min(self.count, count) + 1).astype(int).tolist()
        for made in [self._pool.submit(_work, path, *pair, name) for pair in itertools.pairwise(parts)]:
            made.result()


def _work(path: Path, start: int, stop: int, name: str) -> None:
    saliency_maps(np.load(path, mmap_mode="r")[start:stop], name)

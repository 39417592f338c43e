"""Versions of the packages that a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of this package, of its installed dependencies and of the packages `more`."""
    from dali_saliencymix import __version__

    found = {"python": platform.python_version(), "dali-saliencymix": __version__}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

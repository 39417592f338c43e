"""Make files that block on access, like those of an unreachable network disk."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any


def stall(file: str | Path) -> None:
    """Replace a file by a pipe without a writer, which blocks for ever when opened."""
    Path(file).unlink(missing_ok=True)
    os.mkfifo(file)


def stall_once_listed(module: ModuleType, file: str | Path) -> None:
    """Make a file stall once `module` has listed its folder: a pipe would not be listed."""
    real = module.list_image_folder  # type: ignore[attr-defined]

    def list_image_folder(root: str | Path, **options: Any) -> Any:
        folder = real(root, **options)
        if str(file) in folder.files:
            stall(file)
        return folder

    module.list_image_folder = list_image_folder  # type: ignore[attr-defined]

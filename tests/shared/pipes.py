"""Files that do not answer, as those of a dead network disk."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any


def stall(file: str | Path) -> None:
    """Put a pipe without a writer in the place of a file: opening it waits for ever."""
    Path(file).unlink(missing_ok=True)
    os.mkfifo(file)


def stall_once_listed(module: ModuleType, file: str | Path) -> None:
    """Have a file stall as soon as the folders that `module` lists are listed, which a pipe would not be."""
    real = module.list_image_folder  # type: ignore[attr-defined]

    def list_image_folder(root: str | Path, **options: Any) -> Any:
        folder = real(root, **options)
        if str(file) in folder.files:
            stall(file)
        return folder

    module.list_image_folder = list_image_folder  # type: ignore[attr-defined]

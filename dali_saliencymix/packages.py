"""Checks for optional packages, with an error message that names the extra to install."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# The modules that each extra of pyproject.toml installs, and the package names for messages. cuda13 has the modules of
# cuda12.
EXTRAS = {
    "cuda12": {"nvidia.dali": "NVIDIA DALI", "cupy": "CuPy"},
    "compiled": {"numba": "Numba"},
    "train": {
        "pebble": "pebble",
        "PIL": "Pillow",
        "simplejpeg": "simplejpeg",
        "torch": "PyTorch",
        "torchvision": "torchvision",
        "tqdm": "tqdm",
        "yaml": "PyYAML",
    },
    "tensorboard": {"tensorboard": "TensorBoard"},
    "wandb": {"wandb": "Weights & Biases"},
    "preview": {"matplotlib": "Matplotlib", "PIL": "Pillow", "simplejpeg": "simplejpeg"},
    "test": {"accelerate": "Accelerate", "lightning": "PyTorch Lightning", "transformers": "Transformers"},
}


class MissingPackageError(ModuleNotFoundError):
    """Error for a package of an extra that is not installed."""


def is_installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def require(*modules: str, by: str = "this program") -> None:
    """Raise one `MissingPackageError` for all of these modules that are not installed, without importing any.

    Examples
    --------
    >>> require("numpy")
    >>> print(_sentence(["numba"], "algorithm='kernel' on a CPU"))  # doctest: +ELLIPSIS
    algorithm='kernel' on a CPU needs Numba, which is not installed; the extra compiled provides it: pip install ...
    """
    if absent := [module for module in modules if not is_installed(module)]:
        raise MissingPackageError(_sentence(absent, by), name=absent[0])


def require_or_exit(*modules: str) -> None:
    """Check modules as `require` does, in a script before its imports; on failure exit with one line and status 1."""
    try:
        require(*modules)
    except MissingPackageError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def _sentence(modules: list[str], by: str) -> str:
    bringing = {module: [extra for extra, brought in EXTRAS.items() if module in brought] for module in modules}
    chosen: list[str] = []
    for found in sorted(bringing.values(), key=len):  # start with modules that only one extra installs
        if not set(found) & set(chosen):
            chosen.append(found[0])
    extras = sorted(chosen, key=list(EXTRAS).index)
    names = _listed([EXTRAS[found[0]][module] for module, found in bringing.items()])
    are, them = ("is", "it") if len(modules) == 1 else ("are", "them")
    brings = f"the extra {extras[0]} provides" if len(extras) == 1 else f"the extras {_listed(extras)} provide"
    for_cuda_13 = "; for CUDA 13 use cuda13" if "cuda12" in extras else ""
    return (
        f"{by} needs {names}, which {are} not installed; {brings} {them}: pip install '.[{','.join(extras)}]' "
        f"in a checkout, or with the path of a wheel in place of the dot{for_cuda_13}"
    )


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))

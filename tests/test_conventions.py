"""Conventions of the code: which modules import which, what is public, what CuPy supports."""

from __future__ import annotations

import ast
import functools
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dali_saliencymix

PACKAGE = Path(dali_saliencymix.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# A part may import only parts that are listed above it, anywhere in its files; parts on the same line must not import
# each other. Every module of the package belongs to a part. "" is the package itself, with its public names.
ORDER = [
    {"packages"},
    {"_array", "_tables", "_json", "_errors"},
    {"_checks", "_threads"},
    {"_routes"},
    {"_numba", "_cuda"},
    {"saliency"},
    {"options"},
    {"boxes", "pixels", "labels", "draw"},
    {"mix"},
    {""},
    {"_compile", "_versions"},
    {"measure"},
    {"_dali", "_tensors"},
    {"network_saliency"},
    {"pytorch", "callbacks"},
    {"fn", "datasets"},
    {"preview", "loaders"},
    {"training"},
    {"bottleneck"},
    {"__main__"},
]
PARTS = [part for parts in ORDER for part in sorted(parts)]
WITHOUT_FRAMEWORKS = PARTS[: PARTS.index("") + 1]  # importing these needs NumPy, and SciPy for an FFT
# Packages that are imported only when needed.
FRAMEWORKS = {"_array": {"scipy"}, "_numba": {"numba"}, "_cuda": {"cupy"}}
ON_THE_GPU_PATH = [
    PACKAGE / f"{name}.py" for name in ("boxes", "pixels", "labels", "mix", "_dali/bridge", "_dali/mix_nodes")
]
ON_THE_GPU_PATH += sorted([*PACKAGE.glob("saliency/*.py"), *PACKAGE.glob("_cuda/*.py")])

functions = {
    name: value for name in dali_saliencymix.__all__ if inspect.isfunction(value := getattr(dali_saliencymix, name))
}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_modules(path: Path) -> set[str]:
    """Return the names of all modules that a file imports anywhere; for `from` imports, with the imported name."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr) -> str | None:
    """Return the source of a chain of attributes such as ``xp.fft.fft2``; None for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def namespace_attributes() -> set[str]:
    """Return all attributes that the package uses of `xp`, such as ``fft.fft2``."""
    chains = (dotted(node) for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
    return {chain.removeprefix("xp.") for chain in chains if chain and chain.startswith("xp.")}


def has(library: object, attribute: str) -> bool:
    try:
        functools.reduce(getattr, attribute.split("."), library)
    except AttributeError:
        return False
    return True


def test_importing_the_package_imports_numpy_and_nothing_else():
    script = (
        "import sys; before = set(sys.modules); import dali_saliencymix;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == {"dali_saliencymix", "numpy"}


def test_every_attribute_of_xp_exists_in_numpy():
    attributes = {name for name in namespace_attributes() if name.partition(".")[0] != "cuda"}
    assert {"lib.stride_tricks.as_strided", "where", "concatenate"} <= attributes
    assert [name for name in sorted(attributes) if not has(np, name)] == []


def test_every_attribute_of_xp_exists_in_cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    assert [name for name in sorted(namespace_attributes()) if not has(cupy, name)] == []


def test_the_fft_functions_that_are_used_exist_in_all_libraries():
    used = set()
    for path in MODULES:
        chains = (dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
        used |= {chain.removeprefix("fft.") for chain in chains if chain and chain.startswith("fft.")}
    assert {"rfft2", "ifft2"} <= used
    for library in ("scipy.fft", "cupy.fft"):
        module = pytest.importorskip(library)
        assert [name for name in used if not has(module, name)] == []


def test_modules_are_named_after_what_they_hold():
    names = {part.strip("_") for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert names & {"utils", "util", "helpers", "misc", "common"} == set()


def test_modules_have_a_docstring():
    assert [path for path in MODULES if not ast.get_docstring(tree(path))] == []


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")


def part_of(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def imports_inside() -> dict[str, set[str]]:
    """Return the modules that each module of the package imports, by name without the package."""
    names = {name_of(path) for path in MODULES}

    def module(imported: str) -> str:
        inside = imported.removeprefix("dali_saliencymix").removeprefix(".")
        return inside if inside in names else inside.rpartition(".")[0]

    return {
        name_of(path): {module(found) for found in imported_modules(path) if part_of(found) == "dali_saliencymix"}
        for path in MODULES
    }


def test_the_order_holds_every_module():
    assert {part_of(name) for name in imports_inside()} == set(PARTS)
    assert len(PARTS) == len(set(PARTS))


@pytest.mark.parametrize("part", PARTS)
def test_no_module_imports_up_or_aside(part):
    line = next(number for number, parts in enumerate(ORDER) if part in parts)
    above = set().union(*ORDER[:line], {part})
    for name, imported in imports_inside().items():
        if part_of(name) == part:
            assert {part_of(other) for other in imported} <= above, name


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(imports_inside()).static_order())
    assert set(order) == set(imports_inside())


@pytest.mark.parametrize("part", WITHOUT_FRAMEWORKS)
def test_the_array_functions_import_no_framework(part):
    allowed = {*sys.stdlib_module_names, "numpy", "dali_saliencymix", *FRAMEWORKS.get(part, ())}
    for path in MODULES:
        if part_of(name_of(path)) == part:
            assert {part_of(imported) for imported in imported_modules(path)} <= allowed, path


def test_nothing_in_the_package_imports_what_is_not_installed():
    outside = {"pipelines", "benchmarks", "train", "transfer_voc", "tests"}
    for path in MODULES:
        assert not outside & {part_of(imported) for imported in imported_modules(path)}, path


def test_nothing_on_the_gpu_path_brings_values_to_the_host():
    # Each of these calls waits for the GPU while holding the GIL.
    waiting = {"item", "get", "asnumpy", "synchronize"}
    for path in ON_THE_GPU_PATH:
        calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        assert not waiting & {function.attr for function in calls if isinstance(function, ast.Attribute)}, path


def test_all_lists_the_public_names_once():
    assert len(dali_saliencymix.__all__) == len(set(dali_saliencymix.__all__))
    public = {
        name
        for name, value in vars(dali_saliencymix).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name not in {"annotations", "Any"}
    }
    assert public == set(dali_saliencymix.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dali_saliencymix' has no attribute 'nothing'"):
        dali_saliencymix.nothing  # noqa: B018


def test_public_names_have_a_docstring_of_their_own():
    names = set(dali_saliencymix.__all__) - {"DETECTORS"}
    assert [name for name in names if not getattr(dali_saliencymix, name).__doc__] == []


@pytest.mark.parametrize("name", functions)
def test_public_functions_describe_parameters_and_show_examples(name):
    docstring = inspect.getdoc(functions[name])
    for section in ("Parameters", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in docstring
    assert "\n>>> " in docstring  # pytest runs the examples


@pytest.mark.parametrize("name", functions)
def test_options_are_keyword_only_and_nothing_else_has_a_default(name):
    for parameter in inspect.signature(functions[name]).parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name


def test_the_mean_of_imagenet_stands_in_one_place():
    repository = PACKAGE.parent
    others = [path for folder in ("pipelines", "benchmarks") for path in (repository / folder).glob("*.py")]
    found = [path.name for path in [*MODULES, *others, *repository.glob("*.py")] if "0.485" in path.read_text()]
    assert found == ["pixels.py"]

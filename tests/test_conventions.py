"""Conventions of the code, as tests: what is imported where, what is public, what CuPy can run."""

from __future__ import annotations

import ast
import doctest
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dali_saliencymix

PACKAGE = Path(dali_saliencymix.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module imports only what stands further up; those of one line do not know each other.
LAYERS = [
    {"_array"},
    {"_checks"},
    {"_algorithms", "_threads"},
    {"compiled_pixels"},
    {"saliency", "boxes", "mixing", "params"},
    {"placement"},
    {"core"},
]
# What is imported only where it is asked for.
COMPILED = ("compiled_pixels.py", "saliency/compiled.py", "saliency/compiled_fft.py", "saliency/compiled_spectral.py")
FRAMEWORKS = {PACKAGE / "_array.py": {"scipy"}, **{PACKAGE / name: {"numba"} for name in COMPILED}}
ON_THE_GPU_PATH = [PACKAGE / f"{name}.py" for name in ("boxes", "mixing", "placement", "core", "_bridge")]
ON_THE_GPU_PATH += sorted([*PACKAGE.glob("saliency/*.py"), *PACKAGE.glob("cuda/*.py")])

functions = {
    name: value for name in dali_saliencymix.__all__ if inspect.isfunction(value := getattr(dali_saliencymix, name))
}
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_modules(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever it does, `from` imports with the name they take."""
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
    """Everything that the package takes from `xp`, as ``fft.fft2``."""
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


@each_module
def test_annotations_are_not_evaluated(path):
    only_a_docstring = len(tree(path).body) == 1
    assert only_a_docstring or "__future__.annotations" in imported_modules(path)


@each_module
def test_modules_are_named_after_what_they_hold(path):
    assert not {"utils", "util", "helpers", "misc", "common"} & {
        part.strip("_") for part in path.relative_to(PACKAGE).with_suffix("").parts
    }


@each_module
def test_modules_have_a_docstring(path):
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_lower_layers_import_no_upper_ones_and_no_framework(layer):
    below = set().union(*LAYERS[:layer])
    for name in LAYERS[layer]:
        paths = sorted(PACKAGE.glob(f"{name}/*.py")) or [PACKAGE / f"{name}.py"]
        for path in paths:
            for imported in imported_modules(path):
                library, _, rest = imported.partition(".")
                allowed = {*sys.stdlib_module_names, "numpy", "dali_saliencymix", *FRAMEWORKS.get(path, ())}
                assert library in allowed, f"{path} imports {imported}"
                if library == "dali_saliencymix" and rest != "cuda":  # the same in kernels, where these are asked for
                    assert rest.partition(".")[0] in {*below, name}, f"{path} imports {imported}"


@pytest.mark.parametrize("path", ON_THE_GPU_PATH, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_on_the_gpu_path_brings_values_to_the_host(path):
    # Each of these waits for the GPU while it holds Python's lock.
    waiting = {"item", "get", "asnumpy", "synchronize"}
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not waiting & {function.attr for function in calls if isinstance(function, ast.Attribute)}


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


@pytest.mark.parametrize("name", [name for name in dali_saliencymix.__all__ if name != "DETECTORS"])
def test_public_names_have_a_docstring_of_their_own(name):
    assert getattr(dali_saliencymix, name).__doc__


@pytest.mark.parametrize("name", functions)
def test_public_functions_show_examples_that_run(name):
    docstring = inspect.getdoc(functions[name])
    for section in ("Parameters", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in docstring
    scope = dict(vars(inspect.getmodule(functions[name])))
    examples = doctest.DocTestParser().get_doctest(docstring, scope, name, None, 0)
    assert examples.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples).failed == 0


@pytest.mark.parametrize("name", functions)
def test_options_are_keyword_only_and_nothing_else_has_a_default(name):
    for parameter in inspect.signature(functions[name]).parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name

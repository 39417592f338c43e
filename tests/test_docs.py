"""The documentation builds without a warning, documents all public names, and its code runs.

Blocks that begin with three backticks and ``python`` are executed, those of a page in order in one namespace. Blocks
that begin with ``{code-block} python`` need packages or data that are missing here, and are only compiled. So is the
result of a diff.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from shared.programs import run_program

import dali_saliencymix
from dali_saliencymix import callbacks, datasets, fn, loaders, preview, pytorch, saliencymix, soft_labels
from dali_saliencymix._dali import bridge
from dali_saliencymix._dali.python_operator import Stage, python_operator
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.saliency import saliency_maps

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
BLOCK = re.compile(r"^```(\{code-block\} )?(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Return all code of a page as pairs (kind, source); the kinds are run, compiled and diff."""
    for compiled_only, language, source in BLOCK.findall(page.read_text()):
        if language == "diff":
            kept = (line for line in source.splitlines() if not line.startswith("-"))
            yield "diff", "\n".join(line[1:] for line in kept)
        else:
            yield "compiled" if compiled_only else "run", source


def pages_with(*kinds):
    return [page for page in PAGES if any(kind in kinds for kind, _ in blocks(page))]


def page_id(page):
    return str(page.relative_to(DOCS))


def public_names():
    """Return the full names of all public objects."""
    modules = [
        importlib.import_module(f"{package.__name__}.{name}")
        for package in (datasets, loaders)
        for _, name, _ in pkgutil.iter_modules(package.__path__)
    ]
    for module in (dali_saliencymix, callbacks, fn, pytorch):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)
    for module in (preview, *modules):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and callable(value) and not name.startswith("_") and inspect.getdoc(value):
                yield f"{module.__name__}.{name}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the site; return the completed process and the folder."""
    for name in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(name, reason=f"the documentation needs {name}, which is not installed")
    folder = tmp_path_factory.mktemp("site")
    options = ("-W", "--keep-going", "-q", "-b", "html")
    process = run_program("-m", "sphinx", *options, DOCS, folder, folder=folder, check=False)
    return SimpleNamespace(process=process, folder=folder)


@pytest.fixture(scope="module")
def site(built):
    assert built.process.returncode == 0, built.process.stderr
    return built.folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with the data sets of the pages: ``data``, and ``cifar`` with images of 32x32 pixels."""
    root = tmp_path_factory.mktemp("reader")
    make_sample_data(root / "data", train=2, val=1)
    for file in list_image_folder(root / "data" / "train").files:
        small = root / "cifar" / Path(file).relative_to(root / "data")
        small.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((32, 32)).save(small)
    return root


def test_the_site_builds_without_a_warning(built):
    assert (built.process.returncode, built.process.stderr) == (0, "")


def test_every_public_name_has_an_entry(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)
    lines = zlib.decompress(inventory[4]).decode().splitlines()
    entries = {line.split()[0] for line in lines if line.split()[1].startswith("py:")}
    names = set(public_names())
    assert {"dali_saliencymix.fn.mix", "dali_saliencymix.loaders.cifar.cifar_training_pipeline"} <= names
    assert sorted(names - entries) == []


def test_parameters_are_rendered_as_a_list(site):
    page = (site / "api" / "package.html").read_text()
    entry = page[page.index('id="dali_saliencymix.saliencymix"') : page.index('id="dali_saliencymix.cutmix"')]
    for name in inspect.signature(saliencymix).parameters:
        assert f"<li><p><strong>{name}</strong>" in entry
    assert "-------" not in entry


class Anchors(HTMLParser):
    """Collect the links of a page and its anchors."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.places = [], {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.places |= {attributes["id"]} if "id" in attributes else set()
        # Links in the head (next page, search) belong to the theme.
        if tag in ("a", "img"):
            self.targets += [attributes[name] for name in ("href", "src") if name in attributes]


def test_links_and_images_lead_somewhere(site):
    pages = {path.resolve(): Anchors(path) for path in site.rglob("*.html")}
    broken, seen = [], 0
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file() or (file in pages and unquote(parts.fragment) not in pages[file].places):
                broken.append(f"{path.relative_to(site.resolve())}: {target}")
    assert seen > 500
    assert broken == []


def test_references_in_the_guides_are_links(site):
    # An unknown name in {py:obj} causes no warning; it stays plain text.
    for page in PAGES:
        html = (site / page.relative_to(DOCS).with_suffix(".html")).read_text()
        for name in re.findall(r"\{py:obj\}`([\w.]+)`", page.read_text()):
            assert re.search(rf'<a class="reference internal" href="[^"]*" title="{re.escape(name)}">', html), name


@pytest.mark.parametrize("page", pages_with("run", "compiled", "diff"), ids=page_id)
def test_code_compiles(page):
    for number, (_, source) in enumerate(blocks(page)):
        ast.parse(source, f"{page.name}, block {number}")


@pytest.mark.parametrize("page", pages_with("run", "compiled"), ids=page_id)
def test_code_is_formatted(page, tmp_path):
    pytest.importorskip("ruff", reason="ruff is not installed")
    for number, (kind, source) in enumerate(blocks(page)):
        if kind != "diff":
            (tmp_path / f"block{number}.py").write_text(source)
    config = str(DOCS.parent / "pyproject.toml")
    command = [sys.executable, "-m", "ruff", "format", "--no-cache", "--diff", "--config", config, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


PACKAGES = ("lightning", "timm", "transformers")  # trainers and loaders of others


def place_of(code):
    for package in PACKAGES:
        if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE):
            return package
    return "with workers" if "num_workers" in code else "one process"


# In separate processes: workers are forked, and may hang if PyTorch has computed in this process before.
@pytest.mark.parametrize("place", ["one process", "with workers", *PACKAGES])
def test_code_runs(place, data):
    if place in PACKAGES:
        pytest.importorskip(place, reason=f"{place} is not installed")
    pages = {}
    for page in pages_with("run"):
        code = "\n".join(source for kind, source in blocks(page) if kind == "run")
        if place_of(code) == place:
            pages[page_id(page)] = code
    assert pages
    # Pipelines of one page must be destroyed before those of the next one run: see conftest.py.
    # DALI reads the source of a pipeline with conditionals through Python's line cache.
    runner = (
        f"import gc, linecache; gc.disable()\nfor page, code in {pages!r}.items():\n"
        "    linecache.cache[page] = len(code), None, code.splitlines(True), page\n"
        "    exec(compile(code, page, 'exec'), {'__name__': page}); gc.collect()"
    )
    run_program("-c", runner, folder=data)


def test_all_guides_have_code_that_runs():
    guides = {f"guides/{path.name}" for path in (DOCS / "guides").glob("*.md")}
    assert guides <= {page_id(page) for page in pages_with("run")}


def real_errors(monkeypatch):
    """Yield the messages of the errors that the guide for DALI explains."""
    images = np.zeros((8, 16, 16, 3), np.uint8)
    index, lam = np.arange(8), np.full(8, 0.5)
    shapes = [np.zeros((height, 100, 3), np.uint8) for height in range(96, 104)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    mistakes = [
        lambda: saliencymix(images.astype(np.float32), index, lam),
        lambda: saliencymix(np.moveaxis(images, 3, 1), index, lam),
        lambda: bridge.as_batch(shapes),
        lambda: soft_labels(index, index, lam, num_classes=4),
        lambda: saliency_maps(images, lambda images: images),
        lambda: saliencymix(images, index, lam, saliency="fine_grained", peaks=np.zeros((8, 2), int)),
        lambda: python_operator(print, SimpleNamespace(device="gpu"), name="saliencymix", stage=Stage("paste")),
    ]
    for mistake in mistakes:
        with pytest.raises((TypeError, ValueError, ImportError)) as error:
            mistake()
        yield str(error.value)


def test_the_errors_of_the_guide_are_those_that_are_raised(monkeypatch):
    page = (DOCS / "guides" / "dali.md").read_text()
    table = page[page.index("## What the errors mean") : page.index("## Complete examples")]
    shown = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    errors = list(real_errors(monkeypatch))
    assert len(shown) == len(errors)
    for text in shown:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(text).replace(r"\.\.\.", ".*"))
        assert any(re.search(pattern, error) for error in errors), text

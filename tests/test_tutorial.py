"""The tutorial and its notebook run as they stand, and show what running them prints and draws.

``python tests/test_tutorial.py`` runs both and stores the outputs of the notebook and the picture of the tutorial.
Text outputs of the tutorial are edited by hand: a failure shows what was printed.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from shared.programs import REPOSITORY, run_program

DOCS = REPOSITORY / "docs"
PAGE, PICTURE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.jpg", DOCS / "notebooks" / "first_mix.ipynb"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[+-]\d+)?")
CLOCK = re.compile(r"\d+:\d\d:\d\d")

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def inside(folder):
    """Work in a folder, with its temporary files in there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


# The tutorial.


def blocks():
    """Return the blocks of the tutorial: (language, source, output), with None for no output."""
    found = []
    for language, text in BLOCK.findall(PAGE.read_text()):
        if language == "text":
            found[-1][2] = text
        else:
            found.append([language, text, None])
    return found


def run_console(block, folder):
    """Run the commands of a console block in a folder; return what they write to stdout."""
    outputs = []
    for command in block.replace("\\\n", "").splitlines():
        program, *arguments = re.sub("'", "", command).split()
        if program == "export":
            assert arguments == ["OMP_NUM_THREADS=1"]  # as all tests have it
        elif program == "pip":
            check_extras(arguments)
        elif program == "python":
            script = [REPOSITORY / word if word.endswith(".py") else word for word in arguments]
            outputs.append(run_program(*script, folder=folder).stdout)
        else:
            environment = os.environ | {"LC_ALL": "C"}
            ended = subprocess.run(command.split(), cwd=folder, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            outputs.append(ended.stdout)
    return "".join(outputs)


def check_extras(arguments):
    """Check an installation that cannot be done in a test: the package has the extras."""
    install, requirement = arguments
    assert install == "install"
    extras = re.fullmatch(r"\.\[(.*)\]", requirement)[1].split(",")
    assert set(extras) <= set(metadata("dali-saliencymix").get_all("Provides-Extra"))


def run_tutorial(folder):
    """Run all blocks in order, Python in one namespace; return the output of each."""
    names = {"__name__": "tutorial"}
    outputs = []
    with inside(folder):
        for number, (language, source, _) in enumerate(blocks()):
            if language == "console":
                outputs.append(run_console(source, folder))
            else:
                outputs.append(run_cell(source, names, f"block {number} of tutorial.md").printed)
    return outputs


def differences(shown, printed, *, any_number):
    """Return where an output differs from the page, as text.

    On the page a line ``...`` stands for any lines, and ``...`` at the end of a line for its rest. With `any_number`
    only the words count. Otherwise numbers in brackets and those with a decimal point may differ a little, since
    pixels and losses depend on the versions of Pillow, DALI and PyTorch; all others are exact.
    """
    lines, position = printed.splitlines(), 0
    skipping = False
    for line in shown.splitlines():
        if line == "...":
            skipping = True
            continue
        candidates = lines[position:] if skipping else lines[position : position + 1]
        matches = [number for number, each in enumerate(candidates) if agree(line, each, any_number)]
        if not matches:
            return f"{line!r} is not in the output, or not there:\n{printed}"
        position += matches[0] + 1
        skipping = False
    return "" if skipping or position == len(lines) else f"lines are not on the page:\n{printed}"


def agree(shown, printed, any_number):
    """Tell whether a line of the page agrees with one that was printed."""
    if shown.endswith("..."):
        shown, printed = shown[:-3], printed[: len(printed) if any_number else len(shown) - 3]
        if any_number:
            return re.match(words(shown), words(printed)) is not None
    if any_number:
        return words(shown).split() == words(printed).split()
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.finditer(shown), NUMBER.finditer(printed), strict=True)
    return all(abs(float(one[0]) - float(other[0])) <= tolerance(shown, one) for one, other in pairs)


def words(line):
    return NUMBER.sub("#", CLOCK.sub("#", line))


def tolerance(line, number):
    before = line[: number.start()]
    if "." in number[0]:
        return 0.1
    return 3 if before.count("[") > before.count("]") else 0


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    return SimpleNamespace(folder=folder, outputs=run_tutorial(folder))


def test_every_block_prints_what_the_page_shows(tutorial):
    for (language, source, shown), printed in zip(blocks(), tutorial.outputs, strict=True):
        differing = differences(shown or "", printed, any_number="train.py" in source or "summary.csv" in source)
        assert not differing, f"{language}\n{source}\n{differing}"


def test_the_picture_of_the_tutorial_is_what_it_draws(tutorial):
    check_alike(tutorial.folder / "mixed.jpg", PICTURE)


def test_the_ten_steps_lower_the_loss(tutorial):
    (printed,) = (output for output in tutorial.outputs if "step 10" in output)
    losses = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("(2, 128) uint8", "(2, 128) uint8", True),
        ("(2, 128) uint8", "(2, 64) uint8", False),
        ("[[ 50   0]", "[[ 51   2]", True),
        ("[[ 50   0]", "[[ 60   0]", False),
        ("loss 1.64", "loss 1.70", True),
        ("loss 1.64", "loss 1.94", False),
        ("a\n...\nc", "a\nb\nc", True),
        ("a\n...", "a\nb\nc", True),
        ("a\nb", "a\nb\nc", False),
        ("a\nb", "a", False),
    ],
)
def test_outputs_are_compared(shown, printed, alike):
    assert (differences(shown, printed, any_number=False) == "") is alike


# The notebook, without Jupyter, which need not be installed.


def run_cell(source, names, where):
    """Run a cell; return what it prints, the value of its last expression and its figures, as a notebook shows them."""
    tree = ast.parse(source)
    last = tree.body.pop().value if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last), where, "eval"), names)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    if isinstance(value, Figure):
        figures.append(value)
        value = None
    pictures = [as_jpeg(figure) for figure in figures]
    plt.close("all")
    return SimpleNamespace(printed=printed.getvalue(), value=value, pictures=pictures)


def as_jpeg(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="jpeg", dpi=60, pil_kwargs={"quality": 75})
    return stream.getvalue()


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_notebook(notebook, folder):
    """Run the code cells in order; return the outputs of each, in the notebook format."""
    names = {"__name__": "notebook"}
    with inside(folder):
        for number, cell in enumerate(code_cells(notebook), 1):
            result = run_cell("".join(cell["source"]), names, f"cell {number} of {NOTEBOOK.name}")
            assert not result.printed
            outputs = [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {"image/jpeg": base64.b64encode(picture).decode(), "text/plain": ["<Figure>"]},
                }
                for picture in result.pictures
            ]
            if result.value is not None:
                text = repr(result.value).splitlines(keepends=True)
                value = {"data": {"text/plain": text}, "metadata": {}, "execution_count": number}
                outputs.append({"output_type": "execute_result", **value})
            yield outputs


def pictures_of(outputs):
    return [base64.b64decode(output["data"]["image/jpeg"]) for output in outputs if "image/jpeg" in output["data"]]


def text_of(outputs):
    return "".join("".join(output["data"]["text/plain"]) for output in outputs if "image/jpeg" not in output["data"])


def check_alike(drawn, stored):
    """Check that two pictures are the same, but for fonts and compression."""
    small = []
    for file in (drawn, stored):
        with Image.open(file) as picture:
            small.append(np.asarray(picture.convert("RGB").resize((96, 96)), float))
            ratio = picture.width / picture.height
            assert small[-1].std() > 20  # not a blank page
            assert 0.1 < ratio < 10
    assert np.abs(small[0] - small[1]).mean() < 8


def test_every_cell_of_the_notebook_shows_what_is_stored(tmp_path):
    pytest.importorskip("matplotlib", minversion="3.11")  # before, titles are placed elsewhere
    notebook = json.loads(NOTEBOOK.read_text())
    seen = 0
    for cell, outputs in zip(code_cells(notebook), run_notebook(notebook, tmp_path), strict=True):
        differing = differences(text_of(cell["outputs"]), text_of(outputs), any_number=False)
        assert not differing, differing
        stored, drawn = pictures_of(cell["outputs"]), pictures_of(outputs)
        assert len(stored) == len(drawn)
        for one, other in zip(drawn, stored, strict=True):
            check_alike(io.BytesIO(one), io.BytesIO(other))
            seen += 1
    assert seen >= 5


def test_the_notebook_has_the_form_of_one_and_is_small():
    assert NOTEBOOK.stat().st_size < 400_000
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert [cell["execution_count"] for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]


def store():
    """Run the tutorial and the notebook; write the outputs of the notebook and the picture of the tutorial."""
    with tempfile.TemporaryDirectory() as folder:
        run_tutorial(folder)
        PICTURE.write_bytes(Path(folder, "mixed.jpg").read_bytes())
    notebook = json.loads(NOTEBOOK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for number, outputs in enumerate(run_notebook(notebook, folder)):
            code_cells(notebook)[number] |= {"outputs": outputs, "execution_count": number + 1}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    store()

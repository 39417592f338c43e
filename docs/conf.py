"""Sphinx configuration: ``make docs``, or ``sphinx-build -W docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # generated.py; train.py, which is not installed

import generated  # noqa: E402

import dali_saliencymix  # noqa: E402

project = "dali-saliencymix"
author = "the authors of dali-saliencymix"
version = release = dali_saliencymix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path: list[str] = []

# Docstrings use single backticks for parameters and for functions; py:obj links the names that it finds.
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types, with shapes and ranges, are in the docstrings
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
myst_substitutions = generated.parts()

# In a block with prompts, copy only the commands, without the prompts.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

html_theme = "furo"
html_title = f"dali-saliencymix {version}"
html_static_path = ["_static"]
html_css_files = ["width.css"]
html_copy_source = False
html_show_copyright = False

"""
Sphinx builds the documentation from this folder, without the network:

    sphinx-build -W docs build/docs

Pages are Markdown (MyST); the notebook is executed; the API page comes from the docstrings.
"""

import os
import re
import textwrap
import tomllib
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import cbsa_hf


ROOT = Path(__file__).resolve().parents[1]


project = "cbsa-hf"
author = "The cbsa-hf contributors"
version = release = cbsa_hf.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["**.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = "cbsa-hf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
# The address of the repository, once there is one, stands in `[project.urls]` of pyproject.toml and nowhere else.
urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
if "Source" in urls:
    html_theme_options = {"source_repository": urls["Source"], "source_branch": "main", "source_directory": "docs/"}

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types where shapes do not
napoleon_use_ivar = True
default_role = "literal"  # docstrings mark code with single backticks


def to_code_block(fenced: re.Match) -> str:
    """The directive for a fenced example; one with prompts is a session."""
    language = "pycon" if ">>>" in fenced[1] else "python"
    return f".. code-block:: {language}\n\n{textwrap.indent(fenced[1], '    ')}"


def to_restructured_text(app, what, name, obj, options, lines: list[str]):
    """Docstrings are written for Transformers' reader: names are [`Name`], and examples are fenced."""
    text = "\n".join(lines)
    public = "|".join(cbsa_hf.__all__)
    text = re.sub(rf"\[`({public})`\]", r":py:obj:`cbsa_hf.\1`", text)
    text = re.sub(r"\[(`\w+`)\]", r"\1", text)
    text = re.sub(r"```python\n(.*?)```", to_code_block, text, flags=re.DOTALL)
    lines[:] = text.split("\n")


def setup(app):
    """Connect the conversion of docstrings; Sphinx calls this."""
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)

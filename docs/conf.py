"""Configuration of the documentation site; `make docs` builds it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]  # extensions of this site; experiments and tests, whose data it shows

from inventories import local_mapping

import balance

project = "balance"
author = "the balance developers"
copyright = "2026, the balance developers"  # noqa: A001 - Sphinx gives the name
version = release = balance.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_design",
    "sphinx_copybutton",
    "matplotlib.sphinxext.plot_directive",
    "external_names",
    "peer_methods",
    "remedies",
    "study_tables",
    "method_pages",
    "benchmark_tables",
    "configuration",
    "public_names",
    "published_rows",
]
exclude_patterns = ["_build", "_ext", "_inventories", "**/.ipynb_checkpoints"]
nitpicky = True
nitpick_ignore_regex = [("py:obj", r"[^.]+")]  # words in single backticks that are no names, such as arguments
default_role = "py:obj"

myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are executed by the tests, and stored with their output

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autodoc_mock_imports = [name for name in ("lightning", "transformers", "accelerate") if find_spec(name) is None]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style"), ("Sources", "notes_style")]

intersphinx_mapping = local_mapping()

plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("svg", 100)]
plot_rcparams = {"figure.figsize": (6.4, 3.6), "figure.facecolor": "white", "font.size": 10}
plot_apply_rcparams = True

html_theme = "pydata_sphinx_theme"
html_title = "balance"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "github_url": "https://github.com/mtl-balance/balance",
    "header_links_before_dropdown": 9,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_show_sourcelink = False

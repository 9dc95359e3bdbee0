"""How the documentation is built: ``make docs`` at the root of the repository."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

# sphinx-autodoc-typehints with Sphinx 9
warnings.filterwarnings("ignore", message=".*set_application' is deprecated")

project = "mixscvi"
author = "mixscvi developers"
copyright = "mixscvi developers"  # noqa: A001
about = metadata("mixscvi")
version = release = about["Version"]
urls = dict(line.split(", ", 1) for line in about.get_all("Project-URL", []))

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # the source of every name, within the site
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "docstrings",
    "evidence",
]

# Pages
exclude_patterns = ["_build", "generated/evidence", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
master_doc = "index"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["mystnb.unknown_mime_type"]

# Cells of Markdown pages run in every build; notebooks come with their outputs.
nb_execution_mode = "auto"
nb_execution_excludepatterns = ["notebooks/*"]
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True

# References
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "alpha"
nitpicky = True
# Other projects' names: links where their inventories can be fetched, plain text elsewhere.
_others = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scvi-tools": "https://docs.scvi-tools.org/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "zuko": "https://zuko.readthedocs.io/stable/",
}
if os.environ.get("MIXSCVI_DOCS_ONLINE"):
    intersphinx_mapping = {name: (url, None) for name, url in _others.items()}
nitpick_ignore_regex = [
    (r"py:.*", r"(anndata|lightning|matplotlib|numpy|pandas|ray|scanpy|scvi|torch|zuko)\..*"),
    # Python's own: builtins, and what annotations are made of
    (r"py:.*", r"(abc|collections|enum|os|pathlib|typing)\..*|Ellipsis|[A-Z]\w+(Error|Warning)"),
    (r"py:(class|obj)", r"bool|bytes|complex|dict|float|int|list|None|object|set|str|tuple|type"),
]

# API reference
autosummary_generate = True
autosummary_imported_members = False
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
autoclass_content = "class"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_rtype = True
napoleon_use_param = True
typehints_defaults = "braces"
always_use_bars_union = True
python_maximum_signature_line_length = 88
# beside a page, methods without the name of their class, for which there is no room
toc_object_entries_show_parents = "hide"

# Look
html_theme = "sphinx_book_theme"
html_title = "mixscvi"
html_static_path = ["_static"]
html_css_files = ["mixscvi.css"]
html_theme_options = {
    "repository_url": urls.get("Source", ""),
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": "Source" in urls,
    "use_issues_button": "Source" in urls,
    "use_download_button": False,
    "show_toc_level": 2,
    # the sidebar has a search field already
    "navbar_persistent": [],
    "home_page_in_toc": False,
}
html_show_sphinx = False
pygments_style = "default"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

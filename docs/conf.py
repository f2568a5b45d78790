"""Configuration of Sphinx, which makes the pages from the Markdown in this folder."""

import shutil
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
MEASURED = HERE / "measured"  # copies of the results, so that they become pages too

project = "graphprune"
copyright = "the graphprune authors"
release = version_of("graphprune")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]


def copy_results(app: Sphinx) -> None:
    """Put what the benchmarks wrote beside the pages that link to it."""
    shutil.rmtree(MEASURED, ignore_errors=True)
    shutil.copytree(RESULTS, MEASURED, ignore=shutil.ignore_patterns("*.jsonl"))


def link_to_copies(app: Sphinx, page: str, source: list[str]) -> None:
    """Have links to results lead to their pages."""
    source[0] = source[0].replace("](../benchmarks/results/", "](measured/")


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("builder-inited", copy_results)
    app.connect("source-read", link_to_copies)

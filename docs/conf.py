"""The site's settings, for Sphinx: `make docs-site`. Its root is the repository's, so that studies are pages too."""

from typing import Any

from flatmin.common import console

with console.importing_tensorflow():
    import flatmin.models.classifier  # noqa: F401 - quietly, before docstrings are read by importing what has them

project = "Flatmin"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/*.ipynb", "studies/*/*.md"]
html_theme = "furo"
html_title = "Flatmin"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
myst_enable_extensions = ["deflist", "html_image"]
myst_heading_anchors = 3  # links to headings, as code forges make them
nb_execution_mode = "off"  # a test runs the notebook
nb_ipywidgets_js: dict[str, Any] = {}  # it would come from the network
autodoc_typehints = "none"
default_role = "code"  # docstrings have `names` in single backticks


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_bars)


def escape_bars(app: Any, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep |w| as it is, in which Sphinx would see a substitution."""
    lines[:] = [line.replace("|", "\\|") for line in lines]

"""Settings of the documentation site, which `make docs` builds from the root of the checkout."""

import os
import re
from pathlib import Path
from typing import Any

import stem_dask

project, author = "stem_dask", "the developers of stem_dask"
version = release = stem_dask.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb"]
root_doc = "docs/index"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "docs/*.md", "docs/*.rst",
    "examples/quickstart.ipynb",
]  # fmt: skip

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True  # it writes a scan and a crop, which do not belong beside it
nb_execution_raise_on_error = True
nb_execution_timeout = 300
numpydoc_show_class_members = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
default_role = "py:obj"
autodoc_member_order = "bysource"

html_theme = "pydata_sphinx_theme"
html_title = project
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_center": [],
}
html_sidebars = {"**": ["globaltoc"]}
html_copy_source = html_show_sourcelink = False


# the kernel that runs the notebook warns that it listens on a port, which would be a warning of the build
kernel = Path("build/ipython/profile_default")
kernel.mkdir(parents=True, exist_ok=True)
(kernel / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ["IPYTHONDIR"] = str(kernel.parent.absolute())

for name in stem_dask.__all__:  # loaded on first use
    getattr(stem_dask, name)


def describe(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Move the text behind the name of a parameter below it, where numpydoc expects the description."""
    section, out = "", []
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and lines[i + 1].startswith("---"):
            section = line
        found = re.fullmatch(r"(\w[\w, *]*) : (.+)", line) if section == "Parameters" else None
        out += [found[1], f"    {found[2]}"] if found else [line]
    lines[:] = out


def finish(app: Any, error: Exception | None) -> None:
    """Lead from the root of the site to its first page, and leave out a template of the theme, whose links lead nowhere."""
    if error is None:
        first = '<meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (app.outdir / "index.html").write_text(f"<!doctype html><title>{project}</title>{first}")
        (app.outdir / "_static" / "webpack-macros.html").unlink(missing_ok=True)


def setup(app: Any) -> None:
    """Before numpydoc, whose priority is 500."""
    app.connect("autodoc-process-docstring", describe, priority=400)
    app.connect("build-finished", finish)

"""How Sphinx builds the documentation: `make docs`."""

import re

import pallas_flash

project = "pallas_flash"
author = "the authors of pallas_flash"
copyright = author
release = version = pallas_flash.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pallas_flash {release}"

myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
autodoc_preserve_defaults = True
napoleon_use_rtype = False


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are Markdown: `code` becomes a literal, a star a star, an indented block behind a colon code."""
    for i, line in enumerate(lines):
        pieces = re.split(r"(?<!`)`([^`]+)`(?!`)", line)
        pieces[::2] = (piece if piece.startswith((":", "..")) else re.sub(r"(?<![\\*])\*(?!\*)", r"\\*", piece)
                       for piece in pieces[::2])
        pieces[1::2] = (rf"``{code}``\ " for code in pieces[1::2])
        lines[i] = "".join(pieces)
        if line.endswith(":") and not line.endswith("::") and lines[i + 1:i + 2] == [""] \
                and lines[i + 2:i + 3] and lines[i + 2].startswith(" " * (len(line) - len(line.lstrip()) + 4)):
            lines[i] += ":"


def setup(app):
    """After napoleon, which reads the sections of a docstring."""
    app.connect("autodoc-process-docstring", to_restructured_text, priority=900)

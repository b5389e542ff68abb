"""Sphinx's configuration; `make docs` builds the pages."""

from __future__ import annotations

import nidl_dcl

project = "nidl_dcl"
author = "The nidl_dcl developers"
copyright = "the nidl_dcl developers, BSD-3-Clause"
version = release = nidl_dcl.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = True

autodoc_typehints = "none"  # the docstrings say types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"nidl_dcl {version}"
html_show_sphinx = False
smartquotes = False  # quotes in the docstrings are code

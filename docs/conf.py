"""Sphinx's configuration; `make docs` builds the pages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Two tutorials at a time, a thread each: threads of two that share the cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nidl_dcl

sys.path.insert(0, str(Path(__file__).parent))  # draw_architecture, mathml, tutorial_runs
import draw_architecture

project = "nidl_dcl"
author = "The nidl_dcl developers"
copyright = "the nidl_dcl developers, BSD-3-Clause"
version = release = nidl_dcl.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx_gallery.gen_gallery",
    "mathml",
]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "tutorials"]
default_role = "code"
nitpicky = True

autodoc_typehints = "none"  # the docstrings say types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The tutorials are run when the pages are built, so what they show is what the code does. A tutorial
# that did not change is not run again; `make clean` forgets.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "generated/tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1,
    "write_computation_times": False,
    "ignore_repr_types": r"matplotlib|list",  # what drawing returns
    "copyfile_regex": "",
    "parallel": 2,
    "reset_modules": ("matplotlib", "tutorial_runs.quiet"),
    "image_scrapers": ("matplotlib", "tutorial_runs.report_scraper"),
}
html_extra_path = ["generated/extra"]  # what tutorial_runs puts there
(Path(__file__).parent / html_extra_path[0]).mkdir(parents=True, exist_ok=True)

draw_architecture.main(Path(__file__).parent / "generated")

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["tutorials.css"]
html_title = f"nidl_dcl {version}"
html_show_sphinx = False
smartquotes = False  # quotes in the docstrings are code

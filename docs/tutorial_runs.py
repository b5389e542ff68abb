"""What tutorials need while they run: the report that one wrote, shown in its page; less talk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parent / "generated" / "extra" / "reports"
"""Sphinx copies what is beside it to the root of the built pages (`html_extra_path`)."""

FRAME = """
.. raw:: html

   <iframe src="../../reports/{name}" title="The report of this study" loading="lazy"
     style="width: 100%; height: 36rem; border: 1px solid gray"></iframe>
   <p><a href="../../reports/{name}">The report on a page of its own</a></p>

"""


def report_scraper(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Return a frame with the report that a block names `report_page`, else nothing.

    A scraper of sphinx-gallery, called after each block of code.
    """
    if "report_page =" not in block[1]:
        return ""
    name = Path(block_vars["src_file"]).with_suffix(".html").name
    REPORTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(block_vars["example_globals"]["report_page"], REPORTS / name)
    return FRAME.format(name=name)


def quiet(gallery_conf: dict[str, Any], file: str) -> None:
    """Silence what Lightning says of each fit, in the process that runs the tutorial."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)

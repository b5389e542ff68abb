"""The look of the report: numbers and text as they are shown, pictures as files, the page as HTML.

Knows Jinja, escaping and the content-security policy; what is said on the page is `report`'s.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import keep_bytes
from nidl_dcl.io.formats import camel_case, escape_control, keep_tsv
from nidl_dcl.report.reader import as_number
from nidl_dcl.report.svg import clean

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table of the page: cells of `numeric` columns are numbers, the others text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture of the page: drawn SVG as markup, or a PNG as data URI, with its words."""

    alt: str
    caption: str
    source: str
    svg: Markup | None = None
    uri: str = ""
    width: int = 0
    height: int = 0


class Gallery:
    """Writes each picture, and the table behind it, into ``figures/`` of an output folder."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder / "figures", model
        self.taken: set[str] = set()

    def name(self, column: str, ending: str) -> str:
        """Return a file name without suffix for a column of any name; unique in any case."""
        try:
            label = camel_case(column)[:60]
        except UsageError:
            label = "Column"
        for count in itertools.count(1):
            name = f"desc-{self.model}{label}{'' if count == 1 else f'x{count}'}_{ending}"
            if name.casefold() not in self.taken:
                break
        self.taken.add(name.casefold())
        return name

    def svg(
        self,
        name: str,
        drawn: bytes,
        alt: str,
        caption: str,
        source: str = "",
        table: pd.DataFrame | None = None,
    ) -> Picture:
        """Write an SVG, and the table of its numbers.

        Parameters
        ----------
        name : str
            Of the file.
        drawn : bytes
            The SVG.
        alt, caption : str
            What it shows, for those who do not see it, and below it.
        source : str
            The file that holds its numbers, if there is one.
        table : DataFrame, optional
            Its numbers, written beside it, where no file holds them.
        """
        keep_bytes(self.folder / f"{name}.svg", drawn)
        if table is not None:
            keep_tsv(self.folder / f"{name}.tsv", table)
            source = f"figures/{name}.tsv"
        return Picture(alt, caption, source, svg=Markup(drawn.decode("utf-8")))  # noqa: S704 (ours)

    def volume(self, name: str, drawn: bytes, alt: str, caption: str, source: str) -> Picture:
        """Write a PNG of a volume; every picture of brains on the page comes from here.

        Parameters
        ----------
        name : str
            Of the file; empty where the picture is a file already.
        drawn : bytes
            The PNG.
        alt, caption : str
            What it shows, for those who do not see it, and below it.
        source : str
            Where its numbers are.
        """
        if name:
            keep_bytes(self.folder / f"{name}.png", drawn)
        width, height = (int.from_bytes(drawn[at : at + 4], "big") for at in (16, 20))
        uri = "data:image/png;base64," + base64.b64encode(drawn).decode("ascii")
        return Picture(alt, caption, source, uri=uri, width=width, height=height)


def format_number(value: Any) -> str:
    """Return a number as the page shows it: about three digits that matter, counts in full."""
    number = _plain(value)
    if number is None:
        return "–"
    size = abs(number)
    if number.is_integer() and size < 1e15:
        text = f"{size:,.0f}"
    elif 0.001 <= size < 1e15:
        text = f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"
    else:
        text = f"{size:.2g}"
    return f"−{text}" if number < 0 else text


def format_score(value: float | None, more: int = 0) -> str:
    """Return a score: three decimals below 1, so that the scores of a table line up.

    `more` decimals are added where that does not tell two scores apart.
    """
    if value is None:
        return "–"
    size = abs(value)
    places = more + (0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1.005 else 3)
    text = f"{size:,.{places}f}"
    return f"−{text}" if value < 0 and text.strip("0.") else text


def format_duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_cell(value: Any) -> str:
    """Return a value from a file as one line of text of bounded length."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "n/a"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return clean(", ".join(format_cell(v) for v in value), 300)
    return clean(value, 300)


def row_names(table: pd.DataFrame) -> list[str]:
    """Return who each row of `table` is: participant, session and run, as far as known."""
    known = [c for c in ("participant_id", "session_id", "run") if c in table]
    rows = table[known].astype("object").to_numpy().tolist()
    return [" ".join(format_cell(v) for v in row if not pd.isna(v)) for row in rows]


def render_page(context: Mapping[str, Any]) -> str:
    """Return the page for what `report` has collected; every text in it is escaped.

    The policy in its head allows the page's own style and script, by their hashes, and images
    inside the page; nothing is loaded.
    """
    templates, style, script = _templates(), _asset("report.css"), _asset("report.js")
    methods = templates.get_template("methods.txt.jinja").render(context).strip()
    return templates.get_template("report.html.jinja").render(
        context,
        methods=re.sub(r"\n{3,}", "\n\n", methods),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def render_mosaics(context: Mapping[str, Any]) -> str:
    """Return the page of all preprocessed images; every text in it is escaped.

    It has no script. Its policy allows its own style and the images beside it.
    """
    style = _asset("report.css")
    page = _templates().get_template("mosaics.html.jinja")
    return page.render(context, style=style, style_hash=_hash(style))


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        # The methods are plain text for a paper: escaped as a whole when they enter the page.
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(number=format_number, score=format_score, exact=_exact)
    templates.filters.update(cell=format_cell, sides=_sides, block=_block)
    return templates


def _asset(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8").strip())  # noqa: S704 (ours)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _exact(value: Any) -> str:
    """Return a number in full, for sorting and for tests that compare the page with its files."""
    number = _plain(value)
    return "" if number is None else repr(number)


def _plain(value: Any) -> float | None:
    return as_number(value.item() if isinstance(value, np.generic) else value)


def _sides(value: Any) -> str:
    """Return one size, or three as 40 × 48 × 40."""
    values = value if isinstance(value, list | tuple) else [value]
    return " × ".join(format_cell(v) if as_number(v) is None else format_number(v) for v in values)


def _block(text: str) -> Markup:
    """Return text of several lines, escaped line by line."""
    return Markup("\n").join(escape_control(line) for line in text.splitlines())


def _shown(value: Any) -> Any:
    """Make the control and direction characters of whatever comes from files visible."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return escape_control(value)
    return value

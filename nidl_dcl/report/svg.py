"""One drawing of the report: its colors and style, and an SVG that is safe inside a page.

Such an SVG has no style rule, script, link or date: a page may inline it under a strict
content-security policy. It names its colors plainly: a style sheet may exchange them on a dark
page. What is drawn is the business of `figures`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from nidl_dcl.io.formats import escape_control

INK, MUTED, GRID, PAPER = "#1f2328", "#6e7781", "#d8dee4", "#ffffff"

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", INK, "#e69f00", "#56b4e9")
"""Colors that color-blind readers tell apart (Okabe and Ito, 2008), without the yellow.

The first five stand out from the paper also as thin lines; the last two need an edge.
"""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    # A column called $x$ is no formula.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
"""Settings of matplotlib under which everything is drawn."""

_NS = "{http://www.w3.org/2000/svg}"

_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass
class Sheet:
    """A figure and its axes; once the block of `drawing` has ended, also what matplotlib wrote."""

    name: str
    figure: Any
    axes: Any
    raw: bytes = b""

    def legend(
        self, entries: Sequence[tuple[Any, str]], scale: float = 1.0, columns: int = 2
    ) -> None:
        """Add a legend below the axes.

        Parameters
        ----------
        entries : sequence of (artist, str)
            Signs and their names.
        scale : float, default=1.0
            By how much the signs are larger.
        columns : int, default=2
            Of names.
        """
        if entries:
            handles, blank = [handle for handle, _ in entries], [" "] * len(entries)
            place = {"loc": "outside lower left", "ncols": columns}
            legend = self.figure.legend(handles, blank, markerscale=scale, **place)
            # Not given above: names that begin with an underscore would be left out.
            for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
                text.set_text(label)
            for sign in legend.legend_handles:
                sign.set_rasterized(False)

    def svg(self, alt: str, hover: Mapping[str, Sequence[str]] | None = None) -> bytes:
        """Return the drawing as an SVG that can be inlined and says `alt` to screen readers.

        `hover` maps the group id (`gid`) of a scatter to what the pointer shows over its points.
        """
        ET.register_namespace("", _NS[1:-1])
        prefix = re.sub(r"[^A-Za-z0-9_-]", "-", self.name)
        root = ET.fromstring(self.raw)  # noqa: S314 (written by matplotlib a moment ago)
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', self.raw.decode("utf-8")))
        for group in root.iter(f"{_NS}g"):
            texts = (hover or {}).get(group.get("id", ""), ())
            points = list(group.iter(f"{_NS}use")) if texts else []
            if len(points) == len(texts):
                for point, text in zip(points, texts, strict=True):
                    ET.SubElement(point, f"{_NS}title").text = clean(text, 200)
        for element in root.iter():
            _make_plain(element, prefix, used)
        paper = root.find(f".//{_NS}path[@fill='{PAPER}']")
        if paper is not None:
            paper.set("class", "paper")
        root.attrib.update({"role": "img", "aria-label": escape_control(alt)})
        root.attrib.update({"font-family": "sans-serif", "stroke-linejoin": "round"})
        return ET.tostring(root, encoding="unicode").encode("utf-8")


@contextmanager
def drawing(name: str, height: float, rows: int = 1) -> Iterator[Sheet]:
    """Yield a sheet to draw on.

    Parameters
    ----------
    name : str
        Unique on a page; begins all ids.
    height : float
        In inches.
    rows : int, default=1
        Axes below one another; with more than one, `Sheet.axes` is an array of them.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The reader's browser has fonts for glyphs that matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(4.4, height), layout="constrained")
        sheet = Sheet(name, figure, figure.subplots(rows))
        yield sheet
        stream = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", dpi=140, metadata=nothing)
        sheet.raw = stream.getvalue()


def clean(text: object, length: int = 40) -> str:
    """Return `text` on one line of at most `length` characters, all of them legal in XML."""
    plain = escape_control(str(text))
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _make_plain(element: ET.Element, prefix: str, used: set[str]) -> None:
    """Turn styles into attributes, make ids unique, drop rules and what only indents."""
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key != "font-family":
            element.set(key, value)
    name = element.attrib.pop("id", None)
    if name in used:
        element.set("id", f"{prefix}-{name}")
    link = element.attrib.pop(_XLINK, "")
    if link:
        element.set("href", f"#{prefix}-{link[1:]}" if link[0] == "#" else "".join(link.split()))
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{prefix}-"))
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
    for child in [child for child in element if child.tag == f"{_NS}style"]:
        element.remove(child)
    if element.tag not in (f"{_NS}text", f"{_NS}title"):
        element.text = None
    element.tail = None

"""Read cells of tables that hold a number with its unit, such as the ages ``022Y`` or ``21 years``.

Columns are decoded by `recode`; of other cells nothing is known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection

MISSING = {"", "-", "--", "n/a", "na", "nan", "null", "#n/a", "#na", "<na>", "."}
"""Cells that stand for a missing value, in lower case."""

_UNITS = {
    **dict.fromkeys(("y", "yr", "yrs", "year", "years", "yo"), "years"),
    **dict.fromkeys(("m", "mo", "mos", "mon", "mons", "month", "months"), "months"),
    **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), "weeks"),
    **dict.fromkeys(("d", "day", "days"), "days"),
}
_WORDS = "|".join(sorted(_UNITS, key=len, reverse=True))
_QUANTITY = re.compile(
    rf"P?(\+?[0-9]+(?:[.,][0-9]+)?)\+?[ _-]?({_WORDS})\.?\+?(?: old)?", re.IGNORECASE
)
_BEGINS = re.compile(rf"P?\+?[0-9]+(?:[.,][0-9]+)?\+?[ _-]?(?:{_WORDS})(?![a-z])", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]+)?\+?")
_LONGEST = 40  # characters of a number with its unit
_DIMENSIONS = {"1d", "2d", "3d", "4d"}  # of scans


def read_quantities(texts: Collection[str]) -> tuple[dict[str, str], str] | None:
    """Return the number in each text, as text, and the unit; None unless all have one unit."""
    if any(len(text) > _LONGEST for text in texts):
        return None
    found = {text: _QUANTITY.fullmatch(text.strip()) for text in texts}
    units = {match and _UNITS[match[2].lower()] for match in found.values()}
    if len(units) != 1 or None in units or _are_dimensions(texts):
        return None
    return {text: _plain(match[1]) for text, match in found.items() if match}, str(units.pop())


def hold_units(texts: Collection[str]) -> bool:
    """Return whether texts are numbers, half of them or more, and some of these have a unit of time."""
    stripped = [text.strip() for text in texts if len(text) <= _LONGEST]
    having = sum(_BEGINS.match(text) is not None for text in stripped)
    bare = sum(_NUMBER.fullmatch(text) is not None for text in stripped)
    return having > 0 and 2 * (having + bare) >= len(texts) and not _are_dimensions(texts)


def _are_dimensions(texts: Collection[str]) -> bool:
    return {text.strip().lower() for text in texts} <= _DIMENSIONS


def _plain(number: str) -> str:
    """Return a number without the zeros and the sign in front of it."""
    whole, _, rest = number.lstrip("+").replace(",", ".").partition(".")
    return (whole.lstrip("0") or "0") + (f".{rest}" if rest else "")

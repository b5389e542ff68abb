"""Read a TSV or CSV as text, the way BIDS means it: no quoting in TSV, no type guessed, no row lost.

What the columns mean is told by `coding`; whose rows they are by `phenotypes`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nidl_dcl.errors import UsageError

__all__ = ["Table", "is_missing", "read_sidecar", "read_table"]

_MISSING = {"", "n/a", "na", "nan", "null", "#n/a", "#na", "<na>", "."}
_BOMS = (("utf-8-sig", b"\xef\xbb\xbf"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"))


@dataclass
class Table:
    """A table of text.

    Attributes
    ----------
    path : Path
        Where it was read.
    columns : list of str
        Unique names.
    rows : list of list of (str or None)
        Stripped text, None where missing; as long as `columns`.
    lines : list of int
        Line of the file each row stands in, from 1.
    notes : list of str
        What was put right while reading.
    """

    path: Path
    columns: list[str]
    rows: list[list[str | None]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, names: Iterable[str]) -> int | None:
        """Return the position of the first column that is called one of `names`, in any case."""
        plain = [re.sub("[ -]", "_", column.strip().lower()) for column in self.columns]
        return next((plain.index(name) for name in names if name in plain), None)


def is_missing(text: str | None) -> bool:
    """Return whether a cell stands for no value: ``n/a`` and its usual relatives, in any case."""
    return text is None or text.strip().lower() in _MISSING


def read_table(path: Path) -> Table:
    """Read a table as text.

    Tabs part the cells if the header holds one, else semicolons or commas, with CSV's quoting.
    Byte order marks and every kind of line end are understood.

    Parameters
    ----------
    path : Path
        A file.

    Raises
    ------
    UsageError
        For a file that is missing, empty or not text, and rows longer than the header.
    """
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{path} is a link to nothing; fetch it first (datalad get, git annex get)."
        )
    if not path.is_file():
        raise UsageError(f"There is no table {path}. Give an existing TSV or CSV file.")
    notes: list[str] = []
    text = _text(path, notes)
    header = re.split("\r\n|\n|\r", text, maxsplit=1)[0]
    if "\t" in header or not re.search("[,;]", header):
        lines = list(enumerate(re.split("\r\n|\n|\r", text), start=1))
        cells = [(number, line.split("\t")) for number, line in lines if line.strip()]
    else:
        mark = ";" if header.count(";") > header.count(",") else ","
        if path.suffix == ".tsv":
            notes.append(f"cells are parted by {mark!r}, not by tabs")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        try:
            cells = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise UsageError(f"{path} is no CSV file: {error}.") from error
    if not cells:
        raise UsageError(f"{path} is empty. A table needs a header line.")
    table = Table(path, _unique([cell.strip() for cell in cells[0][1]], notes), notes=notes)
    short: list[int] = []
    for number, row in cells[1:]:
        values = [None if is_missing(cell) else cell.strip() for cell in row]
        if any(value is not None for value in values[len(table.columns) :]):
            raise UsageError(
                f"{path}, line {number}: {len(row)} cells under {len(table.columns)} column names. "
                "Repair the line; nothing is guessed."
            )
        if len(values) < len(table.columns):
            short.append(number)
            values += [None] * (len(table.columns) - len(values))
        table.rows.append(values[: len(table.columns)])
        table.lines.append(number)
    if short:
        notes.append(f"{len(short)} rows are short (first: line {short[0]}); the rest is missing")
    return table


def read_sidecar(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what the JSON file beside a table says of its columns, and notes.

    Parameters
    ----------
    path : Path
        The table; its sidecar has the same name and ends in ``.json``.

    Returns
    -------
    (dict, list of str)
        Column to its description (empty without a sidecar); a broken sidecar is a note.
    """
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return {}, []
    try:
        content = json.loads(sidecar.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        return {}, [f"{sidecar.name} cannot be read ({error}); columns are used without it"]
    if not isinstance(content, dict):
        return {}, [f"{sidecar.name} is no JSON object; columns are used without it"]
    return {str(k): v for k, v in content.items() if isinstance(v, dict)}, []


def _text(path: Path, notes: list[str]) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    encoding = next((name for name, bom in _BOMS if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        notes.append("not UTF-8; read as Latin-1")
        text = data.decode("latin-1")
    if "\0" in text:
        raise UsageError(f"{path} is no text file. Give a TSV or CSV file.")
    return text


def _unique(names: list[str], notes: list[str]) -> list[str]:
    """Return column names, none empty and none twice."""
    while names and not names[-1]:
        names.pop()
    unique: list[str] = []
    for position, name in enumerate(names, start=1):
        new = name or f"column_{position}"
        while new in unique:
            new += "_again"
        if new != name:
            notes.append(f"column {position}, {name!r}, is called {new!r} here")
        unique.append(new)
    return unique

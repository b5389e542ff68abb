"""Read TSV and CSV tables as text, and join the session and scan tables of participants' folders."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nidl_dcl.bids.quantities import MISSING
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.errors import UsageError

_LARGEST = 256 * 2**20
_POINTERS = ("version https://git-lfs", "/annex/objects/", "../.git/annex/")
_FETCH = "fetch it first (datalad get, git annex get, git lfs pull)"
_BOMS = (("utf-8-sig", b"\xef\xbb\xbf"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"))


@dataclass
class Table:
    """A table of text."""

    path: Path  # where it was read
    columns: list[str]  # unique
    # Stripped text, None where missing; as long as the columns.
    rows: list[list[str | None]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of the file each row stands in, from 1
    notes: list[str] = field(default_factory=list)  # what was repaired
    files: list[Path] = field(default_factory=list)  # of each row, where several were joined
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # of columns, by the sidecars

    def find(self, names: Iterable[str]) -> int | None:
        """Return the position of the first column with one of the `names`, in any case."""
        plain = [re.sub("[ -]", "_", column.strip().lower()) for column in self.columns]
        return next((plain.index(name) for name in names if name in plain), None)


def read_table(path: Path) -> Table:
    """Read a table as text.

    Cells are separated by tabs if the header holds one, else by semicolons or commas. Between tabs,
    unless the name ends in ``.csv``, quotes are text; elsewhere they are CSV's quoting. Byte order
    marks and all kinds of line ends are accepted; short rows are filled with missing values. The
    file has at most 256 MB.

    Raises
    ------
    UsageError
        For a file that is missing, empty, too large or not text, quotes that are never closed, and
        rows longer than the header.
    """
    notes: list[str] = []
    text = _text(path, notes)
    table: Table | None = None
    # Each text is looked at once, since tables repeat themselves.
    value_of = cache(lambda cell: None if (text := cell.strip()).lower() in MISSING else text)
    short: list[int] = []
    for number, row in _rows(path, text, notes):
        if table is None:
            table = Table(path, _unique([cell.strip() for cell in row], notes), notes=notes)
            width = len(table.columns)
            continue
        values = list(map(value_of, row))
        if len(values) > width:
            if any(value is not None for value in values[width:]):
                raise UsageError(
                    f"{path}, line {number}: {len(row)} cells under {width} column names. "
                    "Repair the line; nothing is guessed."
                )
            del values[width:]
        elif len(values) < width:
            short.append(number)
            values += [None] * (width - len(values))
        table.rows.append(values)
        table.lines.append(number)
    if table is None:
        raise UsageError(f"{path} is empty. A table needs a header line.")
    if short:
        notes.append(
            f"rows shorter than the header, the rest of them missing: {len(short)} "
            f"(first: line {short[0]})"
        )
    return table


def read_sidecar(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the descriptions of columns in the JSON file beside a table, by column, and notes.

    There is none without a sidecar; a broken sidecar is a note. It is decoded as tables are.
    """
    sidecar = path.with_name(f"{path.stem}.json")
    if not os.path.lexists(sidecar):
        return {}, []
    try:
        notes: list[str] = []
        content = json.loads(_decoded(_bytes(sidecar), notes))
    except UsageError as error:
        return {}, [f"{error} Columns are used without it."]
    except (ValueError, RecursionError) as error:
        return {}, [f"{sidecar.name} is no JSON ({error}); columns are used without it"]
    if not isinstance(content, dict):
        return {}, [f"{sidecar.name} is no JSON object; columns are used without it"]
    notes = [f"{sidecar.name}: {note}" for note in notes]
    return {str(k).strip(): v for k, v in content.items() if isinstance(v, dict)}, notes


def _rows(path: Path, text: str, notes: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each line that is not blank, the header first."""
    lines = re.split("\r\n|\n|\r", text)
    header = next((line for line in lines if line.strip()), "")
    mark = next((m for m in "\t;," if m in header), "\t")
    if mark != "\t" and header.count(",") > header.count(";"):
        mark = ","
    if mark == "\t" and path.suffix.lower() != ".csv":
        yield from ((n, line.split("\t")) for n, line in enumerate(lines, 1) if line.strip())
        return
    if mark != "\t" and path.suffix.lower() == ".tsv":
        notes.append(f"cells are separated by {mark!r}, not by tabs")
    del lines
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num}: {error}. Repair the quotes of this CSV file."
        ) from error


def _bytes(path: Path) -> bytes:
    """Return the content of a regular file of limited size; nothing else is opened."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UsageError(f"{path} is not a file. Give an existing file.")
        if about.st_size > _LARGEST:
            raise UsageError(
                f"{path} has {about.st_size} bytes, more than {_LARGEST}. "
                "Give a table with only the columns that are needed."
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UsageError(f"{path} is a link to nothing; {_FETCH}.") from error
        raise UsageError(f"There is no table {path}. Give an existing TSV or CSV file.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read: {why}. Give a readable file.") from error


def _decoded(data: bytes, notes: list[str]) -> str:
    encoding = next((name for name, bom in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        notes.append("not UTF-8; read as Latin-1")
        return data.decode("latin-1")


def _text(path: Path, notes: list[str]) -> str:
    text = _decoded(_bytes(path), notes)
    if "\0" in text:
        raise UsageError(f"{path} is no text file. Give a TSV or CSV file in UTF-8.")
    if text.startswith(_POINTERS):
        raise UsageError(f"{path} only points to its content; {_FETCH}.")
    return text


def _unique(names: list[str], notes: list[str]) -> list[str]:
    """Return column names, renamed where they are empty or repeated."""
    while names and not names[-1]:
        names.pop()
    unique: dict[str, None] = {}
    times: Counter[str] = Counter()
    renamed: list[str] = []
    for position, name in enumerate(names, start=1):
        new = name or f"column_{position}"
        while new in unique:
            times[name] += 1
            new = f"{name or 'column'}_{times[name] + 1}"
        if new != name:
            renamed.append(f"column {position} {name[:40]!r} = {new[:40]!r}")
        unique[new] = None
    if renamed:
        more = f" and {len(renamed) - 5} more" if len(renamed) > 5 else ""
        notes.append(f"names that are empty or there twice: {', '.join(renamed[:5])}{more}")
    return list(unique)


_FolderCells = Callable[[str, str | None], list[str | None]]


def session_tables(root: Path, participants: Iterable[str], session: Iterable[str]) -> Table:
    """Return all ``sub-*/sub-*_sessions.tsv`` as one table, participant and session first.

    Parameters
    ----------
    root : Path
        The dataset.
    participants : iterable of str
        Names of folders.
    session : iterable of str
        Accepted names of the column of sessions.
    """
    whole = Table(root / "sessions.tsv", ["participant_id", "session_id"])
    names = [(name, f"{name}/{name}_sessions.tsv") for name in participants]
    _gather(whole, names, tuple(session), lambda who, text: [who, text])
    return whole


def scan_tables(root: Path, folders: Iterable[str]) -> Table:
    """Return all ``*_scans.tsv`` of `folders` as one table, paths below the root first.

    The folders are those of participants and their sessions.
    """

    def path(folder: str, name: str | None) -> list[str | None]:
        return [None if name is None else f"{folder}/{name.replace(chr(92), '/').lstrip('./')}"]

    whole = Table(root / "scans.tsv", ["path"])
    names = [(folder, f"{folder}/{folder.replace('/', '_')}_scans.tsv") for folder in folders]
    _gather(whole, names, ("filename",), path)
    return whole


def _gather(
    whole: Table, names: Iterable[tuple[str, str]], key: tuple[str, ...], cells: _FolderCells
) -> None:
    """Append tables to `whole`, matching columns by name; equal notes of several files become one."""
    root, own = whole.path.parent, list(whole.columns)
    columns = dict.fromkeys(own)
    notes: defaultdict[str, list[str]] = defaultdict(list)
    parts: list[tuple[Table, str, int]] = []
    for owner, name in names:
        if not os.path.lexists(root / name):
            continue
        part = read_table(root / name)
        at = part.find(key)
        if at is None:
            notes[f"no column {key[0]}, so it is not used"].append(name)
            continue
        for note in (*part.notes, *_take_sidecar(whole, part)):
            notes[note].append(name)
        if own[0] in part.columns[:at] + part.columns[at + 1 :]:
            texts = {row[part.columns.index(own[0])] or owner for row in part.rows}
            if len(match_ids(texts, [owner])) < len(texts):
                notes[f"its {own[0]} is not that of the folder, which counts"].append(name)
        columns |= dict.fromkeys(c for i, c in enumerate(part.columns) if i != at)
        parts.append((part, owner, at))
    whole.columns = list(columns)
    for part, owner, at in parts:
        place = {name: i for i, name in enumerate(part.columns)}
        order = [place.get(name, -1) for name in whole.columns[len(own) :]]
        for line, row in zip(part.lines, part.rows, strict=True):
            whole.rows.append([*cells(owner, row[at]), *((*row, None)[i] for i in order)])
            whole.lines.append(line)
            whole.files.append(part.path)
    for note, files in notes.items():
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        whole.notes.append(f"{files[0]}{others}: {note}")


def _take_sidecar(whole: Table, part: Table) -> list[str]:
    """Add the sidecar of a part; levels and units that differ between parts are dropped."""
    about, notes = read_sidecar(part.path)
    for column, said in about.items():
        old = whole.about.setdefault(column, said)
        for what in ("Levels", "Units"):
            if old.get(what) != said.get(what):
                whole.about[column] = old = old | {what: None}
                notes.append(f"{column}: {what} differ from those of other files, so none count")
    return notes

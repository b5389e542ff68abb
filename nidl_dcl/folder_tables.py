"""Put the tables that lie in the participants' folders together: sessions, and scans.

Read by `tables`; joined to images by `phenotypes`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from nidl_dcl.ids import match_ids
from nidl_dcl.tables import Table, read_sidecar, read_table

__all__ = ["scan_tables", "session_tables"]

_Cells = Callable[[str, str | None], list[str | None]]


def session_tables(root: Path, participants: Iterable[str], session: Iterable[str]) -> Table:
    """Return all ``sub-*/sub-*_sessions.tsv`` as one table, participant and session first.

    Parameters
    ----------
    root : Path
        The dataset.
    participants : iterable of str
        Names of folders.
    session : iterable of str
        How the column of sessions may be called.
    """
    whole = Table(root / "sessions.tsv", ["participant_id", "session_id"])
    names = [(name, f"{name}/{name}_sessions.tsv") for name in participants]
    _gather(whole, names, tuple(session), lambda who, text: [who, text])
    return whole


def scan_tables(root: Path, folders: Iterable[str]) -> Table:
    """Return all ``*_scans.tsv`` of `folders` as one table, paths below the root first.

    Parameters
    ----------
    root : Path
        The dataset.
    folders : iterable of str
        Folders of participants and their sessions.
    """

    def path(folder: str, name: str | None) -> list[str | None]:
        return [None if name is None else f"{folder}/{name.replace(chr(92), '/').lstrip('./')}"]

    whole = Table(root / "scans.tsv", ["path"])
    names = [(folder, f"{folder}/{folder.replace('/', '_')}_scans.tsv") for folder in folders]
    _gather(whole, names, ("filename",), path)
    return whole


def _gather(
    whole: Table, names: Iterable[tuple[str, str]], key: tuple[str, ...], cells: _Cells
) -> None:
    """Append tables to `whole`, column by name; what is said of many files is said once."""
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
        more = _take_sidecar(whole, part)
        for note in (*part.notes, *more):
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
    """Add what the sidecar of a part says; codes and units that differ between parts do not count."""
    about, notes = read_sidecar(part.path)
    for column, said in about.items():
        old = whole.about.setdefault(column, said)
        for what in ("Levels", "Units"):
            if old.get(what) != said.get(what):
                whole.about[column] = old = old | {what: None}
                notes.append(f"{column}: {what} differ from those of other files, so none count")
    return notes

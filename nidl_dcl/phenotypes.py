"""Join what a dataset says of its participants, sessions and scans to a table of images.

Tables are read by `tables`, the meaning of their columns by `coding`; images come from `bids_index`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.coding import as_series, decode, same_value
from nidl_dcl.errors import UsageError
from nidl_dcl.ids import match_ids
from nidl_dcl.tables import Table, read_sidecar, read_table

__all__ = ["Phenotypes", "participant_ids", "read_phenotypes"]

_PARTICIPANT = ("participant_id", "participant", "subject_id", "subject", "sub", "id")
_SESSION = ("session_id", "session", "ses")
_TAKEN = {
    *("participant_id", "session_id", "run", "path", "source", "mask_path", "split", "row"),
}

_Row = dict[str, str | None]
_Key = tuple[str, str | None]


@dataclass(frozen=True)
class Phenotypes:
    """Phenotypes of images.

    Attributes
    ----------
    table : DataFrame
        One row per image, in the order given, index from 0; one column per phenotype: float64
        where every value is a number, else strings with ``<NA>``.
    matches : DataFrame
        ``participant_id id rule source``: which row of which table belongs to which participant,
        and by which rule (exact, prefix, case, zeros); ``none`` where nothing fits, for ids
        without images (participant_id missing) and participants without a row (id missing).
    notes : list of str
        What was put right, collapsed, renamed or left out, in words.
    columns : dict of str to dict
        What the sidecars say of each column (Description, Units, Levels …).
    """

    table: pd.DataFrame
    matches: pd.DataFrame
    notes: list[str]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)


def participant_ids(bids_dir: str | Path) -> list[str]:
    """Return the ids of ``participants.tsv``, in order, each once; none without that file.

    Raises
    ------
    UsageError
        When the file cannot be read or has no column of ids.
    """
    path = _home(Path(bids_dir).expanduser().resolve()) / "participants.tsv"
    if not os.path.lexists(path):
        return []
    table = read_table(path)
    at = _id_column(table)
    return list(dict.fromkeys(text for row in table.rows if (text := row[at]) is not None))


def read_phenotypes(
    bids_dir: str | Path, images: pd.DataFrame, files: Sequence[str | Path] = ()
) -> Phenotypes:
    """Return the phenotypes of images.

    Read are ``participants.tsv``, ``phenotype/*.tsv``, ``sub-*/sub-*_sessions.tsv``, the images'
    rows in ``*_scans.tsv``, and `files`. A value of a session or scan goes before that of the
    participant. Where tables contradict each other, a column of ``phenotype/`` is renamed to
    ``<file>_<column>``; a column of `files` takes the plain name and the other one is renamed.

    Parameters
    ----------
    bids_dir : path
        Dataset; for a derivative inside ``derivatives/``, the tables are those of the dataset
        around it when it has none itself. No table at all is fine.
    images : DataFrame
        ``participant_id session_id path`` at least, one row per image.
    files : sequence of path
        Further TSV or CSV tables with ids, and sessions if they have several rows per participant.

    Raises
    ------
    UsageError
        For a table that is missing or broken, and rows that contradict each other, naming them.
    """
    join = _Join(Path(bids_dir).expanduser().resolve(), images)
    home = join.home
    if os.path.lexists(home / "participants.tsv"):
        join.add(read_table(home / "participants.tsv"))
    for path in sorted((home / "phenotype").glob("*.tsv")):
        table = read_table(path)
        if table.find(_PARTICIPANT) is None:
            join.notes.append(f"{join.called(path)} has no column participant_id and is not used")
        else:
            join.add(table, clash="rename new")
    join.add(join.session_tables(), clash="over")
    join.add_scans(join.scan_tables())
    for given in files:
        join.add(read_table(Path(given).expanduser()), clash="rename old")
    return join.result()


class _Join:
    """The growing table: columns of text, one value per image."""

    def __init__(self, bids_dir: Path, images: pd.DataFrame) -> None:
        self.home = _home(bids_dir)
        self.in_raw = self.home == bids_dir
        self.participants = [str(p) for p in images["participant_id"]]
        self.sessions = [None if pd.isna(s) else str(s) for s in images["session_id"]]
        self.paths = [str(p) for p in images["path"]]
        # Ids must be told from all participants, else "1" would match the only one selected.
        with os.scandir(self.home) as entries:
            around = sorted(e.name for e in entries if e.name.startswith("sub-") and e.is_dir())
        self.everyone = list(dict.fromkeys([*self.participants, *around]))
        self.columns: dict[str, list[str | None]] = {}
        self.origin: dict[str, str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.matches: list[tuple[str | None, str | None, str, str]] = []

    def called(self, path: Path) -> str:
        """Return how a table is called in notes and messages."""
        return (
            path.relative_to(self.home).as_posix() if path.is_relative_to(self.home) else str(path)
        )

    def add(self, table: Table, clash: str = "over") -> None:
        """Join a table of participants, or of participants and sessions."""
        if not table.rows:
            return
        at, when = _id_column(table), table.find(_SESSION)
        if table.columns[at] != "participant_id":
            table.notes.append(f"ids are read from the column {table.columns[at]!r}")
        ids = [row[at] for row in table.rows]
        who = match_ids([text for text in ids if text is not None], self.everyone)
        seen = [text for row in table.rows if when is not None and (text := row[when]) is not None]
        known = dict.fromkeys(s for s in self.sessions if s is not None)
        which = {text: name for text, (name, _) in match_ids(seen, known, "ses-").items()}
        keys: list[_Key | None] = []
        for text, row in zip(ids, table.rows, strict=True):
            session = None if when is None else row[when]
            named = None if session is None else which.get(session, session)
            keys.append((who[text][0], named) if text in who else None)
        self._note_matches(table, ids, who)
        names, merged = self._rows(table, keys, {at, when})
        agreed = _agreed(merged)
        rows: list[_Row] = []
        for participant, session in self._image_keys():
            whole = merged.get((participant, None)) or {}
            if session is None:
                rows.append(whole or agreed.get(participant, {}))
            else:
                own = merged.get((participant, session), {})
                rows.append(whole | {k: v for k, v in own.items() if v is not None})
        self._lay(table, clash, names, rows)

    def add_scans(self, table: Table) -> None:
        """Join a table with one row per scan, its path in the first column."""
        wanted = set(self.paths)
        keys: list[_Key | None] = [
            (str(row[0]), None) if row[0] in wanted else None for row in table.rows
        ]
        if any(keys):
            names, merged = self._rows(table, keys, {0})
            self._lay(table, "over", names, [merged.get((path, None), {}) for path in self.paths])

    def session_tables(self) -> Table:
        """Return all ``sub-*/sub-*_sessions.tsv`` as one table."""
        names = [(p, f"{p}/{p}_sessions.tsv") for p in dict.fromkeys(self.participants)]
        whole = Table(self.home / "sessions.tsv", ["participant_id", "session_id"])
        self._collect(whole, names, _SESSION, lambda who, session: [who, session])
        return whole

    def scan_tables(self) -> Table:
        """Return all ``*_scans.tsv`` of the images' folders as one table."""
        folders = dict.fromkeys(
            folder
            for who, session in self._image_keys()
            for folder in ([who] if session is None else [who, f"{who}/{session}"])
        )
        names = [(f, f"{f}/{f.replace('/', '_')}_scans.tsv") for f in folders if self.in_raw]
        whole = Table(self.home / "scans.tsv", ["path"])
        self._collect(whole, names, ("filename",), lambda folder, name: [f"{folder}/{name}"])
        return whole

    def result(self) -> Phenotypes:
        """Return the table as it stands."""
        table = pd.DataFrame(
            {name: as_series(values) for name, values in self.columns.items()},
            index=pd.RangeIndex(len(self.paths)),
        )
        matches = pd.DataFrame(
            self.matches, columns=["participant_id", "id", "rule", "source"]
        ).astype("string")
        about = {name: self.about[name] for name in self.columns if name in self.about}
        return Phenotypes(table, matches, self.notes, about)

    def _image_keys(self) -> Iterable[_Key]:
        return zip(self.participants, self.sessions, strict=True)

    def _collect(
        self,
        whole: Table,
        names: Iterable[tuple[str, str]],
        key: tuple[str, ...],
        cells: Callable[[str, str | None], list[str | None]],
    ) -> None:
        """Append the tables of single participants to `whole`, column by name."""
        n_keys = len(whole.columns)
        for owner, name in names:
            if not os.path.lexists(self.home / name):
                continue
            part = read_table(self.home / name)
            at = part.find(key)
            if at is None:
                self.notes.append(f"{name} has no column {key[0]} and is not used")
                continue
            whole.notes += [f"{name}: {note}" for note in part.notes]
            others = [i for i in range(len(part.columns)) if i != at]
            taken = set(whole.columns[:n_keys])
            places = {i: part.columns[i] for i in others if part.columns[i] not in taken}
            whole.columns += [c for c in places.values() if c not in whole.columns]
            for line, row in zip(part.lines, part.rows, strict=True):
                values = {name: row[i] for i, name in places.items()}
                rest = [values.get(column) for column in whole.columns[n_keys:]]
                whole.rows.append([*cells(owner, row[at]), *rest])
                whole.lines.append(line)
        for row in whole.rows:
            row += [None] * (len(whole.columns) - len(row))

    def _rows(
        self, table: Table, keys: Sequence[_Key | None], skip: Collection[int | None]
    ) -> tuple[list[str], dict[_Key, _Row]]:
        """Return the columns, and their decoded values by key; rows of one key must agree."""
        about, notes = read_sidecar(table.path)
        decoded: dict[str, list[str | None]] = {}
        for at, name in enumerate(table.columns):
            if at not in skip:
                values = [row[at] for row in table.rows]
                decoded[name], more = decode(name, values, about.get(name, {}))
                notes += more
        merged: dict[_Key, _Row] = {}
        lines: defaultdict[_Key, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            if key is None:
                continue
            old = merged.setdefault(key, {})
            lines[key].append(table.lines[number])
            for name, values in decoded.items():
                if not same_value(old.get(name), values[number]):
                    self._refuse(table, key, lines[key], name, old.get(name), values[number])
                if old.get(name) is None:
                    old[name] = values[number]
        doubles = [key for key in merged if len(lines[key]) > 1]
        if doubles:
            shown = f"{doubles[0][0]}, lines {' '.join(map(str, lines[doubles[0]]))}"
            notes.append(
                f"rows that agree are taken as one for {len(doubles)} ids (first: {shown})"
            )
        source = self.called(table.path)
        self.notes += [f"{source}: {note}" for note in (*table.notes, *notes)]
        for name in decoded:
            if name in about:
                self.about.setdefault(name, about[name])
        return list(decoded), merged

    def _refuse(
        self, table: Table, key: _Key, lines: list[int], name: str, *values: str | None
    ) -> None:
        who = " ".join(part for part in key if part is not None)
        raise UsageError(
            f"{table.path}: lines {' and '.join(map(str, lines))} contradict each other for {who}: "
            f"{name} is {values[0]!r} and {values[1]!r}. Keep one row per participant"
            " (and session, in a column session_id)."
        )

    def _lay(self, table: Table, clash: str, names: Sequence[str], rows: Sequence[_Row]) -> None:
        """Lay the columns of `rows`, one row per image, over what is there."""
        source = self.called(table.path)
        stem = re.sub("[^A-Za-z0-9]+", "_", table.path.stem)
        for name in names:
            values = [row.get(name) for row in rows]
            target = f"{stem}_{name}" if name in _TAKEN else name
            if target != name:
                self.notes.append(f"{source}: column {name!r} is called {target!r} here")
            old = self.columns.get(target)
            if old is None:
                self.columns[target], self.origin[target] = values, stem
                continue
            differ = sum(not same_value(a, b) for a, b in zip(old, values, strict=True))
            if clash == "over" or not differ:
                pairs = zip(values, old, strict=True)
                self.columns[target] = [a if a is not None else b for a, b in pairs]
                if differ:
                    self.notes.append(
                        f"{source}: {target} goes before the participant's ({differ} images)"
                    )
                continue
            other = f"{stem if clash == 'rename new' else self.origin[target]}_{target}"
            if clash == "rename new":
                self.columns[other], self.origin[other] = values, stem
            else:
                self.columns[other], self.origin[other] = old, self.origin[target]
                self.columns[target], self.origin[target] = values, stem
            self.notes.append(
                f"{source}: {target} contradicts an earlier table for {differ} images; "
                f"the {'one here' if clash == 'rename new' else 'earlier one'} is called {other}"
            )

    def _note_matches(
        self, table: Table, ids: Sequence[str | None], who: dict[str, tuple[str, str]]
    ) -> None:
        source = self.called(table.path)
        own = set(self.participants)
        for text in dict.fromkeys(i for i in ids if i is not None):
            name, rule = who.get(text, (None, "none"))
            self.matches.append((name, text, rule, source))
        have = {name for name, _ in who.values()} & own
        lacking = [name for name in dict.fromkeys(self.participants) if name not in have]
        self.matches += [(name, None, "none", source) for name in lacking]
        rules = Counter(rule for name, rule in who.values() if name in own)
        how = ", ".join(f"{n} {rule}" for rule, n in rules.items())
        self.notes.append(
            f"{source}: {len(have)} of {len(own)} participants with images have a row"
            + (f" (ids matched: {how})" if how else "")
        )


def _agreed(merged: dict[_Key, _Row]) -> dict[str, _Row]:
    """Return what all sessions of a participant agree on, for images that name no session."""
    agreed: dict[str, _Row] = {}
    clashing: defaultdict[str, set[str]] = defaultdict(set)
    for (participant, _), row in merged.items():
        old = agreed.setdefault(participant, {})
        for name, value in row.items():
            if not same_value(old.get(name), value):
                clashing[participant].add(name)
            if old.get(name) is None:
                old[name] = value
    for participant, names in clashing.items():
        agreed[participant] |= dict.fromkeys(names)
    return agreed


def _home(bids_dir: Path) -> Path:
    """Return the dataset whose tables count: for ``X/derivatives/NAME`` without any, that is X."""
    outer = bids_dir.parent.parent
    own = os.path.lexists(bids_dir / "participants.tsv")
    inside = bids_dir.parent.name == "derivatives"
    return outer if inside and not own and os.path.lexists(outer / "participants.tsv") else bids_dir


def _id_column(table: Table) -> int:
    at = table.find(_PARTICIPANT)
    if at is None:
        raise UsageError(
            f"{table.path} has no column participant_id (its columns: "
            f"{', '.join(table.columns[:8])}). Name the column of ids participant_id."
        )
    return at

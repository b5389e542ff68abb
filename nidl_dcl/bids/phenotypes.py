"""Join a dataset's tables of participants, sessions and scans to a table of images.

Reading tables is left to `tables`, decoding columns to `recode`, and finding images to `index`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.bids.quantities import read_quantities
from nidl_dcl.bids.recode import as_series, decode, same_value
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.bids.tables import Table, read_sidecar, read_table, scan_tables, session_tables
from nidl_dcl.bids.walk import subfolders
from nidl_dcl.errors import UsageError

_PARTICIPANT = ("participant_id", "participant", "subject_id", "subject", "sub", "id")
_SESSION = ("session_id", "session", "ses")

_TAKEN = {
    *("participant_id", "session_id", "run", "path", "source", "mask_path", "split", "row"),
    *("person_id", "group_id", "content", "voxel_mm", "seen_by"),
}

_DERIVED = re.compile("_(?:space|res|den|desc|label|hemi|atlas|seg|cohort)-[A-Za-z0-9]+")
_MOST_NOTES = 20
_Values = list[str | None]
_Key = tuple[str, str | None]

_Rows = tuple[list[int], ...]
"""Numbers of the rows of an image, by level: those of its scan or session before its participant's."""


@dataclass(frozen=True)
class Phenotypes:
    """Phenotypes of images.

    Attributes
    ----------
    table : DataFrame
        One row per image, in the order given, index from 0; one column per phenotype: float64
        where every value is a number, else strings with ``<NA>``.
    matches : DataFrame
        ``participant_id id rule source``, as text: the ids of each table, the participant that each
        matches, with or without images, and by which rule (exact, prefix, case, zeros). The rule is
        ``none`` for ids that match no participant or several (participant_id missing) and for
        participants with images but without a row (id missing).
    notes : list of str
        What was repaired, merged, renamed or left out; at most 20 for each table.
    columns : dict of str to dict
        Descriptions of the columns in sidecars (Description, Units, Levels …).
    reasons : dict of str to list of str
        Why values of a column are missing, besides missing cells; under "" what holds for all columns.
    """

    table: pd.DataFrame
    matches: pd.DataFrame
    notes: list[str]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)


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
    bids_dir: str | Path,
    images: pd.DataFrame,
    files: Sequence[str | Path] = (),
    *,
    id_column: str | None = None,
    id_map: str | Path | None = None,
) -> Phenotypes:
    """Return the phenotypes of images.

    They come from ``participants.tsv``, ``phenotype/*.tsv``, ``sub-*/sub-*_sessions.tsv``, the
    images' rows in ``*_scans.tsv``, and `files`. A value of a session or scan replaces that of the
    participant. Where tables contradict each other, a column of ``phenotype/`` is renamed to
    ``<file>_<column>``; a column of `files` keeps its name and the other one is renamed. Columns in
    different declared units are never merged.

    Parameters
    ----------
    bids_dir : path
        A dataset. A derivative inside ``derivatives/`` that has no ``participants.tsv`` uses the
        tables of the dataset around it. Tables are optional.
    images : DataFrame
        ``participant_id session_id path`` at least, one row per image.
    files : sequence of path
        Further TSV or CSV tables with ids, and sessions if they have several rows per participant.
    id_column : str, optional
        Column of ids, in the tables that have it.
    id_map : path, optional
        Table of two columns: ids as the tables have them, and as the folders of the images.

    Raises
    ------
    UsageError
        For a table that is missing or broken, rows that contradict each other, naming them, and an
        `id_column` that no table has.
    """
    join = _Join(Path(bids_dir).expanduser().resolve(), images, id_column)
    if id_map is not None:
        join.known_as = _read_map(Path(id_map))
    home = join.home
    if not os.path.lexists(home / "participants.tsv"):
        join.explain("", _tables_beside(home, files))
    if os.path.lexists(home / "participants.tsv"):
        join.add(read_table(home / "participants.tsv"))
    for path in sorted((home / "phenotype").glob("*.tsv")):
        if path.name.startswith("."):
            continue
        table = read_table(path)
        if table.find(join.id_names) is None:
            join.notes.append(f"{join.name_of(table)} has no column participant_id and is not used")
        else:
            join.add(table, clash="rename new")
    join.add_own()
    for given in files:
        # Unlike Path.expanduser, this does not raise for an unknown user: the path is then missing.
        join.add(read_table(Path(os.path.expanduser(given))), clash="rename old")  # noqa: PTH111
    if id_column is not None and not join.id_column_found:
        raise UsageError(
            f"--id-column {id_column}: no table has that column. "
            f"Tables: {', '.join(join.seen) or 'none'}."
        )
    return join.result()


@dataclass
class _Column:
    """One value per image, the table it came from, and its description in the sidecar."""

    values: _Values
    origin: str
    about: Mapping[str, Any]

    @property
    def unit(self) -> str:
        """Return the declared unit; ``year`` and ``years`` are one."""
        return str(self.about.get("Units") or "").strip().lower().rstrip("s")


class _Join:
    """Joins tables one after the other: columns of text, one value per image."""

    def __init__(self, bids_dir: Path, images: pd.DataFrame, id_column: str | None = None) -> None:
        self.id_names = (*([_plain_name(id_column)] if id_column else []), *_PARTICIPANT)
        self.id_column_found = False
        self.known_as: dict[str, str] = {}
        self.seen: list[str] = []  # columns of each table
        self.reasons: defaultdict[str, list[str]] = defaultdict(list)
        self.home = _home(bids_dir)
        self.participants = [str(p) for p in images["participant_id"]]
        self.sessions = [None if pd.isna(s) else str(s) for s in images["session_id"]]
        self.paths = [str(p) for p in images["path"]]
        # Match among all participants: else "1" could match the only one that is selected.
        self.everyone = list(dict.fromkeys([*self.participants, *_folders(self.home, "sub-")]))
        self.sessions_of: dict[str, list[str]] = {name: [] for name in self.participants}
        for name, session in dict.fromkeys(self._image_keys()):
            self.sessions_of[name] += [session] if session else []
        self.columns: dict[str, _Column] = {}
        self.notes: list[str] = []
        self.matches: list[tuple[str | None, str | None, str, str]] = []

    def name_of(self, table: Table) -> str:
        """Return how a table is called in notes."""
        if table.files:
            return f"sub-*_{table.path.name}"
        inside = table.path.is_relative_to(self.home)
        return table.path.relative_to(self.home).as_posix() if inside else str(table.path)

    def add(self, table: Table, clash: str = "over") -> None:
        """Join a table of participants, or of participants and sessions."""
        at, when = _id_column(table, self.id_names), table.find(_SESSION)
        if table.columns[at] != "participant_id":
            table.notes.append(f"ids are read from the column {table.columns[at][:60]!r}")
        self.id_column_found |= _plain_name(table.columns[at]) == self.id_names[0]
        self.seen.append(f"{self.name_of(table)} ({', '.join(table.columns[:8])})")
        ids = [row[at] for row in table.rows]
        if self.known_as:
            ids = [None if text is None else self.known_as.get(text, text) for text in ids]
        who = match_ids([text for text in ids if text is not None], self.everyone)
        owners = [None if text is None or text not in who else who[text][0] for text in ids]
        sessions = self._sessions(table, owners, when)
        groups: defaultdict[_Key, list[int]] = defaultdict(list)
        every: defaultdict[str, list[int]] = defaultdict(list)
        for number, (owner, session) in enumerate(zip(owners, sessions, strict=True)):
            if owner is not None:
                groups[owner, session].append(number)
                every[owner].append(number)
        rows: list[_Rows] = []
        for person, session in self._image_keys():
            whole = groups.get((person, None), [])
            if session is None:
                rows.append((whole or every.get(person, []),))
            else:
                rows.append((groups.get((person, session), []), whole))
        self._note_matches(table, at, ids, who, rows)
        self._join(table, clash, {at, when}, groups, rows)

    def add_own(self) -> None:
        """Join the tables in the participants' folders: sessions, then scans."""
        sessions = session_tables(self.home, self.sessions_of, _SESSION)
        if sessions.files:
            self.add(sessions)
        else:
            self.notes += sessions.notes
        folders = dict.fromkeys(
            folder
            for who, session in self._image_keys()
            for folder in ([who] if session is None else [who, f"{who}/{session}"])
        )
        scans = scan_tables(self.home, folders)
        if scans.files:
            self._add_scans(scans)
        else:
            self.notes += scans.notes

    def result(self) -> Phenotypes:
        """Return the table as it stands."""
        series = {name: as_series(column.values) for name, column in self.columns.items()}
        table = pd.DataFrame(series, index=pd.RangeIndex(len(self.paths)))
        names = ["participant_id", "id", "rule", "source"]
        matches = pd.DataFrame(self.matches, columns=names).astype("string")
        about = {name: dict(c.about) for name, c in self.columns.items() if c.about}
        return Phenotypes(table, matches, self.notes, about, dict(self.reasons))

    def explain(self, column: str, reason: str) -> None:
        """Note why values are missing, of one column or of all (empty name)."""
        if reason:
            self.notes.append(f"{column}: {reason}" if column else reason)
            self.reasons[column].append(reason)

    def _image_keys(self) -> Iterable[_Key]:
        return zip(self.participants, self.sessions, strict=True)

    def _add_scans(self, table: Table) -> None:
        """Join a table with one row per scan, its path in the first column."""
        groups: defaultdict[_Key, list[int]] = defaultdict(list)
        for number, row in enumerate(table.rows):
            if row[0] is not None:
                groups[row[0], None].append(number)
        named: defaultdict[str, list[str]] = defaultdict(list)
        for path, _ in groups:
            named[_scan_name(path)].append(path)
        rows: list[_Rows] = []
        rules: Counter[str] = Counter()
        for who, path in zip(self.participants, self.paths, strict=True):
            name = _scan_name(path)
            alike = named.get(name, []) if name.startswith(f"{who}_") else []
            scan = path if (path, None) in groups else alike[0] if len(alike) == 1 else None
            rows.append(() if scan is None else (groups[scan, None],))
            rules["path" if scan == path else "none" if scan is None else "name"] += 1
        matched = ", ".join(f"{rules[rule]} {rule}" for rule in ("path", "name") if rules[rule])
        table.notes.insert(
            0,
            f"{len(rows) - rules['none']} of {len(rows)} images have a row"
            + (f" (scans matched: {matched})" if matched else ""),
        )
        if matched:
            self._join(table, "over", {0}, groups, rows)
        else:
            self._add_notes(table, table.notes)

    def _sessions(self, table: Table, owners: Sequence[str | None], when: int | None) -> _Values:
        """Return the session of each row, by the name of the image's session where it is one."""
        texts = [None if when is None else row[when] for row in table.rows]
        theirs: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for owner, text in zip(owners, texts, strict=True):
            if owner is not None and text is not None and self.sessions_of.get(owner):
                theirs[owner][text] = None
        matched: dict[_Key, str] = {}
        rules: Counter[str] = Counter()
        for person, said in theirs.items():
            known = self.sessions_of[person]
            found = match_ids(said, known, "ses-")
            if not said.keys() <= set(known):
                folders = _folders(self.home / person, "ses-")
                everywhere = match_ids(said, list(dict.fromkeys([*known, *folders])), "ses-")
                # Sessions of a derivative may be written otherwise than the raw ones of the table;
                # where the raw dataset has both names, they are two sessions.
                found = {t: f for t, f in found.items() if t == f[0] or f[0] not in folders} | {
                    t: f for t, f in everywhere.items() if t not in found or found[t][0] in folders
                }
            for text, (name, rule) in found.items():
                matched[person, text] = name
                rules[rule] += 1
        if rules and set(rules) != {"exact"}:
            how = ", ".join(f"{n} {rule}" for rule, n in rules.items())
            table.notes.append(f"sessions matched: {how}")
        lost = [
            (p, text) for p, said in theirs.items() for text in said if (p, text) not in matched
        ]
        if lost:
            table.notes.append(
                f"{len(lost)} sessions have no folder (first: {lost[0][1][:40]!r} of {lost[0][0]})"
            )
        return [
            text if owner is None else matched.get((owner, text), text)
            for owner, text in zip(owners, texts, strict=True)
        ]

    def _note_matches(
        self,
        table: Table,
        at: int,
        ids: Sequence[str | None],
        who: Mapping[str, tuple[str, str]],
        rows: Sequence[_Rows],
    ) -> None:
        source = self.name_of(table)
        texts = list(dict.fromkeys(text for text in ids if text is not None))
        for text in texts:
            name, rule = who.get(text, (None, "none"))
            self.matches.append((name, text, rule, source))
        have = {name for name, _ in who.values()} & self.sessions_of.keys()
        self.matches += [(n, None, "none", source) for n in self.sessions_of if n not in have]
        rules = Counter(who[text][1] for text in texts if text in who and who[text][0] in have)
        how = ", ".join(f"{n} {rule}" for rule, n in rules.items())
        said = [
            f"{len(have)} of {len(self.sessions_of)} participants with images have a row"
            + (f" (ids matched: {how})" if how else "")
        ]
        images = zip(self.participants, rows, strict=True)
        without = sum(not any(levels) for name, levels in images if name in have)
        if without:
            said.append(f"{without} of their images have no row for their session")
            example = next((n, s) for n, s in self._image_keys() if n in have and s is not None)
            self.reasons[""].append(
                f"{source}: {without} images have no row for their session, such as {example[1]} of "
                f"{example[0]}"
            )
        strange = [text for text in texts if text not in who]
        if strange:
            said.append(
                f"{len(strange)} ids of the table fit no participant, or several "
                f"(first: {strange[0][:40]!r})"
            )
        if len(have) < len(self.sessions_of) and strange:
            lone = next(name for name in self.sessions_of if name not in have)
            self.reasons[""].append(
                f"{source}: {len(have)} of {len(self.sessions_of)} participants with images have a "
                f"row; the table, in its column {table.columns[at]!r}, has for instance "
                f"{strange[0][:40]!r}, and the images have {lone!r} (see --id-column and --id-map)"
            )
        if None in ids:
            said.append(
                f"{ids.count(None)} rows have no id (first: line {table.lines[ids.index(None)]})"
            )
        table.notes.insert(0, "; ".join(said))

    def _join(
        self,
        table: Table,
        clash: str,
        skip: Collection[int | None],
        groups: Mapping[_Key, list[int]],
        rows: Sequence[_Rows],
    ) -> None:
        """Lay the columns of a table over what is there; rows of one key must agree."""
        about, notes = read_sidecar(table.path)
        about |= table.about
        doubles = {key: numbers for key, numbers in groups.items() if len(numbers) > 1}
        if doubles:
            key, numbers = next(iter(doubles.items()))
            notes.append(
                f"rows that agree are taken as one, for {len(doubles)} ids "
                f"(first: {_key_name(key)}, {_lines(table, numbers)})"
            )
        # Nearly every image has one row; -1 is the missing value at the end of each column.
        flat = [[number for level in levels for number in level] for levels in rows]
        sole = [numbers[0] if len(numbers) == 1 else -1 for numbers in flat]
        several = [image for image, numbers in enumerate(flat) if len(numbers) > 1]
        names = {at: name for at, name in enumerate(table.columns) if at not in skip}
        for at, name in names.items():
            cells = [row[at] for row in table.rows]
            column, more = decode(name, cells, about.get(name, {}))
            if read := read_quantities({cell for cell in cells if cell is not None}):
                about[name] = {**about.get(name, {}), "Units": read[1]}
            for key, numbers in doubles.items():
                _refuse_contradiction(table, key, name, column, numbers)
            column.append(None)
            values = [column[number] for number in sole]
            differing = 0
            for image in several:
                values[image] = _closest(column, rows[image])
                if values[image] is None and self.sessions[image] is None:
                    differing += any(column[n] is not None for n in flat[image])
            if differing:
                self.reasons[name].append(
                    f"{self.name_of(table)}: {name} is known per session and differs between "
                    f"them; {differing} of the images have no session"
                )
                notes.append(
                    f"{name} differs between sessions, and is missing for {differing} images, "
                    "which have no session"
                )
            notes += more + self._lay(
                table, clash, name, values, about.get(name, {}), names.values()
            )
        self._add_notes(table, [*table.notes, *notes])

    def _add_notes(self, table: Table, notes: Sequence[str]) -> None:
        source, more = self.name_of(table), len(notes) - _MOST_NOTES
        self.notes += [f"{source}: {note}" for note in notes[:_MOST_NOTES]]
        if more > 0:
            self.notes.append(f"{source}: {more} more notes like these")

    def _lay(
        self,
        table: Table,
        clash: str,
        name: str,
        values: _Values,
        about: Mapping[str, Any],
        names: Collection[str],
    ) -> list[str]:
        """Lay one column over what is there, and return notes."""
        notes = []
        new = _Column(values, re.sub("[^A-Za-z0-9]+", "_", table.path.stem), about)
        target = name
        if name in _TAKEN:
            target = self._free(f"{new.origin}_{name}", names)
            notes.append(f"column {name!r} is called {target!r} here")
        old = self.columns.setdefault(target, new)
        if old is new:
            return notes
        pairs = list(zip(old.values, values, strict=True))
        differ = sum(not same_value(a, b) for a, b in pairs if a != b)
        units = bool(old.unit and new.unit and old.unit != new.unit)
        if not units and (clash == "over" or not differ):
            merged = [b if b is not None else a for a, b in pairs]
            self.columns[target] = _Column(merged, old.origin, {**old.about, **about})
            if differ:
                notes.append(f"{target} goes before that of earlier tables ({differ} images)")
            return notes
        keeps, moves = (new, old) if clash == "rename old" else (old, new)
        other = self._free(f"{moves.origin}_{target}", names)
        self.columns[target], self.columns[other] = keeps, moves
        why = (
            f"is in {new.about['Units']} here and in {old.about['Units']} in an earlier table"
            if units
            else f"contradicts an earlier table for {differ} images"
        )
        which = "the earlier one" if moves is old else "the one here"
        return [*notes, f"{target} {why}; {which} is called {other}"]

    def _free(self, name: str, names: Collection[str]) -> str:
        """Return a name that no column has, here or in the table to come."""
        free, count = name, 1
        while free in self.columns or free in names:
            count += 1
            free = f"{name}_{count}"
        return free


def _closest(column: Sequence[str | None], rows: _Rows) -> str | None:
    """Return the value of the closest level that has one, if the rows of that level agree on it."""
    for level in rows:
        values = [column[number] for number in level if column[number] is not None]
        if values:
            return values[0] if all(same_value(values[0], value) for value in values) else None
    return None


def _refuse_contradiction(
    table: Table, key: _Key, name: str, column: Sequence[str | None], numbers: Sequence[int]
) -> None:
    said = [number for number in numbers if column[number] is not None]
    other = next((n for n in said if not same_value(column[said[0]], column[n])), None)
    if other is not None:
        person = "participant (and session, in a column session_id)"
        raise UsageError(
            f"{table.path if not table.files else table.path.parent}: "
            f"{_lines(table, [said[0], other])} contradict each other for {_key_name(key)}: "
            f"{name} is {str(column[said[0]])[:60]!r} and {str(column[other])[:60]!r}. "
            f"Keep one row per {'scan' if table.columns[0] == 'path' else person}."
        )


def _key_name(key: _Key) -> str:
    return " ".join(part for part in key if part is not None)


def _lines(table: Table, numbers: Sequence[int]) -> str:
    """Return where rows stand, naming their files if these are several tables in one."""
    if not table.files:
        return f"lines {' and '.join(str(table.lines[n]) for n in numbers[:6])}"
    root = table.path.parent
    return " and ".join(
        f"{table.files[n].relative_to(root).as_posix()} line {table.lines[n]}" for n in numbers[:6]
    )


def _scan_name(path: str) -> str:
    """Return the name of a scan as a raw dataset has it, without ending."""
    return _DERIVED.sub("", path.rpartition("/")[2].partition(".")[0])


def _folders(path: Path, prefix: str) -> list[str]:
    """Return the sub-folders that start with `prefix`; none where the folder cannot be read."""
    try:
        return subfolders(os.scandir(path), prefix)
    except OSError:
        return []


def _home(bids_dir: Path) -> Path:
    """Return the dataset whose tables count: for ``X/derivatives/NAME`` without any, that is X."""
    outer = bids_dir.parent.parent
    own = os.path.lexists(bids_dir / "participants.tsv")
    inside = bids_dir.parent.name == "derivatives"
    return outer if inside and not own and os.path.lexists(outer / "participants.tsv") else bids_dir


def _plain_name(column: str) -> str:
    return re.sub("[ -]", "_", column.strip().lower())


def _read_map(path: Path) -> dict[str, str]:
    """Return the ids of the images by those of the tables."""
    table = read_table(path)
    if len(table.columns) != 2:
        raise UsageError(
            f"{path} has {len(table.columns)} columns. A map of ids has two: ids of the tables, "
            "and participant_id, as the folders of the images are called."
        )
    theirs = table.find(("participant_id",))
    to = 1 if theirs is None else theirs
    found: dict[str, str] = {}
    for row, line in zip(table.rows, table.lines, strict=True):
        own, name = row[1 - to], row[to]
        if own is None or name is None:
            continue
        if found.setdefault(own, name) != name:
            raise UsageError(f"{path}, line {line}: {own!r} stands there twice. Keep one line.")
    return found


def _tables_beside(home: Path, files: Sequence[str | Path]) -> str:
    """Return what may have been meant for ``participants.tsv``; empty if nothing is there."""
    read = {Path(file).resolve() for file in files}
    names = ("participants.csv", "participants.txt", "participants.xlsx", "participants.tsv.gz")
    places = [home / name for name in names] + [
        home.parent / n for n in ("participants.tsv", *names)
    ]
    there = [path for path in places if path.is_file() and path.resolve() not in read]
    if not there:
        return ""
    how = f"--phenotypes {there[0]}"
    if there[0].suffix not in (".tsv", ".csv", ".txt"):
        how = "save it as participants.tsv, or as CSV and name it with --phenotypes"
    return f"there is no participants.tsv; {there[0]} is not read: {how}"


def _id_column(table: Table, names: Sequence[str] = _PARTICIPANT) -> int:
    at = table.find(names)
    if at is not None:
        return at
    if len(table.columns) == 1 and len(table.columns[0].split()) > 1:
        raise UsageError(
            f"{table.path} has blanks between the names of its columns. Put one tab there, and "
            "between the cells of each line."
        )
    raise UsageError(
        f"{table.path} has no column participant_id (its columns: {', '.join(table.columns[:8])}). "
        "Name the column of ids participant_id, or say which it is with --id-column."
    )

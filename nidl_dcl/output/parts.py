"""Parts of a dataset that jobs embed at the same time, and their merging into the tables of all.

A part is one file in the output, ``.parts/<model>-<digest>-<token>.npz``: rows, matrix, what became
of each image, the record of the run. Within its selection (participants, sessions) a part replaces
what was there; everything else stays. The order of merging changes no result.
"""

from __future__ import annotations

import io
import json
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.bids.entities import natural_key
from nidl_dcl.io.atomic import replacing
from nidl_dcl.io.formats import to_tsv
from nidl_dcl.output.embeddings import COLUMNS, Embeddings

__all__ = [
    "Part",
    "Selection",
    "as_text",
    "merge_embeddings",
    "merge_inputs",
    "merge_matches",
    "waiting_parts",
]

_FOLDER = ".parts"


@dataclass(frozen=True)
class Selection:
    """Participants and sessions that a run was restricted to.

    Attributes
    ----------
    participants, sessions : tuple of str
        ``sub-…`` and ``ses-…``; empty: all.
    """

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()

    @classmethod
    def of(cls, participants: Sequence[str], sessions: Sequence[str]) -> Selection:
        """Return the selection of labels with or without prefix."""
        return cls(
            tuple(sorted({f"sub-{str(p).removeprefix('sub-')}" for p in participants})),
            tuple(sorted({f"ses-{str(s).removeprefix('ses-')}" for s in sessions})),
        )

    def __bool__(self) -> bool:
        return bool(self.participants or self.sessions)

    def holds(self, table: pd.DataFrame) -> np.ndarray:
        """Return for each row of a table whether it is selected, by its participant and session."""
        chosen = np.ones(len(table), dtype=bool)
        if self.participants:
            chosen &= table["participant_id"].isin(self.participants).to_numpy(dtype=bool)
        if self.sessions and "session_id" in table:
            chosen &= table["session_id"].isin(self.sessions).to_numpy(dtype=bool)
        return chosen


@dataclass(frozen=True, eq=False)
class Part:
    """What one run found of its selection.

    Attributes
    ----------
    selection : Selection
    inputs, matches : DataFrame
        Rows of ``logs/inputs.tsv`` and ``logs/phenotypes.tsv``.
    embeddings : Embeddings or None
        None where the run failed after it had looked at the images.
    record : mapping
        Of the run, for ``logs/run.json``.
    """

    selection: Selection
    inputs: pd.DataFrame
    matches: pd.DataFrame
    embeddings: Embeddings | None
    record: Mapping[str, Any]

    def write(self, folder: Path, label: str, digest: str) -> Path:
        """Write the part into an output folder, in one step; return its file."""
        file = folder / _FOLDER / f"{label}-{digest[:16]}-{secrets.token_hex(8)}.npz"
        about = {
            "participants": self.selection.participants,
            "sessions": self.selection.sessions,
            "inputs": _as_rows(self.inputs),
            "matches": _as_rows(self.matches),
            "record": self.record,
        }
        arrays: dict[str, Any] = {}
        if self.embeddings is not None:
            about["table"] = _as_rows(self.embeddings.table)
            about["config"] = self.embeddings.config
            arrays["matrix"] = self.embeddings.matrix.astype(np.float32)
        text = json.dumps(about).encode("ascii")
        with replacing(file) as beside, beside.open("wb") as stream:
            np.savez(stream, about=np.frombuffer(text, np.uint8), **arrays)
        return file

    @classmethod
    def read(cls, file: Path) -> Part | None:
        """Return the part in a file; None where it is gone, or no part."""
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                about = json.loads(content["about"].tobytes())
                matrix = content.get("matrix")
            embeddings = None
            if matrix is not None:
                embeddings = Embeddings(_from_rows(about["table"]), matrix, about["config"])
            return cls(
                Selection(tuple(about["participants"]), tuple(about["sessions"])),
                _from_rows(about["inputs"]),
                _from_rows(about["matches"]),
                embeddings,
                about["record"],
            )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def waiting_parts(folder: Path, label: str, digest: str) -> list[Path]:
    """Return the files of the parts by one model that wait in an output folder, oldest first."""
    found = (folder / _FOLDER).glob(f"{label}-{digest[:16]}-*.npz")
    return [file for _, file in sorted((_time(file), file) for file in found)]


def merge_embeddings(
    before: Embeddings | None, now: Embeddings, selection: Selection
) -> Embeddings:
    """Return embeddings in which those of a selection are replaced; sorted as a whole run does."""
    if before is None or not selection:
        return now
    kept = np.flatnonzero(~selection.holds(before.table))
    fresh = set(now.table["source"])
    kept = kept[[before.table["source"].iloc[i] not in fresh for i in kept]]
    table = pd.concat(
        [before.table.iloc[kept].astype(object), now.table.astype(object)], ignore_index=True
    )
    matrix = np.concatenate([before.matrix[kept], now.matrix])
    order = _order(table, "source")
    return Embeddings(table.iloc[order][list(COLUMNS)], matrix[order], now.config)


def merge_inputs(
    before: pd.DataFrame | None, now: pd.DataFrame, selection: Selection
) -> pd.DataFrame:
    """Return a table of inputs, as text, in which those of a selection are replaced.

    A participant who has an image in one part is not listed as one without by another.
    """
    if before is None or not selection:
        return now
    # Who has no image in the sessions of this selection has no session in the row that says so.
    missing = before["path"].isna()
    again = before["participant_id"].isin(now["participant_id"])
    kept = before[~selection.holds(before) & ~(missing & again).to_numpy(dtype=bool)]
    table = pd.concat([kept.astype(object), now.astype(object)], ignore_index=True)
    absent = table["path"].isna()
    table = table[~(absent & table["participant_id"].isin(table["participant_id"][~absent]))]
    return table.iloc[_order(table, "path")].reset_index(drop=True)


def merge_matches(
    before: pd.DataFrame | None, now: pd.DataFrame, selection: Selection
) -> pd.DataFrame:
    """Return whom the rows of the phenotype tables belong to, with what other parts told."""
    if before is None or not selection:
        return now
    mine = before["participant_id"].isin(selection.participants)
    here = _rows(now)
    known = set(here)
    others = [row for row in _rows(before[~mine]) if row not in known]
    table = pd.DataFrame([*here, *others], columns=list(now.columns), dtype=object)
    # Tables of one participant's sessions are known in part; others whole, in their own order.
    in_part = {source for _, text, _, source in others if text is not None}

    def place(number: int) -> tuple[Any, ...]:
        who, text, _, source = (*here, *others)[number]
        name = (who or "", text or "") if text is None or source in in_part else ()
        return (source.startswith("/"), source, text is None, name, number)

    return table.iloc[sorted(range(len(table)), key=place)].reset_index(drop=True)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as it is read back from a TSV file."""
    return pd.read_csv(
        io.StringIO(to_tsv(table)),
        sep="\t",
        dtype=str,
        keep_default_na=False,
        na_values=["n/a"],
        quoting=3,
    )


def _rows(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    plain = table.astype(object).where(table.notna(), None)
    return list(plain.itertuples(index=False, name=None))


def _order(table: pd.DataFrame, path: str) -> list[int]:
    """Return the order of a whole run: participant, session, then names with numbers in order."""
    keys = [
        (
            str(who),
            "" if pd.isna(session) else str(session),
            natural_key("" if pd.isna(name) else str(name)),
        )
        for who, session, name in zip(
            table["participant_id"], table["session_id"], table[path], strict=True
        )
    ]
    return sorted(range(len(table)), key=keys.__getitem__)


def _as_rows(table: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(table.columns), "rows": _rows(as_text(table))}


def _from_rows(known: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(known["rows"], columns=known["columns"], dtype=object)


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0

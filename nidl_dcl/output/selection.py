"""Runs that were restricted to some participants or sessions: their rows beside those of before."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.bids.entities import natural_key
from nidl_dcl.io.formats import to_tsv
from nidl_dcl.output.embeddings import COLUMNS, Embeddings


@dataclass(frozen=True)
class Selection:
    """Participants ``sub-…`` and sessions ``ses-…`` that a run was restricted to; empty: all."""

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


def merge_embeddings(
    before: Embeddings | None, now: Embeddings, selection: Selection
) -> Embeddings:
    """Return embeddings in which those of a selection are replaced; sorted as a whole run does.

    Parameters
    ----------
    before : Embeddings or None
        What is there.
    now : Embeddings
        What the run found.
    selection : Selection
        What it was restricted to.
    """
    if before is None or not selection:
        return now
    again = before.table["source"].isin(now.table["source"]).to_numpy(dtype=bool)
    kept = ~(selection.holds(before.table) | again)
    both = [before.table[kept].astype(object), now.table.astype(object)]
    table = pd.concat(both, ignore_index=True)
    matrix = np.concatenate([before.matrix[kept], now.matrix])
    order = _order(table, "source")
    return Embeddings(table.iloc[order][list(COLUMNS)], matrix[order], now.config)


def merge_inputs(
    before: pd.DataFrame | None, now: pd.DataFrame, selection: Selection
) -> pd.DataFrame:
    """Return a table of inputs, as text, in which those of a selection are replaced.

    A participant who has an image in one selection is not listed as one without by another.

    Parameters
    ----------
    before : DataFrame or None
        What is there.
    now : DataFrame
        What the run found.
    selection : Selection
        What it was restricted to.
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
    """Return whom the rows of the phenotype tables belong to, with what other selections showed.

    Parameters
    ----------
    before : DataFrame or None
        What is there.
    now : DataFrame
        What the run found.
    selection : Selection
        What it was restricted to.
    """
    if before is None or not selection:
        return now
    mine = before["participant_id"].isin(selection.participants)
    here = _rows(now)
    known = set(here)
    others = [row for row in _rows(before[~mine]) if row not in known]
    table = pd.DataFrame([*here, *others], columns=list(now.columns), dtype=object)
    # Tables of one participant's sessions are known in part; others whole, in their own order.
    in_part = {source for _, text, _, source in others if text is not None}

    def rank(number: int) -> tuple[Any, ...]:
        who, text, _, source = (*here, *others)[number]
        name = (who or "", text or "") if text is None or source in in_part else ()
        return (source.startswith("/"), source, text is None, name, number)

    return table.iloc[sorted(range(len(table)), key=rank)].reset_index(drop=True)


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
    named = table[["session_id", path]].astype(object)
    texts = named.where(named.notna(), "").to_numpy().tolist()
    keys = [
        (str(who), str(session), natural_key(str(name)))
        for who, (session, name) in zip(table["participant_id"], texts, strict=True)
    ]
    return sorted(range(len(table)), key=keys.__getitem__)

"""Images that a person decided not to use: the list of them is read, and candidates are marked.

Finding candidates is left to `search`, and what else is wrong with an image to `nidl_dcl.volumes`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nidl_dcl.bids.labels import unknown_labels
from nidl_dcl.bids.search import Candidate, SearchResult
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.bids.tables import read_table
from nidl_dcl.errors import UsageError

_PARTICIPANT = ("participant_id", "participant", "subject_id", "subject", "sub", "id")
_SESSION = ("session_id", "session", "ses")
_REASON = ("reason", "reasons", "comment", "comments")


@dataclass(frozen=True)
class Exclusion:
    """All images of a participant, or those of a session or a run, and why they are not used."""

    participant: str  # as it was written
    session: str | None = None
    run: int | None = None
    reason: str = ""
    where: str = ""  # it was written

    def __str__(self) -> str:
        run = None if self.run is None else f"run {self.run}"
        return " ".join(filter(None, (self.participant, self.session, run)))


def read_exclusions(file: str | Path) -> list[Exclusion]:
    """Return the rows of a table of images not to use.

    Columns: ``participant_id``, and if wanted ``session_id``, ``run`` and ``reason``; others are
    ignored. Without a session or a run, all are meant.

    Raises
    ------
    UsageError
        When the file cannot be read, has no column of ids, or a row names nobody or no run.
    """
    path = Path(file)
    try:
        table = read_table(path)
    except UsageError as error:
        raise UsageError(f"--exclude: {error}") from error
    columns = [table.find(names) for names in (_PARTICIPANT, _SESSION, ("run",), _REASON)]
    if columns[0] is None:
        raise UsageError(
            f"--exclude {path} has no column participant_id (its columns: "
            f"{', '.join(table.columns[:8])}). Its first line names the columns: participant_id, and "
            "if wanted session_id, run and reason, separated by tabs."
        )
    found = []
    for line, row in zip(table.lines, table.rows, strict=True):
        where = f"{path}, line {line}"
        who, session, run, reason = (None if at is None else row[at] for at in columns)
        if who is None:
            raise UsageError(
                f"--exclude {where}: no participant_id. Complete the row, or remove it."
            )
        if run is not None and not run.removeprefix("run-").isdecimal():
            raise UsageError(f"--exclude {where}: run takes a number, got {run!r}.")
        number = None if run is None else int(run.removeprefix("run-"))
        found.append(Exclusion(who, session, number, reason or "", where))
    return found


def exclude_images(
    found: SearchResult,
    known: Collection[str],
    *,
    labels: Collection[str] | None = None,
    file: str | Path | None = None,
) -> None:
    """Mark candidates that are not to be used, with the reason; they stay in the list.

    Parameters
    ----------
    found : SearchResult
        Changed.
    known : collection of str
        All participants of the dataset, ``sub-…``.
    labels : collection of str, optional
        Participants of whom nothing is used, ``sub-…``.
    file : path, optional
        See `read_exclusions`. Ids may be written with other zeros, in another case, or without
        ``sub-``, as far as that leaves one participant.

    Raises
    ------
    UsageError
        For an unknown participant, or a session of images that have none: an exclusion that does
        nothing would pass for one that does.
    """
    if not labels and file is None:
        return
    if labels and (unknown := set(labels) - set(known)):
        raise UsageError(unknown_labels("participant", unknown, known, found.root))
    rows = [Exclusion(label, where="--exclude-participant-label") for label in sorted(labels or ())]
    rows += [] if file is None else read_exclusions(file)
    names = match_ids([row.participant for row in rows], known)
    if missing := [row for row in rows if row.participant not in names]:
        there = unknown_labels("participant", {missing[0].participant}, known, found.root)
        more = f" (and {len(missing) - 1} rows more)" if len(missing) > 1 else ""
        raise UsageError(
            f"--exclude {missing[0].where}{more}: {there} Correct the id, or remove the row."
        )
    images: dict[str, list[Candidate]] = {}
    for candidate in found.candidates:
        images.setdefault(candidate.participant, []).append(candidate)
    reasons: dict[int, list[str]] = {}
    unused = []
    for row in rows:
        own = images.get(names[row.participant][0], [])
        fitting = _fitting(row, own)
        for candidate in fitting:
            reasons.setdefault(id(candidate), []).append(row.reason)
        if own and not fitting:
            unused.append(row)
    for candidate in found.candidates:
        if (given := reasons.get(id(candidate))) is not None:
            said = "; ".join(dict.fromkeys(filter(None, given)))
            candidate.leave_out("excluded", said or "excluded by hand; no reason was given")
    step = f"not excluded ({len(reasons)} excluded by hand)"
    if unused:
        more = f", and {len(unused) - 1} more rows" if len(unused) > 1 else ""
        step += f"; no image fits {unused[0].where} ({unused[0]}){more}"
    found.count(step)


def _fitting(row: Exclusion, images: Sequence[Candidate]) -> list[Candidate]:
    """Return the images of a participant that are meant."""
    if row.session is not None:
        sessions = {image.session for image in images}
        if sessions == {None}:
            raise UsageError(
                f"--exclude {row.where}: images of {images[0].participant} have no session, and the "
                f"row names {row.session}. Leave the session out to exclude them."
            )
        named = [session for session in sessions if session is not None]
        pairs = match_ids([row.session], named, "ses-")
        session = pairs.get(row.session, (None,))[0]
        images = [image for image in images if session and image.session == session]
    if row.run is not None:
        images = [image for image in images if image.entities.get("run") == row.run]
    return list(images)

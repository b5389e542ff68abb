"""Whom each image is of, who is held out, and whom pretraining saw.

Reads what the caller says row by row; folds are dealt in `folds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import Column, read_column, read_labels
from nidl_dcl.evaluation.targets import Target

_READ = ("person_id", "seen", "seen_by")
"""Columns of `ids` that are not passed on."""

_IN_PREDICTIONS = (
    *("target", "prediction", "prediction_sd", "n_folds"),
    *("seen_in_pretraining", "status", "reason"),
)

Labels = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class People:
    """Whom each image is of, row by row.

    Attributes
    ----------
    table : DataFrame, shape (n_images, n_columns)
        Columns to pass on to predictions, ``participant_id`` among them.
    participant : ndarray of object, shape (n_images,)
        The ids.
    person : ndarray of object, shape (n_images,)
        Who counts once: a participant, or several who are one person.
    group : ndarray of object, shape (n_images,)
        Who is never split between training and test: persons, or families.
    held_out : ndarray of bool, shape (n_images,)
    seen : Series of boolean, shape (n_images,)
        Whether pretraining saw the person, by any image; missing where unknown.
    seen_by_image : Series of bool or None, shape (n_images,)
        Whether an image was recognized, not just an id; None where that is not known.
    """

    table: pd.DataFrame
    participant: Labels
    person: Labels
    group: Labels
    held_out: NDArray[np.bool_]
    seen: pd.Series[Any]
    seen_by_image: pd.Series[Any] | None

    def refuse_seen(self) -> None:
        """Raise `UsageError` when the encoder saw somebody who is held out."""
        seen = self.held_out & self.seen.fillna(False).to_numpy(dtype=bool)
        if seen.any():
            raise UsageError(
                f"{self.person[seen][0]} is held out, but the encoder saw it "
                "in pretraining. Hold out only whom it has not seen."
            )

    def describe_duplicates(self, target: Target) -> dict[str, Any] | None:
        """Return how many participants are one person, and who contradicts whom; None without any."""
        table = pd.DataFrame(
            {"person": self.person, "id": self.participant, "value": target.numbers}
        )
        several = table[table.groupby("person")["id"].transform("nunique") > 1]
        if several.empty:
            return None
        n_ids, n_persons = several["id"].nunique(), several["person"].nunique()
        conflicts = [
            str(name)
            for name, rows in several.dropna(subset="value").groupby("person")
            if not set.intersection(*(set(one) for _, one in rows.groupby("id")["value"]))
        ]
        sentence = (
            f"{n_ids} participants are {n_persons} by their images, and count as {n_persons}."
        )
        if conflicts:
            sentence += (
                f" Their values of {target.name} contradict one another for {len(conflicts)} of them "
                f"({', '.join(conflicts[:5])}{', …' if len(conflicts) > 5 else ''}): each value "
                "weighs less, so that the person counts once. Find out which is right."
            )
        counts = {"n_ids": n_ids, "n_persons": n_persons}
        return {**counts, "conflicting": conflicts, "sentence": sentence}

    def describe_exposure(self, rows: NDArray[np.intp]) -> dict[str, Any]:
        """Return how many of the persons of some rows pretraining saw, with a sentence."""
        who = self.person[rows]
        tested = self.seen.iloc[rows].groupby(who).first()
        n, unknown = len(tested), int(tested.isna().sum())
        yes, no = int((tested == True).sum()), int((tested == False).sum())  # noqa: E712
        if unknown == n:
            sentence = "It is not known which of the participants the encoder saw in pretraining."
        elif no == n:
            sentence = f"The encoder saw none of the {n} participants in pretraining."
        else:
            sentence = (
                f"The encoder saw {yes} of the {n} participants in pretraining, so the scores are "
                "not those of participants new to the encoder."
            )
            if unknown:
                sentence += f" Of {unknown} it is not known."
        by_image = None
        if self.seen_by_image is not None:
            by_image = int(self.seen_by_image.iloc[rows].groupby(who).first().sum())
            if yes:
                sentence += f" {by_image} were recognized by an image"
                sentence += f", {yes - by_image} by their id alone." if yes > by_image else "."
            if yes > by_image:
                sentence += (
                    " An id alone may be another person of the same name, such as sub-01 of another "
                    "dataset; it counts as seen, to be safe."
                )
        return {
            "seen": yes,
            "not_seen": no,
            "unknown": unknown,
            "by_image": by_image,
            "by_id_only": None if by_image is None else yes - by_image,
            "sentence": sentence,
        }


def read_people(
    groups: Column, ids: pd.DataFrame | None, n: int, held_out: Column | None = None
) -> People:
    """Read whom each image is of.

    Parameters
    ----------
    groups : array-like, shape (n_images,)
        Who is never split.
    ids : DataFrame or None, shape (n_images, n_columns)
        ``participant_id`` (default: the groups), ``person_id`` (default: the participants),
        ``seen`` and ``seen_by`` (default: unknown), and columns to pass on.
    n : int
        Images.
    held_out : array-like of bool, shape (n_images,), optional

    Raises
    ------
    UsageError
        For another number of rows, a column that predictions have too, participants in several
        persons or groups, and groups that are held out in part.
    """
    group = read_labels(groups, n, "groups")
    given = pd.DataFrame({"participant_id": group}) if ids is None else ids.reset_index(drop=True)
    if len(given) != n:
        raise UsageError(f"ids has {len(given)} rows, but the features have {n}.")
    taken = [c for c in given if c in _IN_PREDICTIONS or str(c).startswith("probability_")]
    if taken:
        raise UsageError(f"ids has columns that the predictions also have: {taken}. Rename them.")
    table = given.drop(columns=[column for column in _READ if column in given])
    if "participant_id" not in table:
        table.insert(0, "participant_id", group)
    participant = read_labels(table["participant_id"], n, "participant_id")
    _refuse_split("Participant", participant, "group", group)
    person = participant
    if "person_id" in given:
        person = read_labels(given["person_id"], n, "person_id")
        _refuse_split("Participant", participant, "person", person)
        _refuse_split("Person", person, "group", group)
    seen, by_image = pd.Series([pd.NA] * n, dtype="boolean"), None
    if "seen" in given:
        known = given["seen"].astype("boolean")
        seen = known.groupby(person).transform("max").astype("boolean")
    if "seen_by" in given:
        by_image = (given["seen_by"] == "image").groupby(person).transform("max")
    rows = np.zeros(n, dtype=bool)
    if held_out is not None:
        given_out = read_column(held_out, n, "held_out").astype(bool)
        parted = given_out.groupby(group).transform("nunique") > 1
        if parted.any():
            raise UsageError(
                f"Group {group[parted.to_numpy()][0]!r} is held out in part. Hold out all of its "
                "images, or none."
            )
        rows = given_out.to_numpy()
    return People(table, participant, person, group, rows, seen, by_image)


def _refuse_split(part: str, parts: Labels, whole: str, wholes: Labels) -> None:
    split = pd.Series(wholes).groupby(parts).nunique()
    if (split > 1).any():
        raise UsageError(
            f"{part} {split.index[split > 1][0]!r} is in several {whole}s. "
            f"A {whole} must hold all images of its {part.lower()}s."
        )

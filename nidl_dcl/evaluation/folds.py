"""Which rows of a target are used, what is scored together, and which fold everyone is in.

Participants, or wider groups, are never split. Models are fitted in `linear_models`, scores
computed in `metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.targets import HELD_OUT, Target
from nidl_dcl.randomness import permutation

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

MIN_FOLDS = 3
"""One to test on, one to tune on, one to learn from."""


@dataclass(frozen=True, eq=False)
class Units:
    """What gets one prediction and one score each: the images of a participant that share a value.

    So a trait gives one unit per participant, and a target that changes between sessions gives one
    unit per value, each weighing less so that participants count once.

    Attributes
    ----------
    unit : ndarray of int, shape (n_rows,)
        Unit of each row.
    value, weight : ndarray, shape (n_units,)
        Target (number, or position of the class) and weight; weights of a participant sum to 1.
    participant, group : ndarray of int, shape (n_units,)
        Participant, and group (participant, or family) of each unit, in the order of their names.
    """

    unit: Rows
    value: Array
    weight: Array
    participant: Rows
    group: Rows

    @property
    def n_participants(self) -> int:
        """Participants, each of whom counts once."""
        return int(self.participant.max()) + 1

    @property
    def n_groups(self) -> int:
        """Groups, which stay together."""
        return int(self.group.max()) + 1

    def by_unit(self, predictions: Array) -> Array:
        """Return the mean of the rows of each unit, for an array with rows first."""
        n, count = len(self.unit), np.bincount(self.unit, minlength=len(self.value))
        mean = csr_array((1 / count[self.unit], (self.unit, np.arange(n))), (len(self.value), n))
        by_unit = np.asarray(mean @ predictions.reshape(n, -1))
        return by_unit.reshape(len(self.value), *predictions.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class CVDesign(Units):
    """What is used of a target, what is scored together and which fold everyone is in.

    Attributes
    ----------
    task : {"classification", "regression"}
    labels : tuple of str
        The classes; empty for regression.
    rows : ndarray of int, shape (n_used,)
        Used rows of the caller's tables; the units are of these.
    fold : ndarray of int, shape (n_repeats, n_groups)
        Groups are never split.
    ratio : float
        Participants in a test set per participant in its training set, mean over all folds.
    """

    task: str
    labels: tuple[str, ...]
    rows: Rows
    fold: Rows
    ratio: float

    @property
    def n_folds(self) -> int:
        """Folds of each repeat."""
        return int(self.fold.max()) + 1

    @property
    def class_sizes(self) -> dict[str, int]:
        """Participants per class; one whose class changes counts for each."""
        return {label: int((self.value == k).sum()) for k, label in enumerate(self.labels)}

    @property
    def row_folds(self) -> Rows:
        """Fold of each used row, shape (n_repeats, n_used)."""
        return np.asarray(self.fold[:, self.group[self.unit]])


def make_units(
    values: Array, participants: NDArray[np.object_], groups: NDArray[np.object_]
) -> Units:
    """Put the rows of a participant that share a value together.

    Parameters
    ----------
    values : ndarray, shape (n_rows,)
        Numbers, or positions of classes.
    participants, groups : ndarray of object, shape (n_rows,)
        Who counts once, and who stays together.
    """
    table = pd.DataFrame(
        {"group": groups.astype(str), "participant": participants.astype(str), "value": values}
    )
    keys = table.groupby(["group", "participant", "value"], sort=True)
    unit = np.asarray(keys.ngroup(), dtype=np.intp)
    units = table.groupby(unit).first()
    size = units.groupby("participant")["value"].transform("size").to_numpy(dtype=np.float64)
    participant, group = (
        np.asarray(units[name].factorize(sort=True)[0], dtype=np.intp)
        for name in ("participant", "group")
    )
    return Units(unit, units["value"].to_numpy(dtype=np.float64), 1 / size, participant, group)


def make_design(
    target: Target,
    participants: NDArray[np.object_],
    groups: NDArray[np.object_],
    *,
    n_splits: int,
    n_repeats: int,
    seed: int,
) -> CVDesign:
    """Choose rows, units and folds.

    Folds are dealt out group by group: classes are spread evenly (a group counts for its most
    frequent class), numbers by rank, so that every fold covers the range. There are `n_splits`
    of them, or fewer: as many as the smallest class has groups and such that a fold has two groups.
    The order of the rows does not matter.

    Parameters
    ----------
    target : Target
        Rows without a reason to leave them out are used.
    participants, groups : ndarray of object, shape (n_images,)
        Who counts once, and who is never split.
    n_splits, n_repeats : int
        Folds, and how often they are dealt.
    seed : int
        Key of the dealing.

    Raises
    ------
    InputsUnusableError
        With fewer than six groups: three folds of two.
    """
    rows = np.flatnonzero(target.reasons == "")
    units = make_units(target.numbers[rows], participants[rows], groups[rows])
    n_groups, n_held_out = units.n_groups, len(set(groups[target.reasons == HELD_OUT]))
    if n_groups < 2 * MIN_FOLDS:
        raise InputsUnusableError(
            f"Target {target.name!r} is known for {n_groups} participants with features"
            f"{f', besides {n_held_out} held out' if n_held_out else ''}; "
            f"cross-validation needs {2 * MIN_FOLDS} ({MIN_FOLDS} folds of two)."
        )
    n_folds = min(n_splits, n_groups // 2)
    if target.task == "classification":
        strata = main_class(units.value, units.group)
        n_folds = max(MIN_FOLDS, min(n_folds, int(np.bincount(strata)[np.unique(strata)].min())))
    else:
        mean = pd.Series(units.value).groupby(units.group).mean().to_numpy()
        rank = np.argsort(np.argsort(mean, kind="stable"), kind="stable")
        strata = (rank // n_folds).astype(np.intp)
    fold = np.stack([_deal_folds(strata, n_folds, seed, "folds", r) for r in range(n_repeats)])
    group_of = pd.Series(units.group).groupby(units.participant).first().to_numpy(dtype=np.intp)
    tested = [np.bincount(f[group_of], minlength=n_folds) for f in fold]
    ratio = float(np.mean([count / (len(group_of) - count) for count in tested]))
    return CVDesign(
        **vars(units), task=target.task, labels=target.labels, rows=rows, fold=fold, ratio=ratio
    )


def main_class(value: Array, group: Rows) -> Rows:
    """Return the most frequent class of each group, of equals the first."""
    count = np.zeros((int(group.max()) + 1, int(value.max()) + 1), dtype=np.intp)
    np.add.at(count, (group, value.astype(np.intp)), 1)
    return np.asarray(count.argmax(axis=1))


def make_external_design(
    target: Target, participants: NDArray[np.object_], groups: NDArray[np.object_]
) -> CVDesign:
    """Return rows and units as `make_design`, for a model fitted elsewhere: one fold, all tested.

    Parameters
    ----------
    target, participants, groups
        As for `make_design`; a row or more must be used.
    """
    rows = np.flatnonzero(target.reasons == "")
    units = make_units(target.numbers[rows], participants[rows], groups[rows])
    fold = np.zeros((1, units.n_groups), dtype=np.intp)
    return CVDesign(
        **vars(units), task=target.task, labels=target.labels, rows=rows, fold=fold, ratio=np.nan
    )


def count_used(
    design: CVDesign, reasons: NDArray[np.object_], people: NDArray[np.object_]
) -> dict[str, Any]:
    """Return what was used and what was left out; people are left out when no image stays.

    Parameters
    ----------
    design : CVDesign
        What is used.
    reasons : ndarray of object, shape (n_rows,)
        Why each row is left out, empty text where it is used; without rows held out.
    people : ndarray of object, shape (n_rows,)
        Whose rows these are.
    """
    images = pd.Series(reasons)
    kept = (images == "").groupby(people).transform("any")
    left_out, people_left_out = (
        {str(k): int(v) for k, v in given[given != ""].value_counts().sort_index().items()}
        for given in (images, images[~kept].groupby(people[~kept]).first())
    )
    counts: dict[str, Any] = {
        "n_participants": design.n_participants,
        "n_dropped": people_left_out,
        "n_images": len(design.rows),
        "n_images_dropped": left_out,
    }
    if design.task == "classification":
        return counts | {"classes": design.class_sizes}
    mean = float(np.average(design.value, weights=design.weight))
    variance = float(np.average((design.value - mean) ** 2, weights=design.weight))
    low, high = float(design.value.min()), float(design.value.max())
    return counts | {"distribution": {"mean": mean, "sd": variance**0.5, "min": low, "max": high}}


def _deal_folds(strata: Rows, n_folds: int, *key: object) -> Rows:
    """Return a fold for each group: every stratum spread evenly, at random, keyed by `key`."""
    order = permutation(len(strata), *key)
    order = order[np.argsort(strata[order], kind="stable")]
    fold = np.empty(len(strata), dtype=np.intp)
    fold[order] = np.arange(len(strata)) % n_folds
    return fold

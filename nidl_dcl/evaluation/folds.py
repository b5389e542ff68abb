"""Which rows of a target are used, what is scored together, and which fold everyone is in.

Participants, or wider groups, are never split; models and scores are the business of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.targets import HELD_OUT, Target
from nidl_dcl.randomness import permutation

__all__ = [
    "MIN_FOLDS",
    "CVDesign",
    "Units",
    "deal_folds",
    "main_class",
    "make_design",
    "make_external_design",
    "make_units",
]

Array = NDArray[np.float64]


Rows = NDArray[np.intp]


MIN_FOLDS = 3
"""One to test on, one to tune on, one to learn from."""


@dataclass(frozen=True, eq=False)
class CVDesign:
    """What is used of a target, what is scored together and which fold everyone is in.

    A unit is what gets one prediction and one score: the images of a participant that share a value
    of the target. So a trait gives one unit per participant, and a target that changes between
    sessions gives one unit per value, each weighing less so that participants count once.

    Attributes
    ----------
    task : {"classification", "regression"}
    labels : tuple of str
    rows : ndarray of int, shape (n_used,)
        Used rows of the caller's tables.
    unit : ndarray of int, shape (n_used,)
        Unit of each used row.
    value, weight : ndarray, shape (n_units,)
        Target (number, or position of the class) and weight; weights of a participant sum to 1.
    group : ndarray of int, shape (n_units,)
        Group (participant, or family) of each unit; groups are never split.
    fold : ndarray of int, shape (n_repeats, n_groups)
    ratio : float
        Participants in a test set per participant in its training set, mean over all folds.
    n_participants : int
    """

    task: str
    labels: tuple[str, ...]
    rows: Rows
    unit: Rows
    value: Array
    weight: Array
    group: Rows
    fold: Rows
    ratio: float
    n_participants: int

    @property
    def n_folds(self) -> int:
        """Folds of each repeat."""
        return int(self.fold.max()) + 1

    @property
    def class_sizes(self) -> dict[str, int]:
        """Participants per class; one whose class changes counts for each."""
        return {label: int((self.value == k).sum()) for k, label in enumerate(self.labels)}

    def row_folds(self, repeat: int) -> Rows:
        """Return the fold of each used row."""
        return np.asarray(self.fold[repeat][self.group[self.unit]])

    def by_unit(self, predictions: Array) -> Array:
        """Return the mean of the rows of each unit, for an array with rows first."""
        return _mean_of_units(self.unit, len(self.value), predictions)


@dataclass(frozen=True, eq=False)
class Units:
    """What gets one prediction and one score each (see `Design`).

    Attributes
    ----------
    unit : ndarray of int, shape (n_rows,)
    value, weight : ndarray, shape (n_units,)
    participant, group : ndarray of int, shape (n_units,)
        In the order of their names.
    """

    unit: Rows
    value: Array
    weight: Array
    participant: Rows
    group: Rows

    def by_unit(self, predictions: Array) -> Array:
        """Return the mean of the rows of each unit, for an array with rows first."""
        return _mean_of_units(self.unit, len(self.value), predictions)


def make_units(
    values: Array, participants: NDArray[np.object_], groups: NDArray[np.object_]
) -> Units:
    """Put the rows of a participant that share a value together."""
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


def _mean_of_units(unit: Rows, n_units: int, predictions: Array) -> Array:
    n = len(unit)
    count = np.bincount(unit, minlength=n_units)
    mean = csr_array((1 / count[unit], (unit, np.arange(n))), shape=(n_units, n))
    return np.asarray(mean @ predictions.reshape(n, -1)).reshape(n_units, *predictions.shape[1:])


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

    Raises
    ------
    InputsUnusableError
        With fewer than six groups: three folds of two.
    """
    rows = np.flatnonzero(target.reasons == "")
    made = make_units(target.numbers[rows], participants[rows], groups[rows])
    unit, value, weight, group = made.unit, made.value, made.weight, made.group
    n_groups = int(group.max()) + 1
    n_aside = len(set(groups[target.reasons == HELD_OUT]))
    if n_groups < 2 * MIN_FOLDS:
        raise InputsUnusableError(
            f"Target {target.name!r} is known for {n_groups} participants with features"
            f"{f', besides {n_aside} held out' if n_aside else ''}; "
            f"cross-validation needs {2 * MIN_FOLDS} ({MIN_FOLDS} folds of two)."
        )
    n_folds = min(n_splits, n_groups // 2)
    if target.task == "classification":
        strata = main_class(value, group)
        n_folds = max(MIN_FOLDS, min(n_folds, int(np.bincount(strata)[np.unique(strata)].min())))
    else:
        mean = pd.Series(value).groupby(group).mean().to_numpy()
        rank = np.argsort(np.argsort(mean, kind="stable"), kind="stable")
        strata = (rank // n_folds).astype(np.intp)
    fold = np.stack([deal_folds(strata, n_folds, seed, "folds", r) for r in range(n_repeats)])
    participant_group = pd.Series(group).groupby(made.participant).first().to_numpy(dtype=np.intp)
    n_participants = len(participant_group)
    tested = [np.bincount(f[participant_group], minlength=n_folds) for f in fold]
    ratio = float(np.mean([count / (n_participants - count) for count in tested]))
    return CVDesign(
        target.task, target.labels, rows, unit, value, weight, group, fold, ratio, n_participants
    )


def main_class(value: Array, group: Rows) -> Rows:
    """Return the most frequent class of each group, of equals the first.

    Parameters
    ----------
    value : ndarray, shape (n_units,)
        Positions of classes.
    group : ndarray of int, shape (n_units,)
    """
    count = np.zeros((int(group.max()) + 1, int(value.max()) + 1), dtype=np.intp)
    np.add.at(count, (group, value.astype(np.intp)), 1)
    return np.asarray(count.argmax(axis=1))


def make_external_design(
    target: Target, participants: NDArray[np.object_], groups: NDArray[np.object_]
) -> CVDesign:
    """Return rows and units as `make_design`, for a model fitted elsewhere: one fold, all tested.

    Raises
    ------
    InputsUnusableError
        When no row is left.
    """
    if not (target.reasons == "").any():
        raise InputsUnusableError(f"No row of target {target.name!r} can be scored.")
    rows = np.flatnonzero(target.reasons == "")
    made = make_units(target.numbers[rows], participants[rows], groups[rows])
    return CVDesign(
        target.task,
        target.labels,
        rows,
        made.unit,
        made.value,
        made.weight,
        made.group,
        fold=np.zeros((1, int(made.group.max()) + 1), dtype=np.intp),
        ratio=np.nan,
        n_participants=int(made.participant.max()) + 1,
    )


def deal_folds(strata: Rows, n_folds: int, *key: object) -> Rows:
    """Return a fold for each group: every stratum spread evenly, at random, keyed by `key`.

    Parameters
    ----------
    strata : ndarray of int, shape (n_groups,)
    n_folds : int
    *key : object
        See `nidl_dcl.randomness.permutation`.
    """
    order = permutation(len(strata), *key)
    order = order[np.argsort(strata[order], kind="stable")]
    fold = np.empty(len(strata), dtype=np.intp)
    fold[order] = np.arange(len(strata)) % n_folds
    return fold

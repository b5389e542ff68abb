"""Confounds as numbers, and their linear effect on features, learned inside the folds.

Taking it away is for `harmonization`; which rows are used is decided in `folds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.targets import Target, Values, read_target, read_values

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Labels = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class EncodedConfounds:
    """Confounds of the rows in use, as numbers.

    Attributes
    ----------
    names : tuple of str
        One per column of `matrix`: the confound, with ``=category`` where it has categories.
    matrix : ndarray, shape (n_used, n_columns)
        Numbers as they are, a column of 0 and 1 for each category.
    blocks : tuple of slice
        Columns of each confound that has categories.
    columns : dict
        Name to what it is taken for, JSON types only.
    """

    names: tuple[str, ...]
    matrix: Array
    blocks: tuple[slice, ...]
    columns: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return what is removed, with a sentence."""
        return {
            "columns": self.columns,
            "sentence": f"The linear effect of {', '.join(self.columns)} is removed from the "
            "features of embeddings and image baselines, learned in the training rows of each fold; "
            "the baseline 'confounds' has them alone.",
        }

    def rows(self, train: Rows, rows: Rows) -> Array:
        """Return rows of `matrix`, those of a category without a training row as an average row."""
        taken, known = self.matrix[rows], self.matrix[train]
        for block in self.blocks:
            new = taken[:, block] @ known[:, block].max(axis=0) == 0
            taken[new, block] = known[:, block].mean(axis=0)
        return taken

    def effect(self, train: Rows, features: Array) -> tuple[Array, Array]:
        """Return the linear effect of the confounds on features of training rows.

        It is an intercept, shape (n_features,), and coefficients, shape (n_columns, n_features):
        of features `z` of rows `r`, ``z - intercept - self.rows(train, r) @ coefficients`` is left.
        """
        known = self.rows(train, train)
        mean, spread = known.mean(axis=0), scale_of(known)
        coefficients = np.linalg.pinv((known - mean) / spread) @ features / spread[:, None]
        return features.mean(axis=0) - mean @ coefficients, coefficients


def read_confounds(
    table: pd.DataFrame | None, groups: Labels, held_out: NDArray[np.bool_], target: str
) -> dict[str, Values]:
    """Read columns by the rules of targets: numbers, or categories.

    Parameters
    ----------
    table : DataFrame or None, shape (n_images, n_confounds)
    groups : ndarray of object, shape (n_images,)
    held_out : ndarray of bool, shape (n_images,)
        These rows do not decide what a column is.
    target : str
        A column of this name is refused.

    Raises
    ------
    UsageError
        For what is no table of so many rows, the target itself, or a name that is there twice.
    InputsUnusableError
        For a column without a value.
    """
    if table is None:
        return {}
    if not isinstance(table, pd.DataFrame):
        raise UsageError(f"confounds must be a DataFrame, got {type(table).__name__}.")
    if len(table) != len(groups):
        raise UsageError(f"confounds has {len(table)} rows, but the features have {len(groups)}.")
    names = table.columns.astype(str)
    if target in names:
        raise UsageError(
            f"{target!r} is the target and cannot be a confound too: nothing would be left to "
            "predict. Leave it out of the confounds, or of the targets."
        )
    if not names.is_unique:
        raise UsageError(f"Confound {names[names.duplicated(keep=False)][0]!r} is given twice.")
    found = {}
    for name, (_, column) in zip(names, table.reset_index(drop=True).items(), strict=True):
        seen = read_values(column[~held_out], groups[~held_out], name=name, what="confound")
        read = read_values(column, groups, name=name, task=seen.task, what="confound")
        found[name] = replace(read, rule=seen.rule)
    return found


def confound_reasons(confounds: Mapping[str, Values], n: int) -> Labels:
    """Return why each of `n` rows lacks a confound, empty text where it has all."""
    reasons = np.full(n, "", dtype=object)
    for name, read in confounds.items():
        usable = np.isfinite(read.numbers) if read.task == "regression" else read.present
        lacks = ~usable & (reasons == "")
        reasons[lacks] = f"confound missing: {name}"
    return reasons


def read_target_beside(
    y: pd.Series[Any],
    groups: Labels,
    held_out: NDArray[np.bool_],
    confounds: Mapping[str, Values] | None,
    *,
    name: str = "target",
    task: str = "auto",
) -> Target:
    """Read a target: its task is decided by all rows, the rest by those with all confounds.

    Parameters
    ----------
    y : Series, shape (n_images,)
    groups, held_out, name, task
        As for `nidl_dcl.evaluation.targets.read_target`: rows held out decide nothing.
    confounds : mapping or None
        As `read_confounds` gives them.

    Raises
    ------
    UsageError
        For a confound that has the values of the target.
    InputsUnusableError
        As `nidl_dcl.evaluation.targets.read_target`, and when no row has the target and all confounds.
    """
    if not confounds or held_out.all():
        return read_target(y, groups, held_out=held_out, name=name, task=task)
    decided = read_values(y[~held_out], groups[~held_out], name=name, task=task)
    values = read_values(y, groups, name=name, task=decided.task)
    lacking = confound_reasons(confounds, len(y))
    left = values.present & (lacking == "")
    seen = left & ~held_out
    if not seen.any():
        raise InputsUnusableError(
            f"No image has both the target {name!r} and the confounds "
            f"{', '.join(map(repr, confounds))}. Leave a confound out, or check the ids of the "
            "phenotype table."
        )
    for column, other in confounds.items():
        if (other.texts[seen] == values.texts[seen]).all():
            raise UsageError(
                f"Confound {column!r} has the values of the target {name!r}: nothing would be left "
                "to predict. Leave it out."
            )
    read = read_target(y.where(left), groups, held_out=held_out, name=name, task=decided.task)
    reasons = np.where(values.present & ~left, lacking, read.reasons)
    return replace(read, rule=decided.rule, reasons=reasons, texts=values.texts)


def encode_confounds(
    confounds: Mapping[str, Values], rows: Rows, groups: Labels, n_seen: int | None = None
) -> EncodedConfounds:
    """Return the confounds of the rows in use as numbers.

    Parameters
    ----------
    confounds : dict
        As `read_confounds` gives them.
    rows : ndarray of int, shape (n_used,)
    groups : ndarray of object, shape (n_images,)
    n_seen : int, optional
        The first of `rows` that decide which categories there are; the others are held out.

    Raises
    ------
    UsageError
        For a confound that is constant, and for as many columns as half of the groups.
    """
    names: list[str] = []
    columns: list[Array] = []
    blocks: list[slice] = []
    taken_for: dict[str, Any] = {}
    n_seen = len(rows) if n_seen is None else n_seen
    for name, read in confounds.items():
        numeric = read.task == "regression"
        values = read.numbers[rows] if numeric else read.texts[rows]
        levels = sorted(set(values[:n_seen].tolist()))
        if len(levels) < 2:
            raise UsageError(
                f"Confound {name!r} is constant: each of the {n_seen} images in use has "
                f"{levels[0]!r}. There is nothing to remove; leave it out."
            )
        taken_for[name] = {"kind": "numeric" if numeric else "categorical", "rule": read.rule}
        if numeric:
            names.append(name)
            columns.append(values.astype(np.float64))
            continue
        taken_for[name]["categories"] = {
            level: int((values[:n_seen] == level).sum()) for level in levels
        }
        blocks.append(slice(len(names), len(names) + len(levels)))
        names += [f"{name}={level}" for level in levels]
        columns += [(values == level).astype(np.float64) for level in levels]
    n_groups = len(set(groups[rows[:n_seen]]))
    if len(names) > n_groups // 2:
        raise UsageError(
            f"The confounds {', '.join(map(repr, confounds))} make {len(names)} columns (one for "
            f"each category) for {n_groups} participants: too little would be left of the "
            "features. Merge categories, or leave a confound out."
        )
    return EncodedConfounds(tuple(names), np.column_stack(columns), tuple(blocks), taken_for)


def scale_of(known: Array) -> Array:
    """Return the standard deviation of each column, 1 for columns that are constant."""
    spread = known.std(axis=0)
    constant = spread <= 1e-12 * np.abs(known).max(axis=0)
    return np.where(constant, 1.0, spread)

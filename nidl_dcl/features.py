"""Tables of features checked row by row, and the baselines to compare with.

Turns what a caller gives into sources that can be evaluated; which rows are used is decided in
`evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.coordinates import Components, Features, Source, gram_matrix
from nidl_dcl.errors import InputsUnusableError, UsageError

__all__ = [
    "Baseline",
    "Column",
    "Comparison",
    "Matrix",
    "finite_matrix",
    "read_column",
    "read_labels",
    "read_sources",
]

Matrix: TypeAlias = NDArray[Any] | pd.DataFrame
Column: TypeAlias = Sequence[Any] | NDArray[Any] | pd.Series


@dataclass(frozen=True, eq=False)
class Baseline:
    """A matrix to compare with, on the same folds.

    Attributes
    ----------
    matrix : ndarray or DataFrame, shape (n_images, n_columns)
        Rows as in the features. With ``pca=True`` it may be wide, of any dtype and memory-mapped.
    pca : bool
        Replace the columns by at most 256 principal components, learnt inside the folds, before
        the read-out; for voxels. The products of the rows are computed once per object, so give
        the same object for several targets.
    origin : int
        With ``pca=True`` the row that is subtracted from all, for digits; when rows are held out,
        one that is not.
    """

    matrix: Matrix
    pca: bool = False
    origin: int = 0

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        """Inner products of all rows, shape (n_images, n_images)."""
        # A row that is not finite is an error with a message later, not a warning now.
        with np.errstate(invalid="ignore", over="ignore"):
            return gram_matrix(np.asarray(self.matrix), origin=self.origin)


Comparison: TypeAlias = Baseline | Matrix | Sequence[Matrix]


def finite_matrix(
    given: Any, what: str, ids: pd.DataFrame | None, groups: Column
) -> NDArray[np.float64]:
    """Return a table of numbers as float64.

    Parameters
    ----------
    given : ndarray or DataFrame, shape (n_images, n_features)
    what : str
        What it holds, for messages.
    ids : DataFrame or None
    groups : array-like
        Both name a row in messages.

    Raises
    ------
    UsageError
        For another shape, or what is not a number.
    InputsUnusableError
        For NaN or infinity, naming the first row.
    """
    try:
        if isinstance(given, pd.DataFrame):
            matrix = given.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            matrix = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The {what} must be a table of numbers: {error}.") from error
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UsageError(
            f"The {what} must have the shape (images, features), both at least 1; "
            f"got {matrix.shape}."
        )
    _refuse_non_finite(np.asarray(np.isfinite(matrix).all(axis=1)), what, ids, groups)
    return matrix


def read_column(given: Column, n: int, what: str) -> pd.Series[Any]:
    """Return a column as a Series numbered from 0; a `UsageError` unless it has `n` values."""
    series = pd.Series(given).reset_index(drop=True)
    if len(series) != n:
        raise UsageError(f"{what} has {len(series)} values, but the features have {n} rows.")
    return series


def read_labels(given: Column, n: int, what: str) -> NDArray[np.object_]:
    """Return a column without missing values as text (see `read_column`)."""
    series = read_column(given, n, what)
    if series.isna().any():
        row = int(np.flatnonzero(series.isna())[0])
        raise UsageError(f"{what} is missing in row {row}; every image needs a participant.")
    return series.astype(str).to_numpy(dtype=object)


def read_sources(
    name: str,
    given: Comparison,
    rows: NDArray[np.intp],
    n: int,
    ids: pd.DataFrame | None,
    groups: Column,
    aside: NDArray[np.bool_],
) -> list[Source]:
    """Return the sources of a baseline, one per matrix, for the rows in use.

    A row that is held out (`aside`) is never the one that is subtracted from all.

    Raises
    ------
    UsageError, InputsUnusableError
        As `finite_matrix`, and for another number of rows.
    """
    what = f"features of baseline {name!r}"
    matrices = list(given) if isinstance(given, list | tuple) else [given]
    if not matrices:
        raise UsageError(f"Baseline {name!r} is an empty list; give a matrix or leave it out.")
    sources: list[Source] = []
    for item in matrices:
        baseline = item if isinstance(item, Baseline) else Baseline(np.asarray(item))
        shape = np.shape(baseline.matrix)
        if len(shape) != 2 or shape[0] != n:
            raise UsageError(f"Baseline {name!r} has the shape {shape}, expected {n} rows.")
        if baseline.pca:
            if aside[baseline.origin]:
                baseline = replace(baseline, origin=int(np.argmin(aside)))
            # A row has a finite length only if all of it is finite.
            _refuse_non_finite(np.isfinite(np.diag(baseline.gram)), what, ids, groups)
            sources.append(Components(baseline.gram[np.ix_(rows, rows)]))
        else:
            sources.append(Features(finite_matrix(baseline.matrix, what, ids, groups)[rows]))
    return sources


def _refuse_non_finite(
    finite: NDArray[np.bool_], what: str, ids: pd.DataFrame | None, groups: Column
) -> None:
    if finite.all():
        return
    row = int(np.flatnonzero(~finite)[0])
    who = f"group {list(groups)[row]}" if len(groups) == len(finite) else ""
    if ids is not None and len(ids) == len(finite):
        who = ", ".join(f"{name} {value}" for name, value in ids.iloc[row].items())
    raise InputsUnusableError(
        f"The {what} are not finite in {int((~finite).sum())} of {len(finite)} rows, first in row "
        f"{row} ({who}). Embed these images again, or leave them out."
    )

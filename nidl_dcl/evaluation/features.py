"""Feature matrices and columns read row by row, and coordinates of training and test rows.

What is compared with the features is read in `baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.preprocessing import StandardScaler

from nidl_dcl.errors import InputsUnusableError, UsageError

Matrix: TypeAlias = NDArray[Any] | pd.DataFrame
Column: TypeAlias = Sequence[Any] | NDArray[Any] | pd.Series
Array = NDArray[np.float64]
Rows = NDArray[np.intp]

MAX_COMPONENTS = 256
"""Principal components that stand for voxels."""


def read_matrix(given: Any, what: str) -> NDArray[np.float64]:
    """Return a table of numbers as float64; what is not finite is left to `refuse_non_finite`.

    Raises
    ------
    UsageError
        For another shape than (images, features), or what is not a number.
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
    return matrix


def refuse_non_finite(
    matrix: NDArray[np.float64], what: str, ids: pd.DataFrame
) -> NDArray[np.float64]:
    """Return a matrix, or raise for NaN or infinity.

    Parameters
    ----------
    matrix : ndarray, shape (n_images, n_features)
    what : str
        What it holds, for messages.
    ids : DataFrame, shape (n_images, n_columns)
        What names a row in messages.

    Raises
    ------
    InputsUnusableError
        Naming the first row.
    """
    finite = np.asarray(np.isfinite(matrix).all(axis=1))
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        who = ", ".join(f"{name} {value}" for name, value in ids.iloc[row].items())
        raise InputsUnusableError(
            f"The {what} are not finite in {int((~finite).sum())} of {len(finite)} rows, first in "
            f"row {row} ({who}). Embed these images again, or leave them out."
        )
    return matrix


def read_column(given: Column, n: int, what: str) -> pd.Series[Any]:
    """Return a column as a Series numbered from 0.

    Parameters
    ----------
    given : array-like, shape (n_images,)
    n : int
        Images; a `UsageError` is raised for another number of values.
    what : str
        What it holds, for messages.
    """
    series = pd.Series(given).reset_index(drop=True)
    if len(series) != n:
        raise UsageError(f"{what} has {len(series)} values, but the features have {n} rows.")
    return series


def read_labels(given: Column, n: int, what: str) -> NDArray[np.object_]:
    """Return a column without missing values as text.

    Parameters
    ----------
    given, n, what
        As for `read_column`; a `UsageError` is raised for a missing value, too.
    """
    series = read_column(given, n, what)
    if series.isna().any():
        row = int(np.flatnonzero(series.isna())[0])
        raise UsageError(f"{what} is missing in row {row}; every image needs a participant.")
    return series.astype(str).to_numpy(dtype=object)


class Source(Protocol):
    """What gives coordinates of training and test rows, learned from the training rows alone."""

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training coordinates (orthogonal, centered columns) and test coordinates."""
        ...


def fit_scaler(matrix: Array, scaling: str) -> StandardScaler:
    """Return scikit-learn's StandardScaler of some rows.

    Parameters
    ----------
    matrix : ndarray, shape (n_rows, n_features)
    scaling : {"each", "shared"}
        ``"each"`` divides each column by its own standard deviation. ``"shared"`` divides by the
        square root of its variance plus the mean variance of all columns, times a number that leaves
        the columns a variance of 1 on average. So columns that hardly vary, of which an embedding has
        many, are not blown up; for columns of one kind and unit alone.
    """
    scaler = StandardScaler().fit(matrix)
    varies = np.isclose(scaler.scale_**2, scaler.var_) & (scaler.var_ > 0)
    if scaling == "shared" and varies.any():
        variance = scaler.var_[varies]
        shared = variance + variance.mean()
        scaler.scale_[varies] = np.sqrt(shared * np.mean(variance / shared))
    return scaler


@dataclass(frozen=True)
class Features:
    """A feature matrix, standardized by the training rows of each fold.

    Attributes
    ----------
    matrix : ndarray, shape (n_images, n_features)
    scale : float
        What the standardized columns are multiplied by.
    scaling : {"each", "shared"}
        As for `fit_scaler`.
    """

    matrix: Array
    scale: float = 1.0
    scaling: str = "each"

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return the standardized rows in the principal axes of the training rows.

        No axis with variance is left out, so a ridge or logistic model is the same as on the
        standardized features; the axes make its matrices diagonal.
        """
        return principal_axes(*self.standardized(train, test))

    def standardized(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training and test rows, standardized by the training rows."""
        scaler = fit_scaler(self.matrix[train], self.scaling)
        known, new = (scaler.transform(self.matrix[rows]) for rows in (train, test))
        return known * self.scale, new * self.scale


@dataclass(frozen=True)
class Components:
    """Wide data known by its inner products: centered, then up to 256 principal components.

    The components are those of the training rows of each fold. They keep their variances (no
    whitening): with all of them the model is the ridge or logistic model on the wide data itself.

    Attributes
    ----------
    gram : ndarray, shape (n_images, n_images)
        Inner products of the rows, see `gram_matrix`.
    """

    gram: Array

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return the principal component scores of training and test rows."""
        known, new = self.gram[np.ix_(train, train)], self.gram[np.ix_(test, train)]
        mean = known.mean(axis=0)
        new = new - new.mean(axis=1, keepdims=True) - mean + mean.mean()
        return _by_products(known - mean - mean[:, None] + mean.mean(), new, MAX_COMPONENTS)

    def residual_coordinates(
        self, train: Rows, test: Rows, design: Array, design_test: Array
    ) -> tuple[Array, Array]:
        """Return the scores of what a linear regression on `design` leaves of the wide data.

        Residuals are linear combinations of rows, so their inner products follow from those of
        the rows: exact, and no voxel is needed.

        Parameters
        ----------
        train, test : ndarray of int
        design, design_test : ndarray, shapes (n_train, c) and (n_test, c)
            Columns to regress on, the constant among them.
        """
        learn = np.linalg.pinv(design)
        known, new = self.gram[np.ix_(train, train)], self.gram[np.ix_(test, train)]
        keep = np.eye(len(train)) - design @ learn
        new = (new - design_test @ (learn @ known)) @ keep
        left = keep @ known @ keep
        # What rounding leaves where the design explains everything is nothing.
        centered = np.trace(known) - known.mean() * len(known)
        if np.trace(left) <= 1e-12 * centered:
            left = np.zeros_like(left)
        return _by_products(left, new, MAX_COMPONENTS)


@dataclass(frozen=True)
class FeaturesBeside:
    """A source with a block of other features beside it.

    Attributes
    ----------
    source, block : Source
    columns : int, optional
        How many standardized columns a source of wide data, whose scale is any, is made to weigh as
        much as.
    """

    source: Source
    block: Source
    columns: int | None = None

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return both in the principal axes of the training rows."""
        known, new = self.source.coordinates(train, test)
        if self.columns is not None and known.any():
            spread = np.sqrt((known**2).sum() / (len(known) * self.columns))
            known, new = known / spread, new / spread
        beside, beside_new = self.block.coordinates(train, test)
        return principal_axes(np.hstack([known, beside]), np.hstack([new, beside_new]))


def principal_axes(known: Array, new: Array) -> tuple[Array, Array]:
    """Return rows in the principal axes of the known ones, whose columns are centered.

    No axis with variance is left out.
    """
    n, d = known.shape
    if d == 0:
        return known, new
    if d <= n:
        _, axes = _spectrum(known.T @ known)
        return known @ axes, new @ axes
    return _by_products(known @ known.T, new @ known.T)


def gram_matrix(matrix: NDArray[Any], *, max_bytes: int = 2**28, origin: int = 0) -> Array:
    """Return the inner products of the rows of a wide, possibly memory-mapped matrix.

    One row is subtracted from all, which keeps digits where rows have much in common and
    leaves differences between rows, all that `Components` uses, as they are.

    Parameters
    ----------
    matrix : ndarray, shape (n_images, n_voxels)
    max_bytes : int
        How much of it is in memory as float64 at a time.
    origin : int
        The row that is subtracted.
    """
    n, d = matrix.shape
    step = max(1, int(max_bytes // (16 * max(1, d))))
    gram = np.empty((n, n))
    first = np.asarray(matrix[origin], dtype=np.float64)
    center = np.where(np.isfinite(first), first, 0.0)
    for i in range(0, n, step):
        rows = matrix[i : i + step] - center
        for j in range(0, i + 1, step):
            others = rows if j == i else matrix[j : j + step] - center
            gram[i : i + step, j : j + step] = rows @ others.T
            gram[j : j + step, i : i + step] = gram[i : i + step, j : j + step].T
    return gram


def _by_products(known: Array, new: Array, limit: int | None = None) -> tuple[Array, Array]:
    """Return coordinates of rows known by their inner products with the training rows."""
    variance, left = _spectrum(known, limit)
    length = np.sqrt(variance)
    return left * length, new @ (left / length)


def _spectrum(product: Array, limit: int | None = None) -> tuple[Array, Array]:
    """Return eigenvalues above rounding, the largest last, and their vectors; at most `limit`."""
    n = len(product)
    subset = None if limit is None or limit >= n else (n - limit, n - 1)
    value, vector = eigh(product, subset_by_index=subset, check_finite=False)
    keep = value > 1e-11 * max(value[-1], 0.0)
    return value[keep], vector[:, keep]

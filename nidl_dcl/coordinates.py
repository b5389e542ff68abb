"""Coordinates of training and test rows: standardised features, principal components of voxels.

Everything is learnt from the training rows of a fold; what is fitted in them is `readout`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.preprocessing import StandardScaler

__all__ = ["MAX_COMPONENTS", "Components", "Features", "Source", "gram_matrix", "principal_axes"]

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

MAX_COMPONENTS = 256
"""Principal components that stand for voxels."""


class Source(Protocol):
    """What gives coordinates of training and test rows, learnt from the training rows alone."""

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training coordinates (orthogonal, centred columns) and test coordinates."""
        ...


@dataclass(frozen=True)
class Features:
    """A feature matrix, standardised by the training rows of each fold.

    Attributes
    ----------
    matrix : ndarray, shape (n_images, n_features)
    """

    matrix: Array

    def coordinates(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return the standardised rows in the principal axes of the training rows.

        No axis with variance is left out, so a ridge or logistic model is the same as on the
        standardised features; the axes make its matrices diagonal.
        """
        return principal_axes(*self.standardised(train, test))

    def standardised(self, train: Rows, test: Rows) -> tuple[Array, Array]:
        """Return training and test rows, standardised by the training rows."""
        scaler = StandardScaler().fit(self.matrix[train])
        return scaler.transform(self.matrix[train]), scaler.transform(self.matrix[test])


@dataclass(frozen=True)
class Components:
    """Wide data known by its inner products: centred, then up to 256 principal components.

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
        centred = np.trace(known) - known.mean() * len(known)
        if np.trace(left) <= 1e-12 * centred:
            left = np.zeros_like(left)
        return _by_products(left, new, MAX_COMPONENTS)


def principal_axes(known: Array, new: Array) -> tuple[Array, Array]:
    """Return rows in the principal axes of the known ones; no axis with variance is left out.

    Parameters
    ----------
    known : ndarray, shape (n, n_features)
        Training rows, with centred columns.
    new : ndarray, shape (m, n_features)

    Returns
    -------
    known, new : ndarray, shapes (n, r) and (m, r)
    """
    n, d = known.shape
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
        Read in blocks, so that `max_bytes` of it are in memory as float64 at a time.
    max_bytes : int
    origin : int
        The row that is subtracted.

    Returns
    -------
    ndarray of float64, shape (n_images, n_images)
    """
    n, d = matrix.shape
    step = max(1, int(max_bytes // (16 * max(1, d))))
    gram = np.empty((n, n))
    first = np.asarray(matrix[origin], dtype=np.float64)
    centre = np.where(np.isfinite(first), first, 0.0)
    for i in range(0, n, step):
        rows = matrix[i : i + step] - centre
        for j in range(0, i + 1, step):
            others = rows if j == i else matrix[j : j + step] - centre
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

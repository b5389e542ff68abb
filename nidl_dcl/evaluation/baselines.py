"""What the embeddings are compared with, as sources of coordinates.

Computing such features is for `nidl_dcl.models.baselines`, scoring them for `cross_validation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import (
    Components,
    Features,
    Matrix,
    gram_matrix,
    read_matrix,
    refuse_non_finite,
)
from nidl_dcl.evaluation.people import People


@dataclass(frozen=True, eq=False)
class Baseline:
    """A matrix to compare with, on the same folds.

    Attributes
    ----------
    matrix : ndarray or DataFrame, shape (n_images, n_columns)
        Rows as in the features. With ``pca=True`` it may be wide, of any dtype and memory-mapped.
    pca : bool
        Replace the columns by at most 256 principal components, learned inside the folds, before
        the readout; for voxels. The products of the rows are computed once per object, so give
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


def read_baseline(
    name: str, given: Comparison, rows: NDArray[np.intp], people: People, scaling: str = "each"
) -> list[Features | Components]:
    """Return the sources of a baseline, one per matrix.

    Parameters
    ----------
    name : str
        For messages.
    given : Baseline, array-like or sequence of array-like
        One matrix, or several whose scores are averaged.
    rows : ndarray of int
        Those in use.
    people : People
        Of all rows. One that is held out is never subtracted from all.
    scaling : {"each", "shared"}
        As for `nidl_dcl.predict_phenotype`.

    Raises
    ------
    UsageError, InputsUnusableError
        For no matrix, another number of rows, and numbers that are not finite.
    """
    what, n = f"features of baseline {name!r}", len(people.table)
    matrices = list(given) if isinstance(given, list | tuple) else [given]
    if not matrices:
        raise UsageError(f"Baseline {name!r} is an empty list; give a matrix or leave it out.")
    sources: list[Features | Components] = []
    for item in matrices:
        baseline = item if isinstance(item, Baseline) else Baseline(np.asarray(item))
        shape = np.shape(baseline.matrix)
        if len(shape) != 2 or shape[0] != n:
            raise UsageError(f"Baseline {name!r} has the shape {shape}, expected {n} rows.")
        if baseline.pca:
            if people.held_out[baseline.origin]:
                baseline = replace(baseline, origin=int(np.argmin(people.held_out)))
            # A row has a finite length only if all of it is finite.
            refuse_non_finite(np.diag(baseline.gram)[:, None], what, people.table)
            sources.append(Components(baseline.gram[np.ix_(rows, rows)]))
        else:
            matrix = refuse_non_finite(read_matrix(baseline.matrix, what), what, people.table)
            sources.append(Features(matrix[rows], scaling=scaling))
    return sources

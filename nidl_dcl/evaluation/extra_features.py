"""Extra features: a few columns beside the embeddings and their baselines, as a block with its own weight.

What is removed from features instead is in `confounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import Features, read_matrix, refuse_non_finite

_LEAST_WEIGHT, _SHARE = 50, 0.1


def extra_weight(n_features: int) -> int:
    """Return how many columns of features the extra ones weigh as much as: a tenth, at least 50.

    The penalty would shrink a single column among thousands of embeddings to nearly nothing.
    """
    return max(_LEAST_WEIGHT, round(_SHARE * n_features))


@dataclass(frozen=True, eq=False)
class ExtraFeatures:
    """Columns that every predictor gets beside its own features.

    Attributes
    ----------
    names : tuple of str
    matrix : ndarray, shape (n_images, n_columns)
    weight : int
        How many columns of features they weigh as much as, taken together.
    """

    names: tuple[str, ...]
    matrix: NDArray[np.float64]
    weight: int = _LEAST_WEIGHT

    @property
    def name(self) -> str:
        """What the block is called, and the baseline that has it alone."""
        return "+".join(self.names)

    @property
    def scale(self) -> float:
        """What its standardized columns are multiplied by."""
        return float(np.sqrt(self.weight / len(self.names)))

    def rows(self, rows: NDArray[np.intp]) -> ExtraFeatures:
        """Return some of the rows."""
        return ExtraFeatures(self.names, self.matrix[rows], self.weight)

    def as_source(self) -> Features:
        """Return the columns, standardized by training rows and weighted."""
        return Features(self.matrix, self.scale)

    def describe(self) -> dict[str, Any]:
        """Return what the block is, with a sentence."""
        words = ", ".join(name.replace("_", " ") for name in self.names)
        return {
            "name": self.name,
            "columns": len(self.names),
            "weight": self.weight,
            "sentence": f"The embeddings and every image baseline have extra features ({words}) beside "
            f"their own, standardized inside the folds and with the weight of {self.weight} columns; "
            f"the baseline {self.name!r} has these alone.",
        }


def read_extra_features(
    table: pd.DataFrame | None, ids: pd.DataFrame, target: str, n_features: int
) -> ExtraFeatures | None:
    """Return columns of numbers, checked; None without a table.

    Parameters
    ----------
    table : DataFrame or None, shape (n_images, n_columns)
    ids : DataFrame, shape (n_images, n_ids)
        What names a row in messages.
    target : str
        A column of this name is refused.
    n_features : int
        Columns of the features that they stand beside.

    Raises
    ------
    UsageError
        For what is no table of numbers with so many rows, the target, or a name that is there twice.
    InputsUnusableError
        For numbers that are not finite.
    """
    if table is None:
        return None
    if not isinstance(table, pd.DataFrame):
        raise UsageError(f"extra_features must be a DataFrame, got {type(table).__name__}.")
    matrix, names = read_matrix(table, "extra features"), tuple(table.columns.astype(str))
    if len(matrix) != len(ids):
        raise UsageError(
            f"extra_features has {len(matrix)} rows, but the features have {len(ids)}."
        )
    if target in names or len(set(names)) < len(names):
        raise UsageError(
            f"The extra features {', '.join(names)} must have names of their own, and none that of "
            f"the target {target!r}."
        )
    return ExtraFeatures(
        names, refuse_non_finite(matrix, "extra features", ids), extra_weight(n_features)
    )

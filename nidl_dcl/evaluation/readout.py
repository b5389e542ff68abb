"""The readout of all participants: fitted once by scikit-learn, applied to rows it never saw.

Its file is written in `readout_file`; in another cohort it is scored in `external_validation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as RidgeRegression

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.confounds import EncodedConfounds
from nidl_dcl.evaluation.cross_validation import make_estimator
from nidl_dcl.evaluation.extra_features import ExtraFeatures
from nidl_dcl.evaluation.features import Features, FeaturesBeside, Source, fit_scaler
from nidl_dcl.evaluation.folds import CVDesign
from nidl_dcl.evaluation.linear_models import tuned_strength

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConfoundModel:
    """What confounds add to each feature, learned from the training rows, to be taken away.

    Attributes
    ----------
    names : tuple of str
        Columns of the phenotype tables, as numbers; ``column=category`` is 1 for that category and
        0 for others.
    means : ndarray, shape (n_confounds,)
    coefficients : ndarray, shape (n_confounds, n_features)
    """

    names: tuple[str, ...]
    means: Array
    coefficients: Array


@dataclass(frozen=True, eq=False)
class FittedReadout:
    """Standardized features times coefficients plus intercept, of Ridge or LogisticRegression.

    Attributes
    ----------
    labels : tuple of str
        The classes; empty for regression.
    mean, scale : ndarray, shape (n_features,)
        Of the training rows, as StandardScaler has them; the scale of extra features is divided by
        the root of their weight.
    coefficients : ndarray, shape (n_outputs, n_features)
        One output for a number and for two classes, else one per class.
    intercept : ndarray, shape (n_outputs,)
    strength : float
        What tuning chose, see `nidl_dcl.evaluation.linear_models`.
    confounds : ConfoundModel, optional
        Taken away before anything else.
    extra : tuple of str
        Names of the last features, which stand beside the embeddings.
    """

    labels: tuple[str, ...]
    mean: Array
    scale: Array
    coefficients: Array
    intercept: Array
    strength: float
    confounds: ConfoundModel | None = None
    extra: tuple[str, ...] = ()

    @property
    def n_embedded(self) -> int:
        """How many of the features are embeddings: the first ones."""
        return len(self.mean) - len(self.extra)

    def with_extra(self, matrix: NDArray[np.floating], extra: pd.DataFrame | None = None) -> Array:
        """Return embeddings with the extra features that the readout takes beside them.

        Raises
        ------
        UsageError
            For another number of embedded features, or extra features that are missing.
        """
        if matrix.ndim != 2 or matrix.shape[1] != self.n_embedded:
            raise UsageError(
                f"The readout takes {self.n_embedded} features, the embeddings have the shape "
                f"{matrix.shape}: they come from another model."
            )
        rows = np.asarray(matrix, dtype=np.float64)
        if not self.extra:
            return rows
        if extra is None or not set(self.extra) <= set(extra.columns):
            raise UsageError(
                f"The readout was fitted with {', '.join(self.extra)} beside the embeddings, and the "
                "images here come without. The volume of a brain is known where nidl-dcl aligned its "
                "image: prepare both cohorts alike, or fit a readout without it."
            )
        return np.hstack([rows, extra[list(self.extra)].to_numpy(dtype=np.float64)])

    def predict(
        self,
        matrix: NDArray[np.floating],
        confounds: Array | None = None,
        extra: pd.DataFrame | None = None,
    ) -> Array:
        """Return numbers, shape (n,), or probabilities of the classes, shape (n, n_classes).

        Parameters
        ----------
        matrix : ndarray, shape (n, n_embedded)
        confounds : ndarray, shape (n, n_confounds), optional
            Needed where the readout was fitted on features freed from confounds.
        extra : DataFrame, optional
            Needed where it was fitted with extra features: their columns.

        Raises
        ------
        UsageError
            For another number of features, missing confounds or extra features.
        """
        rows = self.with_extra(matrix, extra)
        if self.confounds is not None:
            if confounds is None:
                raise UsageError(
                    "The readout was fitted on features freed from the confounds "
                    f"{', '.join(self.confounds.names)}, and none were given. It cannot be applied "
                    "without them."
                )
            rows = rows - (confounds - self.confounds.means) @ self.confounds.coefficients
        logits = (rows - self.mean) / self.scale @ self.coefficients.T + self.intercept
        if not self.labels:
            return np.asarray(logits[:, 0])
        if len(self.labels) == 2:
            return np.column_stack([expit(-logits[:, 0]), expit(logits[:, 0])])
        return np.asarray(softmax(logits, axis=1))

    def changes(self, differences: NDArray[np.floating]) -> Array:
        """Return by how much differences of embeddings change the answer, whatever the confounds.

        Extra features stay as they are. The change, shape (n, n_outputs), is in units of the target;
        of two classes in the log-odds of the second one; of more, for each class, it is that of its
        logit less the mean of all.
        """
        n, rows = self.n_embedded, np.asarray(differences, dtype=np.float64)
        logits = rows / self.scale[:n] @ self.coefficients[:, :n].T
        if len(self.labels) > 2:
            logits = logits - logits.mean(axis=1, keepdims=True)
        return np.asarray(logits)


def fit_readout(
    design: CVDesign,
    matrix: Array,
    *,
    source: Source | None = None,
    extra: ExtraFeatures | None = None,
    confounds: EncodedConfounds | None = None,
    scaling: str = "each",
) -> FittedReadout:
    """Fit the readout on every used row, its strength chosen over the folds of the design.

    Parameters
    ----------
    design : CVDesign
    matrix : ndarray, shape (n_used, n_features)
        The used rows.
    source : Source, optional
        What was cross-validated, from which the strength is chosen; default: the features, and the
        extra ones beside them.
    extra : ExtraFeatures, optional
        Of the used rows.
    confounds : EncodedConfounds, optional
        Their first rows are the used ones; their linear effect on the standardized features is taken
        away.
    scaling : {"each", "shared"}
        As for `nidl_dcl.predict_phenotype`.

    Returns
    -------
    FittedReadout
        That of scikit-learn's Pipeline(StandardScaler, Ridge or class-balanced LogisticRegression).
    """
    targets, train = design.value[design.unit], np.arange(len(matrix))
    scaler = fit_scaler(matrix, scaling)
    mean, scale = scaler.mean_, scaler.scale_
    if extra is None:
        source = source or Features(matrix, scaling=scaling)
    else:
        source = source or FeaturesBeside(Features(matrix, scaling=scaling), extra.as_source())
        matrix = np.hstack([matrix, extra.matrix])
        beside = fit_scaler(extra.matrix, "each")
        mean = np.append(mean, beside.mean_)
        scale = np.append(scale, beside.scale_ / extra.scale)
    strength = tuned_strength(source, targets, train, design.row_folds, make_estimator(design))
    rows, removed = (matrix - mean) / scale, None
    if confounds is not None:
        values = confounds.matrix[train]
        means, spread = values.mean(axis=0), values.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        effect = np.linalg.pinv((values - means) / spread) @ rows / spread[:, None]
        rows = rows - (values - means) @ effect
        removed = ConfoundModel(confounds.names, means, effect * scale)
    # Of standardized features: n x d, but for those that are constant.
    total = float((rows**2).sum()) or 1.0
    if design.task == "regression":
        model = RidgeRegression(alpha=strength * total)
    else:
        targets = targets.astype(np.intp)
        model = LogisticRegression(
            C=4 / (strength * total), class_weight="balanced", tol=1e-8, max_iter=10000
        )
    fitted = model.fit(rows, targets)
    return FittedReadout(
        labels=tuple(design.labels),
        mean=np.asarray(mean, dtype=np.float64),
        scale=np.asarray(scale, dtype=np.float64),
        coefficients=np.atleast_2d(fitted.coef_),
        intercept=np.atleast_1d(fitted.intercept_),
        strength=strength,
        confounds=removed,
        extra=() if extra is None else extra.names,
    )

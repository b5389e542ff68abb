"""What reviewers ask of predictions beside scores: calibration, regression to the mean, curves.

Takes cross-validated predictions; scores are computed in `metrics`, pictures drawn by the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    precision_recall_curve,
    roc_curve,
)

from nidl_dcl.evaluation.folds import CVDesign
from nidl_dcl.evaluation.metrics import interval, score_bounds

Array = NDArray[np.float64]

_BINS = 5

_POINTS = 200
"""Points of a curve that are kept."""


def describe_calibration(design: CVDesign, predicted: Array) -> dict[str, Any]:
    """Return what stands beside the scores: nothing of it replaces one.

    Parameters
    ----------
    design : CVDesign
    predicted : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)
        Cross-validated predictions of the embeddings.

    Returns
    -------
    dict
        ``calibration``; ``regression_to_the_mean`` of numbers, ``confusion`` and ``curves`` of classes,
        None for the other task.
    """
    units = np.stack([design.by_unit(one) for one in predicted])
    if design.labels:
        mean = units.mean(axis=0)
        return {
            "calibration": _of_classes(design, units),
            "regression_to_the_mean": None,
            "confusion": _confusion(design, mean),
            "curves": _curves(design, mean),
        }
    lines = [fit_line(one, design.value, design.weight) for one in units]
    slope, intercept = (_mean(values) for values in zip(*lines, strict=True))
    return {
        "calibration": {"slope": slope, "intercept": intercept},
        "regression_to_the_mean": _regression_to_the_mean(design, units),
        "confusion": None,
        "curves": None,
    }


def fit_line(x: Array, y: Array, weight: Array) -> tuple[float, float]:
    """Return slope and intercept of `y` on `x`, NaN where `x` is constant.

    Parameters
    ----------
    x, y, weight : ndarray, shape (n,)
    """
    share = weight / weight.sum()
    center, middle = share @ x, share @ y
    spread = share @ (x - center) ** 2
    # What rounding leaves of a constant is not a spread.
    if spread <= (1e-12 * np.abs(x).max()) ** 2:
        return np.nan, np.nan
    slope = float(share @ ((x - center) * (y - middle)) / spread)
    return slope, float(middle - slope * center)


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else None


def _regression_to_the_mean(design: CVDesign, units: Array) -> dict[str, Any]:
    """Return by how much predictions shrink towards the mean, and errors with that taken out.

    For each test fold the line of the prediction on the truth is fitted on the predictions of the
    other folds of the repeat, and what it says of the true value is subtracted from the prediction
    (Smith et al. 2019; de Lange and Cole 2020).
    """
    truth, weight = design.value, design.weight
    lines, before, after, folds = [], [], [], []
    for fold, predicted in zip(design.fold, units, strict=True):
        lines.append(fit_line(truth, predicted, weight))
        corrected = np.empty(len(truth))
        for k in range(design.n_folds):
            test = fold[design.group] == k
            slope, intercept = fit_line(truth[~test], predicted[~test], weight[~test])
            corrected[test] = predicted[test] - (intercept + slope * truth[test])
            error = np.abs(corrected[test])
            folds.append(float(np.average(error, weights=weight[test])))
        before.append(_correlation(truth, predicted - truth, weight))
        after.append(_correlation(truth, corrected, weight))
    steepness, offset = (_mean(values) for values in zip(*lines, strict=True))
    error_r, mae = _mean(before), interval(folds, design.ratio, score_bounds("mae"))
    sentence = None
    if steepness is not None and error_r is not None:
        sentence = (
            f"Predictions rise by {steepness:.2f} for each unit of the true value (1 would be no "
            f"regression to the mean), so errors go with it: r = {error_r:.2f}. With the usual "
            f"correction, fitted on the other folds, the mean absolute error is {mae['mean']:.3g}; it "
            "uses the true value of whoever is tested, so it is no error of a prediction."
        )
    return {
        "slope": steepness,
        "intercept": offset,
        "error_r": error_r,
        "corrected": {"mae": mae, "error_r": _mean(after)},
        "sentence": sentence,
    }


def _correlation(x: Array, y: Array, weight: Array) -> float:
    share = weight / weight.sum()
    x, y = x - share @ x, y - share @ y
    spread = (share @ x**2) * (share @ y**2)
    return float(share @ (x * y) / np.sqrt(spread)) if spread > 0 else np.nan


def _of_classes(design: CVDesign, units: Array) -> dict[str, Any]:
    """Return the Brier score by fold, and bins of predicted and observed shares of the last class."""
    n_classes = len(design.labels)
    folds = []
    for fold, probability in zip(design.fold, units, strict=True):
        for k in range(design.n_folds):
            test = fold[design.group] == k
            truth = design.value[test].astype(np.intp)
            folds.append(
                float(
                    brier_score_loss(
                        truth,
                        probability[test][:, 1] if n_classes == 2 else probability[test],
                        sample_weight=_balanced(truth, design.weight[test]),
                        labels=range(n_classes),
                    )
                )
            )
    bounds = (0.0, 1.0 if n_classes == 2 else 2.0)
    knows_nothing = 1 - 1 / n_classes
    found: dict[str, Any] = {
        "brier": interval(folds, design.ratio, bounds),
        "brier_of_equal_shares": knows_nothing / 2 if n_classes == 2 else knows_nothing,
        "bins": None,
        "average_precision": {},
    }
    mean, truth = units.mean(axis=0), design.value
    for k, label in enumerate(design.labels):
        found["average_precision"][label] = float(
            average_precision_score(truth == k, mean[:, k], sample_weight=design.weight)
        )
    if n_classes == 2:
        found["bins"] = _bins(truth == 1, mean[:, 1], _balanced(truth, design.weight))
    return found


def _balanced(truth: NDArray[Any], weight: Array) -> Array:
    """Return weights with which all classes are equally frequent, as the model takes them to be."""
    share = pd.Series(weight).groupby(np.asarray(truth)).transform("sum").to_numpy()
    return np.asarray(weight / share, dtype=np.float64)


def _bins(member: NDArray[np.bool_], probability: Array, weight: Array) -> list[dict[str, float]]:
    """Return the mean probability and the share of members in bins of equally many."""
    rank = np.argsort(np.argsort(probability, kind="stable"), kind="stable")
    number = rank * min(_BINS, len(rank)) // len(rank)
    return [
        {
            "predicted": float(np.average(probability[rows], weights=weight[rows])),
            "observed": float(np.average(member[rows], weights=weight[rows])),
            "n": int(rows.sum()),
        }
        for rows in (number == k for k in np.unique(number))
    ]


def _confusion(design: CVDesign, probability: Array) -> dict[str, dict[str, float]]:
    """Return participants by true and predicted class, by the mean of images and repeats."""
    counts = confusion_matrix(
        design.value.astype(np.intp),
        probability.argmax(axis=1),
        labels=range(len(design.labels)),
        sample_weight=design.weight,
    )
    return {
        true: {guess: round(float(n), 6) for guess, n in zip(design.labels, row, strict=True)}
        for true, row in zip(design.labels, counts, strict=True)
    }


def _curves(design: CVDesign, probability: Array) -> dict[str, dict[str, list[list[float]]]]:
    """Return points of the ROC and the precision-recall curve of each class; of two, of the last."""
    found: dict[str, dict[str, list[list[float]]]] = {"roc": {}, "precision_recall": {}}
    classes = list(enumerate(design.labels))
    for k, label in classes[-1:] if len(classes) == 2 else classes:
        member = design.value == k
        false, true, _ = roc_curve(member, probability[:, k], sample_weight=design.weight)
        precision, recall, _ = precision_recall_curve(
            member, probability[:, k], sample_weight=design.weight
        )
        found["roc"][label] = _points(false, true)
        found["precision_recall"][label] = _points(recall, precision)
    return found


def _points(x: Array, y: Array) -> list[list[float]]:
    """Return the points of a curve, at most `_POINTS` of them."""
    rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(np.intp))
    return [[float(a), float(b)] for a, b in zip(x[rows], y[rows], strict=True)]

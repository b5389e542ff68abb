"""Cross-validation of a readout on given folds, and of the same readout on permuted targets.

Takes a design and sources of coordinates; tables and words are the business of `prediction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier, DummyRegressor

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import Source
from nidl_dcl.evaluation.folds import MIN_FOLDS, CVDesign, Units
from nidl_dcl.evaluation.linear_models import Logistic, Ridge, fit_once, nested_cv_predict
from nidl_dcl.evaluation.metrics import (
    balanced_accuracies,
    classification_scores,
    mean_absolute_errors,
    regression_scores,
)
from nidl_dcl.randomness import key_seed, permutation

__all__ = [
    "ProgressCounter",
    "check_counts",
    "cross_validate",
    "dummy",
    "dummy_prediction",
    "make_estimator",
    "permutation_steps",
    "permuted_scores",
    "resampled_scores",
    "train_and_test",
]

Array = NDArray[np.float64]


Rows = NDArray[np.intp]


_CHUNK = 50
"""Permutations fitted together; between two chunks progress is told."""


class ProgressCounter:
    """Counts steps for the caller's progress display."""

    def __init__(self, progress: Callable[[int, int], None] | None, steps: int) -> None:
        self.progress, self.steps, self.done = progress, steps, 0

    def __call__(self) -> None:
        """Tell that one step more is done."""
        self.done = min(self.done + 1, self.steps)
        if self.progress is not None:
            self.progress(self.done, self.steps)

    def finish(self) -> None:
        """Tell the last step, also when some were not needed."""
        if self.done < self.steps:
            self.done = self.steps - 1
            self()


def check_counts(n_splits: int, n_repeats: int, n_permutations: int) -> None:
    """Raise `UsageError` for what cannot be counted."""
    for name, value, least in (
        ("n_splits", n_splits, MIN_FOLDS),
        ("n_repeats", n_repeats, 1),
        ("n_permutations", n_permutations, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def cross_validate(
    design: CVDesign,
    source: Source,
    tick: Callable[[], None],
    known: NDArray[np.bool_] | None = None,
) -> tuple[Array, list[dict[str, float]], list[float]]:
    """Predict every used row once per repeat and score every fold.

    Parameters
    ----------
    design : Design
    source : Source
    tick : callable
        Called once per repeat.
    known : ndarray of bool, shape (n_repeats, n_used), optional
        Rows that may be trained and tuned on; default: all.

    Returns
    -------
    predictions : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)
    scores : list of dict
        One per fold, repeat after repeat.
    strengths : list of float
        What tuning chose in each of these folds.
    """
    predictions, scores, strengths = [], [], []
    targets = design.value[design.unit][:, None]
    for repeat in range(len(design.fold)):
        fold, may = design.row_folds(repeat), None if known is None else known[repeat]
        predicted, chosen = nested_cv_predict(source, targets, fold, make_estimator(design), may)
        predictions.append(predicted[:, 0])
        scores += _score_folds(design, repeat, predicted[:, 0])
        strengths += [float(s) for s in chosen[:, 0]]
        tick()
    return np.stack(predictions), scores, strengths


def dummy(design: CVDesign, known: NDArray[np.bool_] | None = None) -> list[dict[str, float]]:
    """Return the scores of always saying the training mean, or the training shares of classes.

    Parameters
    ----------
    design : Design
    known : ndarray of bool, shape (n_repeats, n_used), optional
        Rows that may be learnt from; default: all.
    """
    regression = design.task == "regression"
    targets = design.value[design.unit]
    shape = (len(targets),) if regression else (len(targets), len(design.labels))
    scores = []
    for repeat in range(len(design.fold)):
        fold = design.row_folds(repeat)
        predicted = np.zeros(shape)
        for k in range(design.n_folds):
            test, train = fold == k, fold != k
            learnt = train if known is None else train & known[repeat]
            predicted[test] = dummy_prediction(design, np.flatnonzero(learnt), np.flatnonzero(test))
        scores += _score_folds(design, repeat, predicted)
    return scores


def train_and_test(design: CVDesign, source: Source, test: NDArray[np.intp]) -> tuple[Array, float]:
    """Predict rows that are in no fold by one readout of all used rows, tuned by their folds.

    Parameters
    ----------
    design : Design
    source : Source
        Its first rows are the used ones of `design`, in order.
    test : ndarray of int, shape (n_test,)
        Other rows of it.

    Returns
    -------
    predictions : ndarray, shape (n_test,) or (n_test, n_classes)
    strength : float
    """
    train = np.arange(len(design.unit))
    folds = np.stack([design.row_folds(repeat) for repeat in range(len(design.fold))])
    return fit_once(source, design.value[design.unit], train, test, folds, make_estimator(design))


def resampled_scores(
    design: CVDesign, units: Units, predictions: Sequence[Array], n_resamples: int, *key: object
) -> dict[str, dict[str, Any]]:
    """Return each score of a test set, and its interval over resampled groups.

    Parameters
    ----------
    design : Design
        Says what is scored.
    units : Units
        Of the test set.
    predictions : sequence of ndarray, shape (n_test,) or (n_test, n_classes)
        Their scores are averaged (three untrained encoders).
    n_resamples : int
        Draws of participants (or families) with replacement, all units of one together.
    *key : object
        See `nidl_dcl.randomness.key_seed`.

    Returns
    -------
    dict
        Per metric ``mean`` (None where undefined) and ``ci95``: the 2.5th and 97.5th percentile
        of the draws, None unless the score is defined in nine of ten.
    """
    said = [units.by_unit(predicted) for predicted in predictions]
    members = [np.flatnonzero(units.group == g) for g in range(units.group.max() + 1)]
    draws = np.random.Generator(np.random.PCG64(key_seed(*key))).integers(
        len(members), size=(n_resamples, len(members))
    )
    drawn = [np.concatenate([members[g] for g in draw]) for draw in draws]
    scored = [
        [_score(design, units, each, rows) for each in said]
        for rows in (np.arange(len(units.value)), *drawn)
    ]
    result: dict[str, dict[str, Any]] = {}
    for metric in scored[0][0]:
        values = np.array([[one[metric] for one in each] for each in scored]).mean(axis=1)
        own, others = float(values[0]), values[1:][np.isfinite(values[1:])]
        known = np.isfinite(own) and len(others) >= 0.9 * n_resamples
        ends = [float(q) for q in np.quantile(others, [0.025, 0.975])] if known else None
        result[metric] = {"mean": own if np.isfinite(own) else None, "ci95": ends}
    return result


def _score(
    design: CVDesign, units: Units, predicted: Array, rows: NDArray[np.intp]
) -> dict[str, float]:
    truth, said, weight = units.value[rows], predicted[rows], units.weight[rows]
    if design.task == "regression":
        return regression_scores(truth, said, weight)
    return classification_scores(truth, said, weight, design.labels)


def dummy_prediction(design: CVDesign, train: Rows, test: Rows) -> Array:
    """Return the training mean, or the training shares of the classes, for each test row."""
    known = design.value[design.unit[train]]
    x, x_test = np.zeros((len(known), 1)), np.zeros((len(test), 1))
    if design.task == "regression":
        return np.asarray(DummyRegressor().fit(x, known).predict(x_test))
    prior = DummyClassifier(strategy="prior").fit(x, known.astype(np.intp))
    predicted = np.zeros((len(test), len(design.labels)))
    predicted[:, prior.classes_] = prior.predict_proba(x_test)
    return predicted


def permuted_scores(
    design: CVDesign, source: Source, n_permutations: int, seed: int, tick: Callable[[], None]
) -> tuple[float, Array]:
    """Return the main score on the folds of the first repeat, and the same for permuted targets.

    Targets change places between groups of the same fold, whole groups at a time, and the model is
    tuned and fitted afresh each time. So every permutation keeps the folds stratified and the
    training sets balanced exactly as they are, which makes the test exact when each group has one
    value; a group with more values than its donor repeats them in order.

    Returns
    -------
    observed : float
        Mean over the folds.
    permuted : ndarray, shape (n_permutations,)
    """
    start = np.searchsorted(design.group, np.arange(design.fold.shape[1]))
    count = np.bincount(design.group)
    place = np.arange(len(design.group)) - start[design.group]
    columns = [np.arange(len(design.group))]
    for i in range(n_permutations):
        donor = np.arange(len(start))
        for k in range(design.n_folds):
            members = np.flatnonzero(design.fold[0] == k)
            donor[members] = members[permutation(len(members), seed, "permutation", i, k)]
        given = donor[design.group]
        columns.append(start[given] + place % count[given])
    values = design.value[np.stack(columns, axis=1)]
    fold = design.row_folds(0)
    scores = []
    for i in range(0, values.shape[1], _CHUNK):
        part = values[:, i : i + _CHUNK]
        predicted, _ = nested_cv_predict(source, part[design.unit], fold, make_estimator(design))
        scores.append(_main_scores(design, part, design.by_unit(predicted)))
        tick()
    joined = np.concatenate(scores)
    return float(joined[0]), joined[1:]


def permutation_steps(n_permutations: int) -> int:
    """Return how often `permuted_scores` calls its `tick`."""
    return 1 + n_permutations // _CHUNK


def make_estimator(design: CVDesign) -> Ridge | Logistic:
    """Return the model of the design's task."""
    return Ridge() if design.task == "regression" else Logistic(len(design.labels))


def _main_scores(design: CVDesign, values: Array, predicted: Array) -> Array:
    """Return the main score of each column on the first repeat, mean over the folds."""
    fold, total = design.fold[0][design.group], np.zeros(values.shape[1])
    for k in range(design.n_folds):
        test = fold == k
        truth, said, weight = values[test], predicted[test], design.weight[test]
        if design.task == "regression":
            total += mean_absolute_errors(truth, said, weight)
        else:
            labels = said.argmax(axis=2).astype(np.float64)
            total += balanced_accuracies(truth, labels, weight, len(design.labels))
    return total / design.n_folds


def _score_folds(design: CVDesign, repeat: int, predicted: Array) -> list[dict[str, float]]:
    by_unit, fold = design.by_unit(predicted), design.fold[repeat][design.group]
    scores: list[dict[str, float]] = []
    for k in range(design.n_folds):
        test = fold == k
        truth, said, weight = design.value[test], by_unit[test], design.weight[test]
        if design.task == "regression":
            scores.append(regression_scores(truth, said, weight))
        else:
            scores.append(classification_scores(truth, said, weight, design.labels))
    return scores

"""Cross-validation of a readout on given folds, and of the same readout on permuted targets.

Takes a design and sources of coordinates; tables and sentences are made in `prediction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier, DummyRegressor

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import Source
from nidl_dcl.evaluation.folds import MIN_FOLDS, CVDesign
from nidl_dcl.evaluation.linear_models import Logistic, Ridge, nested_cv_predict, tuned_strength
from nidl_dcl.evaluation.metrics import (
    MAIN_METRIC,
    balanced_accuracies,
    chance_level,
    mean_absolute_errors,
    prediction_scores,
    summarize,
)
from nidl_dcl.randomness import permutation

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

_CHUNK = 50
"""Permutations fitted together; progress is counted between two chunks."""


class ProgressCounter:
    """Counts steps and calls `progress` with the steps done and the steps in all."""

    def __init__(self, progress: Callable[[int, int], None] | None, steps: int) -> None:
        self.progress, self.steps, self.done = progress, steps, 0

    def update(self) -> None:
        """Count one step more."""
        self.done = min(self.done + 1, self.steps)
        if self.progress is not None:
            self.progress(self.done, self.steps)

    def finish(self) -> None:
        """Report the last step, also when some were not needed."""
        if self.done < self.steps:
            self.done = self.steps - 1
            self.update()


def check_counts(n_splits: int, n_repeats: int, n_permutations: int) -> None:
    """Refuse numbers of folds, repeats and permutations that make no sense.

    Parameters
    ----------
    n_splits, n_repeats, n_permutations : int
        A `UsageError` is raised for fewer than three, one and none.
    """
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
    counter: ProgressCounter,
    known: NDArray[np.bool_] | None = None,
) -> tuple[Array, list[dict[str, float]], list[float]]:
    """Predict every used row once per repeat and score every fold.

    Parameters
    ----------
    design : CVDesign
    source : Source
    counter : ProgressCounter
        Counts one step per repeat.
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
    for repeat, fold in enumerate(design.row_folds):
        usable = None if known is None else known[repeat]
        predicted, chosen = nested_cv_predict(source, targets, fold, make_estimator(design), usable)
        predictions.append(predicted[:, 0])
        scores += _score_folds(design, repeat, predicted[:, 0])
        strengths += [float(s) for s in chosen[:, 0]]
        counter.update()
    return np.stack(predictions), scores, strengths


def cross_validate_all(
    design: CVDesign, sources: Mapping[str, Sequence[Source]], counter: ProgressCounter
) -> tuple[dict[str, Array], list[float], dict[str, dict[str, Any]]]:
    """Cross-validate the embeddings and everything they are compared with.

    Parameters
    ----------
    design : CVDesign
    sources : mapping of str to sequence of Source
        ``embeddings`` (one source) first; scores of several sources are averaged fold by fold.
    counter : ProgressCounter
        Counts one step per source and repeat.

    Returns
    -------
    predictions : dict
        Name to array, shape (n_sources, n_repeats, n_used) or (n_sources, n_repeats, n_used,
        n_classes).
    strengths : list of float
        What tuning chose for the embeddings in each fold.
    scores : dict
        Name to scores with intervals; ``dummy``, which is in no other dict, follows the embeddings.
    """
    (source,) = sources["embeddings"]
    first, folds, strengths = cross_validate(design, source, counter)
    constant, constant_folds = cross_validate_dummy(design)
    predicted = {"embeddings": first[None], "dummy": constant[None]}
    found = {"embeddings": folds, "dummy": constant_folds}
    for name in [name for name in sources if name != "embeddings"]:
        runs = [cross_validate(design, each, counter) for each in sources[name]]
        predicted[name] = np.stack([run[0] for run in runs])
        found[name] = [
            {metric: float(np.mean([fold[metric] for fold in same])) for metric in same[0]}
            for same in zip(*(run[1] for run in runs), strict=True)
        ]
    scores = {name: summarize(folds, design.ratio) for name, folds in found.items()}
    return predicted, strengths, scores


def cross_validate_dummy(
    design: CVDesign, known: NDArray[np.bool_] | None = None
) -> tuple[Array, list[dict[str, float]]]:
    """Return predictions and scores of the training mean, or the training shares of classes.

    Rows that may be learned from are `known`, shape (n_repeats, n_used); default: all.
    """
    predictions, scores = [], []
    for repeat, fold in enumerate(design.row_folds):
        predicted = np.zeros((len(fold), *[len(design.labels)] * (design.task != "regression")))
        for k in range(design.n_folds):
            test, train = fold == k, fold != k
            learned = train if known is None else train & known[repeat]
            predicted[test] = dummy_prediction(
                design, np.flatnonzero(learned), np.flatnonzero(test)
            )
        predictions.append(predicted)
        scores += _score_folds(design, repeat, predicted)
    return np.stack(predictions), scores


def train_and_test(
    design: CVDesign, source: Source, train: Rows, test: Rows, folds: NDArray[np.intp]
) -> tuple[Array, float]:
    """Predict `test` by one readout of all of `train`, tuned by the folds of `train` alone.

    Parameters
    ----------
    design : CVDesign
    source : Source
        Its first rows are the used ones of `design`, in order.
    train, test : ndarray of int
        Used rows, and other rows of the source.
    folds : ndarray of int, shape (n_repeats, n_train)

    Returns
    -------
    predictions : ndarray, shape (n_test,) or (n_test, n_classes)
    strength : float
    """
    values, model = design.value[design.unit[train]], make_estimator(design)
    strength = tuned_strength(source, values, train, folds, model)
    z, z_test = source.coordinates(train, test)
    return model.predict(z, values[:, None], z_test, np.array([strength]))[:, 0], strength


def dummy_prediction(design: CVDesign, train: Rows, test: Rows) -> Array:
    """Return the training mean, or the training shares of the classes, for each test row.

    Parameters
    ----------
    design : CVDesign
    train, test : ndarray of int
        Training rows among the used ones of `design`; test rows, of which only the number counts.
    """
    known = design.value[design.unit[train]]
    x, x_test = np.zeros((len(known), 1)), np.zeros((len(test), 1))
    if design.task == "regression":
        return np.asarray(DummyRegressor().fit(x, known).predict(x_test))
    prior = DummyClassifier(strategy="prior").fit(x, known.astype(np.intp))
    predicted = np.zeros((len(test), len(design.labels)))
    predicted[:, prior.classes_] = prior.predict_proba(x_test)
    return predicted


def permutation_test(
    design: CVDesign,
    source: Source,
    n_permutations: int,
    seed: int,
    counter: ProgressCounter,
    strata: Rows | None = None,
) -> dict[str, Any]:
    """Compare the main score, mean over the folds of the first repeat, with permuted targets.

    Targets change places between groups of the same fold, whole groups at a time, and the model is
    tuned and fitted afresh each time. So every permutation keeps the folds stratified and the
    training sets balanced exactly as they are, which makes the test exact when each group has one
    value; a group with more values than its donor repeats them in order.

    Parameters
    ----------
    design : CVDesign
    source : Source
    n_permutations : int
    seed : int
        Key of the permutations.
    counter : ProgressCounter
        Counts `permutation_steps`.
    strata : ndarray of int, shape (n_groups,), optional
        Targets change places between groups of one stratum (a site) alone, which tests what is
        predicted beyond it.
    """
    start = np.searchsorted(design.group, np.arange(design.n_groups))
    count = np.bincount(design.group)
    turn = np.arange(len(design.group)) - start[design.group]
    columns = [np.arange(len(design.group))]
    blocks = permuted_together(design, strata)
    for i in range(n_permutations):
        donor = np.arange(len(start))
        for key, members in blocks.items():
            donor[members] = members[permutation(len(members), seed, "permutation", i, *key)]
        given = donor[design.group]
        columns.append(start[given] + turn % count[given])
    values = design.value[np.stack(columns, axis=1)]
    fold = design.row_folds[0]
    scores = []
    for i in range(0, values.shape[1], _CHUNK):
        part = values[:, i : i + _CHUNK]
        predicted, _ = nested_cv_predict(source, part[design.unit], fold, make_estimator(design))
        scores.append(_main_scores(design, part, design.by_unit(predicted)))
        counter.update()
    every = np.concatenate(scores)
    return chance_level(MAIN_METRIC[design.task], float(every[0]), every[1:])


def permuted_together(design: CVDesign, strata: Rows | None) -> dict[tuple[int, ...], Rows]:
    """Return the groups between which targets change places, by fold and, if given, stratum."""
    blocks: dict[tuple[int, ...], Rows] = {}
    for k in range(design.n_folds):
        in_fold = design.fold[0] == k
        if strata is None:
            blocks[(k,)] = np.flatnonzero(in_fold)
            continue
        for stratum in np.unique(strata[in_fold]):
            blocks[k, int(stratum)] = np.flatnonzero(in_fold & (strata == stratum))
    return blocks


def permutation_steps(n_permutations: int) -> int:
    """Return how many steps `permutation_test` counts."""
    return 1 + n_permutations // _CHUNK


def make_estimator(design: CVDesign) -> Ridge | Logistic:
    """Return the model of the design's task."""
    return Ridge() if design.task == "regression" else Logistic(len(design.labels))


def _main_scores(design: CVDesign, values: Array, predicted: Array) -> Array:
    """Return the main score of each column on the first repeat, mean over the folds."""
    fold, total = design.fold[0][design.group], np.zeros(values.shape[1])
    for k in range(design.n_folds):
        test = fold == k
        truth, given, weight = values[test], predicted[test], design.weight[test]
        if design.task == "regression":
            total += mean_absolute_errors(truth, given, weight)
        else:
            labels = given.argmax(axis=2).astype(np.float64)
            total += balanced_accuracies(truth, labels, weight, len(design.labels))
    return total / design.n_folds


def _score_folds(design: CVDesign, repeat: int, predicted: Array) -> list[dict[str, float]]:
    by_unit, fold = design.by_unit(predicted), design.fold[repeat][design.group]
    return [
        prediction_scores(design.value[test], by_unit[test], design.weight[test], design.labels)
        for test in (fold == k for k in range(design.n_folds))
    ]

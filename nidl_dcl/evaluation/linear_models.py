"""Linear readouts fitted for many targets at once, their strength tuned inside the folds.

The numbers are those of scikit-learn's Pipeline(StandardScaler, Ridge or LogisticRegression); a
shared factorization per fold makes 200 permutations of a tuned model cost seconds. Folds are dealt in
`folds`, scores computed in `metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from nidl_dcl.evaluation.features import Source

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

MAX_ITERATIONS = 2000
"""Gradient steps of a logistic model; enough at every strength in use."""

_TOLERANCE = 1e-10
"""Where they stop: size of the preconditioned gradient per row."""

_MANY = 0.2
"""Share of the folds from which on it is said that they chose an end of the grid."""

_NONE = np.empty(0)


def _logistic(z: Array, targets: Array, z_test: Array, penalty: Array, n_classes: int) -> Array:
    """Minimize for one chunk of targets; arrays inside are (rows or axes, classes, targets).

    Accelerated gradient steps in the axes of `z`, where a bound on the Hessian is diagonal, until the
    preconditioned gradient is small.
    """
    n, n_targets = targets.shape
    design = np.column_stack([np.ones(n), z])
    member = targets[:, None, :] == np.arange(n_classes)[:, None]
    count = member.sum(axis=0)
    balance = n / np.maximum(count * (count > 0).sum(axis=0), 1)
    weight = (member * balance).sum(axis=1, keepdims=True)
    binary = n_classes == 2
    truth = (member[:, 1:] if binary else member).astype(np.float64)
    shrink = np.repeat(penalty[None, None, :], design.shape[1], axis=0)
    shrink[0] = 0.0
    curvature = (0.25 if binary else 0.5) * (design**2).sum(axis=0)[:, None, None]
    step = 1 / (curvature * weight.max(axis=0) + shrink)

    current = np.zeros((design.shape[1], truth.shape[1], n_targets))
    start = np.where(count > 0, 0.0, -30.0)
    current[0] = start[1:] - start[:1] if binary else start
    result, ahead, momentum = current.copy(), current, np.ones(n_targets)
    active = np.arange(n_targets)
    for iteration in range(1, MAX_ITERATIONS + 1):
        logits = (design @ ahead.reshape(len(ahead), -1)).reshape(n, -1, len(active))
        residual = weight * ((expit(logits) if binary else _softmax(logits)) - truth)
        gradient = (design.T @ residual.reshape(n, -1)).reshape(ahead.shape) + shrink * ahead
        moved = ahead - step * gradient
        change = moved - current
        # Momentum that points uphill is dropped, target by target.
        momentum = np.where((gradient * change).sum(axis=(0, 1)) > 0, 1.0, momentum)
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / grown * change
        current, momentum = moved, grown
        # Looked at now and then, and at the same steps whatever the other targets do.
        if iteration % 10 == 0:
            done = (gradient**2 * step).sum(axis=(0, 1)) <= _TOLERANCE * n
            result[:, :, active] = current
            if done.all():
                break
            going = ~done
            active, momentum = active[going], momentum[going]
            current, ahead, step = current[..., going], ahead[..., going], step[..., going]
            weight, truth, shrink = weight[..., going], truth[..., going], shrink[..., going]
    logits = result[0] + np.tensordot(z_test, result[1:], axes=1)
    if binary:
        probability = np.concatenate([expit(-logits), expit(logits)], axis=1)
    else:
        probability = _softmax(logits)
    return probability.transpose(0, 2, 1)


def _softmax(logits: Array) -> Array:
    # scipy's softmax is several times slower along a short axis.
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Ridge:
    """Ridge regression; its strength is the penalty relative to the total variance (n x trace).

    With d standardized features and n training rows, scikit-learn's ``alpha`` is strength x n x d.

    Attributes
    ----------
    strengths : ndarray
        To choose from, the strongest first.
    weaker : ndarray
        More of them, tried where the weakest of `strengths` is the best.
    """

    strengths: Array = field(default_factory=lambda: np.logspace(4, -8, 25))
    weaker: Array = field(default_factory=lambda: _NONE)

    def predict(self, z: Array, targets: Array, z_test: Array, strength: Array) -> Array:
        """Return predictions of many targets, shape (m, n_targets).

        Parameters
        ----------
        z : ndarray, shape (n, r)
            Training coordinates with orthogonal, centered columns.
        targets : ndarray, shape (n, n_targets)
        z_test : ndarray, shape (m, r)
        strength : ndarray, shape (n_targets,)
            Each target has its own.
        """
        mean, penalty = targets.mean(axis=0), strength * float((z**2).sum())
        weight = (z.T @ (targets - mean)) / ((z**2).sum(axis=0)[:, None] + penalty)
        return np.asarray(mean + z_test @ weight)

    def loss(self, targets: Array, predicted: Array) -> Array:
        """Return the summed squared error of each target."""
        return np.asarray(((targets - predicted) ** 2).sum(axis=0))


@dataclass(frozen=True)
class Logistic:
    """Class-balanced logistic regression; ``1 / C`` is strength x n x d / 4 (see `Ridge`).

    The objective is that of ``LogisticRegression(class_weight="balanced")``: one column of weights
    for two classes, softmax for more.

    Attributes
    ----------
    n_classes : int
    strengths, weaker : ndarray
        As of `Ridge`. The weaker the penalty, the more steps a model takes, so the weakest are tried
        where they can be chosen alone.
    """

    n_classes: int
    strengths: Array = field(default_factory=lambda: np.logspace(4, -4, 17))
    weaker: Array = field(default_factory=lambda: np.logspace(-4.5, -7, 6))

    def predict(self, z: Array, targets: Array, z_test: Array, strength: Array) -> Array:
        """Return class probabilities of many targets, shape (m, n_targets, n_classes).

        Parameters
        ----------
        z, targets, z_test, strength
            As for `Ridge.predict`; targets are positions of classes. A class without a training row
            gets probability 0.
        """
        penalty = strength * float((z**2).sum()) / 4
        # Targets per chunk such that an array of logits stays near the cache.
        width = max(1, int(2**20 // (len(z) * self.n_classes)))
        chunks = [slice(i, i + width) for i in range(0, targets.shape[1], width)]
        found = [_logistic(z, targets[:, c], z_test, penalty[c], self.n_classes) for c in chunks]
        return np.concatenate(found, axis=1)

    def loss(self, targets: Array, predicted: Array) -> Array:
        """Return the log loss of each target, summed over the means of the classes present."""
        total = np.zeros(targets.shape[1])
        for k in range(self.n_classes):
            member = targets == k
            costs = -np.log(np.clip(predicted[:, :, k], 1e-12, None))
            total += (member * costs).sum(axis=0) / np.maximum(member.sum(axis=0), 1)
        return total


def nested_cv_predict(
    source: Source,
    targets: Array,
    fold: NDArray[np.intp],
    model: Ridge | Logistic,
    known: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array]:
    """Predict each fold by a model trained and tuned on the other folds.

    For the test fold k the strength is chosen by cross-validation over the other folds: each of
    them in turn is predicted from the rest without k. So one division into folds serves both levels
    and nobody who is kept together by the folds straddles either.

    Parameters
    ----------
    source : Features or Components
    targets : ndarray, shape (n_images, n_targets)
    fold : ndarray of int, shape (n_images,)
        Fold of each row, 0 to n_folds - 1; at least three folds.
    model : Ridge or Logistic
    known : ndarray of bool, shape (n_images,), optional
        Rows that may be trained and tuned on; every row is predicted. Default: all.

    Returns
    -------
    predictions : ndarray, shape (n_images, n_targets) or (n_images, n_targets, n_classes)
    strengths : ndarray, shape (n_folds, n_targets)
        What was chosen for each test fold.
    """
    n_folds = int(fold.max()) + 1
    if known is None:
        known = np.ones(len(fold), dtype=bool)
    loss = _inner_losses(source, targets, fold, model, known, model.strengths)
    # The first of equals is the strongest.
    best = loss.argmin(axis=1)
    strengths = model.strengths[best]
    at_edge = best == len(model.strengths) - 1
    if len(model.weaker) and at_edge.any():
        some = np.flatnonzero(at_edge.any(axis=0))
        more = _inner_losses(source, targets[:, some], fold, model, known, model.weaker)
        better = at_edge[:, some] & (more.min(axis=1) < loss.min(axis=1)[:, some])
        strengths[:, some] = np.where(better, model.weaker[more.argmin(axis=1)], strengths[:, some])
    predictions: list[tuple[Rows, Array]] = []
    for k in range(n_folds):
        train, test = np.flatnonzero(known & (fold != k)), np.flatnonzero(fold == k)
        z, z_test = source.coordinates(train, test)
        predictions.append((test, model.predict(z, targets[train], z_test, strengths[k])))
    result = np.empty((len(fold), *predictions[0][1].shape[1:]))
    for test, predicted in predictions:
        result[test] = predicted
    return result, strengths


def _inner_losses(
    source: Source,
    targets: Array,
    fold: NDArray[np.intp],
    model: Ridge | Logistic,
    known: NDArray[np.bool_],
    strengths: Array,
) -> Array:
    """Return the loss of each strength for each test fold, shape (n_folds, n_strengths, n_targets)."""
    n_folds, n_targets = int(fold.max()) + 1, targets.shape[1]
    loss = np.zeros((n_folds, len(strengths), n_targets))
    repeated = np.repeat(strengths, n_targets)
    for a in range(n_folds):
        for b in range(a):
            train = np.flatnonzero(known & (fold != a) & (fold != b))
            test = np.flatnonzero(known & ((fold == a) | (fold == b)))
            if not len(test):
                continue
            z, z_test = source.coordinates(train, test)
            tiled = np.tile(targets[train], (1, len(strengths)))
            predicted = model.predict(z, tiled, z_test, repeated)
            for inner, outer in ((a, b), (b, a)):
                rows = fold[test] == inner
                truth = np.tile(targets[test[rows]], (1, len(strengths)))
                loss[outer] += model.loss(truth, predicted[rows]).reshape(-1, n_targets)
    return loss


def tuned_strength(
    source: Source, targets: Array, train: Rows, folds: NDArray[np.intp], model: Ridge | Logistic
) -> float:
    """Return the strength that predicts each fold of `train` best from its other folds.

    The rule of `nested_cv_predict`, for a model that is fitted on all of `train`.

    Parameters
    ----------
    source : Features or Components
    targets : ndarray, shape (n_train,)
    train : ndarray of int
        Rows of the source.
    folds : ndarray of int, shape (n_repeats, n_train)
        Losses are summed over the folds of all repeats.
    model : Ridge or Logistic
    """
    strengths = model.strengths
    loss = _losses(source, targets, train, folds, model, strengths)
    if len(model.weaker) and loss.argmin() == len(strengths) - 1:
        strengths = np.concatenate([strengths, model.weaker])
        more = _losses(source, targets, train, folds, model, model.weaker)
        loss = np.concatenate([loss, more])
    # The first of equals is the strongest.
    return float(strengths[loss.argmin()])


def _losses(
    source: Source,
    targets: Array,
    train: Rows,
    folds: NDArray[np.intp],
    model: Ridge | Logistic,
    strengths: Array,
) -> Array:
    """Return the loss of each strength over the folds of `train`."""
    loss = np.zeros(len(strengths))
    for fold in folds:
        for k in range(int(fold.max()) + 1):
            z, z_test = source.coordinates(train[fold != k], train[fold == k])
            known, truth = (
                np.tile(targets[rows][:, None], (1, len(loss))) for rows in (fold != k, fold == k)
            )
            loss += model.loss(truth, model.predict(z, known, z_test, strengths))
    return loss


def count_edges(chosen: Sequence[float], model: Ridge | Logistic) -> dict[str, Any]:
    """Return how often tuning chose an end of its grid: another grid might have served better.

    Parameters
    ----------
    chosen : sequence of float
        One per fold.
    model : Ridge or Logistic
        Whose grid it was.

    Returns
    -------
    dict
        ``strongest`` and ``weakest`` strength of the grid; ``n_strongest`` and ``n_weakest``, the
        folds that chose them; ``sentence``, None if fewer than a fifth of the folds did.
    """
    grid = np.concatenate([model.strengths, model.weaker])
    most, least = float(grid.max()), float(grid.min())
    n = {"strongest": sum(s >= most for s in chosen), "weakest": sum(s <= least for s in chosen)}
    said = [
        f"the {name} ({end:.1g}, {means}) in {n[name]} of {len(chosen)} folds"
        for name, end, means in (
            ("strongest", most, "hardly anything but the mean is predicted"),
            ("weakest", least, "hardly any penalty"),
        )
        if n[name] >= _MANY * len(chosen)
    ]
    return {
        "strongest": most,
        "weakest": least,
        "n_strongest": int(n["strongest"]),
        "n_weakest": int(n["weakest"]),
        "sentence": f"Tuning chose an end of its grid of penalties: {', '.join(said)}. Another grid "
        "might have given another score."
        if said
        else None,
    }

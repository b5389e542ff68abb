"""Scores of predictions, their intervals over repeated folds, and the sentence that compares them.

Takes truth, prediction and weights of one test set; who is in it is decided in `folds`, intervals
over participants are made in `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

Array = NDArray[np.float64]

MAIN_METRIC = {"regression": "mae", "classification": "balanced_accuracy"}
"""The score of each task that permutations and the headline use."""

MIN_FINDING = 20
"""Participants scored once, fewer of whom are no finding, whatever the score."""

_BOUNDS = {"mae": (0.0, np.inf), "r2": (-np.inf, 1.0), "r": (-1.0, 1.0)}
"""What a score of numbers can be; those of classes lie between 0 and 1."""

METRIC_WORDS = {"mae": "mean absolute error", "balanced_accuracy": "balanced accuracy"}
"""The main scores as sentences call them."""


def prediction_scores(
    truth: Array, predicted: Array, weight: Array, labels: Sequence[str]
) -> dict[str, float]:
    """Return the scores of one test set: of numbers without labels, else of classes.

    Parameters
    ----------
    truth, weight : ndarray, shape (n_units,)
    predicted : ndarray, shape (n_units,) or (n_units, n_classes)
    labels : sequence of str
        The classes; empty for regression.

    Returns
    -------
    dict
        As `regression_scores` or `classification_scores`.
    """
    if labels:
        return classification_scores(truth, predicted, weight, labels)
    return regression_scores(truth, predicted, weight)


def regression_scores(truth: Array, predicted: Array, weight: Array) -> dict[str, float]:
    """Return ``mae`` (units of the target), ``r2`` and ``r`` (Pearson) of one test fold.

    Parameters
    ----------
    truth, predicted, weight : ndarray, shape (n_units,)
        `weight` sums to 1 over the units of a participant, so each participant counts once.

    Returns
    -------
    dict
        NaN where a score is undefined: ``r2`` for a constant truth, ``r`` also for a constant
        prediction.
    """
    weight = weight / weight.sum()
    centered = truth - weight @ truth
    moved = predicted - weight @ predicted
    # What rounding leaves of a constant is not a spread.
    spread = weight @ centered**2 if np.ptp(truth) > 0 else 0.0
    spread_predicted = weight @ moved**2
    floor = (1e-12 * np.abs(predicted).max()) ** 2
    r2 = 1 - weight @ (truth - predicted) ** 2 / spread if spread > 0 else np.nan
    defined = spread > 0 and spread_predicted > floor
    r = weight @ (centered * moved) / np.sqrt(spread * spread_predicted) if defined else np.nan
    return {"mae": float(weight @ np.abs(truth - predicted)), "r2": float(r2), "r": float(r)}


def mean_absolute_errors(truth: Array, predicted: Array, weight: Array) -> Array:
    """Return the weighted mean absolute error of each column.

    Parameters
    ----------
    truth, predicted : ndarray, shape (n_units, n_columns)
    weight : ndarray, shape (n_units,)
    """
    errors: Array = weight @ np.abs(truth - predicted) / weight.sum()
    return errors


def recalls(truth: Array, predicted: Array, weight: Array, n_classes: int) -> Array:
    """Return the recall of each class, shape (n_classes, n_columns); NaN for an absent class.

    Parameters
    ----------
    truth, predicted : ndarray, shape (n_units, n_columns)
        Positions of classes.
    weight : ndarray, shape (n_units,)
    n_classes : int
    """
    found = np.full((n_classes, truth.shape[1]), np.nan)
    for k in range(n_classes):
        member = truth == k
        total = weight @ member
        np.divide(weight @ (member & (predicted == k)), total, out=found[k], where=total > 0)
    return found


def balanced_accuracies(truth: Array, predicted: Array, weight: Array, n_classes: int) -> Array:
    """Return the mean recall of the classes present, for each column.

    Parameters
    ----------
    truth, predicted, weight, n_classes
        As for `recalls`.
    """
    accuracies: Array = np.nanmean(recalls(truth, predicted, weight, n_classes), axis=0)
    return accuracies


def roc_area(member: NDArray[np.bool_], score: Array, weight: Array) -> float:
    """Return the area under the ROC curve, as scikit-learn's, in a twentieth of the time.

    Parameters
    ----------
    member : ndarray of bool, shape (n_units,)
        Some, but not all of them.
    score, weight : ndarray, shape (n_units,)
    """
    values, rank = np.unique(score, return_inverse=True)
    inside = np.bincount(rank, weight * member, len(values))
    outside = np.bincount(rank, weight * ~member, len(values))
    below = np.cumsum(outside) - outside / 2  # a tie counts half
    return float(inside @ below / (inside.sum() * outside.sum()))


def classification_scores(
    truth: Array, probability: Array, weight: Array, labels: Sequence[str]
) -> dict[str, float]:
    """Return the scores of one test fold.

    Parameters
    ----------
    truth : ndarray, shape (n_units,)
        Positions in `labels`.
    probability : ndarray, shape (n_units, n_classes)
    weight : ndarray, shape (n_units,)
    labels : sequence of str

    Returns
    -------
    dict
        ``balanced_accuracy``, ``roc_auc`` (with more than two classes: mean over the classes of
        one against the rest) and ``recall_<label>`` of each class; NaN where undefined.
    """
    predicted = probability.argmax(axis=1).astype(np.float64)
    recall = recalls(truth[:, None], predicted[:, None], weight, len(labels))[:, 0]
    present = [k for k in range(len(labels)) if 0 < (truth == k).sum() < len(truth)]
    areas = [
        roc_area(truth == k, probability[:, k], weight)
        for k in (present[-1:] if len(labels) == 2 else present)
    ]
    scores = {
        "balanced_accuracy": float(np.nanmean(recall)),
        "roc_auc": float(np.mean(areas)) if areas else float("nan"),
    }
    return scores | {f"recall_{label}": float(x) for label, x in zip(labels, recall, strict=True)}


def score_bounds(metric: str) -> tuple[float, float]:
    """Return the least and the largest value that a score can have."""
    return _BOUNDS.get(metric, (0.0, 1.0))


def interval(
    folds: Sequence[float] | Array,
    test_train_ratio: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Any]:
    """Return mean and corrected 95 % interval of a score over repeated folds (Nadeau and Bengio).

    Training sets of repeated folds overlap, so the plain standard error is far too small. The
    corrected variance of the mean is ``(1 / J + n_test / n_train) * s**2`` with the sample variance
    ``s**2`` of the J folds; the interval uses Student's t with J - 1 degrees of freedom. It ends at
    the bounds of the score.

    Parameters
    ----------
    folds : sequence of float
        NaN where the score is undefined; those folds are left out.
    test_train_ratio : float
        Participants in a test set per participant in its training set, mean over the folds.
    bounds : tuple of float
        What the score can be, see `score_bounds`; default: anything.

    Returns
    -------
    dict
        ``mean``, ``ci95`` ([low, high], None with fewer than two folds), ``folds`` (None where
        undefined); ``mean`` is None when no fold has the score.
    """
    values = np.asarray(folds, dtype=np.float64)
    finite = values[np.isfinite(values)]
    listed = [float(v) if np.isfinite(v) else None for v in values]
    if not len(finite):
        return {"mean": None, "ci95": None, "folds": listed}
    mean = float(finite.mean())
    if len(finite) < 2:
        return {"mean": mean, "ci95": None, "folds": listed}
    error = np.sqrt((1 / len(finite) + test_train_ratio) * finite.var(ddof=1))
    half = float(student_t.ppf(0.975, len(finite) - 1) * error)
    return {"mean": mean, "ci95": within(bounds, mean - half, mean + half), "folds": listed}


def within(bounds: tuple[float, float], low: float, high: float) -> list[float]:
    """Return the ends of an interval, at most the bounds of a score.

    Parameters
    ----------
    bounds : tuple of float
        As of `score_bounds`.
    low, high : float
    """
    return [max(low, bounds[0]), min(high, bounds[1])]


def summarize(folds: Sequence[dict[str, float]], test_train_ratio: float) -> dict[str, Any]:
    """Return ``{metric: interval(...)}`` from the scores of each fold."""
    return {
        metric: interval([f[metric] for f in folds], test_train_ratio, score_bounds(metric))
        for metric in folds[0]
    }


def compared(*values: float | None) -> list[str]:
    """Return scores with as many digits as it takes to tell them apart, three to six."""
    given = {v for v in values if v is not None}
    for digits in range(3, 7):
        texts = ["–" if v is None else f"{v:.{digits}g}" for v in values]
        if len({t for t, v in zip(texts, values, strict=True) if v is not None}) == len(given):
            break
    return texts


def p_words(p: float | None, n: int | None) -> str:
    """Return a p value in words: ``= 0.02``, or ``≤ 0.005`` where no permutation was as good."""
    if p is None:
        return ""
    at_floor = n is not None and p <= 1.0000001 / (1 + n)
    return f"{'≤' if at_floor else '='} {p:.2g}"


def multiplicity_note(n_targets: int) -> str:
    """Return what to think of when several targets were predicted; nothing of one."""
    if n_targets < 2:
        return ""
    return (
        f"{n_targets} targets were predicted. Intervals and p values are of each alone: of many "
        "targets without any information, one in twenty has a p of at most 0.05. By Bonferroni's rule "
        f"for {n_targets}, a p says something from {0.05 / n_targets:.2g} down."
    )


def chance_level(metric: str, observed: float, permuted: Array) -> dict[str, Any]:
    """Return chance level and p value of a score from its values under permuted targets.

    Parameters
    ----------
    metric : str
        Smaller is better for ``mae``.
    observed : float
    permuted : ndarray, shape (n_permutations,)

    Returns
    -------
    dict
        ``metric``; ``chance``, the mean over the permutations; ``p`` = (1 + permutations at least
        as good) / (1 + permutations); ``n``; ``observed``, the score compared; ``range95``, where
        95 % of the permutations lie. None instead of numbers without permutations.
    """
    result: dict[str, Any] = {"metric": metric, "chance": None, "p": None, "n": len(permuted)}
    result |= {"observed": float(observed), "range95": None}
    if not len(permuted):
        return result
    sign = -1.0 if metric == "mae" else 1.0
    # Equal but for rounding counts as equal.
    at_least = sign * permuted >= sign * observed - 1e-9 * abs(observed)
    result["chance"] = float(permuted.mean())
    result["p"] = float((1 + at_least.sum()) / (1 + len(permuted)))
    result["range95"] = [float(q) for q in np.quantile(permuted, [0.025, 0.975])]
    return result


def compare(
    target: str,
    metric: str,
    scores: dict[str, Any],
    baselines: dict[str, dict[str, Any]],
    test_train_ratio: float,
) -> dict[str, Any]:
    """Return the headline: the gain of the embeddings over the best baseline, fold by fold.

    Parameters
    ----------
    target : str
    metric : str
        A score; smaller is better for ``mae``.
    scores : dict
        Of the embeddings, as `summarize` gives them.
    baselines : dict
        Name to scores on the same folds.
    test_train_ratio : float

    Returns
    -------
    dict
        ``metric``; ``best_baseline``; ``gain`` (mean, ci95, folds; positive when the embeddings are
        better); ``beats``, whether the interval of the gain lies above zero; ``gains`` over each
        baseline; ``sentence``, in words.
    """
    sign = -1.0 if metric == "mae" else 1.0
    own = np.array(scores[metric]["folds"], dtype=np.float64)  # None becomes NaN
    gains = {}
    for name, other in baselines.items():
        theirs = np.array(other[metric]["folds"], dtype=np.float64)
        gains[name] = interval(sign * (own - theirs), test_train_ratio)
    best = max(baselines, key=lambda name: sign * baselines[name][metric]["mean"])
    gain = gains[best]
    low, high = gain["ci95"]
    beats = bool(low > 0)
    zero = ""
    if beats:
        verdict = f"The embeddings predict {target} better than the best baseline, {best}"
    elif high < 0:
        verdict = f"The embeddings predict {target} worse than the best baseline, {best}"
    else:
        verdict = f"The embeddings are not shown to predict {target} better than the best baseline, {best}"
        zero = ", which includes 0"
    mine, theirs_best = compared(scores[metric]["mean"], baselines[best][metric]["mean"])
    sentence = (
        f"{verdict}: {METRIC_WORDS.get(metric, metric)} {mine} against "
        f"{theirs_best}, gain {gain['mean']:.2g} "
        f"(95 % interval {low:.2g} to {high:.2g}{zero})."
    )
    return {
        "metric": metric,
        "best_baseline": best,
        "gain": gain,
        "beats": beats,
        "gains": gains,
        "sentence": sentence,
    }

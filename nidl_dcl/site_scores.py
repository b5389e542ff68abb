"""How well a target is predicted within each site, and at sites that training never had.

Uses the folds and read-outs of the target; how well the site itself is decoded is `site_audit`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from nidl_dcl.coordinates import Source
from nidl_dcl.evaluation import dummy_prediction, read_out
from nidl_dcl.folds import Design
from nidl_dcl.readout import fit_once
from nidl_dcl.scores import MAIN_METRIC, classification_scores, regression_scores
from nidl_dcl.targets import MIN_CLASS

__all__ = ["score_new_sites", "score_within_sites", "usable_sites"]

Array = NDArray[np.float64]
Labels = NDArray[np.object_]

_METRICS = {"regression": ("mae", "r2", "r"), "classification": ("balanced_accuracy", "roc_auc")}


def usable_sites(site: Labels, participants: Labels) -> dict[str, int]:
    """Return the participants at each site, in the order of the labels.

    Parameters
    ----------
    site : ndarray of object, shape (n_used,)
        None where unknown.
    participants : ndarray of object, shape (n_used,)
        One with images at two sites counts at both.
    """
    labels = sorted({str(label) for label in site if label is not None})
    return {label: len(set(participants[site == label])) for label in labels}


def score_within_sites(
    design: Design, site: Labels, participants: Labels, predicted: Array
) -> dict[str, dict[str, Any]]:
    """Return the scores within each site, from the cross-validated predictions.

    Parameters
    ----------
    design : Design
    site, participants : ndarray of object, shape (n_used,)
    predicted : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)

    Returns
    -------
    dict
        Site to ``n_participants`` and the scores, mean over the repeats; None where a score is
        undefined: fewer than three participants, one class, a constant target.
    """
    return {
        label: {"n_participants": n}
        | _mean(
            [
                _score(design, np.flatnonzero(site == label), participants, each, n)
                for each in predicted
            ]
        )
        for label, n in usable_sites(site, participants).items()
    }


def score_new_sites(
    design: Design,
    site: Labels,
    participants: Labels,
    sources: Mapping[str, Sequence[Source]],
    tick: Callable[[], None],
) -> dict[str, Any] | None:
    """Return the scores at each site of models that were trained and tuned on the other sites.

    Tuning uses the folds of the first repeat. A group (participant, family) with an image at the
    tested site is not in training, also not by its images at other sites; images without a site are
    in training and never tested.

    Parameters
    ----------
    design, site, participants
        As for `score_within_sites`.
    sources : dict
        Name to sources; scores are averaged over several. ``dummy`` is added.
    tick : callable
        Called once per site and source.

    Returns
    -------
    dict or None
        ``metric``; ``sites`` (label to participants); ``scores``: name to metric to ``sites`` (label
        to score, None where undefined), ``mean`` over the sites and ``ci95`` across them (Student's
        t; None with fewer than three); ``sentence``. None when fewer than two sites have three
        participants.
    """
    sites = usable_sites(site, participants)
    tested = [label for label, n in sites.items() if n >= MIN_CLASS]
    if len(tested) < 2:
        return None
    fold, group = design.row_folds(0), design.group[design.unit]
    found: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in sources}
    found["dummy"] = {}
    for label, n in sites.items():
        test = np.flatnonzero(site == label)
        train = np.flatnonzero(~np.isin(group, group[test]))
        enough = label in tested and _can_learn(design, fold, train)
        for name in found:
            runs: list[Array] = []
            if enough and name == "dummy":
                runs = [dummy_prediction(design, train, test)]
            elif enough:
                for source in sources[name]:
                    values = design.value[design.unit[train]]
                    folds = np.unique(fold[train], return_inverse=True)[1][None]
                    said, _ = fit_once(source, values, train, test, folds, read_out(design))
                    runs.append(said)
                    tick()
            whole = [_spread_out(design, test, run) for run in runs]
            found[name][label] = _mean(
                [_score(design, test, participants, each, n) for each in whole]
                or [dict.fromkeys(_METRICS[design.task], float("nan"))]
            )
    metric = MAIN_METRIC[design.task]
    scores = {
        name: {m: _across({s: by[s][m] for s in sites}) for m in _METRICS[design.task]}
        for name, by in found.items()
    }
    return {
        "metric": metric,
        "sites": sites,
        "scores": scores,
        "sentence": _sentence(metric, scores, len(tested)),
    }


def _can_learn(design: Design, fold: NDArray[np.intp], train: NDArray[np.intp]) -> bool:
    """Return whether rows lie in two folds and, for classes, hold two of them."""
    several = design.task == "regression" or len(np.unique(design.value[design.unit[train]])) > 1
    return several and len(np.unique(fold[train])) > 1


def _spread_out(design: Design, rows: NDArray[np.intp], predicted: Array) -> Array:
    result = np.full((len(design.unit), *predicted.shape[1:]), np.nan)
    result[rows] = predicted
    return result


def _score(
    design: Design, rows: NDArray[np.intp], participants: Labels, predicted: Array, n: int
) -> dict[str, float]:
    """Return the scores of some rows: images averaged as in `Design`, participants weigh the same."""
    units, place = np.unique(design.unit[rows], return_inverse=True)
    truth, count = design.value[units], np.bincount(place)
    undefined = dict.fromkeys(_METRICS[design.task], float("nan"))
    if n < MIN_CLASS:
        return undefined
    said = np.zeros((len(units), *predicted.shape[1:]))
    np.add.at(said, place, predicted[rows])
    said /= count.reshape(-1, *[1] * (said.ndim - 1))
    who = np.unique(participants[rows].astype(str), return_inverse=True)[1]
    of_unit = np.empty(len(units), dtype=np.intp)
    of_unit[place] = who
    weight = 1 / np.bincount(of_unit)[of_unit]
    if design.task == "regression":
        return regression_scores(truth, said, weight)
    if len(np.unique(truth)) < 2:
        return undefined
    scores = classification_scores(truth, said, weight, design.labels)
    return {metric: scores[metric] for metric in undefined}


def _mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Return the mean of each score; None where it is undefined."""
    means = {metric: float(np.mean([run[metric] for run in runs])) for metric in runs[0]}
    return {metric: x if np.isfinite(x) else None for metric, x in means.items()}


def _across(sites: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the scores of the sites, their mean and its interval across sites."""
    known = np.array([x for x in sites.values() if x is not None])
    result: dict[str, Any] = {"sites": dict(sites), "mean": None, "ci95": None}
    if len(known):
        result["mean"] = mean = float(known.mean())
        if len(known) > 2:
            half = float(
                student_t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
            )
            result["ci95"] = [mean - half, mean + half]
    return result


def _sentence(metric: str, scores: Mapping[str, Any], n_sites: int) -> str:
    words = {"mae": "mean absolute error", "balanced_accuracy": "balanced accuracy"}[metric]
    means = {name: by[metric]["mean"] for name, by in scores.items()}
    own = means.pop("embeddings")
    if own is None:
        return "Prediction at new sites is undefined: no site can be left out."
    others = ", ".join(f"{name} {x:.3g}" for name, x in means.items() if x is not None)
    return (
        f"Trained without the site that is tested, {n_sites} sites in turn, the embeddings have a "
        f"{words} of {own:.3g} on average over the sites ({others})."
    )

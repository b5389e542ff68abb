"""How well site is decoded from features, and how well a target is predicted within and across sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.confounds import Cleaned, can_harmonize
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    check_counts,
    cross_validate,
    dummy_prediction,
    make_estimator,
    permutation_steps,
    permuted_scores,
)
from nidl_dcl.evaluation.features import (
    Column,
    Features,
    Matrix,
    Source,
    finite_matrix,
    read_column,
    read_labels,
)
from nidl_dcl.evaluation.folds import CVDesign, make_design
from nidl_dcl.evaluation.linear_models import fit_once
from nidl_dcl.evaluation.metrics import (
    MAIN_METRIC,
    chance_level,
    classification_scores,
    interval,
    regression_scores,
)
from nidl_dcl.evaluation.targets import MIN_CLASS, read_target
from nidl_dcl.randomness import fresh_seed

__all__ = ["audit_steps", "score_new_sites", "score_within_sites", "site_audit", "usable_sites"]


def site_audit(
    features: Matrix,
    site: Column,
    groups: Column,
    *,
    n_splits: int = 5,
    n_repeats: int = 5,
    n_permutations: int = 200,
    random_state: int | np.random.RandomState | None = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return how well site (scanner, protocol) is decoded from features, against chance.

    Parameters
    ----------
    features, groups, n_splits, n_repeats, n_permutations, random_state, progress
        As for `predict_phenotype`.
    site : array-like, shape (n_images,)
        Site labels; numbers are taken as labels. The name of a Series is the ``column``.

    Returns
    -------
    dict
        ``column``; ``n_participants``; ``sites`` (label to participants); ``balanced_accuracy``
        (mean, ci95, folds); ``permutation`` (as in metrics.json); ``sentence``. The middle two are
        None when there is nothing to decode, for instance with one site. ``harmonized``: the last
        three, of features that ComBat harmonized inside the folds; None when there is nothing to
        decode, or the package pycombat is missing. ``harmonized_sentence`` says it in words.
    """
    check_counts(n_splits, n_repeats, n_permutations)
    seed = fresh_seed(random_state)
    matrix = finite_matrix(features, "features", None, groups)
    group = read_labels(groups, len(matrix), "groups")
    given = read_column(site, len(matrix), "site")
    try:
        read = read_target(given, group, name="site", task="classification")
        design = make_design(read, group, group, n_splits=n_splits, n_repeats=n_repeats, seed=seed)
    except InputsUnusableError as error:
        return {
            "column": _name(site),
            "n_participants": None,
            "sites": None,
            "balanced_accuracy": None,
            "permutation": None,
            "sentence": f"Site was not decoded: {str(error).split('. ')[0].rstrip('.')}.",
            "harmonized": None,
            "harmonized_sentence": "Without two sites there is nothing to harmonize.",
        }
    tick = ProgressCounter(progress, audit_steps(n_repeats, n_permutations))
    source = Features(matrix[design.rows])
    found = _decode(design, source, n_permutations, seed, tick, "")
    harmonized = None
    said = (
        "What harmonization would change is not known: the package pycombat is missing "
        "(pip install 'nidl_dcl[harmonize]')."
    )
    if can_harmonize():
        cleaned = Cleaned(source, site=read.texts[design.rows])
        harmonized = _decode(
            design,
            cleaned,
            n_permutations,
            seed,
            tick,
            "After harmonization (ComBat in the folds), ",
        )
        said = harmonized["sentence"]
    tick.finish()
    return {
        "column": _name(site),
        "n_participants": design.n_participants,
        "sites": design.class_sizes,
        **found,
        "harmonized": harmonized,
        "harmonized_sentence": said,
    }


def audit_steps(n_repeats: int, n_permutations: int) -> int:
    """Return how often `site_audit` calls its `progress`."""
    return (n_repeats + permutation_steps(n_permutations)) * (1 + can_harmonize())


def _name(site: Column) -> str | None:
    name = getattr(site, "name", None)
    return None if name is None else str(name)


def _decode(
    design: CVDesign,
    source: Source,
    n_permutations: int,
    seed: int,
    tick: ProgressCounter,
    opening: str,
) -> dict[str, Any]:
    """Return how well the site is decoded from a source, and the sentence, which begins as told."""
    _, folds, _ = cross_validate(design, source, tick)
    score = interval([fold["balanced_accuracy"] for fold in folds], design.ratio)
    observed, permuted = permuted_scores(design, source, n_permutations, seed, tick)
    chance = chance_level("balanced_accuracy", observed, permuted)
    words = f"{opening}{'site' if opening else 'Site'} ({len(design.labels)}) is decoded with balanced accuracy {score['mean']:.2f}"
    if chance["p"] is not None:
        words += f", chance {chance['chance']:.2f}, p = {chance['p']:.2g}: " + (
            "the features carry site." if chance["p"] <= 0.05 else "no more than by chance."
        )
    return {
        "balanced_accuracy": score,
        "permutation": chance,
        "sentence": words if words.endswith(".") else words + ".",
    }


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
    design: CVDesign, site: Labels, participants: Labels, predicted: Array
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
    design: CVDesign,
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
                    said, _ = fit_once(source, values, train, test, folds, make_estimator(design))
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


def _can_learn(design: CVDesign, fold: NDArray[np.intp], train: NDArray[np.intp]) -> bool:
    """Return whether rows lie in two folds and, for classes, hold two of them."""
    several = design.task == "regression" or len(np.unique(design.value[design.unit[train]])) > 1
    return several and len(np.unique(fold[train])) > 1


def _spread_out(design: CVDesign, rows: NDArray[np.intp], predicted: Array) -> Array:
    result = np.full((len(design.unit), *predicted.shape[1:]), np.nan)
    result[rows] = predicted
    return result


def _score(
    design: CVDesign, rows: NDArray[np.intp], participants: Labels, predicted: Array, n: int
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

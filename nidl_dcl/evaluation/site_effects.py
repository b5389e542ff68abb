"""How well sites are decoded from features, and a target is predicted within and across sites.

Harmonizing features is for `harmonization`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    check_counts,
    cross_validate,
    dummy_prediction,
    permutation_steps,
    permutation_test,
    permuted_together,
    train_and_test,
)
from nidl_dcl.evaluation.features import (
    Column,
    Features,
    Matrix,
    Source,
    read_column,
    read_labels,
    read_matrix,
    refuse_non_finite,
)
from nidl_dcl.evaluation.fold_table import tested_rows
from nidl_dcl.evaluation.folds import CVDesign, Units, main_class, make_design
from nidl_dcl.evaluation.harmonization import AdjustedFeatures, can_harmonize
from nidl_dcl.evaluation.metrics import (
    MAIN_METRIC,
    METRIC_WORDS,
    compared,
    interval,
    p_words,
    prediction_scores,
    score_bounds,
    within,
)
from nidl_dcl.evaluation.row_labels import align_rows
from nidl_dcl.evaluation.targets import MIN_CLASS, read_target, read_values
from nidl_dcl.randomness import fresh_seed

Array = NDArray[np.float64]
Labels = NDArray[np.object_]
_SHOWN = 0.05
"""A p value above which nothing is shown."""

_METRICS = {"regression": ("mae", "r2", "r"), "classification": ("balanced_accuracy", "roc_auc")}


@dataclass(frozen=True, eq=False)
class AuditedSites:
    """Sites of the images, with how well they are decoded: computed once for several targets.

    Attributes
    ----------
    column : array-like or None, shape (n_images,)
        Site labels.
    audit : dict or None
        What `site_audit` gave for the features and sites of the rows that are not held out.
    """

    column: Column | None
    audit: Mapping[str, Any] | None = None

    def labels(self, groups: Labels) -> Labels | None:
        """Return the sites as text, None where missing; None when no image of the groups has one."""
        if self.column is None:
            return None
        given = read_column(self.column, len(groups), "site")
        if given.isna().all():
            return None
        return read_values(given, groups, name="site", task="classification", what="site").texts


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
    site, groups = align_rows(features, {"site": site, "groups": groups}).values()
    matrix = read_matrix(features, "features")
    group = read_labels(groups, len(matrix), "groups")
    refuse_non_finite(matrix, "features", pd.DataFrame({"group": group}))
    given = read_column(site, len(matrix), "site")
    column = None if given.name is None else str(given.name)
    try:
        read = read_target(given, group, name="site", task="classification")
        design = make_design(read, group, group, n_splits=n_splits, n_repeats=n_repeats, seed=seed)
    except InputsUnusableError as error:
        return {
            "column": column,
            **dict.fromkeys(("n_participants", "sites", "balanced_accuracy", "permutation")),
            "sentence": f"Site was not decoded: {str(error).split('. ')[0].rstrip('.')}.",
            "harmonized": None,
            "harmonized_sentence": "Without two sites there is nothing to harmonize.",
        }
    counter = ProgressCounter(progress, audit_steps(n_repeats, n_permutations))
    source = Features(matrix[design.rows])
    found = _decode(design, source, n_permutations, seed, counter)
    harmonized = None
    if can_harmonize():
        adjusted = AdjustedFeatures(source, site=read.texts[design.rows])
        harmonized = _decode(design, adjusted, n_permutations, seed, counter)
    counter.finish()
    return {
        "column": column,
        "n_participants": design.n_participants,
        "sites": design.class_sizes,
        **found,
        "harmonized": harmonized,
        "harmonized_sentence": harmonized["sentence"]
        if harmonized
        else "What harmonization would change is not known: the package pycombat is missing "
        "(pip install 'nidl_dcl[harmonize]').",
    }


def audit_steps(n_repeats: int, n_permutations: int) -> int:
    """Return how many steps `site_audit` counts."""
    return (n_repeats + permutation_steps(n_permutations)) * (1 + can_harmonize())


def _decode(
    design: CVDesign, source: Source, n_permutations: int, seed: int, counter: ProgressCounter
) -> dict[str, Any]:
    """Return how well the site is decoded from a source, with a sentence."""
    _, folds, _ = cross_validate(design, source, counter)
    bounds = score_bounds("balanced_accuracy")
    score = interval([fold["balanced_accuracy"] for fold in folds], design.ratio, bounds)
    chance = permutation_test(design, source, n_permutations, seed, counter)
    subject = "Site"
    if isinstance(source, AdjustedFeatures):
        subject = "After harmonization (ComBat in the folds), site"
    words = (
        f"{subject} ({len(design.labels)}) is decoded with balanced accuracy {score['mean']:.2f}"
    )
    if chance["p"] is not None:
        words += (
            f"; in the first repeat {chance['observed']:.2f}, and {chance['chance']:.2f} with sites "
            f"shuffled, p {p_words(chance['p'], chance['n'])}: "
        )
        words += "the features carry site" if chance["p"] <= 0.05 else "no more than by chance"
    return {"balanced_accuracy": score, "permutation": chance, "sentence": f"{words}."}


def count_sites(design: CVDesign, site: Labels) -> dict[str, int]:
    """Return the participants at each site, sorted; one with images at two sites counts at both."""
    labels, who = sorted({str(x) for x in site if x is not None}), design.participant[design.unit]
    return {label: len(np.unique(who[site == label])) for label in labels}


def score_sites(
    design: CVDesign,
    site: Labels,
    predicted: Array,
    sources: Mapping[str, Sequence[Source]],
    counter: ProgressCounter,
    *,
    n_permutations: int,
    seed: int,
) -> tuple[dict[str, Any], list[pd.DataFrame]]:
    """Return the scores within each site, and at sites that were left out of the training.

    Parameters
    ----------
    design : CVDesign
    site : ndarray of object, shape (n_used,)
        None where unknown.
    predicted : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)
        Of the embeddings, cross-validated.
    sources : mapping of str to sequence of Source
        ``embeddings`` and the baselines but for ``dummy``, which is added.
    counter : ProgressCounter
        Counts one step per site and source, or none with fewer than two sites; and the
        permutations.
    n_permutations, seed : int
        Permutations of the target within sites; their key.

    Returns
    -------
    scores : dict
        ``within``: site to ``n_participants`` and scores, means over the repeats (None where
        undefined); None with fewer than two sites.
        ``permutation_within``: of the embeddings, as ``permutation`` in metrics.json, where the
        target was shuffled within sites; None with fewer than two sites, and where fewer than half
        of the groups have another one of their site and fold.
        ``leave_one_site_out``, see `_score_new_sites`.
        ``n_images_without``, images without a site.
    tables : list of DataFrame
        What was predicted at the sites that were left out.
    """
    sites, inside = count_sites(design, site), {}
    for label, n in sites.items():
        rows = np.flatnonzero(site == label)
        means = _mean([_score(design, rows, each[rows], n) for each in predicted])
        inside[label] = {"n_participants": n, **means}
    chance = None
    strata = site_of_groups(design, site)
    blocks = permuted_together(design, strata).values()
    n_moved = sum(len(members) for members in blocks if len(members) > 1)
    if len(sites) > 1 and n_permutations and n_moved >= design.n_groups / 2:
        (source,) = sources["embeddings"]
        chance = permutation_test(design, source, n_permutations, seed, counter, strata)
    new, tables = _score_new_sites(design, site, sources, counter)
    found = {
        "within": inside if len(sites) > 1 else None,
        "permutation_within": chance,
        "leave_one_site_out": new,
        "n_images_without": int(pd.isna(site).sum()),
    }
    return found, tables


def site_of_groups(design: CVDesign, site: Labels) -> NDArray[np.intp]:
    """Return the number of the site that most images of each group have, of equals the first.

    Groups without any have a number of their own. Sites are numbered by their names.
    """
    names = np.where(pd.isna(site), "", site.astype(str))
    code = np.unique(names, return_inverse=True)[1]
    return main_class(code.astype(np.float64), design.group[design.unit])


def encode_sites(design: CVDesign, site: Labels) -> Array | None:
    """Return a column of 0 and 1 for each site, None with fewer than two among the used images.

    Parameters
    ----------
    design : CVDesign
    site : ndarray of object, shape (n_rows,)
        None where unknown; the rows in use come first, others (held out) add no site.
    """
    labels = sorted({str(x) for x in site[: len(design.rows)] if x is not None})
    if len(labels) < 2:
        return None
    return np.stack([site == label for label in labels], axis=1).astype(np.float64)


def judge_within_sites(headline: Mapping[str, Any], audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return a headline that says so when a target is not shown to be predicted within sites.

    Parameters
    ----------
    headline : mapping
        As `nidl_dcl.evaluation.metrics.compare` gives it.
    audit : mapping
        With the ``permutation_within`` of `score_sites`.
    """
    chance = audit.get("permutation_within")
    if chance is None:
        return {**headline, "within_site": None}
    shown = bool(chance["p"] <= _SHOWN)
    sentence = headline["sentence"]
    if not shown:
        sentence += (
            " Within sites, no prediction is shown (target shuffled within sites: p "
            f"{p_words(chance['p'], chance['n'])}), so what is predicted may be the site."
        )
    return {**headline, "within_site": shown, "sentence": sentence}


def _score_new_sites(
    design: CVDesign,
    site: Labels,
    sources: Mapping[str, Sequence[Source]],
    counter: ProgressCounter,
) -> tuple[dict[str, Any] | None, list[pd.DataFrame]]:
    """Return the scores at each site of models that were trained and tuned on the other sites.

    Tuning uses the folds of the first repeat. A group (participant, family) with an image at the
    tested site is not in training, also not by its images at other sites; images without a site are
    in training and never tested.

    Returns
    -------
    scores : dict or None
        ``metric``; ``sites`` (label to participants); ``scores``: name to metric to ``sites`` (label
        to score, None where undefined), ``mean`` over the sites and ``ci95`` across them (Student's
        t; None with fewer than three); ``sentence``. None when fewer than two sites have three
        participants.
    tables : list of DataFrame
        As `nidl_dcl.evaluation.fold_table.tested_rows` gives it.
    """
    sites = count_sites(design, site)
    tested = [label for label, n in sites.items() if n >= MIN_CLASS]
    if len(tested) < 2:
        return None, []
    tables = []
    group, names = design.group[design.unit], _METRICS[design.task]
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    found |= {name: {} for name in (*sources, "dummy")}
    for label, n in sites.items():
        test = np.flatnonzero(site == label)
        train = np.flatnonzero(~np.isin(group, group[test]))
        kept, folds = np.unique(design.row_folds[0][train], return_inverse=True)
        values = np.unique(design.value[design.unit[train]])
        enough = len(kept) > 1 and (design.task == "regression" or len(values) > 1)
        for name, by in found.items():
            runs = []
            if label in tested and enough and name == "dummy":
                runs = [dummy_prediction(design, train, test)]
            elif label in tested and enough:
                for source in sources[name]:
                    runs.append(train_and_test(design, source, train, test, folds[None])[0])
                    counter.update()
            scored = [_score(design, test, run, n) for run in runs]
            units = _units_at(design, test)
            tables += [
                tested_rows(
                    *(design, units, design.rows[test], run),
                    test="site",
                    features=name,
                    source=number,
                    site=label,
                )
                for number, run in enumerate(runs)
            ]
            by[label] = _mean(scored or [dict.fromkeys(names, float("nan"))])
    metric = MAIN_METRIC[design.task]
    scores = {
        name: {m: _across({s: by[s][m] for s in sites}, score_bounds(m)) for m in names}
        for name, by in found.items()
    }
    result = {
        "metric": metric,
        "sites": sites,
        "scores": scores,
        "sentence": _sentence(metric, scores, len(tested)),
    }
    return result, tables


def _units_at(design: CVDesign, rows: NDArray[np.intp]) -> Units:
    """Return the units of some rows, in which each participant of these rows weighs the same."""
    units, code = np.unique(design.unit[rows], return_inverse=True)
    of_unit, group = design.participant[units], design.group[units]
    weight = 1 / np.bincount(of_unit)[of_unit]
    return Units(code.astype(np.intp), design.value[units], weight, of_unit, group)


def _score(design: CVDesign, rows: NDArray[np.intp], predicted: Array, n: int) -> dict[str, float]:
    """Return the scores of some rows, undefined with few participants or one class.

    Images are averaged by unit, participants weigh the same.
    """
    units = _units_at(design, rows)
    truth, code = units.value, units.unit
    undefined = dict.fromkeys(_METRICS[design.task], float("nan"))
    if n < MIN_CLASS or (design.labels and len(np.unique(truth)) < 2):
        return undefined
    mean = np.zeros((len(truth), *predicted.shape[1:]))
    np.add.at(mean, code, predicted)
    mean /= np.bincount(code).reshape(-1, *[1] * (mean.ndim - 1))
    scores = prediction_scores(truth, mean, units.weight, design.labels)
    return {metric: scores[metric] for metric in undefined}


def _mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Return the mean of each score; None where it is undefined."""
    means = {metric: float(np.mean([run[metric] for run in runs])) for metric in runs[0]}
    return {metric: x if np.isfinite(x) else None for metric, x in means.items()}


def _across(sites: Mapping[str, float | None], bounds: tuple[float, float]) -> dict[str, Any]:
    """Return the scores of the sites, their mean and its interval across sites."""
    known = np.array([x for x in sites.values() if x is not None])
    result: dict[str, Any] = {"sites": dict(sites), "mean": None, "ci95": None}
    if len(known):
        result["mean"] = mean = float(known.mean())
    if len(known) > 2:
        half = float(student_t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
        result["ci95"] = within(bounds, mean - half, mean + half)
    return result


def _sentence(metric: str, scores: Mapping[str, Any], n_sites: int) -> str:
    means = {name: by[metric]["mean"] for name, by in scores.items()}
    own = means.pop("embeddings")
    if own is None:
        return "Prediction at new sites is undefined: no site can be left out."
    mine, *texts = compared(own, *means.values())
    others = ", ".join(f"{name} {text}" for name, text in zip(means, texts, strict=True))
    return (
        f"Trained without the site that is tested, {n_sites} sites in turn, the embeddings have a "
        f"{METRIC_WORDS[metric]} of {mine} on average over the sites ({others})."
    )

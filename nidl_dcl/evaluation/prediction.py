"""Predict a phenotype from a table of features, with the baselines, chance and exposure beside it.

Takes tables, never a model or a file: embeddings come from `embedding`, phenotypes from
`phenotypes`, and the stages write what is returned here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.confounds import (
    Cleaned,
    EncodedConfounds,
    encode_confounds,
    harmonization_counts,
    read_confounds,
    read_target_beside,
    require_harmonization,
)
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    check_counts,
    cross_validate,
    dummy,
    dummy_prediction,
    permutation_steps,
    permuted_scores,
    resampled_scores,
    train_and_test,
)
from nidl_dcl.evaluation.features import (
    MAX_COMPONENTS,
    Baseline,
    Column,
    Comparison,
    Components,
    Features,
    Matrix,
    Source,
    finite_matrix,
    read_column,
    read_labels,
    read_sources,
)
from nidl_dcl.evaluation.folds import CVDesign, make_design, make_units
from nidl_dcl.evaluation.learning_curve import check_shares, learning_shares
from nidl_dcl.evaluation.learning_curve import learning_curve as score_by_size
from nidl_dcl.evaluation.metrics import MAIN_METRIC, METRIC_WORDS, chance_level, compare, summarize
from nidl_dcl.evaluation.prediction_table import (
    describe_predictions,
    passed_on,
    prediction_table,
    read_persons,
)
from nidl_dcl.evaluation.readout import FittedReadout, fit_readout
from nidl_dcl.evaluation.site_effects import (
    audit_steps,
    score_new_sites,
    score_within_sites,
    site_audit,
    usable_sites,
)
from nidl_dcl.evaluation.targets import HELD_OUT, Target, Values, read_values, target_labels
from nidl_dcl.io.formats import camel_case
from nidl_dcl.randomness import fresh_seed

__all__ = [
    "Baseline",
    "PhenotypeResult",
    "camel_case",
    "count_exposure",
    "count_used",
    "predict_phenotype",
    "read_seen",
    "site_audit",
    "target_labels",
]

MIN_HELD_OUT = 5
"""Fewer held-out participants than this are not scored: the number would say nothing."""


_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class PhenotypeResult:
    """What `predict_phenotype` found for one target.

    Attributes
    ----------
    metrics : dict
        What ``metrics.json`` holds: JSON types only, None where a number is undefined.
    predictions : DataFrame
        One row per input row, in input order, the ones left out included.
    columns : dict
        Description of each column of `predictions`, for the BIDS sidecar.
    readout : FittedReadout or None
        The same model fitted on all used rows, to be applied to other people; None after
        harmonization, which is learnt for the sites of these rows alone.
    fitted_on : ndarray of int
        The rows it was fitted on.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    columns: dict[str, dict[str, Any]]
    readout: FittedReadout | None
    fitted_on: NDArray[np.intp]

    def summary(self) -> dict[str, Any]:
        """Return one row of a table of targets.

        Returns
        -------
        dict
            ``target``, ``metric``, ``score``, ``low`` and ``high`` (its interval), ``chance``,
            ``p``, ``half`` (the score with half of the labeled participants, None if unknown), one
            entry per baseline (``dummy``, ``untrained``, ...; ``untrained`` is None when it was not
            given), ``n`` (participants).
        """
        metrics = self.metrics
        metric = metrics["headline"]["metric"]
        score = metrics["scores"][metric]
        low, high = score["ci95"] or (None, None)
        curve = metrics["learning_curve"] or {"shares": [], "scores": {"embeddings": []}}
        sizes = dict(zip(curve["shares"], curve["scores"]["embeddings"], strict=True))
        baselines = {name: scores[metric]["mean"] for name, scores in metrics["baselines"].items()}
        return {
            "target": metrics["target"],
            "metric": metric,
            "score": score["mean"],
            "low": low,
            "high": high,
            "chance": metrics["permutation"]["chance"],
            "p": metrics["permutation"]["p"],
            "half": sizes[0.5]["mean"] if 0.5 in sizes else None,
            "dummy": baselines.pop("dummy"),
            "untrained": baselines.pop("untrained", None),
            **baselines,
            "n": metrics["n_participants"],
        }


def predict_phenotype(
    features: Matrix,
    y: Column,
    groups: Column,
    *,
    target: str = "target",
    task: str = "auto",
    baselines: Mapping[str, Comparison] | None = None,
    site: Column | dict[str, Any] | None = None,
    audit: dict[str, Any] | None = None,
    confounds: pd.DataFrame | None = None,
    harmonize: bool = False,
    seen: Column | None = None,
    seen_by: Column | None = None,
    persons: Column | None = None,
    held_out: Column | None = None,
    ids: pd.DataFrame | None = None,
    n_splits: int = 5,
    n_repeats: int = 5,
    n_permutations: int = 200,
    learning_curve: bool | Sequence[float] = True,
    random_state: int | np.random.RandomState | None = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PhenotypeResult:
    """Predict a phenotype by a linear readout, cross-validated by participant.

    Regression is StandardScaler and Ridge, classification StandardScaler and class-balanced
    LogisticRegression; scaling and the choice of the penalty happen inside the folds, on the same
    division of participants (`nidl_dcl.evaluation.linear_models.nested`). Rows are matched by position.

    Parameters
    ----------
    features : ndarray or DataFrame, shape (n_images, n_features)
        Embeddings; finite numbers.
    y : array-like, shape (n_images,)
        The phenotype, with missing values. Images of a participant that share a value are predicted
        one by one, averaged and scored once; other values of the participant (sessions) are scored
        apart and weigh so that each participant counts once.
    groups : array-like, shape (n_images,)
        Who is never split between training and test: participants, or families (then `ids` must
        hold the ``participant_id``).
    target : str
        Name of the phenotype.
    task : {"auto", "classification", "regression"}
        For the rules of ``"auto"`` see `nidl_dcl.evaluation.targets.read_target`.
    baselines : dict, optional
        Name to matrix, to several matrices (scores are averaged over them: three untrained seeds),
        or to a `Baseline` (voxels). ``dummy`` is always there: the training mean, or the shares
        of the classes.
    site : array-like, shape (n_images,), optional
        Scanner or site; adds how well it is decoded from the features, before and after
        harmonization, and how well the target is predicted within sites and at new sites. The name
        of a Series is told. Or what `site_audit` gave, which then stands for all of this.
    audit : dict, optional
        What `site_audit` gave for these features and `site` (of rows that are not held out), to
        compute it once for several targets.
    confounds : DataFrame, shape (n_images, n_confounds), optional
        Columns whose linear effect is removed from the features, and from those of every baseline,
        by coefficients learnt in the training rows of each fold: numbers as they are, categories
        one by one (told apart by the rules for targets). Adds the baseline ``confounds``: they
        alone, in the same readout. A row that lacks one is left out.
    harmonize : bool, default=False
        Harmonize features and baselines by `site` (ComBat, package pycombat), learnt in the
        training rows of each fold, before confounds are removed; the target is not told to it. A
        row whose site is unknown, or has fewer than three training rows, stays as it is.
    seen : array-like of bool, shape (n_images,), optional
        Whether the encoder saw the participant in pretraining; missing where unknown.
    seen_by : array-like of str, shape (n_images,), optional
        How that is known: ``"image"`` (the same voxels) or ``"id"`` (the name alone).
    persons : array-like, shape (n_images,), optional
        Who counts once, where several participants are one person, such as those who share an
        image; default: the participants.
    held_out : array-like of bool, shape (n_images,), optional
        Rows of participants who are kept out of everything but one last score, see Notes.
    ids : DataFrame, shape (n_images, n_columns), optional
        Columns to pass on to the table of predictions, such as ``participant_id session_id run``.
    n_splits, n_repeats : int
        Folds (3 or more; fewer are used when data are few) and repeats.
    n_permutations : int
        Permutations of the target between groups for chance level and p value, on the folds of the
        first repeat, for ``mae`` or ``balanced_accuracy``; 0 for none.
    learning_curve : bool or sequence of float
        Scores with fewer labeled participants, on the same folds: with a half, a quarter and so on
        while at least ten remain, or with the shares given; False for none.
    random_state : int, RandomState or None
        Same number, same result; the global generators are not touched.
    progress : callable, optional
        Called with the steps done and the steps in all.

    Returns
    -------
    PhenotypeResult

    Raises
    ------
    UsageError
        For unequal lengths, an unknown task, too few splits, a name that is taken, a confound that
        is the target or constant, harmonization without sites or without the package, and for
        held-out participants whom the encoder saw, or whose group is not held out.
    InputsUnusableError
        For a constant or empty target, fewer than six participants or two classes of three, and
        features that are not finite.

    Notes
    -----
    Held-out rows decide about nothing: not the task, the classes, the folds, scaling, tuning,
    components, permutations or the site audit. At the end one readout of all other rows, tuned by
    their folds, predicts them; embeddings and baselines are scored, once, in ``metrics["holdout"]``,
    with percentile intervals over resampled participants. Of fewer than five nothing is scored.
    """
    check_counts(n_splits, n_repeats, n_permutations)
    check_shares(learning_curve)
    seed = fresh_seed(random_state)
    matrix = finite_matrix(features, "features", ids, groups)
    n = len(matrix)
    group = read_labels(groups, n, "groups")
    table, participant = passed_on(ids, group, n)
    ids_of, participant = participant, read_persons(persons, participant, group)
    aside = _aside(held_out, group)
    values = None if confounds is None else _read_confounds(confounds, group, aside, target)
    read = read_target_beside(read_column(y, n, "y"), group, aside, values, name=target, task=task)
    design = make_design(
        read, participant, group, n_splits=n_splits, n_repeats=n_repeats, seed=seed
    )
    tested = np.flatnonzero(read.reasons == HELD_OUT)
    rows = np.concatenate([design.rows, tested])
    for name in ("dummy", *(["confounds"] if values else [])):
        if baselines and name in baselines:
            raise UsageError(
                f"The baseline name {name!r} is taken: it is always added. Use another."
            )
    removed = encode_confounds(values, rows, group, len(design.rows)) if values else None
    per_site = None if site is None or isinstance(site, dict) else read_column(site, n, "site")
    sites = _site_labels(per_site, group)
    if harmonize:
        require_harmonization()
        if sites is None:
            raise UsageError("Harmonization needs a site for the images, and there is none.")
    site_used = None if sites is None else sites[design.rows]

    def clean(source: Source) -> Source:
        assert isinstance(source, Features | Components)
        if removed is None and not harmonize:
            return source
        return Cleaned(source, removed, sites[rows] if harmonize and sites is not None else None)

    others: dict[str, list[Source]] = {
        name: [clean(each) for each in read_sources(name, given, rows, n, ids, groups, aside)]
        for name, given in (baselines or {}).items()
    }
    if removed is not None:
        others["confounds"] = [Features(removed.matrix)]
    was_seen = read_seen(seen, n, participant)
    spent = aside & (was_seen == True).fillna(False).to_numpy(dtype=bool)  # noqa: E712
    if spent.any():
        raise UsageError(
            f"{participant[spent][0]} is held out, but the encoder saw it "
            "in pretraining. Hold out only whom it has not seen."
        )
    shares = learning_shares(design, learning_curve)
    evaluated = 1 + sum(map(len, others.values()))
    auditing = audit is None and per_site is not None
    steps = evaluated * max(1, len(shares)) * n_repeats + permutation_steps(n_permutations)
    steps += audit_steps(n_repeats, n_permutations) * auditing
    if site_used is not None:
        steps += evaluated * len(usable_sites(site_used, participant[design.rows]))
    tick = ProgressCounter(progress, steps)

    source = clean(Features(matrix[rows]))
    predicted, folds, strengths = cross_validate(design, source, tick)
    scores = summarize(folds, design.ratio)
    compared = {"dummy": summarize(dummy(design), design.ratio)}
    for name, sources in others.items():
        runs = [cross_validate(design, each, tick)[1] for each in sources]
        mean = [
            {metric: float(np.mean([run[k][metric] for run in runs])) for metric in folds[k]}
            for k in range(len(folds))
        ]
        compared[name] = summarize(mean, design.ratio)
    metric = MAIN_METRIC[design.task]
    headline = compare(target, metric, scores, compared, design.ratio)
    curve = None
    if shares:
        curve = score_by_size(
            design,
            {"embeddings": [source], **others},
            {"embeddings": scores, **compared},
            headline,
            target=target,
            shares=shares,
            seed=seed,
            tick=tick,
        )
    observed, permuted = permuted_scores(design, source, n_permutations, seed, tick)
    if isinstance(site, dict):
        audit = site
    elif auditing:
        assert per_site is not None
        audit = site_audit(
            matrix[~aside],
            per_site[~aside].rename(getattr(site, "name", None)),
            group[~aside],
            n_splits=n_splits,
            n_repeats=n_repeats,
            n_permutations=n_permutations,
            random_state=seed,
            progress=lambda done, steps: tick(),
        )
    if site_used is not None:
        who = participant[design.rows]
        several = len(usable_sites(site_used, who)) > 1
        audit = (audit or {}) | {
            "within": score_within_sites(design, site_used, who, predicted) if several else None,
            "leave_one_site_out": score_new_sites(
                design, site_used, who, {"embeddings": [source], **others}, tick
            ),
        }
    tick.finish()
    final, last = _last_score(read, design, source, others, (participant, group, aside), seed)
    if last is not None and was_seen[aside].isna().any():
        last["sentence"] += " It is not known whether the encoder saw them in pretraining."
    metrics = {
        "target": target,
        "task": design.task,
        "task_rule": read.rule,
        **count_used(read, design, participant, ~aside),
        "duplicates": _duplicates(read, ids_of, participant),
        "model": _model_text(design, matrix.shape[1], removed, harmonize),
        "cv": {
            "scheme": "repeated k-fold by group, stratified by "
            + ("class" if design.task == "classification" else "rank of the target"),
            "n_splits": design.n_folds,
            "n_splits_asked": n_splits,
            "n_repeats": n_repeats,
            "test_train_ratio": design.ratio,
            "tuning": "penalty chosen in each fold by cross-validation over its other folds",
            "strengths": strengths,
            "interval": "Nadeau-Bengio corrected, 95 %",
            "random_state": seed,
        },
        "groups": {
            "n": design.fold.shape[1],
            "rule": "images of a group are never split between training and test",
        },
        "scores": scores,
        "permutation": chance_level(metric, observed, permuted),
        "baselines": compared,
        "headline": headline,
        "learning_curve": curve,
        "exposure": count_exposure(was_seen, seen_by, participant, design),
        "holdout": last,
        "site": audit,
        "confounds": None if removed is None else _confounds_text(removed),
        "harmonization": _harmonization_text(design, site_used) if harmonize else None,
    }
    predictions = prediction_table(table, read, design, predicted, was_seen, final)
    columns = describe_predictions(predictions, design, target)
    readout = None
    if not harmonize:  # what ComBat learns is of these sites
        readout = fit_readout(
            design,
            matrix[design.rows],
            source=source,
            names=() if removed is None else removed.names,
            values=None if removed is None else removed.matrix[: len(design.rows)],
        )
    return PhenotypeResult(metrics, predictions, columns, readout, design.rows)


def _read_confounds(
    given: pd.DataFrame, group: NDArray[np.object_], aside: NDArray[np.bool_], target: str
) -> dict[str, Values]:
    if not isinstance(given, pd.DataFrame):
        raise UsageError(f"confounds must be a DataFrame, got {type(given).__name__}.")
    if len(given) != len(group):
        raise UsageError(f"confounds has {len(given)} rows, but the features have {len(group)}.")
    return read_confounds(given, group, aside, target)


def _site_labels(
    site: pd.Series[Any] | None, group: NDArray[np.object_]
) -> NDArray[np.object_] | None:
    """Return the site of each row as text, None where it is missing; None without any site."""
    if site is None or site.isna().all():
        return None
    return read_values(site, group, name="site", task="classification", what="site").texts


def read_seen(seen: Column | None, n: int, participant: NDArray[np.object_]) -> pd.Series[Any]:
    """Return whether pretraining saw each row's participant, by any image; missing where unknown."""
    if seen is None:
        return pd.Series([pd.NA] * n, dtype="boolean")
    known = read_column(seen, n, "seen").astype("boolean")
    return known.groupby(participant).transform("max").astype("boolean")


def _aside(held_out: Column | None, group: NDArray[np.object_]) -> NDArray[np.bool_]:
    """Return which rows are held out; whole groups are, or nobody of them."""
    if held_out is None:
        return np.zeros(len(group), dtype=bool)
    aside = read_column(held_out, len(group), "held_out").astype(bool)
    parted = aside.groupby(group).transform("nunique") > 1
    if parted.any():
        raise UsageError(
            f"Group {group[parted.to_numpy()][0]!r} is held out in part. Hold out all of its images, "
            "or none."
        )
    return aside.to_numpy()


def _last_score(
    read: Target,
    design: CVDesign,
    source: Source,
    others: Mapping[str, list[Source]],
    people: tuple[NDArray[np.object_], NDArray[np.object_], NDArray[np.bool_]],
    seed: int,
) -> tuple[NDArray[np.float64] | None, dict[str, Any] | None]:
    """Predict and score the held-out rows, which no other part of a prediction looks at."""
    person, group, aside = people
    if not aside.any():
        return None, None
    tested = np.flatnonzero(read.reasons == HELD_OUT)
    n, n_aside = len(set(person[tested])), len(set(person[aside]))
    result: dict[str, Any] = {"n_participants": n, "n_dropped": n_aside - n}
    result |= {"scores": None, "baselines": None}
    if n < MIN_HELD_OUT:
        result["sentence"] = (
            f"{n_aside} participants are held out, {n} of them with a usable {read.name}: fewer than "
            f"{MIN_HELD_OUT}, so they are not scored."
        )
        return None, result
    units = make_units(read.numbers[tested], person[tested], group[tested])
    at = np.arange(len(design.unit), len(design.unit) + len(tested))

    def score(*predictions: NDArray[np.float64]) -> dict[str, Any]:
        return resampled_scores(design, units, predictions, _RESAMPLES, seed, "bootstrap")

    final, strength = train_and_test(design, source, at)
    result["strength"] = strength
    result["scores"] = score(final)
    result["baselines"] = {
        "dummy": score(dummy_prediction(design, np.arange(len(design.unit)), at))
    }
    for name, sources in others.items():
        result["baselines"][name] = score(*(train_and_test(design, s, at)[0] for s in sources))
    result["interval"] = f"percentiles of {_RESAMPLES} draws of participants, 95 %"
    metric = MAIN_METRIC[design.task]
    own, dummy_score = result["scores"][metric], result["baselines"]["dummy"][metric]
    within = " ({:.3g} to {:.3g})".format(*own["ci95"]) if own["ci95"] else ""
    result["sentence"] = (
        f"In {n} participants held out from everything, one readout of the {design.n_participants} "
        f"others has {METRIC_WORDS[metric]} {own['mean']:.3g}{within}; dummy: "
        f"{dummy_score['mean']:.3g}."
    )
    return final, result


def _duplicates(
    read: Target, ids_of: NDArray[np.object_], person: NDArray[np.object_]
) -> dict[str, Any] | None:
    """Return how many participants are the same person as another, and who contradicts whom."""
    table = pd.DataFrame({"person": person, "id": ids_of, "value": read.numbers})
    several = table[table.groupby("person")["id"].transform("nunique") > 1]
    if several.empty:
        return None
    n_ids, n_persons = several["id"].nunique(), several["person"].nunique()
    conflicts = []
    for name, rows in several.dropna(subset="value").groupby("person"):
        values = [set(one) for _, one in rows.groupby("id")["value"]]
        if not set.intersection(*values):
            conflicts.append(str(name))
    sentence = f"{n_ids} participants are {n_persons} by their images, and count as {n_persons}."
    if conflicts:
        sentence += (
            f" Their values of {read.name} contradict one another for {len(conflicts)} of them "
            f"({', '.join(conflicts[:5])}{', …' if len(conflicts) > 5 else ''}): each value weighs "
            "less, so that the person counts once. Find out which is right."
        )
    return {"n_ids": n_ids, "n_persons": n_persons, "conflicting": conflicts, "sentence": sentence}


def count_exposure(
    was_seen: pd.Series[Any],
    seen_by: Column | None,
    participant: NDArray[np.object_],
    design: CVDesign,
) -> dict[str, Any]:
    """Return how many of the tested participants pretraining saw, with a sentence."""
    tested = was_seen.iloc[design.rows].groupby(participant[design.rows]).first()
    n, unknown = len(tested), int(tested.isna().sum())
    yes, no = int((tested == True).sum()), int((tested == False).sum())  # noqa: E712
    if unknown == n:
        sentence = "It is not known which of the participants the encoder saw in pretraining."
    elif no == n:
        sentence = f"The encoder saw none of the {n} participants in pretraining."
    else:
        sentence = (
            f"The encoder saw {yes} of the {n} participants in pretraining, so the scores are not "
            "those of participants new to the encoder."
        )
        if unknown:
            sentence += f" Of {unknown} it is not known."
    by_image = None
    if seen_by is not None:
        how = read_column(seen_by, len(participant), "seen_by") == "image"
        saw = how.groupby(participant).transform("max").iloc[design.rows]
        by_image = int(saw.groupby(participant[design.rows]).first().sum())
        if yes:
            sentence += f" {by_image} were recognized by an image"
            sentence += f", {yes - by_image} by their id alone." if yes > by_image else "."
        if yes > by_image:
            sentence += (
                " An id alone may be another person of the same name, such as sub-01 of another "
                "dataset; it counts as seen, to be safe."
            )
    return {
        "seen": yes,
        "not_seen": no,
        "unknown": unknown,
        "by_image": by_image,
        "by_id_only": None if by_image is None else yes - by_image,
        "sentence": sentence,
    }


def count_used(
    read: Target, design: CVDesign, participant: NDArray[np.object_], kept: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return what was used and what was left out; participants are left out when no image stays."""
    reasons = read.reasons[kept]
    left = (
        pd.Series(reasons)
        .groupby(participant[kept])
        .agg(lambda r: "" if (r == "").any() else r.iloc[0])
    )
    images = pd.Series(reasons[reasons != ""]).value_counts().sort_index()
    people = left[left != ""].value_counts().sort_index()
    counts: dict[str, Any] = {
        "n_participants": design.n_participants,
        "n_dropped": {str(k): int(v) for k, v in people.items()},
        "n_images": len(design.rows),
        "n_images_dropped": {str(k): int(v) for k, v in images.items()},
    }
    if design.task == "classification":
        return counts | {"classes": design.class_sizes}
    mean = float(np.average(design.value, weights=design.weight))
    variance = float(np.average((design.value - mean) ** 2, weights=design.weight))
    return counts | {
        "distribution": {
            "mean": mean,
            "sd": variance**0.5,
            "min": float(design.value.min()),
            "max": float(design.value.max()),
        }
    }


def _confounds_text(removed: EncodedConfounds) -> dict[str, Any]:
    return {
        "columns": removed.described,
        "sentence": f"The linear effect of {', '.join(removed.described)} is removed from the "
        "features of embeddings and image baselines, learnt in the training rows of each fold; the "
        "baseline 'confounds' has them alone.",
    }


def _harmonization_text(design: CVDesign, site: NDArray[np.object_] | None) -> dict[str, Any]:
    assert site is not None
    folds = np.stack([design.row_folds(repeat) for repeat in range(len(design.fold))])
    counts = harmonization_counts(site, folds)
    left = counts["n_images_not_harmonized"]
    return {
        "method": "ComBat by site (parametric, no covariates), learnt in the training rows of each "
        "fold; voxels: in their principal component scores",
        **counts,
        "sentence": "Features are harmonized by site inside the folds (ComBat, without the target). "
        + (
            f"{left} of {len(site)} images were tested as they are, since their site was unknown or "
            "had too few training images."
            if left
            else "No image was left out of it."
        ),
    }


def _model_text(
    design: CVDesign, n_features: int, removed: EncodedConfounds | None, harmonize: bool
) -> str:
    steps = ["StandardScaler"]
    steps += ["ComBat by site"] * harmonize
    steps += [f"linear effect of {', '.join(removed.described)} removed"] if removed else []
    steps += [
        "Ridge" if design.task == "regression" else "LogisticRegression(class_weight='balanced')"
    ]
    model = ", ".join(steps)
    return (
        f"{model} on {n_features} features; wide baselines: principal components "
        f"(at most {MAX_COMPONENTS}) learnt in the folds, then the same readout"
    )

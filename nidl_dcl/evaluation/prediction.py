"""Predict a phenotype from a table of features, with baselines, chance level and exposure beside it.

Takes tables, never a model or a file. People, targets, confounds and baselines are read, scored and
described each in a module of their name; stages write what is returned here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.baselines import Comparison, read_baseline
from nidl_dcl.evaluation.calibration import describe_calibration
from nidl_dcl.evaluation.confounds import (
    EncodedConfounds,
    encode_confounds,
    read_confounds,
    read_target_beside,
)
from nidl_dcl.evaluation.cross_validation import (
    ProgressCounter,
    check_counts,
    cross_validate_all,
    make_estimator,
    permutation_steps,
    permutation_test,
)
from nidl_dcl.evaluation.extra_features import ExtraFeatures, read_extra_features
from nidl_dcl.evaluation.features import (
    MAX_COMPONENTS,
    Column,
    Components,
    Features,
    FeaturesBeside,
    Matrix,
    Source,
    read_column,
    read_matrix,
    refuse_non_finite,
)
from nidl_dcl.evaluation.fold_table import describe_folds, fold_table
from nidl_dcl.evaluation.folds import CVDesign, count_used, make_design
from nidl_dcl.evaluation.harmonization import (
    AdjustedFeatures,
    describe_harmonization,
    require_harmonization,
)
from nidl_dcl.evaluation.holdout import score_held_out
from nidl_dcl.evaluation.learning_curve import check_shares, learning_shares
from nidl_dcl.evaluation.learning_curve import learning_curve as score_by_size
from nidl_dcl.evaluation.linear_models import count_edges
from nidl_dcl.evaluation.metrics import MAIN_METRIC, compare
from nidl_dcl.evaluation.missing_values import describe_missing
from nidl_dcl.evaluation.people import People, read_people
from nidl_dcl.evaluation.prediction_table import describe_predictions, prediction_table
from nidl_dcl.evaluation.readout import FittedReadout, fit_readout
from nidl_dcl.evaluation.row_labels import align_rows
from nidl_dcl.evaluation.site_effects import (
    AuditedSites,
    audit_steps,
    count_sites,
    encode_sites,
    judge_within_sites,
    score_sites,
    site_audit,
)
from nidl_dcl.evaluation.summary import summary_table
from nidl_dcl.evaluation.targets import HELD_OUT, Target
from nidl_dcl.randomness import fresh_seed

Labels = NDArray[np.object_]


class HasBaselines(Protocol):
    """A model that knows what its embeddings have to beat, such as `nidl_dcl.DCL`."""

    def baseline_features(self, data: Any) -> Mapping[str, Comparison]:
        """Return features of each baseline, one row per row of ``data.images``."""
        ...


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
        harmonization, which is learned for the sites of these rows alone.
    fitted_on : ndarray of int
        The rows it was fitted on.
    repeats : dict
        What `predictions` is the mean of, and the same of each baseline but ``dummy``, so that two can
        be compared participant by participant: name to array, shape (n_sources, n_repeats,
        n_images) of numbers or (n_sources, n_repeats, n_images, n_classes) of probabilities, NaN
        where an image is not used.
    folds : DataFrame
        Every prediction that was scored, by test set: what scores can be computed from again.
    fold_columns : dict
        Description of `folds` and of its columns, for the BIDS sidecar.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    columns: dict[str, dict[str, Any]]
    readout: FittedReadout | None
    fitted_on: NDArray[np.intp]
    repeats: dict[str, NDArray[np.float64]]
    folds: pd.DataFrame
    fold_columns: dict[str, Any]

    def __str__(self) -> str:
        """Return the scores as a table to print, and the headline in words."""
        return f"{summary_table([self.summary()])}\n\n{self.metrics['headline']['sentence']}"

    def summary(self) -> dict[str, Any]:
        """Return one row of a table of targets.

        Returns
        -------
        dict
            ``target``, ``metric``, ``score``, ``low`` and ``high`` (its interval), ``observed`` and
            ``chance`` (the score in the first repeat, and with the target shuffled), ``p``,
            ``permutations`` (how many), ``half`` (the score with half of the labeled participants, None if unknown), one
            entry per baseline (``dummy``, ``untrained``, ...; ``untrained`` is None when it was not
            given), ``n`` (participants).
        """
        metrics, metric = self.metrics, self.metrics["headline"]["metric"]
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
            "observed": metrics["permutation"]["observed"],
            "p": metrics["permutation"]["p"],
            "permutations": metrics["permutation"]["n"],
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
    scaling: Literal["each", "shared"] = "each",
    baselines: Mapping[str, Comparison] | Literal["default"] | None = None,
    model: HasBaselines | None = None,
    data: Any = None,
    extra_features: pd.DataFrame | None = None,
    site: Column | AuditedSites | None = None,
    confounds: pd.DataFrame | None = None,
    harmonize: bool = False,
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
    LogisticRegression; scaling (see `scaling`) and the choice of the penalty happen inside the folds, on the same
    division of participants (`nidl_dcl.evaluation.linear_models.nested_cv_predict`).

    Rows of arrays and lists are matched by position. Where features are a DataFrame, other pandas
    objects are put into its order by their labels; labels that do not match are refused, and so are
    pandas objects that differ in their labels beside an array of features.

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
    task : {"auto", "classification", "quantity", "regression"}
        ``"quantity"`` says that `y` has a unit, so that few different numbers are no classes. For the rules of ``"auto"`` see `nidl_dcl.evaluation.targets.read_target`.
    scaling : {"each", "shared"}, default="each"
        How features, and those of baselines, are standardized: each by its own standard deviation; or
        by the square root of its variance plus the mean variance of all. The latter, which the command
        takes, is for columns of one kind and unit, such as embeddings: those that hardly vary are not
        blown up. See `nidl_dcl.evaluation.features.fit_scaler`.
    baselines : dict, optional
        Name to matrix, to several matrices (scores are averaged over them: three untrained seeds),
        or to a `nidl_dcl.evaluation.baselines.Baseline` (voxels). ``dummy`` is always there: the
        training mean, or the shares of the classes. ``"default"``: those of the command, untrained
        encoders and voxels, of `model` and `data`.
    model : DCL, optional
        What gave the features, for ``baselines="default"``.
    data : BIDSDataModule, optional
        What they were computed from, one row per row of ``data.images``, for ``baselines="default"``.
    extra_features : DataFrame, shape (n_images, n_columns), optional
        Numbers to predict from beside the features, and beside those of every baseline (voxels: beside
        their components), such as the logarithm of the brain's volume in ml where the images were
        aligned and no longer have it. Standardized by the training rows of each fold; together they
        weigh as much as a tenth of the columns of features, and as 50 at least, whatever their units.
        Adds a baseline of their name: they alone.
    site : array-like, shape (n_images,), optional
        Scanner or site; adds how well it is decoded from the features, before and after
        harmonization, how well the target is predicted within sites (against targets shuffled within
        sites) and at new sites, and, with two sites or more, the baseline ``site``: the site alone. The name
        of a Series is reported. An `nidl_dcl.evaluation.site_effects.AuditedSites` saves decoding the
        sites again for each of several targets.
    confounds : DataFrame, shape (n_images, n_confounds), optional
        Columns whose linear effect is removed from the features, and from those of every baseline,
        by coefficients learned in the training rows of each fold: numbers as they are, categories
        one by one (which is which, the rules for targets decide). Adds the baseline ``confounds``: they
        alone, in the same readout. A row that lacks one is left out.
    harmonize : bool, default=False
        Harmonize features and baselines by `site` (ComBat, package pycombat), learned in the
        training rows of each fold, before confounds are removed, and without the target. A row
        whose site is unknown, or has fewer than three training rows, stays as it is.
    held_out : array-like of bool, shape (n_images,), optional
        Rows of participants who are kept out of everything but one last score, see Notes.
    ids : DataFrame, shape (n_images, n_columns), optional
        Columns to pass on to the table of predictions, such as ``participant_id session_id run``.
        Three are read and not passed on: ``person_id``, who counts once, where several participants
        are one person (default: the participants); ``seen``, whether the encoder saw the participant
        in pretraining, missing where unknown; ``seen_by``, how that is known: ``"image"`` (the same
        voxels) or ``"id"`` (the name alone).
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
        For unequal lengths, rows that labels do not match, an unknown task, too few splits, a name that is taken, a confound that
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

    Examples
    --------
    >>> import numpy as np
    >>> from nidl_dcl import predict_phenotype
    >>> rng = np.random.default_rng(0)
    >>> embeddings = rng.normal(size=(60, 8))
    >>> age = 50 + 10 * embeddings[:, 0] + rng.normal(size=60)
    >>> people = [f"sub-{i:02d}" for i in range(60)]
    >>> result = predict_phenotype(embeddings, age, people, target="age", n_permutations=20)
    >>> row = result.summary()
    >>> row["metric"], row["score"] < 2 < row["dummy"]
    ('mae', True)
    """
    check_counts(n_splits, n_repeats, n_permutations)
    check_shares(learning_curve)
    if scaling not in ("each", "shared"):
        raise UsageError(f"scaling is one of each, shared; got {scaling!r}.")
    seed = fresh_seed(random_state)
    compared = _given_baselines(baselines, model, data)
    beside: dict[str, Any] = {
        "y": y,
        "groups": groups,
        "baselines": compared,
        "extra_features": extra_features,
    }
    beside |= {"site": site, "confounds": confounds, "held_out": held_out, "ids": ids}
    y, groups, compared, extra_features, site, confounds, held_out, ids = align_rows(
        features, beside
    ).values()
    matrix = read_matrix(features, "features")
    people = read_people(groups, ids, len(matrix), held_out)
    refuse_non_finite(matrix, "features", people.table)
    people.refuse_seen()
    extra = read_extra_features(extra_features, people.table, target, matrix.shape[1])
    known = read_confounds(confounds, people.group, people.held_out, target)
    column = read_column(y, len(matrix), "y")
    phenotype = read_target_beside(
        column, people.group, people.held_out, known, name=target, task=task
    )
    design = make_design(
        phenotype, people.person, people.group, n_splits=n_splits, n_repeats=n_repeats, seed=seed
    )
    rows = np.concatenate([design.rows, np.flatnonzero(phenotype.reasons == HELD_OUT)])
    removed = encode_confounds(known, rows, people.group, len(design.rows)) if known else None
    sites = site if isinstance(site, AuditedSites) else AuditedSites(site)
    labels, harmonized = sites.labels(people.group), None
    if harmonize:
        require_harmonization()
        if labels is None:
            raise UsageError("Harmonization needs a site for the images, and there is none.")
        harmonized = labels[rows]
    at_sites = None if labels is None else encode_sites(design, labels[rows])
    sources = _read_sources(
        *(matrix, compared, rows, people, extra, removed, harmonized, scaling, at_sites)
    )
    shares = learning_shares(design, learning_curve)
    located = None if labels is None else labels[design.rows]
    n_sources = sum(map(len, sources.values()))
    steps = n_sources * max(1, len(shares)) * n_repeats + permutation_steps(n_permutations)
    if sites.column is not None and sites.audit is None:
        steps += audit_steps(n_repeats, n_permutations)
    if located is not None:
        steps += n_sources * len(count_sites(design, located)) + permutation_steps(n_permutations)
    counter = ProgressCounter(progress, steps)

    every, strengths, scores = cross_validate_all(design, sources, counter)
    predicted = every["embeddings"][0]
    own = scores.pop("embeddings")
    headline = compare(target, MAIN_METRIC[design.task], own, scores, design.ratio)
    last, holdout, tested = score_held_out(phenotype, design, people, sources, seed)
    kept, audit = ~people.held_out, sites.audit
    if sites.column is not None and audit is None:
        audit = site_audit(
            *(matrix[kept], read_column(sites.column, len(kept), "site")[kept], people.group[kept]),
            n_splits=n_splits,
            n_repeats=n_repeats,
            n_permutations=n_permutations,
            random_state=seed,
            progress=lambda done, steps: counter.update(),
        )
    if audit is not None and located is not None:
        by_site, at_new_sites = score_sites(
            *(design, located, predicted, sources, counter),
            n_permutations=n_permutations,
            seed=seed,
        )
        audit, tested = {**audit, **by_site}, [*tested, *at_new_sites]
        headline = judge_within_sites(headline, audit)
    metrics = {
        "target": target,
        "task": design.task,
        "task_rule": phenotype.rule,
        **count_used(design, phenotype.reasons[kept], people.person[kept]),
        "duplicates": people.describe_duplicates(phenotype),
        "features": [
            {"name": "embeddings", "columns": matrix.shape[1]},
            *([extra.describe()] if extra else []),
        ],
        "model": _describe_model(design, matrix.shape[1], scaling, extra, removed, harmonize),
        "cv": {
            "scheme": "repeated k-fold by group, stratified by "
            + ("class" if design.task == "classification" else "rank of the target"),
            "n_splits": design.n_folds,
            "n_splits_asked": n_splits,
            "n_repeats": len(design.fold),
            "test_train_ratio": design.ratio,
            "tuning": "penalty chosen in each fold by cross-validation over its other folds",
            "strengths": strengths,
            "grid": count_edges(strengths, make_estimator(design)),
            "interval": "Nadeau-Bengio corrected, 95 %",
            "random_state": seed,
        },
        "groups": {
            "n": design.n_groups,
            "rule": "images of a group are never split between training and test",
        },
        "scores": own,
        "permutation": permutation_test(
            design, sources["embeddings"][0], n_permutations, seed, counter
        ),
        "baselines": scores,
        "headline": headline,
        **describe_calibration(design, predicted),
        "learning_curve": score_by_size(
            *(design, sources, {"embeddings": own, **scores}, headline),
            target=target,
            shares=shares,
            seed=seed,
            counter=counter,
        ),
        "exposure": people.describe_exposure(design.rows),
        "holdout": holdout,
        "site": audit,
        "missing": {
            name: found
            for name, found in (
                ("site", _missing_sites(sites, located, people.person[design.rows])),
                *((name, _missing_confound(name, phenotype, people)) for name in known),
            )
            if found
        },
        "confounds": None if removed is None else removed.describe(),
        "harmonization": None
        if harmonized is None
        else describe_harmonization(harmonized[: len(design.rows)], design.row_folds),
    }
    counter.finish()
    predictions = prediction_table(people, phenotype, design, predicted, last)
    readout = None
    if not harmonize:  # what ComBat learns is of these sites
        readout = fit_readout(
            design,
            matrix[design.rows],
            source=sources["embeddings"][0],
            extra=extra.rows(design.rows) if extra else None,
            confounds=removed,
            scaling=scaling,
        )
    columns = describe_predictions(predictions, design, target)
    folds = fold_table(design, every, tested)
    repeats = {
        name: _by_image(found, design.rows, len(matrix))
        for name, found in every.items()
        if name != "dummy"
    }
    return PhenotypeResult(
        *(metrics, predictions, columns, readout, design.rows, repeats, folds),
        describe_folds(folds, design, target),
    )


def _missing_sites(
    sites: AuditedSites, located: Labels | None, who: Labels
) -> dict[str, Any] | None:
    """Return which of the used images have no site."""
    if located is None:
        return None
    column = str(getattr(sites.column, "name", None) or "site")
    return describe_missing("site", column, np.asarray(pd.isna(located)), who)


def _missing_confound(name: str, phenotype: Target, people: People) -> dict[str, Any] | None:
    """Return which images with a target have no value of a confound."""
    lacking = phenotype.reasons == f"confound missing: {name}"
    rows = lacking | (phenotype.reasons == "")
    return describe_missing("confound", name, lacking[rows], people.person[rows])


def _given_baselines(given: Any, model: HasBaselines | None, data: Any) -> Mapping[str, Comparison]:
    """Return baselines as a dict; those of the command, if these are asked for."""
    if isinstance(given, str):
        if given != "default":
            raise UsageError(f"baselines is a dict or 'default', got {given!r}.")
        if model is None or data is None:
            raise UsageError(
                "baselines='default' needs the model and the data module that the features come from: "
                "predict_phenotype(..., baselines='default', model=model, data=data)."
            )
        return dict(model.baseline_features(data))
    if model is not None or data is not None:
        raise UsageError("model and data are for baselines='default' alone; leave them out.")
    return given or {}


def _by_image(
    predicted: NDArray[np.float64], rows: NDArray[np.intp], n: int
) -> NDArray[np.float64]:
    """Return predictions of some rows as those of `n` images, NaN for the others."""
    whole = np.full((*predicted.shape[:2], n, *predicted.shape[3:]), np.nan)
    whole[:, :, rows] = predicted
    return whole


def _read_sources(
    matrix: NDArray[np.float64],
    baselines: Mapping[str, Comparison],
    rows: NDArray[np.intp],
    people: People,
    extra: ExtraFeatures | None,
    removed: EncodedConfounds | None,
    harmonized: Labels | None,
    scaling: str,
    at_sites: NDArray[np.float64] | None,
) -> dict[str, list[Source]]:
    """Return the rows in use of the embeddings and of each baseline, all adjusted alike."""
    taken = ["embeddings", "dummy", *(["confounds"] if removed else [])]
    taken += ["site"] if at_sites is not None else []
    for name in (*taken, *([extra.name] if extra else [])):
        if name in baselines:
            raise UsageError(
                f"The baseline name {name!r} is taken: it is always added. Use another."
            )
    if extra and extra.name in taken:
        raise UsageError(f"Extra features cannot have the name {extra.name!r}. Use another.")

    def adjust(source: Features | Components) -> Source:
        if removed is None and harmonized is None:
            return source
        return AdjustedFeatures(source, removed, harmonized)

    block = adjust(extra.rows(rows).as_source()) if extra else None

    def complete(source: Features | Components) -> Source:
        if block is None:
            return adjust(source)
        columns = matrix.shape[1] if isinstance(source, Components) else None
        return FeaturesBeside(adjust(source), block, columns)

    sources: dict[str, list[Source]] = {
        "embeddings": [complete(Features(matrix[rows], scaling=scaling))]
    }
    for name, given in baselines.items():
        read = read_baseline(name, given, rows, people, scaling)
        sources[name] = [complete(source) for source in read]
    if extra is not None and block is not None:
        sources[extra.name] = [block]
    if removed is not None:
        sources["confounds"] = [Features(removed.matrix)]
    if at_sites is not None:
        sources["site"] = [Features(at_sites)]
    return sources


def _describe_model(
    design: CVDesign,
    n_features: int,
    scaling: str,
    extra: ExtraFeatures | None,
    removed: EncodedConfounds | None,
    harmonize: bool,
) -> str:
    steps = ["StandardScaler" + " (variance plus the mean variance)" * (scaling == "shared")]
    steps += ["ComBat by site"] * harmonize
    steps += [f"linear effect of {', '.join(removed.columns)} removed"] if removed else []
    steps += [
        "Ridge" if design.task == "regression" else "LogisticRegression(class_weight='balanced')"
    ]
    beside = f" and {extra.name} (weight of {extra.weight} columns)" if extra else ""
    return (
        f"{', '.join(steps)} on {n_features} features{beside}; wide baselines: principal components "
        f"(at most {MAX_COMPONENTS}) learned in the folds, then the same readout"
    )

"""External validity: a readout fitted in one cohort, applied to the people of another.

Takes tables and a readout; files are read and written in `readout_file` and by the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.bootstrap import N_DRAWS, bootstrap_units, without_intervals
from nidl_dcl.evaluation.cohort import compare_cohorts, describe_cohort
from nidl_dcl.evaluation.extra_features import read_extra_features
from nidl_dcl.evaluation.features import Column, read_matrix, refuse_non_finite
from nidl_dcl.evaluation.folds import CVDesign, count_used, make_external_design
from nidl_dcl.evaluation.metrics import (
    MAIN_METRIC,
    METRIC_WORDS,
    MIN_FINDING,
    compared,
    prediction_scores,
)
from nidl_dcl.evaluation.people import People, read_people
from nidl_dcl.evaluation.prediction_table import describe_predictions, prediction_table
from nidl_dcl.evaluation.readout_file import ReadoutFile
from nidl_dcl.evaluation.targets import Target, read_known_target
from nidl_dcl.io.hashing import salted_hash

OVERLAP = "participant in the training of the readout"

CONFOUND = "confound missing"

_OTHERS = " If equal ids are other people, since each dataset numbers its own, say so with --other-people."

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExternalResult:
    """What applying a readout to another cohort gave.

    Attributes
    ----------
    metrics : dict
        What ``externalmetrics.json`` holds: JSON types only, None where a number is undefined.
    predictions : DataFrame
        One row per image, in input order, those that are not scored included.
    columns : dict
        Description of each column of `predictions`, for the BIDS sidecar.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    columns: dict[str, dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Return one row of a table of targets: external score, internal one, a constant guess."""
        headline = self.metrics["headline"]
        (low, high), (low_inside, high_inside) = (
            headline[side]["ci95"] or (None, None) for side in ("external", "internal")
        )
        return {
            "target": self.metrics["target"],
            "metric": headline["metric"],
            "score": headline["external"]["mean"],
            "low": low,
            "high": high,
            "internal": headline["internal"]["mean"],
            "internal_low": low_inside,
            "internal_high": high_inside,
            "dummy": self.metrics["baselines"]["dummy"][headline["metric"]]["mean"],
            "too_few": headline["too_few"],
            "n": self.metrics["n_participants"],
            "n_internal": self.metrics["internal"]["n_participants"],
            "n_overlap": self.metrics["overlap"]["n_participants"],
        }


@dataclass(frozen=True, eq=False)
class Overlap:
    """Which images are of participants whom a readout was fitted on.

    Attributes
    ----------
    rows : ndarray of bool, shape (n_images,)
    counts : dict
        ``n_participants``, ``by_id``, ``by_image`` (participants), ``ids_are_other_people`` and a
        ``sentence``.
    """

    rows: NDArray[np.bool_]
    counts: dict[str, Any]


def find_overlap(
    stored: ReadoutFile, ids: pd.DataFrame, content: Sequence[str], *, other_people: bool = False
) -> Overlap:
    """Return which images are of participants whom the readout was fitted on.

    Parameters
    ----------
    stored : ReadoutFile
    ids : DataFrame, shape (n_images, n_columns)
        ``participant_id`` (``sub-…``) and, where participants are one person, ``person_id``.
    content : sequence of str, length n_images
        Digests of the images' voxels; empty where unknown.
    other_people : bool, default=False
        Equal ids are known to be other people; equal images still are the same ones.
    """
    column = ids["person_id"] if "person_id" in ids else ids["participant_id"]
    who = column.to_numpy(dtype=object)
    same_id = _are_members(stored, "participants", ids["participant_id"].astype(str).tolist())
    same_image = _are_members(stored, "images", content)
    rows = np.isin(who, who[same_image if other_people else same_image | same_id])
    everyone, n, by_id, by_image = (
        len(set(some)) for some in (who, who[rows], who[same_id], who[same_image])
    )
    sentence = f"None of the {everyone} participants is in the training of the readout."
    if n:
        sentence = (
            f"{n} of the {everyone} participants are in the training of the readout "
            f"(the same id: {by_id}, the same image: {by_image}) and are not scored."
        )
    if other_people and by_id:
        sentence += f" Of {by_id} the id occurs there, but they were declared to be other people."
    counts = {
        "n_participants": n,
        "by_id": by_id,
        "by_image": by_image,
        "ids_are_other_people": other_people,
        "sentence": sentence,
    }
    return Overlap(rows, counts)


def _are_members(stored: ReadoutFile, what: str, values: Sequence[str]) -> NDArray[np.bool_]:
    known, salt = set(stored.members[what]), stored.members["salt"]
    found = [bool(value) and salted_hash(value, salt) in known for value in values]
    return np.array(found, dtype=bool)


def validate_externally(
    stored: ReadoutFile,
    features: NDArray[np.floating],
    images: pd.DataFrame,
    groups: Column,
    *,
    ids: pd.DataFrame,
    overlap: Overlap,
    columns: Mapping[str, str],
    quality: pd.DataFrame,
    extra_features: pd.DataFrame | None = None,
    units: str | None = None,
    random_state: int = 0,
) -> ExternalResult:
    """Apply a readout to the images of another cohort and score it.

    Images are predicted one by one, averaged and scored by participant as in
    `nidl_dcl.predict_phenotype`. Nothing is fitted on this cohort.

    Parameters
    ----------
    stored : ReadoutFile
    features : ndarray, shape (n_images, n_features)
        Embeddings by the same model.
    images : DataFrame, shape (n_images, n_columns)
        The target and what else is known.
    groups : array-like, shape (n_images,)
        Who is resampled together: participants, or families.
    ids : DataFrame, shape (n_images, n_columns)
        As for `nidl_dcl.predict_phenotype`.
    overlap : Overlap
        As `find_overlap` gives it.
    columns, quality
        See `nidl_dcl.evaluation.cohort.describe_cohort`.
    extra_features : DataFrame, shape (n_images, n_columns), optional
        As for `nidl_dcl.predict_phenotype`; used where the readout was fitted with them.
    units : str, optional
        Of the target in this cohort.
    random_state : int
        Key of the resampling.

    Raises
    ------
    UsageError
        For another unit of the target, another number of features, confounds or extra features that
        are missing.
    InputsUnusableError
        When nobody is left to score, saying why.
    """
    here_and_there = {text.strip().lower().rstrip("s") for text in (units, stored.units) if text}
    if len(here_and_there) > 1:
        raise UsageError(
            f"Target {stored.target!r} is in {units} here and in {stored.units} where the readout "
            "was fitted. Convert one of them (--phenotypes FILE)."
        )
    n, matrix = len(images), read_matrix(features, "features")
    people = read_people(groups, ids, n)
    refuse_non_finite(matrix, "features", people.table)
    read_extra_features(extra_features, people.table, stored.target, matrix.shape[1])
    read = read_known_target(
        images[stored.target], name=stored.target, task=stored.task, labels=stored.linear.labels
    )
    confounds = _confounds(stored, images)
    if confounds is not None:
        read.reasons[np.isnan(confounds).any(axis=1)] = CONFOUND
    read.reasons[overlap.rows] = OVERLAP
    read.numbers[read.reasons != ""] = np.nan
    _require_somebody(read, stored, people, overlap)
    design = make_external_design(read, people.person, people.group)
    predicted = stored.linear.predict(matrix, confounds, extra_features)
    scores = _score(design, predicted, random_state)
    calibration = {name: scores.pop(name) for name in ("slope", "intercept") if name in scores}
    # What knows the training cohort and no image: its mean, or its shares.
    known = stored.training["target"]
    if stored.task == "regression":
        constant = np.full(len(design.value), known["distribution"]["mean"])
    else:
        sizes = np.array([known["classes"][label] for label in design.labels], dtype=np.float64)
        constant = np.tile(sizes / sizes.sum(), (len(design.value), 1))
    guess = without_intervals(
        prediction_scores(design.value, constant, design.weight, design.labels)
    )
    counts = count_used(design, read.reasons, people.person)
    here = describe_cohort(
        images.iloc[design.rows], people.person[design.rows], columns, quality.iloc[design.rows]
    )
    here["target"] = {"name": stored.target} | {
        key: counts[key] for key in ("distribution", "classes") if key in counts
    }
    metrics = {
        "target": stored.target,
        "task": stored.task,
        "units": stored.units or units,
        **counts,
        "scores": scores,
        "interval": f"percentile bootstrap over {here['n_participants']} participants "
        f"({design.n_groups} groups), {N_DRAWS} resamples, 95 %",
        "calibration": calibration or None,
        "baselines": {"dummy": guess},
        "internal": {"n_participants": stored.n_participants, "scores": stored.internal},
        "headline": _headline(stored, scores, guess, design.n_participants),
        "overlap": overlap.counts,
        "exposure": people.describe_exposure(design.rows),
        "shift": _shift(stored, here, design),
    }
    predictions, described = _tables(people, read, design, stored, predicted)
    return ExternalResult(metrics, predictions, described)


def _confounds(stored: ReadoutFile, images: pd.DataFrame) -> Array | None:
    """Return the confounds that the readout takes away, NaN where missing; None if it takes none."""
    needed = stored.linear.confounds
    if needed is None:
        return None
    columns = []
    for name, mean in zip(needed.names, needed.means, strict=True):
        column, _, category = (name, "", "") if name in images else name.rpartition("=")
        if column not in images:
            raise UsageError(
                f"The readout of {stored.target!r} was fitted on features freed from the confounds "
                f"{', '.join(needed.names)}, and no table here has a column "
                f"{column or name!r}. Add it (--phenotypes FILE), or fit a readout without it."
            )
        given = images[column]
        if category:
            known = [n.rpartition("=")[2] for n in needed.names if n.startswith(f"{column}=")]
            texts = read_known_target(given, name=column, task="classification", labels=()).texts
            # A category that training did not have is taken for an average row.
            values = [
                np.nan if t is None else float(t == category) if t in known else mean for t in texts
            ]
            columns.append(np.array(values))
            continue
        numbers = pd.to_numeric(given, errors="coerce").astype("float64")
        if (numbers.isna() & given.notna()).any():
            raise UsageError(
                f"The confound {name!r} of the readout is a number, and here its column holds other "
                "values. Code it as where the readout was fitted."
            )
        columns.append(numbers.to_numpy())
    return np.column_stack(columns)


def _require_somebody(read: Target, stored: ReadoutFile, people: People, overlap: Overlap) -> None:
    """Raise `InputsUnusableError` when nobody is left to score."""
    if (read.reasons == "").any():
        return
    if (read.reasons == OVERLAP).any():
        hint = "" if overlap.counts["ids_are_other_people"] else _OTHERS
        raise InputsUnusableError(
            f"{overlap.counts['sentence']} Nobody is left to score for target {stored.target!r}: "
            f"external validity needs other people.{hint}"
        )
    counts = pd.Series(read.reasons).groupby(people.person).first().value_counts()
    reasons = ", ".join(f"{reason} ({n})" for reason, n in counts.items())
    knows = f" The readout knows {', '.join(stored.linear.labels)}." if stored.linear.labels else ""
    raise InputsUnusableError(
        f"No participant can be scored for target {stored.target!r}: {reasons}.{knows} Code the values "
        "as where the readout was fitted (Levels in the sidecar, --phenotypes FILE)."
    )


def _score(design: CVDesign, predicted: Array, random_state: int) -> dict[str, dict[str, Any]]:
    """Return scores, and of numbers the calibration, with their intervals."""
    by_unit = design.by_unit(predicted[design.rows])

    def score(rows: NDArray[np.intp], weight: Array) -> dict[str, float]:
        truth, given = design.value[rows], by_unit[rows]
        scores = prediction_scores(truth, given, weight, design.labels)
        return scores if design.labels else scores | _calibration(truth, given, weight)

    return bootstrap_units(score, design, bool(design.labels), random_state, "external bootstrap")


def _calibration(truth: Array, predicted: Array, weight: Array) -> dict[str, float]:
    """Return slope and intercept of the truth on the prediction; 1 and 0 are perfect."""
    share = weight / weight.sum()
    center, middle = share @ predicted, share @ truth
    spread = share @ (predicted - center) ** 2
    # Two points are always on a line; what rounding leaves of a constant is not a spread.
    if len(truth) < 3 or spread <= (1e-12 * np.abs(predicted).max()) ** 2:
        return {"slope": np.nan, "intercept": np.nan}
    slope = share @ ((predicted - center) * (truth - middle)) / spread
    return {"slope": float(slope), "intercept": float(middle - slope * center)}


def _headline(
    stored: ReadoutFile, scores: dict[str, Any], guess: dict[str, Any], n: int
) -> dict[str, Any]:
    metric = MAIN_METRIC[stored.task]
    sign = -1.0 if metric == "mae" else 1.0
    outside = scores[metric]
    inside = stored.internal.get(metric) or {"mean": None, "ci95": None}
    guessed = guess[metric]["mean"]
    here, there, constant = compared(outside["mean"], inside["mean"], guessed)
    sentence = (
        f"A readout fitted on {stored.n_participants} other participants predicts {stored.target} of "
        f"{n} participants here with {METRIC_WORDS[metric]} {here}{_interval_of(outside)}"
    )
    gap = None
    if inside["mean"] is None:
        sentence += "; there is no cross-validated score of its own cohort to compare with."
    else:
        gap = float(outside["mean"] - inside["mean"])
        way = "better" if sign * gap > 0 else "worse"
        ends = ", from too few participants for an interval"
        if outside["ci95"] and inside["ci95"]:
            (low, high), (low_inside, high_inside) = outside["ci95"], inside["ci95"]
            apart = max(low, low_inside) > min(high, high_inside)
            ends = ", and the intervals do not overlap" if apart else ", and the intervals overlap"
        sentence += (
            f"; cross-validated in its own cohort it had {there}{_interval_of(inside)}: {way} by "
            f"{abs(gap):.2g} here{ends}."
        )
    if sign * (outside["mean"] - guessed) > 0:
        sentence += f" A constant guess that knows that cohort has {constant}."
    else:
        sentence += f" It does not beat a constant guess that knows that cohort, {constant}."
    too_few = n < MIN_FINDING
    if too_few:
        sentence = (
            f"There are too few participants here, {n}, to say how well the readout of {stored.target} "
            f"of another cohort works: it takes {MIN_FINDING}. The predictions are in the table, the "
            "scores in the metrics file; they are not a finding."
        )
    return {
        "metric": metric,
        "external": outside,
        "internal": inside,
        "difference": gap,
        "too_few": too_few,
        "sentence": sentence,
    }


def _interval_of(score: Mapping[str, Any]) -> str:
    return " (95 % interval {:.3g} to {:.3g})".format(*score["ci95"]) if score["ci95"] else ""


def _shift(stored: ReadoutFile, here: dict[str, Any], design: CVDesign) -> dict[str, Any]:
    shift = compare_cohorts(stored.training, here)
    if design.task == "regression":
        known = stored.training["target"]["distribution"]
        beyond = (design.value < known["min"]) | (design.value > known["max"])
        shift["target"]["n_outside_training_range"] = int(beyond.sum())
        if beyond.any():
            shift["sentences"].append(
                f"{int(beyond.sum())} of {len(beyond)} values of {stored.target} lie outside of those "
                f"in training, {known['min']:.4g} to {known['max']:.4g}."
            )
    return shift


def _tables(
    people: People, read: Target, design: CVDesign, stored: ReadoutFile, predicted: Array
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Return predictions of all images, also of those that are not scored, and their columns."""
    known = np.isfinite(predicted.reshape(len(predicted), -1)).all(axis=1)
    everybody = replace(design, rows=np.flatnonzero(known))
    table = prediction_table(people, read, everybody, predicted[known][None])
    table = table.drop(columns=["prediction_sd", "n_folds"], errors="ignore")
    table.loc[read.reasons == OVERLAP, "reason"] = OVERLAP
    described = describe_predictions(table, design, stored.target)
    for name in described:
        if name == "prediction" or name.startswith("probability_"):
            described[name]["Description"] = (
                f"{'Prediction' if name == 'prediction' else 'Probability'} of {stored.target} for "
                "this image by the readout of another cohort; nothing was fitted here. Images that "
                "are not scored have one too."
            )
    described["status"] = {
        "Description": "Whether the image is part of the scores.",
        "Levels": {"ok": "scored", "dropped": "not scored, see reason"},
    }
    described["reason"] = {"Description": "Why the image is not scored; n/a if it is."}
    return table, described

"""Cohorts in summary numbers (age, sex, site, image quality), and how two of them differ.

Counts and moments only, never a row; who is in a cohort is up to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.volumes.quality import QUALITY_METRICS

_AGE = ("age", "age_at_scan", "age_years")
_SEX = ("sex", "gender")

_WORDS = {
    "age": "Age",
    "voxel_mm": "Longest voxel side in mm",
    "sharpness": "Image sharpness",
    "noise": "Image noise",
    "contrast_to_noise": "Contrast-to-noise of the images",
}


def cohort_columns(images: pd.DataFrame, site: str | None) -> dict[str, str]:
    """Return which columns of a table hold age, sex and site (as named), as far as it has them."""
    named = {str(column).lower(): str(column) for column in reversed(images.columns)}
    found = {
        what: next((named[name] for name in names if name in named), None)
        for what, names in (("age", _AGE), ("sex", _SEX))
    }
    return {what: column for what, column in {**found, "site": site}.items() if column}


def describe_cohort(
    images: pd.DataFrame,
    participants: NDArray[np.object_],
    columns: Mapping[str, str],
    quality: pd.DataFrame,
) -> dict[str, Any]:
    """Return the summary of a cohort, each participant counted once.

    Parameters
    ----------
    images : DataFrame, shape (n_images, n_columns)
    participants : ndarray of str, shape (n_images,)
    columns : mapping
        As `cohort_columns` gives it.
    quality : DataFrame, shape (n_images, n_measures)
        Columns of `nidl_dcl.volumes.quality.QUALITY_METRICS`.

    Returns
    -------
    dict
        ``n_participants``; ``age`` (mean, sd, n), ``sex`` and ``site`` (label to participants), None
        where there is no such column; ``quality`` (measure to mean, sd, n).
    """
    cohort: dict[str, Any] = {"n_participants": len(set(participants))}
    cohort["age"] = _moments(images[columns["age"]], participants) if "age" in columns else None
    for what in ("sex", "site"):
        cohort[what] = None
        if what in columns:
            labels = images[columns[what]].to_numpy()
            given = pd.DataFrame({"who": participants, "label": labels}).dropna()
            given["label"] = given["label"].map(_label).astype(object)
            counts = given.drop_duplicates()["label"].value_counts().sort_index()
            cohort[what] = {k: int(v) for k, v in counts.items()} or None
    measured = {
        name: _moments(quality[name], participants) for name in QUALITY_METRICS if name in quality
    }
    cohort["quality"] = {name: moments for name, moments in measured.items() if moments}
    return cohort


def compare_cohorts(training: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a cohort differs from the one that a readout was fitted on.

    Parameters
    ----------
    training, here : mapping
        As `describe_cohort` gives them, with ``target`` beside: ``name``, and ``distribution`` (mean,
        sd, min, max) or ``classes``.

    Returns
    -------
    dict
        ``age``, ``sex``, ``site``, ``target`` and ``quality`` of both, with the
        ``standardized_difference`` of numbers (difference of the means divided by the root mean
        square of both standard deviations) and how many sites are new; ``sentences``, in words.
    """
    sentences: list[str] = []
    shift: dict[str, Any] = {}
    aim = str(here["target"]["name"])
    if "distribution" in here["target"]:
        shift["target"] = _beside(training["target"], here["target"], "distribution")
        sentences.append(_moments_sentence(f"Target {aim}", shift["target"]))
    else:
        sides = {"training": training["target"]["classes"], "here": here["target"]["classes"]}
        shift["target"] = sides
        sentences.append(_shares_sentence(f"Target {aim}", sides))
    known = {what: bool(training.get(what) and here.get(what)) for what in ("age", "sex", "site")}
    for what in known:
        shift[what] = {"training": training.get(what), "here": here.get(what)}
    if known["age"]:
        shift["age"] = _beside(training, here, "age")
        if aim.lower() not in _AGE:
            sentences.append(_moments_sentence(_WORDS["age"], shift["age"]))
    if known["sex"] and aim.lower() not in _SEX:
        sentences.append(_shares_sentence("Sex", shift["sex"]))
    if known["site"]:
        shift["site"]["n_new"] = new = len(set(here["site"]) - set(training["site"]))
        sentences.append(
            f"Sites: {len(here['site'])} here, of which the readout has not seen {new}; "
            f"{len(training['site'])} in its training."
        )
    shift["quality"] = {}
    for name in QUALITY_METRICS:
        if name in training["quality"] and name in here["quality"]:
            shift["quality"][name] = _beside(training["quality"], here["quality"], name)
            sentences.append(_moments_sentence(_WORDS[name], shift["quality"][name]))
    absent = ", ".join(what for what in known if not known[what])
    if absent:
        sentences.append(f"Not compared, since it is not known of both cohorts: {absent}.")
    return {**shift, "sentences": sentences}


def _moments(values: pd.Series[Any], participants: NDArray[np.object_]) -> dict[str, Any] | None:
    """Return mean and standard deviation over participants of the means of their images."""
    numbers = pd.to_numeric(values, errors="coerce").astype("float64").to_numpy()
    known = np.isfinite(numbers)
    each = pd.Series(numbers[known]).groupby(participants[known]).mean()
    if each.empty:
        return None
    sd = float(each.std(ddof=1)) if len(each) > 1 else None
    return {"mean": float(each.mean()), "sd": sd, "n": len(each)}


def _beside(training: Mapping[str, Any], here: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the moments of both with their standardized difference."""
    both = [dict(given[what]) for given in (training, here)]
    spread = [moments["sd"] for moments in both if moments["sd"] is not None]
    scale = float(np.sqrt(np.mean(np.square(spread)))) if spread else 0.0
    gap = both[1]["mean"] - both[0]["mean"]
    # What rounding leaves of a constant is not a spread.
    defined = scale > 1e-9 * max(abs(both[0]["mean"]), abs(both[1]["mean"]))
    return {
        "training": both[0],
        "here": both[1],
        "standardized_difference": gap / scale if defined else None,
    }


def _moments_sentence(words: str, both: Mapping[str, Any]) -> str:
    here, training = (
        f"{mean:.3g}" + ("" if sd is None else f" ± {sd:.2g}")
        for mean, sd in ((both[side]["mean"], both[side]["sd"]) for side in ("here", "training"))
    )
    gap = both["standardized_difference"]
    means = f"{words}: {here} here, {training} in training"
    if gap is None:
        return f"{means}."
    size = abs(gap)
    grade = "slightly " if size < 0.5 else "clearly " if size < 0.8 else "far "
    verdict = "alike" if size < 0.2 else grade + ("higher" if gap > 0 else "lower") + " here"
    return f"{means}; standardized difference {gap:+.2f}, {verdict}."


def _shares_sentence(words: str, both: Mapping[str, Mapping[str, int]]) -> str:
    shares = {}
    for side, counts in both.items():
        total = sum(counts.values()) or 1
        shares[side] = ", ".join(f"{label} {100 * n / total:.0f} %" for label, n in counts.items())
    return f"{words}: {shares['here']} here; {shares['training']} in training."


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

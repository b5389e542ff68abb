"""How well site (scanner, protocol) is decoded from features, against chance.

Uses the folds and read-outs of `evaluation`; correcting for site is the business of `cleaning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nidl_dcl.cleaning import Cleaned, can_harmonize
from nidl_dcl.coordinates import Features, Source
from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation import (
    Ticker,
    check_counts,
    cross_validate,
    permutation_steps,
    permuted_scores,
)
from nidl_dcl.features import Column, Matrix, finite_matrix, read_column, read_labels
from nidl_dcl.folds import Design, make_design
from nidl_dcl.randomness import fresh_seed
from nidl_dcl.scores import chance_level, interval
from nidl_dcl.targets import read_target

__all__ = ["audit_steps", "site_audit"]


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
        None when there is nothing to decode, for instance with one site. ``harmonised``: the last
        three, of features that ComBat harmonised inside the folds; None when there is nothing to
        decode, or the package pycombat is missing. ``harmonised_sentence`` says it in words.
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
            "harmonised": None,
            "harmonised_sentence": "Without two sites there is nothing to harmonise.",
        }
    tick = Ticker(progress, audit_steps(n_repeats, n_permutations))
    source = Features(matrix[design.rows])
    found = _decode(design, source, n_permutations, seed, tick, "")
    harmonised = None
    said = (
        "What harmonisation would change is not known: the package pycombat is missing "
        "(pip install 'nidl_dcl[harmonize]')."
    )
    if can_harmonize():
        cleaned = Cleaned(source, site=read.texts[design.rows])
        harmonised = _decode(
            design,
            cleaned,
            n_permutations,
            seed,
            tick,
            "After harmonisation (ComBat in the folds), ",
        )
        said = harmonised["sentence"]
    tick.finish()
    return {
        "column": _name(site),
        "n_participants": design.n_participants,
        "sites": design.class_sizes,
        **found,
        "harmonised": harmonised,
        "harmonised_sentence": said,
    }


def audit_steps(n_repeats: int, n_permutations: int) -> int:
    """Return how often `site_audit` calls its `progress`."""
    return (n_repeats + permutation_steps(n_permutations)) * (1 + can_harmonize())


def _name(site: Column) -> str | None:
    name = getattr(site, "name", None)
    return None if name is None else str(name)


def _decode(
    design: Design, source: Source, n_permutations: int, seed: int, tick: Ticker, opening: str
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

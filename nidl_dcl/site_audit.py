"""How well site (scanner, protocol) is decoded from features, against chance.

Uses the folds and read-outs of `evaluation`; correcting for site is another module's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nidl_dcl.coordinates import Features
from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation import (
    Ticker,
    check_counts,
    cross_validate,
    permutation_steps,
    permuted_scores,
)
from nidl_dcl.features import Column, Matrix, finite_matrix, read_column, read_labels
from nidl_dcl.folds import make_design
from nidl_dcl.randomness import fresh_seed
from nidl_dcl.scores import chance_level, interval
from nidl_dcl.targets import read_target

__all__ = ["site_audit"]


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
        Site labels; numbers are taken as labels.

    Returns
    -------
    dict
        ``n_participants``; ``sites`` (label to participants); ``balanced_accuracy`` (mean, ci95,
        folds); ``permutation`` (as in metrics.json); ``sentence``. The middle two are None when
        there is nothing to decode, for instance with one site.
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
            "n_participants": None,
            "sites": None,
            "balanced_accuracy": None,
            "permutation": None,
            "sentence": f"Site was not decoded: {str(error).split('. ')[0]}.",
        }
    tick = Ticker(progress, n_repeats + permutation_steps(n_permutations))
    source = Features(matrix[design.rows])
    _, folds, _ = cross_validate(design, source, tick)
    score = interval([fold["balanced_accuracy"] for fold in folds], design.ratio)
    observed, permuted = permuted_scores(design, source, n_permutations, seed, tick)
    chance = chance_level("balanced_accuracy", observed, permuted)
    words = f"Site ({len(design.labels)}) is decoded with balanced accuracy {score['mean']:.2f}"
    if chance["p"] is not None:
        words += f", chance {chance['chance']:.2f}, p = {chance['p']:.2g}: " + (
            "the features carry site." if chance["p"] <= 0.05 else "no more than by chance."
        )
    return {
        "n_participants": design.n_participants,
        "sites": design.class_sizes,
        "balanced_accuracy": score,
        "permutation": chance,
        "sentence": words if words.endswith(".") else words + ".",
    }

"""The last score: held-out participants, predicted once by one readout of all others.

No other part of a prediction looks at them; who is held out is read in `people`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.evaluation.bootstrap import MIN_GROUPS, N_DRAWS, bootstrap_units
from nidl_dcl.evaluation.cross_validation import dummy_prediction, train_and_test
from nidl_dcl.evaluation.features import Source
from nidl_dcl.evaluation.fold_table import tested_rows
from nidl_dcl.evaluation.folds import CVDesign, Units, make_units
from nidl_dcl.evaluation.metrics import (
    MAIN_METRIC,
    METRIC_WORDS,
    MIN_FINDING,
    compared,
    prediction_scores,
)
from nidl_dcl.evaluation.people import People
from nidl_dcl.evaluation.targets import HELD_OUT, Target

Array = NDArray[np.float64]


def score_held_out(
    target: Target,
    design: CVDesign,
    people: People,
    sources: Mapping[str, Sequence[Source]],
    seed: int,
) -> tuple[Array | None, dict[str, Any] | None, list[pd.DataFrame]]:
    """Predict and score the held-out rows.

    Parameters
    ----------
    target : Target
        Held-out rows with a value have the reason `HELD_OUT`.
    design : CVDesign
        Of the other rows.
    people : People
    sources : mapping of str to sequence of Source
        ``embeddings`` (one source) and the baselines but for ``dummy``, which is added. Rows are
        the used ones of `design`, then those with the reason `HELD_OUT`.
    seed : int
        Key of the intervals.

    Returns
    -------
    predictions : ndarray or None
        Of the embeddings, for the rows with the reason `HELD_OUT`; None when they are not scored.
    holdout : dict or None
        What ``metrics.json`` holds; None when nobody is held out.
    tables : list of DataFrame
        What was predicted from each source, as `nidl_dcl.evaluation.fold_table.tested_rows` gives it.
    """
    if not people.held_out.any():
        return None, None, []
    rows = np.flatnonzero(target.reasons == HELD_OUT)
    n, n_held_out = len(set(people.person[rows])), len(set(people.person[people.held_out]))
    result: dict[str, Any] = {"n_participants": n, "n_dropped": n_held_out - n}
    result |= {"scores": None, "baselines": None}
    unknown = ""
    if people.seen[people.held_out].isna().any():
        unknown = " It is not known whether the encoder saw them in pretraining."
    if n < MIN_GROUPS:
        result["sentence"] = (
            f"{n_held_out} participants are held out, {n} of them with a usable {target.name}: fewer "
            f"than {MIN_GROUPS}, so they are not scored.{unknown}"
        )
        return None, result, []
    units = make_units(target.numbers[rows], people.person[rows], people.group[rows])
    train = np.arange(len(design.unit))
    test = len(train) + np.arange(len(rows))
    found = {
        name: [train_and_test(design, source, train, test, design.row_folds) for source in given]
        for name, given in sources.items()
    }
    ((predicted, result["strength"]),) = found.pop("embeddings")
    result["scores"] = _score(units, [predicted], design, seed)
    each = {"dummy": [dummy_prediction(design, train, test)]}
    each |= {name: [prediction for prediction, _ in runs] for name, runs in found.items()}
    result["baselines"] = {name: _score(units, runs, design, seed) for name, runs in each.items()}
    tables = [
        tested_rows(
            *(design, units, rows, prediction), test="holdout", features=name, source=number
        )
        for name, runs in {"embeddings": [predicted], **each}.items()
        for number, prediction in enumerate(runs)
    ]
    result["interval"] = f"percentiles of {N_DRAWS} draws of participants, 95 %"
    metric = MAIN_METRIC[design.task]
    own, guess = result["scores"][metric], result["baselines"]["dummy"][metric]
    within = " ({:.3g} to {:.3g})".format(*own["ci95"]) if own["ci95"] else ""
    mine, constant = compared(own["mean"], guess["mean"])
    few = f" Fewer than {MIN_FINDING} participants: not a finding." if n < MIN_FINDING else ""
    result["sentence"] = (
        f"In {n} participants held out from everything, one readout of the {design.n_participants} "
        f"others has {METRIC_WORDS[metric]} {mine}{within}; dummy: {constant}.{few}{unknown}"
    )
    return predicted, result, tables


def _score(
    units: Units, predictions: Sequence[Array], design: CVDesign, seed: int
) -> dict[str, dict[str, Any]]:
    """Return scores with their intervals, averaged over several predictions (seeds)."""
    by_unit = [units.by_unit(predicted) for predicted in predictions]

    def score(rows: NDArray[np.intp], weight: Array) -> dict[str, float]:
        each = [
            prediction_scores(units.value[rows], predicted[rows], weight, design.labels)
            for predicted in by_unit
        ]
        return {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}

    return bootstrap_units(score, units, bool(design.labels), seed, "bootstrap")

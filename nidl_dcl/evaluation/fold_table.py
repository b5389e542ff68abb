"""Every prediction that was scored, test set by test set, so that scores can be computed again.

Lays out what `cross_validation`, `holdout` and `site_effects` predicted; a stage writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.evaluation.folds import CVDesign, Units
from nidl_dcl.evaluation.prediction_table import probability_columns

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

_COLUMNS = {
    "test": "What was tested: a fold of the cross-validation, held-out participants, or a site that "
    "was left out of the training.",
    "features": "What was predicted from: the embeddings, or a baseline.",
    "source": "Number of the source, from 0, where there are several, such as untrained encoders; "
    "scores are averaged over them.",
    "repeat": "Repeat of the cross-validation, from 0.",
    "fold": "Test fold within the repeat, from 0.",
    "site": "Site that was left out.",
    "row": "Row of the table of predictions, from 0.",
    "unit": "Rows of a test set with an equal number are scored together, by their mean: the images "
    "of a participant that share a value.",
    "weight": "Weight of the unit in a score; those of a participant sum to 1.",
}


def tested_rows(
    design: CVDesign, units: Units, rows: Rows, predicted: Array, **columns: Any
) -> pd.DataFrame:
    """Return a row for each row that one model, or one per fold, predicted.

    Parameters
    ----------
    design : CVDesign
        Its task and classes.
    units : Units
        What is scored together.
    rows : ndarray of int, shape (n_rows,)
        Rows of the caller's tables.
    predicted : ndarray, shape (n_rows,) or (n_rows, n_classes)
    **columns : object
        What else is known of them: ``test``, ``features``, ``source`` and so on.
    """
    table = pd.DataFrame({name: columns.get(name, pd.NA) for name in _COLUMNS}, index=rows)
    table["row"], table["unit"], table["weight"] = rows, units.unit, units.weight[units.unit]
    observed = units.value[units.unit]
    if not design.labels:
        table["observed"], table["predicted"] = observed, predicted
        return table
    labels = np.array(design.labels, dtype=object)
    table["observed"] = labels[observed.astype(np.intp)]
    table["predicted"] = labels[predicted.argmax(axis=1)]
    table[probability_columns(design.labels)] = predicted
    return table


def fold_table(
    design: CVDesign, every: Mapping[str, Array], others: Sequence[pd.DataFrame] = ()
) -> pd.DataFrame:
    """Return all predictions of the cross-validation, then those of other tests.

    Parameters
    ----------
    design : CVDesign
    every : mapping of str to ndarray
        Name to predictions, shape (n_sources, n_repeats, n_used) or (n_sources, n_repeats, n_used,
        n_classes).
    others : sequence of DataFrame
        As `tested_rows` gives them.
    """
    parts = [
        tested_rows(
            *(design, design, design.rows, predicted),
            test="fold",
            features=name,
            source=source,
            repeat=repeat,
            fold=design.row_folds[repeat],
        )
        for name, runs in every.items()
        for source, repeats in enumerate(runs)
        for repeat, predicted in enumerate(repeats)
    ]
    table = pd.concat([*parts, *others], ignore_index=True)
    return table.astype(dict.fromkeys(("source", "repeat", "fold"), "Int64"))


def describe_folds(table: pd.DataFrame, design: CVDesign, target: str) -> dict[str, Any]:
    """Return the BIDS description of a table of folds and of each of its columns.

    Parameters
    ----------
    table : DataFrame
        As `fold_table` gives it.
    design : CVDesign
    target : str
        Name of the phenotype.
    """
    said = {name: {"Description": text} for name, text in _COLUMNS.items()}
    said["observed"] = {"Description": f"True value of {target}."}
    said["predicted"] = {"Description": f"Prediction of {target} for this image by this model."}
    if design.labels:
        names = probability_columns(design.labels)
        for name, label in zip(names, design.labels, strict=True):
            text = f"Probability of {target} {label!r} under balanced classes."
            said[name] = {"Description": text}
    return {
        "Description": "Every prediction that was scored, a row for each image, test set and model. "
        "Numbers have all their digits.",
        **{str(name): said[str(name)] for name in table.columns},
    }

"""The table of predictions, one row per image, used or not, and the description of its columns.

Lays out what `prediction` has computed; a stage writes it as TSV and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.evaluation.folds import CVDesign
from nidl_dcl.evaluation.people import People
from nidl_dcl.evaluation.targets import HELD_OUT, Target

_PASSED_ON = {
    "participant_id": "The participant; kept together in every fold unless a wider group is given.",
    "session_id": "The session of the image.",
    "run": "The run of the image.",
    "path": "The image, relative to the dataset.",
}


def prediction_table(
    people: People,
    target: Target,
    design: CVDesign,
    predicted: NDArray[np.float64],
    final: NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Return one row per image, in input order: truth, prediction, and why it was left out.

    Parameters
    ----------
    people : People
        Its columns come first.
    target : Target
    design : CVDesign
    predicted : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)
    final : ndarray, shape (n_held_out,) or (n_held_out, n_classes), optional
        Predictions of the rows with the reason `HELD_OUT`.
    """
    table = people.table.copy()
    used, held_out = target.reasons == "", target.reasons == HELD_OUT
    value = np.full((len(table), *predicted.shape[2:]), np.nan)
    value[design.rows] = predicted.mean(axis=0)
    if final is not None:
        value[held_out] = final
    if design.task == "regression":
        spread = np.full(len(table), np.nan)
        if len(predicted) > 1:
            spread[design.rows] = predicted.std(axis=0, ddof=1)
        table["target"] = target.numbers
        table["prediction"], table["prediction_sd"] = value, spread
    else:
        label = np.full(len(table), None, dtype=object)
        known = ~np.isnan(value[:, 0])
        label[known] = np.array(design.labels, dtype=object)[value[known].argmax(axis=1)]
        table["target"], table["prediction"] = target.texts, label
        table[probability_columns(design.labels)] = value
    table["n_folds"] = np.where(used, len(predicted), 0)
    table["seen_in_pretraining"] = people.seen
    table["status"] = np.select([used, held_out], ["ok", "holdout"], "dropped")
    table["reason"] = [
        (None if final is not None else "too few are held out to be scored")
        if reason == HELD_OUT
        # What is missing of a confound says it; of a target, the value as it came does.
        else f"{reason}: {text}"
        if reason and text is not None and not reason.startswith("confound")
        else reason or None
        for reason, text in zip(target.reasons, target.texts, strict=True)
    ]
    return table


def describe_predictions(
    table: pd.DataFrame, design: CVDesign, target: str
) -> dict[str, dict[str, Any]]:
    """Return the BIDS description of every column of a table of predictions.

    Parameters
    ----------
    table : DataFrame
        As `prediction_table` gives it.
    design : CVDesign
    target : str
        Name of the phenotype.
    """
    described: dict[str, dict[str, Any]] = {
        str(c): {"Description": _PASSED_ON.get(str(c), "As in the table of images.")}
        for c in table.columns
    }
    classes = {label: f"{n} participants" for label, n in design.class_sizes.items()}
    ours: dict[str, dict[str, Any]] = {
        "target": {"Description": f"True value of {target}."},
        "prediction": {
            "Description": f"Prediction of {target} for this image by models that never had an image "
            f"of its group in training; mean over {len(design.fold)} repeats. Scores average "
            "the images of a participant that share a target value."
        },
        "prediction_sd": {"Description": "Standard deviation of the prediction over the repeats."},
        "n_folds": {
            "Description": "Test folds the image was in: one per repeat, 0 if dropped or held out."
        },
        "seen_in_pretraining": {
            "Description": "Whether the encoder saw the participant in pretraining; n/a if unknown.",
            "Levels": {"True": "seen", "False": "not seen"},
        },
        "status": {
            "Description": "Whether the image was used.",
            "Levels": {
                "ok": "used in cross-validation",
                "dropped": "not used, see reason",
                "holdout": "held out: not used in cross-validation, predicted once by a model of "
                "all images that are ok",
            },
        },
        "reason": {"Description": "Why the image was not used; n/a if it was."},
    }
    if design.task == "classification":
        ours["target"]["Levels"] = ours["prediction"]["Levels"] = classes
        ours["prediction"]["Description"] = (
            f"Class of {target} with the highest mean probability (see probability columns), by models "
            "that never had an image of its group in training."
        )
        for name, label in zip(probability_columns(design.labels), design.labels, strict=True):
            ours[name] = {
                "Description": f"Probability of {target} {label!r} under balanced classes, "
                f"mean over {len(design.fold)} repeats."
            }
    return {name: ours.get(name, entry) for name, entry in described.items()}


def probability_columns(labels: Sequence[str]) -> list[str]:
    """Return a column name for each class, unique and free of odd characters."""
    names = [f"probability_{re.sub('[^0-9A-Za-z]+', '_', label).strip('_')}" for label in labels]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{name}_{k}" for k, name in enumerate(names)]
    return names

"""The table of predictions and the description of its columns: one row per image, used or not.

Lays out what `prediction` has computed; a stage writes it as TSV and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.features import Column, read_labels
from nidl_dcl.evaluation.folds import CVDesign
from nidl_dcl.evaluation.targets import HELD_OUT, Target

__all__ = ["describe_predictions", "passed_on", "prediction_table", "read_persons"]

_OURS = (
    "target",
    "prediction",
    "prediction_sd",
    "n_folds",
    "seen_in_pretraining",
    "status",
    "reason",
)


_PASSED_ON = {
    "participant_id": "The participant; kept together in every fold unless a wider group is given.",
    "session_id": "The session of the image.",
    "run": "The run of the image.",
    "path": "The image, relative to the dataset.",
}


def passed_on(
    ids: pd.DataFrame | None, group: NDArray[np.object_], n: int
) -> tuple[pd.DataFrame, NDArray[np.object_]]:
    """Return the columns to pass on and the participant of each row."""
    if ids is None:
        return pd.DataFrame({"participant_id": group}), group
    if len(ids) != n:
        raise UsageError(f"ids has {len(ids)} rows, but the features have {n}.")
    taken = [c for c in ids.columns if c in _OURS or str(c).startswith("probability_")]
    if taken:
        raise UsageError(f"ids has columns that the predictions also have: {taken}. Rename them.")
    table = ids.reset_index(drop=True)
    if "participant_id" not in table:
        table.insert(0, "participant_id", group)
    participant = read_labels(table["participant_id"], n, "participant_id")
    _refuse_spread("Participant", participant, "group", group)
    return table, participant


def read_persons(
    persons: Column | None, participant: NDArray[np.object_], group: NDArray[np.object_]
) -> NDArray[np.object_]:
    """Return who counts once in each row: a participant, or several who are one person."""
    if persons is None:
        return participant
    person = read_labels(persons, len(participant), "persons")
    _refuse_spread("Participant", participant, "person", person)
    _refuse_spread("Person", person, "group", group)
    return person


def _refuse_spread(
    part: str, parts: NDArray[np.object_], whole: str, wholes: NDArray[np.object_]
) -> None:
    spread = pd.Series(wholes).groupby(parts).nunique()
    if (spread > 1).any():
        raise UsageError(
            f"{part} {spread.index[spread > 1][0]!r} is in several {whole}s. "
            f"A {whole} must hold all images of its {part.lower()}s."
        )


def prediction_table(
    ids: pd.DataFrame,
    read: Target,
    design: CVDesign,
    predicted: NDArray[np.float64],
    was_seen: pd.Series[Any],
    final: NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Return one row per image, in input order: truth, prediction, and why it was left out.

    Parameters
    ----------
    ids : DataFrame, shape (n_images, n_columns)
        Columns to begin with.
    read : Target
    design : Design
    predicted : ndarray, shape (n_repeats, n_used) or (n_repeats, n_used, n_classes)
    was_seen : Series of boolean, shape (n_images,)
    final : ndarray, shape (n_held_out,) or (n_held_out, n_classes), optional
        Predictions of the rows with the reason `HELD_OUT`.
    """
    table = ids.copy()
    n, rows = len(table), design.rows
    aside = read.reasons == HELD_OUT
    if design.task == "regression":
        value, spread = np.full(n, np.nan), np.full(n, np.nan)
        value[rows] = predicted.mean(axis=0)
        if len(predicted) > 1:
            spread[rows] = predicted.std(axis=0, ddof=1)
        if final is not None:
            value[aside] = final
        table["target"] = read.numbers
        table["prediction"], table["prediction_sd"] = value, spread
    else:
        probability = np.full((n, len(design.labels)), np.nan)
        probability[rows] = predicted.mean(axis=0)
        if final is not None:
            probability[aside] = final
        said = np.full(n, None, dtype=object)
        known = ~np.isnan(probability[:, 0])
        said[known] = np.array(design.labels, dtype=object)[probability[known].argmax(axis=1)]
        table["target"], table["prediction"] = read.texts, said
        for k, name in enumerate(_probability_columns(design.labels)):
            table[name] = probability[:, k]
    used = read.reasons == ""
    table["n_folds"] = np.where(used, len(predicted), 0)
    table["seen_in_pretraining"] = was_seen
    table["status"] = np.select([used, aside], ["ok", "holdout"], "dropped")
    table["reason"] = [
        (None if final is not None else "too few are held out to be scored")
        if reason == HELD_OUT
        # What is missing of a confound says it; of a target, the value as it came does.
        else f"{reason}: {text}"
        if reason and text is not None and not reason.startswith("confound")
        else reason or None
        for reason, text in zip(read.reasons, read.texts, strict=True)
    ]
    return table


def describe_predictions(
    table: pd.DataFrame, design: CVDesign, target: str
) -> dict[str, dict[str, Any]]:
    """Return the BIDS description of every column of `prediction_table`."""
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
        for name, label in zip(_probability_columns(design.labels), design.labels, strict=True):
            ours[name] = {
                "Description": f"Probability of {target} {label!r} under balanced classes, "
                f"mean over {len(design.fold)} repeats."
            }
    return {name: ours.get(name, entry) for name, entry in described.items()}


def _probability_columns(labels: Sequence[str]) -> list[str]:
    """Return a column name for each class, unique and free of odd characters."""
    names = [f"probability_{re.sub('[^0-9A-Za-z]+', '_', label).strip('_')}" for label in labels]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{name}_{k}" for k, name in enumerate(names)]
    return names

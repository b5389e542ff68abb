"""What is asked of a study, held against what is there, before anything is done.

Refuses with one message; what options can be refused alone is `options`' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.data.image_table import ImageTable
from nidl_dcl.errors import InputsUnusableError, UsageError, did_you_mean
from nidl_dcl.evaluation.confounds import encode_confounds, read_confounds, read_target_beside
from nidl_dcl.evaluation.folds import make_design
from nidl_dcl.evaluation.targets import Target, target_labels
from nidl_dcl.models.model_source import BUILTIN, ModelSource
from nidl_dcl.models.serialization import read_description, weights_sha256
from nidl_dcl.workflow.factory import refuse_changes
from nidl_dcl.workflow.options import PredictionOptions, TrainingOptions
from nidl_dcl.workflow.participants import held_out_rows

SITE_COLUMNS = ("site", "scanner", "site_id", "center", "centre")
"""Columns, in any case, that are audited as sites."""

_NO_UNITS = ("n/a", "na", "none", "-", "code", "codes", "category", "categorical", "label", "bool")
"""What sidecars say in place of a unit."""


def is_trained(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether the model is there already; refuse one that was trained otherwise."""
    if not (folder / "model.json").is_file():
        return False
    refuse_changes(read_description(folder)["provenance"].get("config", {}), config, folder)
    return True


def known_shape(training: TrainingOptions, folder: Path) -> TrainingOptions:
    """Return the options with the shape of the model that is there.

    The default shape comes from the images, so new participants could change it.
    """
    if training.shape or not (folder / "model.json").is_file():
        return training
    contract = read_description(folder)["input_contract"] or {}
    return replace(training, shape=list(contract.get("shape") or []))


def refuse_another_model(own: Path, source: ModelSource) -> None:
    """Refuse weights other than those that the output holds."""
    if (own / "model.json").is_file() and weights_sha256(own) != weights_sha256(source):
        # Versions of nidl_dcl may ship different ones, and an output keeps its copy.
        same = f" To go on with the one that is there: --model {own}." if source == BUILTIN else ""
        raise UsageError(
            f"{own} holds another model than {source}. Choose another --model-name or another "
            f"OUTPUT_DIR.{same}"
        )


def check_targets(
    table: ImageTable, targets: Sequence[str], prediction: PredictionOptions
) -> dict[str, str]:
    """Return the label of each target in file names; refuse what cannot be predicted.

    Parameters
    ----------
    table : ImageTable
        The dataset's images and phenotypes.
    targets : sequence of str
        Columns to predict.
    prediction : PredictionOptions
        Further columns.

    Raises
    ------
    UsageError
        For a column that is missing or asked for twice in ways that exclude each other.
    """
    if not targets:
        raise UsageError("--target needs at least one column.")
    known = table.phenotype_columns
    columns = [c for c in (prediction.group, prediction.site) if c]
    for name in (*targets, *columns, *prediction.confounds):
        if name not in known:
            close = [c for c in known if c.casefold() == name.strip().casefold()]
            hint = f" Did you mean {close[0]!r}?" if close else did_you_mean(name, known)
            raise UsageError(
                f"No phenotype table of {table.bids_dir} has a column {name!r}.{hint} There are: "
                f"{', '.join(known) or 'none'}.{table.why_missing()}"
            )
    for name in prediction.tasks:
        if name not in targets:
            raise UsageError(
                f"--task {name}=…: {name!r} is no --target; those are: {', '.join(targets)}."
            )
    for target in targets:
        if target in prediction.confounds:
            raise UsageError(
                f"{target!r} is both a --target and one of --confounds: nothing would be left to "
                "predict. Leave it out of one of them, or predict the targets one by one."
            )
        if target == prediction.site:
            raise UsageError(f"{target!r} is both a --target and the --site. Choose another.")
        if prediction.harmonize and site_column(known, prediction.site, target) is None:
            raise UsageError(
                f"--harmonize needs a column of sites besides the target {target!r}. Name it with "
                f"--site; there are: {', '.join(known)}."
            )
    return target_labels(targets)


def task_of(table: ImageTable, target: str, prediction: PredictionOptions) -> str:
    """Return what a target is: as asked, or a quantity where its unit is declared.

    Parameters
    ----------
    table : ImageTable
        Knows the units that are declared.
    target : str
        The column.
    prediction : PredictionOptions
        Knows the tasks that are asked for.
    """
    declared = table.units(target)
    auto = "quantity" if declared and declared.lower() not in _NO_UNITS else "auto"
    return prediction.tasks.get(target, auto)


def refuse_unusable(
    images: pd.DataFrame, targets: Sequence[str], prediction: PredictionOptions, table: ImageTable
) -> list[str]:
    """Return the task of each target; refuse those that have no cross-validation, in one message.

    With another cohort's readout, there is something to do without it.

    Parameters
    ----------
    images : DataFrame
        Of a data module.
    targets : sequence of str
        Columns to predict.
    prediction : PredictionOptions
        Confounds, readout and tasks.
    table : ImageTable
        Knows the units that are declared.

    Returns
    -------
    list of str
        A line for each target: what it is, why, and how to say otherwise.

    Raises
    ------
    InputsUnusableError
        Naming what is wrong with each target.
    """
    if prediction.readout is not None:
        return []
    problems, lines = [], []
    held_out = held_out_rows(images)
    groups, people = (images[c].to_numpy(dtype=object) for c in ("group_id", "person_id"))
    for target in dict.fromkeys(targets):
        try:
            confounds = read_confounds(images[prediction.confounds], groups, held_out, target)
            task = task_of(table, target, prediction)
            read = read_target_beside(
                images[target], groups, held_out, confounds, name=target, task=task
            )
            lines.append(_task_line(read))
            design = make_design(read, people, groups, n_splits=5, n_repeats=1, seed=0)
            if confounds:
                encode_confounds(confounds, design.rows, groups)
        except InputsUnusableError as error:
            lacking = bool(images[target].isna().any())
            problems.append(f"{error}{table.why_missing(target) if lacking else ''}")
    if problems:
        if len(problems) < len(set(targets)):
            problems.append("Nothing was done for the other targets: run again without these.")
        raise InputsUnusableError(" ".join(problems))
    return lines


def _task_line(read: Target) -> str:
    """Say what a target is taken for, and how to say otherwise where that could be meant."""
    line = f"{read.name}: {read.task} ({read.rule})"
    if read.labels:
        shown = ", ".join(label[:20] for label in read.labels[:8])
        line += f", classes {shown}{', …' * (len(read.labels) > 8)}"
        if len(read.labels) > 2 and all(label.lstrip("-").isdigit() for label in read.labels):
            line += f". If it is a quantity: --task {read.name}=regression"
    return line


def site_column(columns: Sequence[str], named: str | None, target: str) -> str | None:
    """Return the column of sites: the one named, or the first whose name says so.

    Parameters
    ----------
    columns : sequence of str
        Of the phenotype tables.
    named : str or None
        The option.
    target : str
        Never taken for a site by its name.
    """
    return named or next((c for c in columns if is_site_name(c) and c != target), None)


def is_site_name(column: str | None) -> bool:
    """Return whether a column is taken for that of sites by its name; so is none at all."""
    return column is None or column.lower() in SITE_COLUMNS

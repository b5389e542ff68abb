"""What a target is taken for, and what is said of columns that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.workflow.options import PredictionOptions
from nidl_dcl.workflow.preflight import check_targets, refuse_unusable

PEOPLE = [f"sub-{k:02d}" for k in range(60)]


def table(units: dict[str, str] | None = None, why: str = "") -> Any:
    return SimpleNamespace(
        bids_dir="MY_DATASET",
        phenotype_columns=["Age", "mmse"],
        units=(units or {}).get,
        why_missing=lambda column=None: why,
    )


def images(values: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"participant_id": PEOPLE, "group_id": PEOPLE, "person_id": PEOPLE, "mmse": values}
    ).assign(split="train")


SCORE = 24 + np.arange(60) % 7


@pytest.mark.parametrize(
    ("units", "asked", "task"),
    [
        ({}, [], "classification"),
        ({"mmse": "points"}, [], "regression"),
        ({"mmse": "n/a"}, [], "classification"),
        ({}, ["mmse=regression"], "regression"),
        ({"mmse": "points"}, ["mmse=classification"], "classification"),
    ],
)
def test_a_score_of_few_whole_numbers_is_what_its_unit_or_the_user_says(units, asked, task):
    options = PredictionOptions(task=asked)
    (line,) = refuse_unusable(images(SCORE), ["mmse"], options, table(units))
    assert line.startswith(f"mmse: {task} (")
    if task == "classification":
        assert "classes 24, 25" in line
        assert "--task mmse=regression" in line


def test_a_target_without_values_is_refused_with_the_reason():
    why = " mmse is known per session and differs; these images have no session."
    with pytest.raises(InputsUnusableError, match="known per session and differs"):
        refuse_unusable(images([None] * 60), ["mmse"], PredictionOptions(), table(why=why))


@pytest.mark.parametrize(
    ("name", "hint"), [("age", "'Age'"), ("MMSE", "'mmse'"), ("mms", "'mmse'")]
)
def test_a_misspelt_target_gets_a_hint(name, hint):
    with pytest.raises(UsageError, match=f"Did you mean {hint}"):
        check_targets(table(), [name], PredictionOptions())


@pytest.mark.parametrize("text", ["mmse", "mmse=", "=regression", "mmse=number"])
def test_a_task_that_makes_no_sense_is_refused(text):
    with pytest.raises(UsageError, match="COLUMN=regression or COLUMN=classification"):
        PredictionOptions(task=[text])


def test_a_task_of_another_column_is_refused():
    with pytest.raises(UsageError, match="is no --target"):
        check_targets(table(), ["mmse"], PredictionOptions(task=["Age=regression"]))

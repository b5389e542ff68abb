from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.evaluation.targets import read_target, target_labels
from nidl_dcl.io.formats import camel_case

ROWS = np.arange(60)


@pytest.mark.parametrize(
    ("values", "task", "rule"),
    [
        (["M", "F"] * 30, "classification", "text"),
        ([True, False] * 30, "classification", "true or false"),
        (pd.Categorical([1, 2, 3, 4] * 15), "classification", "categorical"),
        ([1.0, 2.0] * 30, "classification", "2 distinct"),
        ([0.5, 1.5] * 30, "classification", "2 distinct"),
        (np.arange(60), "regression", "more than 10"),
        ([0.5, 1.0, 2.0] * 20, "regression", "not whole"),
        ([1, 2, 3] * 20, "classification", "at least 5"),
        ([*range(20, 30), *[np.nan] * 50], "regression", "fewer than 5"),
        ([str(i) for i in range(58)] + ["89+", "n/a"], "regression", "reads as numbers"),
        ([f"{i}" for i in range(4)] + ["a", "b"] * 28, "classification", "text"),
    ],
)
def test_auto_follows_the_declared_rules_and_says_which(values, task, rule):
    read = read_target(values, ROWS)

    assert read.task == task
    assert rule in read.rule


def test_whole_numbers_count_participants_not_images():
    codes = np.repeat([1, 2, 3], 20)

    assert read_target(codes, ROWS).task == "classification"
    assert read_target(codes, ROWS // 10).task == "regression"


def test_every_left_out_row_has_its_reason():
    read = read_target(
        ["30.5", "n/a", None, "89+", "inf", "", *["41"] * 54], ROWS, task="regression"
    )

    assert list(read.reasons[:6]) == [
        "",
        "target missing",
        "target missing",
        "target not a number",
        "target not finite",
        "target missing",
    ]
    assert np.isnan(read.numbers[1:6]).all()
    assert read.texts[3] == "89+"


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, "n/a", " ", "N/A"])
def test_every_form_of_missing_is_missing(missing):
    read = read_target([missing, *["a", "b"] * 20], np.arange(41))

    assert read.reasons[0] == "target missing"
    assert (read.reasons[1:] == "").all()


def test_a_class_with_one_participant_is_left_out_with_a_reason():
    groups = np.array([*range(40), 40, 40, 40])
    read = read_target(["a", "b"] * 20 + ["c"] * 3, groups)

    assert read.labels == ("a", "b")
    assert set(read.reasons[40:]) == {"class with fewer than 3 participants"}
    assert list(read.numbers[:2]) == [0.0, 1.0]


def test_classes_that_are_numbers_are_sorted_as_numbers_and_written_without_decimals():
    read = read_target([10.0, 2.0, 1.0] * 20, ROWS)

    assert read.labels == ("1", "2", "10")


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([None] * 60, {}, "no value"),
        ([np.nan] * 60, {}, "no value"),
        ([5.0] * 60, {}, "constant"),
        ([5.0] * 60, {"task": "regression"}, "constant"),
        (["a"] * 60, {}, "constant"),
        ([None] * 58 + ["a", "a"], {}, "constant"),
        (["a"] * 59 + ["b"], {}, "fewer than two classes"),
        (["a"] * 59 + ["b"], {}, "'a' 59, 'b' 1"),
        ([1] * 59 + [2], {}, "'1' 59, '2' 1"),
        ([True] * 58 + [False] * 2, {}, "'True' 58, 'False' 2"),
        ([f"name {i}" for i in range(60)], {}, "60 different texts for 60 participants"),
        ([f"name {i // 2}" for i in range(60)], {}, "fewer than two classes"),
        ([f"{i},5" for i in range(60)], {}, "an identifier, a date or a note"),
        ([*range(50), *["lost"] * 6, *"--??"], {}, r"texts that are none: 'lost', '\?'\. Write"),
        (["a", "b"] * 30, {"task": "regression"}, "no finite number"),
        ([np.inf] * 60, {}, "no finite number"),
        (["inf", "-inf"] * 30, {}, "no finite number"),
    ],
)
def test_a_target_that_cannot_be_predicted_is_one_message(values, options, words):
    with pytest.raises(InputsUnusableError, match=words) as caught:
        read_target(values, ROWS, name="iq", **options)
    assert "'iq'" in str(caught.value)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(UsageError, match="auto, classification, regression"):
        read_target(["a", "b"] * 30, ROWS, task="classify")


@pytest.mark.parametrize(
    ("column", "label"),
    [
        ("age", "Age"),
        ("fluid_intelligence", "FluidIntelligence"),
        ("MMSE", "MMSE"),
        ("bmi (kg/m²)", "BmiKgM2"),
        ("âge-2", "Age2"),
        ("../etc", "Etc"),
        ("1st score", "1stScore"),
    ],
)
def test_camel_case_keeps_letters_and_digits_only(column, label):
    assert camel_case(column) == label


def test_a_column_without_letters_or_digits_cannot_name_a_file():
    with pytest.raises(UsageError, match="cannot name a file"):
        camel_case("年齢")


def test_columns_that_collide_are_an_error_and_repeated_ones_are_not():
    assert target_labels(["age", "sex", "age"]) == {"age": "Age", "sex": "Sex"}
    for one, other in (("fluid_iq", "fluid-iq"), ("age", "AGE")):
        with pytest.raises(UsageError, match="would both be written"):
            target_labels([one, other])


def test_an_integer_too_large_for_a_float_is_no_number():
    read = read_target([10**400, *range(59)], ROWS, task="regression")
    assert read.reasons[0] == "target not a number"


@pytest.mark.parametrize(
    "values", [[f"{20 + k % 5:03d}Y" for k in ROWS], [f"{20 + k % 2} years" for k in ROWS]]
)
def test_numbers_of_one_unit_are_a_quantity_and_never_classes(values):
    read = read_target([*values[:59], "-"], ROWS)
    assert read.task == "regression"
    assert "years" in read.rule
    assert read.numbers[0] == 20
    assert read.reasons[59] == "target missing"
    assert read_target(values, ROWS, task="classification").task == "classification"


@pytest.mark.parametrize("odd", ["6M", "21", "0.5"])
def test_numbers_of_several_units_are_refused_with_what_to_do(odd):
    with pytest.raises(InputsUnusableError, match="plain numbers of one unit"):
        read_target([odd, *["021Y", "022Y"] * 29, "025Y"], ROWS)
    with pytest.raises(InputsUnusableError, match="plain numbers of one unit"):
        read_target(["6M", *["21", "22"] * 29, "25"], ROWS)


@pytest.mark.parametrize(("levels", "task"), [(7, "regression"), (3, "regression"), (2, "")])
def test_a_declared_unit_makes_few_whole_numbers_a_quantity(levels, task):
    values = ROWS % levels + (24 if task else 1)
    assert read_target(values, ROWS).task == "classification"
    assert read_target(values, ROWS, task="quantity").task == (task or "classification")
    text = np.where(ROWS % 2, "a", "b")
    assert read_target(text, ROWS, task="quantity").task == "classification"

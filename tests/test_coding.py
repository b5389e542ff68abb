"""What the text of a phenotype column means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.coding import as_series, decode, same_value

SEX = {"Levels": {"1": "male", "2": "female"}}


@pytest.mark.parametrize(
    ("name", "values", "about", "expected", "note"),
    [
        ("age", ["20", "30.5"], {}, ["20", "30.5"], ""),
        ("age", ["20", None, "89+"], {}, ["20", None, "89"], "89+ = 89"),
        ("age", ["20", "> 90"], {}, ["20", "90"], "> 90 = 90"),
        ("age", ["89+", "89+"], {}, ["89+", "89+"], ""),
        ("age", ["25-30", "89+", "20"], {}, ["25-30", "89+", "20"], ""),
        ("age", ["23,5", "30", "1.5"], {}, ["23.5", "30", "1.5"], "decimal commas"),
        ("n", ["1,234", "2"], {}, ["1,234", "2"], "thousands"),
        ("place", ["Bonn, 1", "2"], {}, ["Bonn, 1", "2"], ""),
        ("sex", ["M", "m", "Male", "F", "female"], {}, ["M", "M", "M", "F", "F"], "Male = M"),
        ("Gender", ["f", "other", None], {}, ["F", "other", None], "f = F"),
        ("sex_at_birth", ["male"], {}, ["M"], "male = M"),
        ("unisexual", ["male"], {}, ["male"], ""),
        ("sex", ["1", "2"], {}, ["1", "2"], "kept as numbers"),
        ("sex", ["1", "2.0", None], SEX, ["M", "F", None], "1 = male, 2 = female"),
        ("sex", ["M", "F"], {"Levels": {"M": "male", "F": "female"}}, ["M", "F"], ""),
        (
            "group",
            ["1", "2"],
            {"Levels": {"1": "control", "2": "patient"}},
            ["control", "patient"],
            "1 = control",
        ),
        ("group", ["1", "3"], {"Levels": {"1": "control", "2": "patient"}}, ["1", "3"], ""),
        ("group", ["1"], {"Levels": {"1": {"Description": "control"}}}, ["control"], "1 = control"),
        ("group", ["1"], {"Levels": ["control"]}, ["1"], ""),
        ("score", ["5", "-9"], {"Levels": {"-9": "missing"}}, ["5", None], "-9 means missing"),
    ],
)
def test_a_column_is_read_by_what_it_or_its_sidecar_says(name, values, about, expected, note):
    decoded, notes = decode(name, values, about)
    assert decoded == expected
    assert note in " ".join(notes)
    assert bool(notes) == bool(note)


def test_numbers_are_float_and_anything_else_is_text():
    numbers = as_series(["1", "-2.5", ".5", "1e3", None])
    assert numbers.dtype == np.float64
    assert list(numbers[:4]) == [1, -2.5, 0.5, 1000]
    assert np.isnan(numbers[4])
    text = as_series(["1", "x", None])
    assert list(text[:2]) == ["1", "x"]
    assert text[2] is pd.NA


@pytest.mark.parametrize("values", [["inf"], ["1_000"], ["nan"], ["0x1"], ["٣"]])
def test_what_only_python_takes_for_a_number_is_text(values):
    assert as_series(values).dtype == "string"


def test_a_column_without_values_is_kept():
    assert as_series([None, None]).isna().all()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("1", "1.0", True), ("a", None, True), ("a", "A", False), ("1", "2", False)],
)
def test_equal_numbers_and_missing_values_do_not_contradict(one, other, same):
    assert same_value(one, other) is same

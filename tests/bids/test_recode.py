"""What the text of a phenotype column means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.bids.recode import as_series, decode, same_value

SEX = {"Levels": {"1": "male", "2": "female"}}


@pytest.mark.parametrize(
    ("name", "values", "about", "expected", "note"),
    [
        ("age", ["20", "30.5"], {}, ["20", "30.5"], ""),
        ("age", ["20", None, "89+"], {}, ["20", None, "89"], "89+ = 89"),
        ("age", ["20", "> 90"], {}, ["20", "90"], "> 90 = 90"),
        ("age", ["89+", "89+"], {}, ["89+", "89+"], ""),
        ("age", ["25-30", "89+", "20"], {}, ["25-30", "89+", "20"], ""),
        ("age", ["25-30", "18", "20"], {}, ["25-30", "18", "20"], "1 of 3 values are not numbers"),
        ("age", ["23,5", "30", "1,123"], {}, ["23.5", "30", "1.123"], "decimal commas"),
        ("age", ["23,5", "30", "1.5"], {}, ["23,5", "30", "1.5"], "commas and decimal points"),
        ("age", ["1.234,5", "2", "3"], {}, ["1.234,5", "2", "3"], "'1.234,5'"),
        ("age", ["P25Y", "P26Y"], {}, ["25", "26"], "numbers of years"),
        ("age", ["022Y", None, "103Y"], {}, ["22", None, "103"], "022Y = 22"),
        ("age", ["21y", "8Y", "30.5 y"], {}, ["21", "8", "30.5"], "numbers of years"),
        ("age", ["21 years", "1 year"], {}, ["21", "1"], "numbers of years"),
        ("scanned_at", ["6M", "011M"], {}, ["6", "11"], "numbers of months"),
        ("ga", ["38 wks", "40,5 weeks"], {}, ["38", "40.5"], "numbers of weeks"),
        ("age", ["20Y", "21Y"], {"Units": "months"}, ["20", "21"], "the cells count"),
        ("age", ["6M", "021Y", "22Y"], {}, ["6M", "021Y", "22Y"], "not the same in all cells"),
        ("age", ["21y", "22"], {}, ["21y", "22"], "not the same in all cells"),
        ("field", ["3T", "1.5T"], {}, ["3T", "1.5T"], ""),
        ("scan", ["2D", "3D"], {}, ["2D", "3D"], ""),
        ("sex", ["M", "F"], {}, ["M", "F"], ""),
        ("age", ["20", "-9", "999"], {}, ["20", "-9", "999"], "-9, 999 is no age in years"),
        ("age", ["20", "900"], {"Units": "months"}, ["20", "900"], ""),
        ("age", ["20", "-9"], {"Levels": {"-9": "Missing data"}}, ["20", None], "-9 means"),
        ("iq", ["-9", "999"], {}, ["-9", "999"], ""),
        ("day", ["2020-01-01", "1"], {}, ["2020-01-01", "1"], ""),
        ("ok", ["true", "False", "1e-3"], {}, ["true", "False", "1e-3"], ""),
        ("n", ["1,234", "2"], {}, ["1,234", "2"], "thousands"),
        ("place", ["Bonn, 1", "2"], {}, ["Bonn, 1", "2"], ""),
        ("sex", ["M", "m", "Male", "F", "female"], {}, ["M", "M", "M", "F", "F"], "Male = M"),
        ("Gender", ["f", "other", None], {}, ["F", "other", None], "f = F"),
        ("sex_at_birth", ["male"], {}, ["M"], "male = M"),
        ("unisexual", ["male"], {}, ["male"], ""),
        ("sex", ["1", "2"], {}, ["1", "2"], "kept as numbers"),
        ("sex", ["M", "1", "F"], {}, ["M", "1", "F"], "words and numbers"),
        ("sex", ["O", "unknown", "woman"], {}, ["O", "unknown", "F"], "woman = F"),
        ("sex", ["M", "U"], {"Levels": {"M": "male", "U": "unknown"}}, ["M", None], "U means"),
        ("sex", ["H", "F"], {}, ["H", "F"], ""),
        ("sex", ["1", "2.0", None], SEX, ["M", "F", None], "1 = male, 2 = female"),
        ("sex", ["M", "F"], {"Levels": {"M": "male", "F": "female"}}, ["M", "F"], ""),
        (
            "group",
            ["1", "2"],
            {"Levels": {"1": "control", "2": "patient"}},
            ["control", "patient"],
            "1 = control",
        ),
        ("group", ["1", "3"], {"Levels": {"1": "control"}}, ["1", "3"], "only some"),
        ("group", ["1", "3"], {"Levels": {"5": "control"}}, ["1", "3"], ""),
        ("group", ["1"], {"Levels": {"1": "a", "01": "b"}}, ["1"], "name 1 twice"),
        ("group", ["hc", "PT"], {"Levels": {"HC": "control", "pt": "ill"}}, ["hc", "PT"], ""),
        ("group", ["1"], {"Levels": {"1": 7, "2": None, "3": []}}, ["1"], ""),
        ("group", ["1"], {"Levels": {"1": {"TermURL": "http://x"}}}, ["1"], ""),
        ("group", ["9" * 5000, "1"], {"Levels": {"1": "a"}}, ["9" * 5000, "1"], "only some"),
        ("group", ["007", "+0.0"], {"Levels": {"7": "a", "0": "b"}}, ["a", "b"], "7 = a"),
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


def test_long_digits_take_no_time():
    from time import perf_counter

    start = perf_counter()
    values = ["1" * 300_000 + "x", "0" * 300_000 + "-", "1" * 300_000, "1,5"]
    decode("sex", values, {"Levels": {"1": "male"}})
    as_series(values)
    assert perf_counter() - start < 2

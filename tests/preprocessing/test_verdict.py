from __future__ import annotations

import dataclasses

import pytest

from nidl_dcl.preprocessing.measures import MEASURES, Measures
from nidl_dcl.preprocessing.verdict import PREPROCESSING_CODES, Verdict, gravest, judge

GOOD = Measures(
    mask_ml=1400,
    determinant=1.4,
    stretch=1.13,
    shear_degrees=3,
    overlap=0.96,
    correlation=0.55,
    upright=0.95,
    lead=0.27,
    at_edge=0,
    clipped=0.01,
)


def test_measures_are_explained():
    assert list(MEASURES) == [field.name for field in dataclasses.fields(Measures)]


def test_a_good_image_is_ok():
    assert judge(GOOD) == Verdict("ok", "ok")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"mask_ml": 700}, "warn", "brain_size"),
        ({"mask_ml": 30}, "skip", "brain_size"),
        ({"mask_ml": 3000}, "skip", "brain_size"),
        ({"overlap": 0.89}, "warn", "misaligned"),
        ({"overlap": 0.6}, "skip", "misaligned"),
        ({"upright": 0.5}, "skip", "misaligned"),
        ({"lead": -0.2}, "skip", "misaligned"),
        ({"determinant": -1.4}, "skip", "misaligned"),
        ({"stretch": 2}, "skip", "misaligned"),
        ({"shear_degrees": 14}, "warn", "misaligned"),
        ({"correlation": -0.5}, "skip", "contrast"),
        ({"at_edge": 0.05}, "warn", "field_of_view"),
        ({"clipped": 0.3}, "skip", "field_of_view"),
    ],
)
def test_each_measure_can_flag_and_skip(change, status, code):
    verdict = judge(dataclasses.replace(GOOD, **change))
    assert (verdict.status, verdict.code) == (status, code)
    assert code in PREPROCESSING_CODES
    assert verdict.message.endswith(".")


def test_the_gravest_reason_names_the_code_and_all_are_told():
    verdict = judge(dataclasses.replace(GOOD, mask_ml=700, overlap=0.5))
    assert (verdict.status, verdict.code) == ("skip", "misaligned")
    assert "0.50" in verdict.message
    assert "700 ml" in verdict.message
    assert gravest([]) == Verdict("ok", "ok")

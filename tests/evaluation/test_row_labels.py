from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.evaluation.site_effects import site_audit

QUICK = {"n_permutations": 0, "n_repeats": 1, "learning_curve": False}
N = 40


@pytest.fixture
def cohort():
    """Return features, a column they carry almost without error, and groups, labeled alike."""
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(N, 4)), index=[f"sub-{i:02d}" for i in range(N)])
    return x, 50 + 10 * x[0], pd.Series(x.index, index=x.index)


def turned(labeled):
    return labeled.iloc[::-1]


def test_a_target_in_another_order_is_joined_by_its_labels(cohort):
    x, age, who = cohort

    found = predict_phenotype(x, turned(age), turned(who), **QUICK)

    assert found.metrics["scores"]["mae"]["mean"] < 1
    assert found.predictions["participant_id"].tolist() == list(x.index)
    assert found.predictions["target"].tolist() == age.tolist()


def test_everything_that_is_given_beside_the_features_is_joined_by_labels(cohort):
    x, age, who = cohort
    beside = {
        "confounds": pd.DataFrame({"sex": ["F", "M"] * (N // 2)}, index=x.index),
        "site": pd.Series(["a"] * 20 + ["b"] * 20, index=x.index, name="scanner"),
        "held_out": pd.Series([True] * 10 + [False] * 30, index=x.index),
        "ids": pd.DataFrame({"participant_id": x.index, "run": range(N)}, index=x.index),
        "extra_features": pd.DataFrame({"size": np.arange(N) % 7}, index=x.index),
        "baselines": {"one": x * 2, "two": [x, x + 1], "three": Baseline(x, pca=True)},
    }
    mixed = {name: turned(v) if name != "baselines" else v for name, v in beside.items()}
    mixed["baselines"] = {
        "one": turned(x * 2),
        "two": [turned(x), x + 1],
        "three": Baseline(turned(x), pca=True),
    }

    right = predict_phenotype(x, age, who, **beside, **QUICK)
    found = predict_phenotype(x, turned(age), who, **mixed, **QUICK)

    assert found.metrics == right.metrics
    pd.testing.assert_frame_equal(found.predictions, right.predictions)


@pytest.mark.parametrize("which", ["other labels", "repeated labels", "numbers"])
def test_labels_that_do_not_match_are_refused_with_what_to_do(cohort, which):
    x, age, who = cohort
    if which == "other labels":
        age = age.rename(lambda label: label.removeprefix("sub-"))
    elif which == "numbers":
        age = age.reset_index(drop=True)
    else:
        x, age = x.rename({"sub-01": "sub-00"}), turned(age)

    with pytest.raises(UsageError, match=r"rows of y have other labels.*row 0.*\.to_numpy\(\)"):
        predict_phenotype(x, age, who.to_numpy(), **QUICK)


def test_beside_an_array_objects_that_differ_in_their_labels_are_refused(cohort):
    x, age, who = cohort

    with pytest.raises(UsageError, match="y and groups are pandas objects"):
        predict_phenotype(x.to_numpy(), turned(age), who, **QUICK)
    same = predict_phenotype(x.to_numpy(), age, who, **QUICK)
    plain = predict_phenotype(x.to_numpy(), age.tolist(), who.tolist(), **QUICK)
    assert same.metrics == plain.metrics


def test_repeated_labels_in_one_order_are_fine(cohort):
    x, age, who = cohort
    x = x.rename({"sub-01": "sub-00"})

    found = predict_phenotype(x, age.set_axis(x.index), who.to_numpy(), **QUICK)

    assert found.metrics["scores"]["mae"]["mean"] < 1


def test_sites_are_joined_by_labels_too(cohort):
    x, _, who = cohort
    site = pd.Series(np.where(x[0] > 0, "a", "b"), index=x.index)

    found = site_audit(x, turned(site), who, n_repeats=1, n_permutations=0)

    assert found["balanced_accuracy"]["mean"] > 0.9

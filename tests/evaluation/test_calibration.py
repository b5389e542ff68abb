from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.io.formats import write_json, write_tsv
from nidl_dcl.report.build import write_report

N = 60
PEOPLE = [f"sub-{i:02d}" for i in range(N)]


@pytest.fixture(scope="module")
def found():
    """Return predictions of an age that shrink towards the mean, and of an uneven class."""
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, N)
    x = np.column_stack([age + 20 * rng.normal(size=N), rng.normal(size=(N, 3))])
    sick = np.where(age + 15 * rng.normal(size=N) > 65, "sick", "healthy")
    quick = {"n_repeats": 2, "n_permutations": 0, "learning_curve": False}
    return {
        "age": predict_phenotype(x, age, PEOPLE, target="age", **quick),
        "group": predict_phenotype(x, sick, PEOPLE, target="group", **quick),
    }


def test_the_correction_is_fitted_on_the_other_folds_and_stands_beside_the_raw_errors(found):
    metrics, folds = found["age"].metrics, found["age"].folds
    own = folds[folds["features"] == "embeddings"]
    errors, slopes = [], []
    for _, repeat in own.groupby("repeat"):
        slopes.append(LinearRegression().fit(repeat[["observed"]], repeat["predicted"]).coef_[0])
        for k in range(5):
            known, test = repeat[repeat["fold"] != k], repeat[repeat["fold"] == k]
            line = LinearRegression().fit(known[["observed"]], known["predicted"])
            errors.append((test["predicted"] - line.predict(test[["observed"]])).abs().mean())

    shrunk = metrics["regression_to_the_mean"]
    assert shrunk["slope"] == pytest.approx(np.mean(slopes))
    assert shrunk["corrected"]["mae"]["folds"] == pytest.approx(errors)
    assert shrunk["slope"] < 0.8
    assert shrunk["error_r"] < -0.3
    assert abs(shrunk["corrected"]["error_r"]) < 0.1
    raw = [
        (t["predicted"] - t["observed"]).abs().mean() for _, t in own.groupby(["repeat", "fold"])
    ]
    assert metrics["scores"]["mae"]["folds"] == pytest.approx(raw)
    assert metrics["confusion"] is None
    json.dumps(metrics, allow_nan=False)


def test_calibration_of_a_number_is_the_line_of_the_truth_on_the_prediction(found):
    own = found["age"].folds.query("features == 'embeddings'")
    lines = [
        LinearRegression().fit(repeat[["predicted"]], repeat["observed"])
        for _, repeat in own.groupby("repeat")
    ]

    calibration = found["age"].metrics["calibration"]
    assert calibration["slope"] == pytest.approx(np.mean([line.coef_[0] for line in lines]))
    assert calibration["intercept"] == pytest.approx(np.mean([line.intercept_ for line in lines]))


def test_the_brier_score_weighs_classes_equally(found):
    own = found["group"].folds.query("features == 'embeddings'")
    folds = []
    for _, test in own.groupby(["repeat", "fold"]):
        each = [
            brier_score_loss(rows["observed"] == "sick", rows["probability_sick"])
            for _, rows in test.groupby("observed")
        ]
        folds.append(np.mean(each))

    calibration = found["group"].metrics["calibration"]
    assert calibration["brier"]["folds"] == pytest.approx(folds)
    assert calibration["brier_of_equal_shares"] == 0.25
    assert sum(part["n"] for part in calibration["bins"]) == N
    assert found["group"].metrics["regression_to_the_mean"] is None


def test_confusion_and_curves_are_of_participants():
    rng = np.random.default_rng(1)
    person = np.repeat(np.arange(30), 2)  # two images each
    sick = np.array(["no", "yes", "yes"])[person % 3]
    x = rng.normal(size=(60, 3)) + (sick == "yes")[:, None]

    result = predict_phenotype(x, sick, person, n_repeats=2, n_permutations=0, learning_curve=False)

    chance = result.repeats["embeddings"][0].mean(axis=0)[:, 1].reshape(30, 2).mean(axis=1)
    truth = np.array([0, 1, 1])[np.arange(30) % 3]
    expected = confusion_matrix(truth, chance > 0.5)
    confusion = pd.DataFrame(result.metrics["confusion"]).T
    np.testing.assert_array_equal(confusion.loc[["no", "yes"], ["no", "yes"]], expected)
    roc, precision = (result.metrics["curves"][name] for name in ("roc", "precision_recall"))
    assert set(roc) == set(precision) == {"yes"}
    false, true = np.array(roc["yes"]).T
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(truth, chance))
    assert np.array(precision["yes"])[:, 1].min() >= 0.6


def test_the_report_shows_them_in_the_details_of_a_target(found, tmp_path):
    for name, result in found.items():
        stem = f"desc-dcl{name.title()}"
        write_json(tmp_path / f"{stem}_metrics.json", result.metrics)
        write_tsv(tmp_path / f"{stem}_predictions.tsv", result.predictions)

    page = write_report(tmp_path).read_text()

    drawn = {file.name.partition("_")[2] for file in (tmp_path / "figures").glob("*.svg")}
    assert drawn >= {"errors.svg", "roc.svg", "precisionrecall.svg", "reliability.svg"}
    assert "Calibration and errors" in page
    assert found["age"].metrics["regression_to_the_mean"]["sentence"] in page
    assert "Brier score" in page
    counted = pd.read_csv(
        tmp_path / "figures" / "desc-dclGroup_confusion.tsv", sep="\t", index_col=0
    )
    assert counted.to_numpy().sum() == N

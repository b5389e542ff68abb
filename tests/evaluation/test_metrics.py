from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from nidl_dcl.evaluation.metrics import (
    balanced_accuracies,
    chance_level,
    classification_scores,
    compare,
    compared,
    interval,
    mean_absolute_errors,
    p_words,
    regression_scores,
    score_bounds,
    summarize,
)

RNG = np.random.default_rng(0)


def test_the_interval_is_the_corrected_one_of_nadeau_and_bengio():
    folds = [1.0, 2.0, 4.0, 5.0]
    # By hand: mean 3, s^2 = (4 + 1 + 1 + 4) / 3, variance (1/4 + 1/4) s^2, t(3) = 3.1824.
    half = 3.182446305284263 * np.sqrt((0.25 + 0.25) * 10 / 3)

    found = interval(folds, 0.25)

    assert found["mean"] == 3.0
    np.testing.assert_allclose(found["ci95"], [3 - half, 3 + half], rtol=1e-12)
    assert found["folds"] == folds


def test_the_interval_is_wider_than_the_plain_one_and_uses_all_folds():
    folds = RNG.normal(size=25)
    low, high = interval(folds, 0.25)["ci95"]

    plain = t.ppf(0.975, 24) * folds.std(ddof=1) / 5
    assert (high - low) / 2 == pytest.approx(plain * np.sqrt(1 + 25 * 0.25))


@pytest.mark.parametrize(
    ("folds", "mean", "has_interval"),
    [([np.nan, np.nan], None, False), ([np.nan, 2.0], 2.0, False), ([np.nan, 2.0, 4.0], 3.0, True)],
)
def test_folds_without_a_score_are_left_out_and_written_as_none(folds, mean, has_interval):
    found = interval(folds, 0.25)

    assert found["mean"] == mean
    assert (found["ci95"] is not None) == has_interval
    assert found["folds"][0] is None


def test_regression_scores_are_those_of_scikit_learn():
    truth, predicted, weight = RNG.normal(size=(3, 40))
    weight = np.abs(weight)

    scores = regression_scores(truth, predicted, weight)

    assert scores["mae"] == pytest.approx(np.average(np.abs(truth - predicted), weights=weight))
    assert scores["r2"] == pytest.approx(r2_score(truth, predicted, sample_weight=weight))
    even = regression_scores(truth, predicted, np.ones(40))
    assert even["r"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    columns = mean_absolute_errors(
        np.stack([truth, predicted], 1), np.stack([predicted, predicted], 1), weight
    )
    np.testing.assert_allclose(columns, [scores["mae"], 0.0])


def test_a_constant_truth_has_an_error_alone_whatever_rounding_leaves_of_it():
    truth = np.full(6, 0.1)
    assert (truth - truth.sum() / 6 != 0).any()

    scores = regression_scores(truth, np.arange(6.0), np.ones(6))

    assert np.isnan([scores["r2"], scores["r"]]).all()
    assert scores["mae"] > 0


def test_a_constant_prediction_has_no_correlation():
    scores = regression_scores(np.arange(5.0), np.full(5, 1 / 3), np.ones(5))

    assert np.isnan(scores["r"])
    assert scores["mae"] > 0


@pytest.mark.parametrize("n_classes", [2, 3])
def test_classification_scores_are_those_of_scikit_learn(n_classes):
    truth = np.arange(30) % n_classes
    probability = RNG.dirichlet(np.ones(n_classes), size=30)
    labels = ["a", "b", "c"][:n_classes]
    predicted = probability.argmax(axis=1)

    scores = classification_scores(truth.astype(float), probability, np.ones(30), labels)

    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    area = (
        roc_auc_score(truth, probability[:, 1])
        if n_classes == 2
        else roc_auc_score(truth, probability, multi_class="ovr", average="macro")
    )
    assert scores["roc_auc"] == pytest.approx(area)
    assert scores["recall_a"] == pytest.approx(np.mean(predicted[truth == 0] == 0))
    columns = balanced_accuracies(
        truth[:, None].astype(float), predicted[:, None].astype(float), np.ones(30), n_classes
    )
    np.testing.assert_allclose(columns, [scores["balanced_accuracy"]])


def test_a_class_absent_from_a_fold_has_no_recall_and_does_not_count():
    scores = classification_scores(np.zeros(3), np.eye(2)[[0, 0, 1]], np.ones(3), ["a", "b"])

    assert scores["balanced_accuracy"] == pytest.approx(2 / 3)
    assert np.isnan(scores["recall_b"])
    assert np.isnan(scores["roc_auc"])


@pytest.mark.parametrize(
    ("metric", "observed", "p"),
    [("mae", 2.0, 3 / 5), ("balanced_accuracy", 2.0, 4 / 5), ("mae", 0.5, 1 / 5)],
)
def test_p_counts_the_permutations_at_least_as_good(metric, observed, p):
    found = chance_level(metric, observed, np.array([1.0, 2.0, 3.0, 4.0]))

    assert found["p"] == pytest.approx(p)
    assert found["chance"] == 2.5
    assert found["n"] == 4


def test_without_permutations_there_is_no_chance_level():
    found = chance_level("mae", 1.0, np.empty(0))

    assert found["chance"] is None
    assert found["p"] is None


@pytest.mark.parametrize(
    ("errors", "beats", "words"),
    [
        (1.0, True, "better than the best baseline, good"),
        (3.0, False, "worse"),
        (2.0, False, "are not shown to predict age better than the best baseline, good"),
    ],
)
def test_the_headline_compares_with_the_best_baseline_and_says_so_plainly(errors, beats, words):
    noise = 0.1 * RNG.normal(size=(3, 25))
    own, good, bad = (
        summarize([{"mae": v + e} for e in row], 0.25)
        for v, row in zip((errors, 2.0, 9.0), noise, strict=True)
    )

    headline = compare("age", "mae", own, {"bad": bad, "good": good}, 0.25)

    assert headline["best_baseline"] == "good"
    assert headline["beats"] is beats
    assert words in headline["sentence"]
    assert ("which includes 0" in headline["sentence"]) == ("not shown" in words)
    assert headline["gain"]["mean"] == pytest.approx(good["mae"]["mean"] - own["mae"]["mean"])
    assert set(headline["gains"]) == {"bad", "good"}


@pytest.mark.parametrize("metric", ["mae", "r2", "r", "roc_auc", "balanced_accuracy", "recall_F"])
def test_an_interval_ends_at_the_bounds_of_the_score(metric):
    bounds = score_bounds(metric)
    near = [bounds[0] + 0.01 * i if np.isfinite(bounds[0]) else 1 - i for i in (0, 0, 9, 9)]
    far = [bounds[1] - 0.01 * i if np.isfinite(bounds[1]) else i for i in (0, 0, 9, 9)]

    for folds in (near, far):
        found = summarize([{metric: x} for x in folds], 0.25)[metric]["ci95"]
        plain = interval(folds, 0.25)["ci95"]
        assert bounds[0] <= found[0] < found[1] <= bounds[1]
        assert plain[0] < bounds[0] or plain[1] > bounds[1]
        assert found == [max(plain[0], bounds[0]), min(plain[1], bounds[1])]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((5.1234, 5.1239), ["5.123", "5.124"]),
        ((0.7, 0.7), ["0.7", "0.7"]),
        ((5.1, None, 5.3), ["5.1", "–", "5.3"]),
    ],
)
def test_scores_that_are_compared_have_the_digits_that_tell_them_apart(values, texts):
    assert [t.rstrip("0") for t in compared(*values)] == [t.rstrip("0") for t in texts]


def test_a_p_value_at_its_floor_is_an_upper_bound():
    assert p_words(1 / 201, 200) == "≤ 0.005"
    assert p_words(2 / 201, 200) == "= 0.01"
    assert p_words(None, 0) == ""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nidl_dcl.evaluation.features import Features
from nidl_dcl.evaluation.linear_models import (
    Logistic,
    Ridge,
    count_edges,
    nested_cv_predict,
    tuned_strength,
)

RNG = np.random.default_rng(0)


def _data(n, d):
    hidden = RNG.normal(size=(n, 5))
    x = hidden @ RNG.normal(size=(5, d)) + 0.5 * RNG.normal(size=(n, d)) + 3
    return x, hidden[:, 0] + 0.5 * RNG.normal(size=n)


@pytest.mark.parametrize("d", [8, 90], ids=["more rows", "more columns"])
def test_ridge_is_scikit_learn_with_the_strength_tuned_on_the_other_folds(d):
    x, y = _data(50, d)
    fold = np.arange(50) % 5

    predicted, strengths = nested_cv_predict(Features(x), y[:, None], fold, Ridge())

    for k in range(5):
        train = fold != k
        # Ridge's penalty scales with the rows it is fitted on; GridSearchCV keeps it fixed.
        inner = PredefinedSplit(fold[train])
        grid = Ridge().strengths * 30 * d
        pipe = make_pipeline(StandardScaler(), SklearnRidge())
        search = GridSearchCV(
            pipe, {"ridge__alpha": grid}, cv=inner, scoring="neg_mean_squared_error", refit=False
        ).fit(x[train], y[train])
        assert strengths[k, 0] == pytest.approx(search.best_params_["ridge__alpha"] / (30 * d))
        pipe.set_params(ridge__alpha=strengths[k, 0] * 40 * d).fit(x[train], y[train])
        np.testing.assert_allclose(predicted[~train, 0], pipe.predict(x[~train]), atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("strength", [1.0, 0.01, 0.0003])
def test_logistic_is_scikit_learn_with_balanced_classes(n_classes, strength):
    x, y = _data(60, 20)
    codes = np.digitize(y, [0.3] if n_classes == 2 else [-1.0, 0.3])
    fold = np.arange(60) % 3

    predicted, _ = nested_cv_predict(
        Features(x), codes[:, None].astype(float), fold, Logistic(n_classes, np.array([strength]))
    )

    for k in range(3):
        train = fold != k
        model = LogisticRegression(
            C=4 / (strength * 40 * 20), class_weight="balanced", tol=1e-10, max_iter=10000
        )
        pipe = make_pipeline(StandardScaler(), model).fit(x[train], codes[train])
        np.testing.assert_allclose(predicted[~train, 0], pipe.predict_proba(x[~train]), atol=1e-3)


@pytest.mark.parametrize("model", [Ridge(), Logistic(2)], ids=["ridge", "logistic"])
def test_many_targets_together_are_the_same_as_one_by_one(model):
    x, y = _data(40, 12)
    targets = np.stack([RNG.permutation((y > 0).astype(float)) for _ in range(7)], axis=1)
    fold = np.arange(40) % 4

    together, strengths = nested_cv_predict(Features(x), targets, fold, model)

    for j in range(7):
        alone, strength = nested_cv_predict(Features(x), targets[:, j : j + 1], fold, model)
        np.testing.assert_allclose(together[:, j], alone[:, 0], atol=1e-9)
        np.testing.assert_array_equal(strengths[:, j], strength[:, 0])


def test_a_class_without_a_training_row_gets_no_probability():
    x, _ = _data(30, 4)
    codes = np.tile([0.0, 1.0], 15)
    codes[::10] = 2.0
    fold = np.where(codes == 2, 0, np.arange(30) % 3)

    predicted, _ = nested_cv_predict(Features(x), codes[:, None], fold, Logistic(3))

    assert predicted[fold == 0, 0, 2].max() < 1e-6
    np.testing.assert_allclose(predicted.sum(axis=2), 1.0)


@pytest.mark.parametrize("model", [Ridge(), Logistic(2)], ids=["ridge", "logistic"])
def test_constant_features_predict_the_mean(model):
    y = np.tile([0.0, 1.0], 15)

    predicted, _ = nested_cv_predict(
        Features(np.ones((30, 4))), y[:, None], np.arange(30) // 2 % 3, model
    )

    np.testing.assert_allclose(predicted, 0.5)


@pytest.mark.parametrize("classes", [False, True], ids=["ridge", "logistic"])
def test_a_signal_that_wants_hardly_any_penalty_gets_it(classes):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 6))
    y = np.arange(40) // 4 % 2.0 if classes else x @ np.ones(6)
    x += 6 * y[:, None] * classes  # far apart, or without noise: the weaker the penalty, the better
    model = Logistic(2) if classes else Ridge()

    _, strengths = nested_cv_predict(Features(x), y[:, None], np.arange(40) % 4, model)

    assert strengths.max() < (1e-4 if classes else 1e-6)
    whole = tuned_strength(Features(x), y, np.arange(40), np.arange(40)[None] % 4, model)
    assert whole < (1e-4 if classes else 1e-6)


def test_weaker_penalties_change_nothing_where_they_are_not_chosen():
    x, y = _data(40, 12)
    y = (y > 0).astype(float)[:, None]
    fold = np.arange(40) % 4
    few, all_of_them = Logistic(2), Logistic(2, np.logspace(4, -7, 23), np.empty(0))

    one, chosen = nested_cv_predict(Features(x), y, fold, few)
    two, same = nested_cv_predict(Features(x), y, fold, all_of_them)

    np.testing.assert_allclose(chosen, same)
    np.testing.assert_allclose(one, two, atol=1e-9)


def test_folds_at_an_end_of_the_grid_are_counted_and_many_are_said():
    grid = Ridge()
    ends = [float(grid.strengths[0])] * 2 + [float(grid.strengths[-1])] * 7 + [0.01] * 16

    found = count_edges(ends, grid)

    assert (found["n_strongest"], found["n_weakest"]) == (2, 7)
    assert "the weakest (1e-08, hardly any penalty) in 7 of 25 folds" in found["sentence"]
    assert "strongest" not in found["sentence"]
    assert count_edges([0.01] * 25, grid)["sentence"] is None

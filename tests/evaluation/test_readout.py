from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_readouts import designed
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nidl_dcl.errors import UsageError
from nidl_dcl.evaluation.confounds import EncodedConfounds
from nidl_dcl.evaluation.features import fit_scaler
from nidl_dcl.evaluation.linear_models import Logistic, Ridge
from nidl_dcl.evaluation.readout import ConfoundModel, FittedReadout, fit_readout


def sklearn_model(kind: str, strength: float, rows: int, varying: int) -> Any:
    """Return the pipeline of scikit-learn for a strength, as the documentation defines it."""
    penalty = strength * rows * varying
    if kind == "numbers":
        return make_pipeline(StandardScaler(), SklearnRidge(alpha=penalty))
    model = LogisticRegression(C=4 / penalty, class_weight="balanced", tol=1e-8, max_iter=10000)
    return make_pipeline(StandardScaler(), model)


@pytest.mark.parametrize("kind", ["numbers", "two", "three"])
def test_the_final_readout_is_scikit_learns_pipeline(kind: str) -> None:
    x, y, design = designed(kind)
    new = np.random.default_rng(4).normal(size=(20, x.shape[1])) + 2

    fitted = fit_readout(design, x)

    pipe = sklearn_model(kind, fitted.strength, len(x), x.shape[1] - 1).fit(x, y)
    expected = pipe.predict(new) if kind == "numbers" else pipe.predict_proba(new)
    np.testing.assert_allclose(fitted.predict(new), expected, atol=1e-6)
    assert fitted.labels == (() if kind == "numbers" else tuple(pipe.classes_))


def test_with_a_shared_scale_it_is_the_model_of_features_scaled_so() -> None:
    x, y, design = designed("numbers")
    x = x * np.linspace(0.01, 3, x.shape[1])

    fitted = fit_readout(design, x, scaling="shared")

    scaler = fit_scaler(x, "shared")
    rows = scaler.transform(x)
    model = SklearnRidge(alpha=fitted.strength * (rows**2).sum()).fit(rows, y)
    np.testing.assert_allclose(fitted.predict(x), model.predict(rows))
    np.testing.assert_array_equal(fitted.scale, scaler.scale_)


@pytest.mark.parametrize("kind", ["numbers", "two"])
def test_its_strength_predicts_each_fold_best_from_the_others(kind: str) -> None:
    x, y, design = designed(kind)
    model = Ridge() if kind == "numbers" else Logistic(2)
    loss = np.zeros(len(model.strengths))
    for repeat in range(2):
        fold = design.row_folds[repeat]
        for k in range(design.n_folds):
            train, test = fold != k, fold == k
            for i, strength in enumerate(model.strengths):
                pipe = sklearn_model(kind, strength, int(train.sum()), x.shape[1] - 1)
                pipe.fit(x[train], y[train])
                if kind == "numbers":
                    loss[i] += ((y[test] - pipe.predict(x[test])) ** 2).sum()
                    continue
                said = np.log(pipe.predict_proba(x[test]))
                for c, label in enumerate("ab"):
                    if (y[test] == label).any():
                        loss[i] -= said[y[test] == label, c].mean()

    assert fit_readout(design, x).strength == model.strengths[loss.argmin()]


def test_confounds_are_taken_away_before_anything_else() -> None:
    rng = np.random.default_rng(0)
    confounds = ConfoundModel(("age",), np.array([40.0]), rng.normal(size=(1, 3)))
    plain = FittedReadout((), np.zeros(3), np.ones(3), rng.normal(size=(1, 3)), np.ones(1), 1.0)
    x, age = rng.normal(size=(5, 3)), rng.normal(size=(5, 1)) + 40

    freed = replace(plain, confounds=confounds)

    expected = plain.predict(x - (age - 40) @ confounds.coefficients)
    np.testing.assert_allclose(freed.predict(x, age), expected)
    with pytest.raises(UsageError, match="confounds age"):
        freed.predict(x)


@pytest.mark.parametrize("kind", ["numbers", "two"])
def test_with_confounds_it_is_scikit_learns_model_of_what_is_left(kind: str) -> None:
    x, y, design = designed(kind)
    rng = np.random.default_rng(5)
    confounds, new = rng.normal(size=(len(x), 2)) * [1, 30], rng.normal(size=(9, x.shape[1])) + 2
    confounds[:, 1] += x[:, 0] * 10
    theirs = rng.normal(size=(9, 2)) * [1, 30]

    fitted = fit_readout(
        design, x, confounds=EncodedConfounds(("a", "b"), confounds, (), {"a": {}, "b": {}})
    )

    scaler = StandardScaler().fit(x)
    effect = LinearRegression().fit(confounds, scaler.transform(x))
    left = scaler.transform(x) - effect.predict(confounds)
    model = sklearn_model(kind, fitted.strength, 1, (left**2).sum())[-1].fit(left, y)
    left_new = scaler.transform(new) - effect.predict(theirs)
    expected = model.predict(left_new) if kind == "numbers" else model.predict_proba(left_new)
    np.testing.assert_allclose(fitted.predict(new, theirs), expected, atol=1e-6)
    assert fitted.confounds is not None
    assert fitted.confounds.names == ("a", "b")

from __future__ import annotations

import builtins

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from nidl_dcl.evaluation.confounds import encode_confounds, read_confounds
from nidl_dcl.evaluation.features import Components, Features
from nidl_dcl.evaluation.harmonization import (
    AdjustedFeatures,
    describe_harmonization,
    learn_harmonization,
)
from nidl_dcl.evaluation.linear_models import Ridge, nested_cv_predict

N = 60
RNG = np.random.default_rng(0)
PEOPLE = np.array([f"sub-{i:02}" for i in range(N)], dtype=object)
fold_of = np.arange(N) % 5
AGE = RNG.uniform(20, 80, N)
SEX = np.array(["F", "M"], dtype=object)[RNG.integers(0, 2, N)]
site_of = np.array(["a", "b", "c"], dtype=object)[RNG.integers(0, 3, N)]
NOBODY = np.zeros(N, dtype=bool)
TABLE = pd.DataFrame({"age": AGE, "sex": SEX})


def _features(d=8):
    signal = RNG.normal(size=N)
    x = RNG.normal(size=(N, d)) + AGE[:, None] / 20 + (SEX == "M")[:, None] * RNG.normal(size=d)
    x[:, 0] += signal
    return x * RNG.uniform(0.5, 3, d), signal + AGE / 30


def _confounds(table=TABLE):
    return encode_confounds(read_confounds(table, PEOPLE, NOBODY, "target"), np.arange(N), PEOPLE)


def _adjusted_by_scikit_learn(x, train, test):
    """Pipeline(StandardScaler, confound regression), in as many words."""
    scaler = StandardScaler().fit(x[train])
    onehot = OneHotEncoder(sparse_output=False).fit(SEX[train, None])
    columns = np.column_stack([AGE, onehot.transform(SEX[:, None])])
    known, new = scaler.transform(x[train]), scaler.transform(x[test])
    regression = LinearRegression().fit(columns[train], known)
    return known - regression.predict(columns[train]), new - regression.predict(columns[test])


@pytest.mark.parametrize("d", [8, 90], ids=["more rows", "more columns"])
def test_nested_is_scikit_learns_pipeline_with_confounds_in_every_fold(d):
    x, y = _features(d)

    predicted, strengths = nested_cv_predict(
        AdjustedFeatures(Features(x), _confounds()), y[:, None], fold_of, Ridge()
    )

    for k in range(5):
        error = np.zeros(len(Ridge().strengths))
        for inner in set(range(5)) - {k}:
            train, test = np.flatnonzero((fold_of != k) & (fold_of != inner)), fold_of == inner
            known, new = _adjusted_by_scikit_learn(x, train, test)
            for i, strength in enumerate(Ridge().strengths):
                model = SklearnRidge(alpha=strength * (known**2).sum()).fit(known, y[train])
                error[i] += ((model.predict(new) - y[test]) ** 2).sum()
        assert strengths[k, 0] == Ridge().strengths[error.argmin()]
        known, new = _adjusted_by_scikit_learn(x, fold_of != k, fold_of == k)
        model = SklearnRidge(alpha=strengths[k, 0] * (known**2).sum()).fit(known, y[fold_of != k])
        np.testing.assert_allclose(predicted[fold_of == k, 0], model.predict(new), atol=1e-6)


def test_confounds_are_removed_from_voxels_by_their_inner_products():
    x, _ = _features(200)
    x = x + 100
    train, test = np.arange(40), np.arange(40, N)

    known, new = AdjustedFeatures(Components(x @ x.T), _confounds()).coordinates(train, test)

    columns = np.column_stack([AGE, SEX == "M"])
    regression = LinearRegression().fit(columns[train], x[train])
    left = x - regression.predict(columns)
    np.testing.assert_allclose(known @ known.T, left[train] @ left[train].T, atol=1e-6)
    # What test rows have outside of the training rows' span has no coordinate.
    np.testing.assert_allclose(new @ known.T, left[test] @ left[train].T, atol=1e-6)


def test_the_linear_effect_of_confounds_comes_as_numbers_that_can_be_kept():
    x, _ = _features()
    confounds = _confounds()
    source = AdjustedFeatures(Features(x), confounds)
    train, test = np.arange(40), np.arange(40, N)

    known, new = source.before_confounds(train, test)
    intercept, coefficients = confounds.effect(train, known)

    assert confounds.names == ("age", "sex=F", "sex=M")
    assert coefficients.shape == (3, 8)
    left = new - intercept - confounds.matrix[test] @ coefficients
    np.testing.assert_allclose(left, _adjusted_by_scikit_learn(x, train, test)[1], atol=1e-10)
    np.testing.assert_allclose(left, source.adjusted(train, test)[1])


def test_a_constant_or_repeated_confound_removes_nothing_more():
    x, _ = _features()
    twice = TABLE.assign(again=2 * AGE + 1, mostly=np.where(np.arange(N) < 40, 1.5, AGE))
    train, test = np.arange(40), np.arange(40, N)

    np.testing.assert_allclose(
        AdjustedFeatures(Features(x), _confounds(twice)).adjusted(train, test)[1],
        AdjustedFeatures(Features(x), _confounds()).adjusted(train, test)[1],
        atol=1e-9,
    )


def _combat(known, site, new, its_site):
    """ComBat as Johnson et al. (2007) write it, one number at a time."""
    labels, (n, d) = sorted(set(site)), known.shape
    grand, pooled = known.mean(axis=0), np.zeros(d)
    for label in labels:
        own = known[site == label]
        pooled += ((own - own.mean(axis=0)) ** 2).sum(axis=0) / n
    result = np.empty_like(new)
    for label in labels:
        z = (known[site == label] - grand) / np.sqrt(pooled)
        gamma, delta, m = z.mean(axis=0), z.var(axis=0, ddof=1), len(z)
        mean, variance = gamma.mean(), gamma.var(ddof=1)
        # Moments of the inverse gamma prior.
        shape = delta.mean() ** 2 / delta.var(ddof=1) + 2
        rate = delta.mean() * (shape - 1)
        for g in range(d):
            where, how_wide = gamma[g], delta[g]
            for _ in range(200):
                where = (m * variance * gamma[g] + how_wide * mean) / (m * variance + how_wide)
                error = ((z[:, g] - where) ** 2).sum()
                how_wide = (rate + error / 2) / (m / 2 + shape - 1)
            rows = its_site == label
            standard = (new[rows, g] - grand[g]) / np.sqrt(pooled[g])
            result[rows, g] = (standard - where) / np.sqrt(how_wide) * np.sqrt(pooled[g]) + grand[g]
    return result


@pytest.mark.parametrize("wide", [False, True], ids=["features", "voxels"])
def test_confounds_that_explain_all_training_rows_leave_the_mean(wide):
    x, y = _features(30)
    many = pd.DataFrame(RNG.normal(size=(N, 25)), columns=[f"c{i}" for i in range(25)])
    source = AdjustedFeatures(Components(x @ x.T) if wide else Features(x), _confounds(many))
    known = np.arange(N) < 25

    predicted, _ = nested_cv_predict(source, y[:, None], fold_of, Ridge(), known)

    for k in range(5):
        np.testing.assert_allclose(predicted[fold_of == k], y[known & (fold_of != k)].mean())


def test_harmonization_is_combat_learnt_from_the_training_rows():
    x, _ = _features()
    x[site_of == "b"] = 2 * x[site_of == "b"] + 1
    train, test = np.arange(40), np.arange(40, N)

    known, new = AdjustedFeatures(Features(x), site=site_of).before_confounds(train, test)

    scaled = StandardScaler().fit(x[train]).transform(x)
    for rows, found in ((train, known), (test, new)):
        expected = _combat(scaled[train], site_of[train], scaled[rows], site_of[rows])
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert np.abs(found - scaled[rows]).max() > 0.5


def test_harmonized_sites_have_one_mean_and_one_variance():
    x, _ = _features()
    x[site_of == "b"] = 3 * x[site_of == "b"] + 5
    rows = np.arange(N)

    known, _ = AdjustedFeatures(Features(x), site=site_of).adjusted(rows, rows[:1])

    before = StandardScaler().fit_transform(x)

    def apart(z):
        return np.ptp([z[site_of == s].mean(axis=0) for s in "abc"], axis=0).mean()

    assert apart(known) < 0.1 * apart(before)
    assert np.ptp([known[site_of == s].std(axis=0).mean() for s in "abc"]) < 0.25


def test_rows_of_unknown_new_and_small_sites_stay_as_they_are():
    x, _ = _features()
    site = site_of.copy()
    site[:3], site[3:5], site[50:54] = None, "small", "new"
    train, test = np.arange(50), np.arange(50, N)

    known, new = AdjustedFeatures(Features(x), site=site).before_confounds(train, test)
    before, before_new = Features(x).standardized(train, test)

    np.testing.assert_array_equal(known[:5], before[:5])
    np.testing.assert_array_equal(new[:4], before_new[:4])
    assert (np.abs(known[5:] - before[5:]).max(axis=1) > 1e-3).all()
    assert (np.abs(new[4:] - before_new[4:]).max(axis=1) > 1e-3).all()
    assert learn_harmonization(before[:5], site[:5]) == {}


def test_images_that_were_not_harmonized_are_counted():
    site = np.array([*["a"] * 10, *["b"] * 10, "c", "c", None], dtype=object)
    folds = np.stack([np.arange(23) % 5, np.arange(23)[::-1] % 5])

    found = describe_harmonization(site, folds)

    assert found["n_images_not_harmonized"] == 3
    assert found["sites_not_harmonized"] == {"c": 2}
    assert found["n_images_without_site"] == 1
    assert "3 of 23 images were tested as they are" in found["sentence"]
    assert describe_harmonization(site[:10], folds[:, :10])["n_images_not_harmonized"] == 10


def test_a_single_feature_is_harmonized_by_its_own_estimates():
    x = np.where(site_of == "b", 5 * AGE + 100, AGE)[:, None]

    shifts = learn_harmonization(x, site_of)

    moved = np.array([v * shifts[s][1] + shifts[s][0] for v, s in zip(x, site_of, strict=True)])
    means = [moved[site_of == s].mean() for s in "abc"]
    np.testing.assert_allclose(means, x.mean())
    np.testing.assert_allclose(
        [moved[site_of == s].std() for s in "ac"], moved[site_of == "b"].std()
    )


def test_constant_columns_and_columns_constant_at_a_site_are_harmonized():
    x = np.column_stack(
        [np.ones(N), np.zeros(N), np.where(site_of == "a", 1.0, AGE), site_of == "b"]
    )
    rows = np.arange(N)

    for source in (Features(x.astype(float)), Components(x.astype(float) @ x.T.astype(float))):
        known, _ = AdjustedFeatures(source, _confounds(), site_of).coordinates(rows, rows[:2])
        assert np.isfinite(known).all()


class Leaky:
    """The mistake: scaling, sites and confounds learned from all rows."""

    def __init__(self, source):
        self.source = source

    def coordinates(self, train, test):
        rows = np.arange(N)
        known, _ = self.source.adjusted(rows, rows[:1])
        return Features(known).coordinates(train, test)


@pytest.mark.parametrize("wide", [False, True], ids=["features", "voxels"])
@pytest.mark.parametrize("harmonized", [False, True], ids=["as they are", "harmonized"])
def test_test_rows_change_nothing_that_other_test_rows_get(wide, harmonized):
    x, y = _features(12)
    table, site = TABLE.copy(), site_of.copy()
    changed, other_table, other_site = x.copy(), table.copy(), site.copy()
    wild = np.flatnonzero(fold_of == 0)[:6]
    changed[wild] = 1e3 * RNG.normal(size=(6, 12))
    other_table.loc[wild, "age"] = 1e4
    other_site[wild] = "a"
    rest = np.setdiff1d(np.flatnonzero(fold_of == 0), wild)

    def predicted(matrix, columns, sites, wrap=lambda source: source):
        source = Components(matrix @ matrix.T) if wide else Features(matrix)
        adjusted = AdjustedFeatures(source, _confounds(columns), sites if harmonized else None)
        return nested_cv_predict(wrap(adjusted), y[:, None], fold_of, Ridge())[0][rest, 0]

    np.testing.assert_allclose(
        predicted(changed, other_table, other_site), predicted(x, table, site), rtol=1e-7
    )
    # The test would see a leak.
    leaks = predicted(changed, other_table, other_site, Leaky) - predicted(x, table, site, Leaky)
    assert np.abs(leaks).max() > 0.01


def test_harmonization_is_kept_for_the_same_training_rows(monkeypatch):
    x, y = _features()
    source = AdjustedFeatures(Features(x), site=site_of)
    first, _ = nested_cv_predict(source, y[:, None], fold_of, Ridge())

    imported = builtins.__import__

    def refuse(name, *rest):
        assert not name.startswith("pycombat")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    again, _ = nested_cv_predict(source, y[:, None], fold_of, Ridge())
    np.testing.assert_array_equal(again, first)

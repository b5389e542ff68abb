from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from nidl_dcl.evaluation.features import Components, Features, fit_scaler, gram_matrix

RNG = np.random.default_rng(0)


def test_components_are_the_principal_components_of_the_training_rows():
    x = RNG.normal(size=(30, 200)).astype(np.float32) + 100
    train, test = np.arange(20), np.arange(20, 30)

    known, new = Components(gram_matrix(x, max_bytes=100_000)).coordinates(train, test)

    pca = PCA().fit(x[train].astype(float))
    expected = pca.transform(x[test].astype(float))[:, :19]
    order = np.argsort(-(known**2).sum(axis=0))
    assert len(order) == 19
    np.testing.assert_allclose(np.abs(new[:, order]), np.abs(expected), atol=1e-5)


def test_test_rows_do_not_change_what_is_learnt():
    x = RNG.normal(size=(40, 60))
    changed = x.copy()
    changed[30:] += 100
    for make in (Features, lambda m: Components(m @ m.T)):
        train, test = np.arange(30), np.arange(30, 40)
        np.testing.assert_array_equal(
            make(x).coordinates(train, test)[0], make(changed).coordinates(train, test)[0]
        )


def test_a_shared_scale_adds_the_mean_variance_and_keeps_the_variance_on_average():
    rng = np.random.default_rng(0)
    x = rng.normal(3, [1e-6, 0.1, 1, 5], size=(50, 4))
    x = np.insert(x, 2, 7.0, axis=1)  # constant

    scaler = fit_scaler(x, "shared")

    variance = x.var(axis=0)
    shared = variance + variance[[0, 1, 3, 4]].mean()
    z = scaler.transform(x)
    assert z[:, [0, 1, 3, 4]].var(axis=0).mean() == pytest.approx(1)
    np.testing.assert_allclose(
        z.var(axis=0) / z[:, 4].var(), variance / shared / (variance / shared)[4], atol=1e-12
    )
    assert not z[:, 2].any()
    far, farther = (fit_scaler(x, how).transform(x + 1)[:, 0] for how in ("shared", "each"))
    assert np.abs(far).max() < 1
    assert np.abs(farther).min() > 1e5


@pytest.mark.parametrize("x", [np.full((5, 3), 2.0), np.zeros((4, 1))])
def test_a_shared_scale_of_constant_columns_is_one(x):
    np.testing.assert_array_equal(fit_scaler(x, "shared").scale_, 1)

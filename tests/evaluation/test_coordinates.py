from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA

from nidl_dcl.evaluation.features import Components, Features, gram_matrix

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

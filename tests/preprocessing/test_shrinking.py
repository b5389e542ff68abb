from __future__ import annotations

import numpy as np
from made_images import AFFINE, brain

from nidl_dcl.preprocessing.shrinking import shrink


def center(data, affine):
    points = np.stack([*np.indices(data.shape), np.ones(data.shape)])
    return affine[:3] @ (points * data).reshape(4, -1).sum(axis=1) / data.sum()


def test_block_means_stay_where_they_were():
    data = np.where(brain()[1], brain()[0], 0)
    small, affine = shrink(data, AFFINE, 8.0)
    assert small.shape == (10, 12, 9)
    assert small.dtype == np.float32
    np.testing.assert_allclose(small[4, 5, 4], data[16:20, 20:24, 16:20].mean(), rtol=1e-6)
    np.testing.assert_allclose(center(small, affine), center(data, AFFINE), atol=0.1)


def test_axes_that_are_coarse_already_stay():
    data = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    small, affine = shrink(data, np.diag([2.0, 2, 6, 1]), 4.0)
    assert small.shape == (2, 3, 3)
    np.testing.assert_allclose(np.diag(affine), [4, 4, 6, 1])


def test_a_flat_image_is_shrunk_along_the_other_axes_alone():
    small, _ = shrink(np.ones((9, 9, 2), np.float32), np.eye(4), 8.0)
    assert small.shape == (1, 1, 1)

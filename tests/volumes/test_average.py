from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from nidl_dcl.volumes.average import average_volumes


def test_mean_and_spread_are_those_of_the_stacked_volumes() -> None:
    volumes = np.random.default_rng(0).normal(5, 2, (9, 7, 6, 5)).astype(np.float32)
    found = average_volumes(iter(volumes), (7, 6, 5))
    np.testing.assert_allclose(found.mean, volumes.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.sd, volumes.std(axis=0), rtol=1e-4)


def test_distances_are_root_mean_square_differences_of_small_volumes() -> None:
    volumes = np.random.default_rng(0).normal(size=(9, 7, 6, 5)).astype(np.float32)
    found = average_volumes(iter(volumes), (7, 6, 5))
    assert found.block == (1, 1, 1)
    expected = np.sqrt(((volumes - volumes.mean(axis=0)) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(found.distance, expected, rtol=1e-5)


def test_distances_of_large_volumes_are_of_block_means() -> None:
    volumes = np.random.default_rng(0).normal(size=(5, 21, 24, 21)).astype(np.float32)
    found = average_volumes(iter(volumes), (21, 24, 21))
    assert found.block == (2, 2, 2)
    blocks = volumes[:, :20, :, :20].reshape(5, 10, 2, 12, 2, 10, 2).mean(axis=(2, 4, 6))
    expected = np.sqrt(((blocks - blocks.mean(axis=0)) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(found.distance, expected, rtol=1e-5)


def test_equal_volumes_have_neither_spread_nor_distance() -> None:
    found = average_volumes(iter([np.full((4, 4, 4), 0.1, np.float32)] * 3), (4, 4, 4))
    assert found.sd.max() < 1e-6
    assert found.distance.max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 5000), (64, 1, 64), (3, 50, 50)])
def test_any_shape_has_few_blocks(shape: tuple[int, int, int]) -> None:
    found = average_volumes(iter(np.random.default_rng(0).normal(size=(2, *shape))), shape)
    assert np.prod([n // e for n, e in zip(shape, found.block, strict=True)]) <= 2048
    assert (found.distance > 0).all()


def test_memory_is_that_of_a_few_volumes() -> None:
    shape = (40, 48, 40)

    def each() -> Iterator[np.ndarray]:
        random = np.random.default_rng(0)
        for _ in range(200):
            yield random.random(shape, dtype=np.float32)

    tracemalloc.start()
    found = average_volumes(each(), shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = np.prod(shape) * 8
    assert len(found.distance) == 200
    assert peak < 8 * one + 200 * 2048 * 4 * 1.2

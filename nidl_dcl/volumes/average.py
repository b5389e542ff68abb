"""Average many volumes, and measure how far each is from their mean, in one pass.

Reading volumes and drawing the average are left to others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_BLOCKS = 2048
"""Blocks of a volume that are kept for its distance: 8 kB for each image."""


@dataclass(frozen=True, eq=False)
class Average:
    """Result of `average_volumes`.

    The distance of each volume from the mean is the root mean square difference of block means, in
    units of the volumes.
    """

    mean: NDArray[np.float32]  # (d, h, w), of each voxel over the volumes; so is sd
    sd: NDArray[np.float32]
    distance: NDArray[np.float64]  # (n,)
    block: tuple[int, int, int]  # voxels along the sides of a block


def average_volumes(volumes: Iterable[NDArray[np.floating]], shape: Sequence[int]) -> Average:
    """Return the mean of volumes of a `shape`, its spread and each one's distance from it.

    There is at least one volume, and all are finite. Memory holds two volumes in double precision
    and, for each volume, the means of at most 2048 blocks: the distance to the mean can be computed
    only when all volumes have been read.
    """
    d, h, w = shape
    edge = 1
    while math.prod(max(1, n // edge) for n in shape) > _MOST_BLOCKS:
        edge += 1
    block = (min(edge, d), min(edge, h), min(edge, w))
    total, squares = np.zeros((d, h, w)), np.zeros((d, h, w))
    kept = []
    for volume in volumes:
        values = np.asarray(volume, dtype=np.float64)
        total += values
        squares += values * values
        kept.append(_block_means(values, block).astype(np.float32))
    count = len(kept)
    mean = total / count
    variance = np.maximum(squares / count - mean * mean, 0.0)
    middle = _block_means(mean, block)
    distance = [float(np.sqrt(np.mean((row - middle) ** 2))) for row in kept]
    return Average(
        mean.astype(np.float32), np.sqrt(variance).astype(np.float32), np.array(distance), block
    )


def _block_means(volume: NDArray[np.float64], block: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return the means of whole blocks, centered in the volume, as a vector."""
    parts = []
    for n, edge in zip(volume.shape, block, strict=True):
        start = n % edge // 2
        parts.append(slice(start, start + n // edge * edge))
    cut = volume[tuple(parts)]
    (a, b, c), (x, y, z) = block, (n // e for n, e in zip(cut.shape, block, strict=True))
    means: NDArray[np.float64] = cut.reshape(x, a, y, b, z, c).mean(axis=(1, 3, 5)).ravel()
    return means

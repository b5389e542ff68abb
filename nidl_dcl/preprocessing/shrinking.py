"""Coarser images by the means of blocks: what is searched or fitted at a few mm starts here."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from nidl_dcl.volumes.reading import Float32

__all__ = ["shrink"]


def shrink(
    data: NDArray[Any], affine: NDArray[np.float64], mm: float
) -> tuple[Float32, NDArray[np.float64]]:
    """Return block means with voxels of at most about `mm`, and their affine.

    Parameters
    ----------
    data : ndarray, shape (i, j, k)
        Numbers, or a mask. Voxels beyond the last whole block are left out.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm.
    mm : float
        Size of voxel wanted; axes that are as coarse already stay.
    """
    edges = np.maximum(1, np.rint(mm / voxel_sizes(affine)).astype(int))
    edges = np.minimum(edges, data.shape)
    counts = np.array(data.shape) // edges
    whole = data[tuple(slice(n * edge) for n, edge in zip(counts, edges, strict=True))]
    blocks = whole.reshape([side for pair in zip(counts, edges, strict=True) for side in pair])
    coarser = np.diag([*edges, 1.0])
    coarser[:3, 3] = (edges - 1) / 2
    return np.asarray(blocks.mean(axis=(1, 3, 5), dtype=np.float32)), affine @ coarser

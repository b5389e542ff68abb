"""Measures of embeddings: how well views agree, how samples spread, what neighbors have in common.

They take tensors or arrays and return a number. When a training is measured is left to `collapse` and
to callbacks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from nidl_dcl.models.losses import unit_rows


def alignment(h1: Any, h2: Any) -> float:
    """Return the mean squared distance of two views on the unit sphere, 0 (equal) to 4.

    `h1` and `h2` are tensors or arrays of shape (n, features), row i of both being of one sample.
    Wang and Isola, ICML 2020.
    """
    h1, h2 = _matrix(h1), _matrix(h2)
    if h1.shape != h2.shape:
        raise ValueError(
            f"Both views must have one shape, got {tuple(h1.shape)} and {tuple(h2.shape)}."
        )
    return float((unit_rows(h1) - unit_rows(h2)).square().sum(1).mean())


def uniformity(h: Any) -> float:
    """Return log mean exp(-2 d²) over pairs of rows on the unit sphere: 0 is full collapse.

    `h` is a tensor or array of shape (n, features). Wang and Isola, ICML 2020.
    """
    u = unit_rows(_matrix(h))
    if len(u) < 2:
        return 0.0
    distances = torch.pdist(u).square()
    return float(torch.logsumexp(-2 * distances, 0) - math.log(len(distances)))


def effective_rank(h: Any) -> float:
    """Return exp of the entropy of the normalized singular values of centered rows (RankMe).

    `h` is a tensor or array of shape (n, features). One direction gives 1, none gives 0. Roy and
    Vetterli 2007; Garrido et al., ICML 2023.
    """
    # Centered in double precision: the rounding error of equal rows must not count as a direction.
    # On the CPU, since not every device has it.
    h = _matrix(h).cpu().double()
    h = h - h.mean(0, keepdim=True)
    # Eigenvalues of the smaller product take a fraction of the time of singular values.
    products = h @ h.T if h.shape[0] < h.shape[1] else h.T @ h
    squares = torch.linalg.eigvalsh(products)
    rounding = torch.finfo(h.dtype).eps * len(squares) * float(squares.max())
    values = squares[squares > rounding].sqrt()
    total = float(values.sum())
    if total <= 1e-12 * max(1.0, float(h.abs().max())):
        return 0.0
    shares = values / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def knn_accuracy(h: Any, y: Any, *, k: int = 5) -> float:
    """Return how often the nearest neighbors of a sample, itself left out, vote for its class.

    Parameters
    ----------
    h : Tensor or array of shape (n, features)
        Embeddings; neighbors are by cosine similarity.
    y : sequence of shape (n,)
        Class of each sample.
    k : int, default=5
        Neighbors that vote; of classes with as many votes, the first in sorted order counts.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        When `h` and `y` differ in length, or `k` is not from 1 to n - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from nidl_dcl.models.metrics import knn_accuracy
    >>> h = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    >>> knn_accuracy(h, ["old", "old", "young", "young"], k=1)
    1.0
    """
    rows = _matrix(h).cpu().numpy()
    classes, codes = np.unique(np.asarray(y), return_inverse=True)
    if codes.shape != rows.shape[:1]:
        raise ValueError(f"There are {len(rows)} embeddings and targets of shape {np.shape(y)}.")
    if not 1 <= k < len(rows):
        raise ValueError(f"k must be from 1 to {len(rows) - 1} for {len(rows)} samples, got {k!r}.")
    near = NearestNeighbors(n_neighbors=k, metric="cosine").fit(rows)
    neighbors = codes[near.kneighbors(return_distance=False)]
    votes = (neighbors[:, :, None] == np.arange(len(classes))).sum(1)
    return float((votes.argmax(1) == codes).mean())


def _matrix(h: Any) -> Tensor:
    """Return embeddings as a tensor of at least single precision."""
    h = torch.as_tensor(h).detach()
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(
            f"Embeddings must be a matrix (n, features), got shape {tuple(h.shape)}. With several "
            "regions, measure each: h[:, region]."
        )
    return h.to(torch.promote_types(h.dtype, torch.float32))

"""Measures of the embeddings of a training, without labels, that show a collapse.

With several regions each measure is that of one region, as the loss is, averaged over regions. The estimator logs them and warns (`dcl`).
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from nidl_dcl.distributed import gather_rows
from nidl_dcl.models.losses import unit_rows

_ROWS = 1024
"""Most samples of an epoch that are kept by each process, and that are measured."""

_REGIONS = 64
"""Most regions that are measured, evenly spread over all."""

_ROWS_OF_REGIONS = 128
"""In place of `_ROWS` where there are several regions, so that measuring them takes no longer."""


class CollapseMonitor:
    """The first embeddings of an epoch, and their measures."""

    def __init__(self) -> None:
        self.views: list[tuple[Tensor, Tensor]] = []
        self.kept = 0
        self.largest_batch = 0

    def add(self, h1: Tensor, h2: Tensor, batch: int) -> None:
        """Keep embeddings of both views, shape (n, d) or (n, regions, d), while there is room.

        Parameters
        ----------
        h1, h2 : Tensor
            This process's rows.
        batch : int
            Samples of the batch, all processes together.
        """
        self.largest_batch = max(self.largest_batch, batch)
        if self.kept < (_ROWS if h1.ndim == 2 else _ROWS_OF_REGIONS) and len(h1):
            self.views.append((_few_regions(h1), _few_regions(h2)))
            self.kept += len(h1)

    def measure(self) -> dict[str, float]:
        """Return alignment, uniformity and effective rank over all processes, and the loss of collapse."""
        if not self.views:
            return {}
        h1, _ = gather_rows(torch.cat([a for a, _ in self.views]))
        h2, _ = gather_rows(torch.cat([b for _, b in self.views]))
        rows = _ROWS if h1.shape[1] == 1 else _ROWS_OF_REGIONS
        regions = [(a, b) for a, b in zip(h1[:rows].unbind(1), h2[:rows].unbind(1), strict=True)]
        return {
            "alignment": fmean(alignment(a, b) for a, b in regions),
            "uniformity": fmean(uniformity(a) for a, _ in regions),
            "effective_rank": fmean(effective_rank(torch.cat([a, b])) for a, b in regions),
            "collapse_loss": math.log(max(1, 2 * self.largest_batch - 2)),
        }


def _few_regions(h: Tensor) -> Tensor:
    """Return embeddings with an axis of regions, of a limited number of them."""
    h = h.float()
    return h[:, None] if h.ndim == 2 else h[:, :: -(h.shape[1] // -_REGIONS)]


def alignment(h1: Tensor, h2: Tensor) -> float:
    """Return the mean squared distance of two views on the unit sphere, 0 (equal) to 4.

    Wang and Isola, ICML 2020.
    """
    return float((unit_rows(h1) - unit_rows(h2)).square().sum(1).mean())


def uniformity(h: Tensor) -> float:
    """Return log mean exp(-2 d²) over pairs of rows on the unit sphere: 0 is full collapse.

    Wang and Isola, ICML 2020.
    """
    u = unit_rows(h)
    if len(u) < 2:
        return 0.0
    distances = torch.pdist(u).square()
    return float(torch.logsumexp(-2 * distances, 0) - math.log(len(distances)))


def effective_rank(h: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values of centered rows (RankMe).

    Roy and Vetterli 2007; Garrido et al., ICML 2023. One direction gives 1, none gives 0.
    """
    # Centered in double precision: the rounding error of equal rows must not count as a direction.
    h = h.double().cpu()
    h = h - h.mean(0, keepdim=True)
    values = torch.linalg.svdvals(h)
    total = float(values.sum())
    if total <= 1e-12 * max(1.0, float(h.abs().max())):
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))

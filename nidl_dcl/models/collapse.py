"""The embeddings of an epoch that are kept and measured, to show a collapse without labels.

With several regions each measure is that of one region, as the loss is, averaged over regions. The
measures are in `metrics`; the estimator logs them and warns (`dcl`).
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from nidl_dcl.distributed import first_value, gather_rows, world
from nidl_dcl.models.metrics import alignment, effective_rank, uniformity

_ROWS = 1024
"""Most samples of an epoch that are kept by each process, and that are measured.

Of longer embeddings, the effective rank is that of half as many: its cost grows with the cube of the
rows of both views or of the features, whichever are fewer.
"""

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
        # One process measures, the others wait: they would all find the same.
        return first_value(self._measure(h1, h2) if world()[0] == 0 else None)

    def _measure(self, h1: Tensor, h2: Tensor) -> dict[str, float]:
        if h1.device.type not in ("cpu", "cuda"):  # Apple's GPU lacks some of the operations
            h1, h2 = h1.cpu(), h2.cpu()
        rows = _ROWS if h1.shape[1] == 1 else _ROWS_OF_REGIONS
        few = rows if h1.shape[2] <= _ROWS else rows // 2
        regions = [(a, b) for a, b in zip(h1[:rows].unbind(1), h2[:rows].unbind(1), strict=True)]
        ranks = [effective_rank(torch.cat([a[:few], b[:few]])) for a, b in regions]
        return {
            "alignment": fmean(alignment(a, b) for a, b in regions),
            "uniformity": fmean(uniformity(a) for a, _ in regions),
            "effective_rank": fmean(ranks),
            "collapse_loss": math.log(max(1, 2 * self.largest_batch - 2)),
        }


def _few_regions(h: Tensor) -> Tensor:
    """Return embeddings with an axis of regions, of a limited number of them."""
    h = h.float()
    return h[:, None] if h.ndim == 2 else h[:, :: -(h.shape[1] // -_REGIONS)]

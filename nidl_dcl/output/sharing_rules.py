"""Which averages of brains may be given away, and what of them: nothing that shows one person.

Where an average goes is for `sharing`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["LEAST", "hide_few", "is_of_many", "largest_share", "n_changed"]

LEAST = 20
"""Participants of whom an average must be, at least."""


_LEAST_IN_VOXEL = 10
"""Participants who must have signal in a voxel that is shown."""


def largest_share(participants: pd.Series) -> float:
    """Return the share of the images of the participant who has the most, given each one's."""
    return float(participants.value_counts(normalize=True).max())


def is_of_many(share: float | None) -> bool:
    """Return whether no participant has more than a twentieth of the images.

    Hence there are 20 participants or more.

    Parameters
    ----------
    share : float or None
        From `largest_share`; None where it is not known.
    """
    return share is not None and share <= 1 / LEAST


def hide_few(
    mean: NDArray[np.float32], sd: NDArray[np.float32], share: float
) -> NDArray[np.float32]:
    """Return a mean with 0 where fewer than ten participants may have signal.

    A head that lies askew stands alone outside of all others, and would be seen there.

    Parameters
    ----------
    mean, sd : ndarray of float32, shape (d, h, w)
        Of each voxel over the images, the background of which is 0.
    share : float
        From `largest_share`.

    Notes
    -----
    By the inequality of Cauchy and Schwarz, the share of the images that are not 0 in a voxel is at
    least ``mean**2 / (mean**2 + sd**2)``.
    """
    square = np.square(mean, dtype=np.float64)
    both = square + np.square(sd, dtype=np.float64)
    there = np.divide(square, both, out=np.zeros_like(square), where=both > 0)
    return np.where(there >= _LEAST_IN_VOXEL * share, mean, 0).astype(np.float32)


def n_changed(before: pd.DataFrame, after: pd.DataFrame) -> int:
    """Return how many participants came, went or have other images in the second average.

    The difference of two averages is that of so many people.

    Parameters
    ----------
    before, after : DataFrame
        Columns ``participant_id`` and ``source`` of the images.
    """
    images = [
        set(table[["participant_id", "source"]].itertuples(index=False, name=None))
        for table in (before, after)
    ]
    return len({who for who, _ in images[0] ^ images[1]})

"""Which images stand out from the others, and why: a list for a person to look at.

Ranks tables of measures; nobody is removed, and nothing else depends on the ranks.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

FLAGGED_ABOVE = 3.5
"""Robust z above which an image is flagged (Iglewicz and Hoaglin, 1993)."""

_LEAST = 5
"""Images, fewer of which have no usual range."""


OUTLIER_MEASURES = {
    "embedding_distance": (1, "far from all others in the embeddings"),
    "brain_distance": (1, "far from the average brain"),
    "noise": (1, "noisy"),
    "sharpness": (-1, "blurred"),
    "contrast_to_noise": (-1, "low contrast to noise"),
}
"""Column to 1 where high values are odd, -1 where low ones are, and what an odd image is called."""


def robust_z(values: pd.Series) -> pd.Series:
    """Return the distance from the median in units of 1.4826 times the median absolute deviation.

    Missing where a value is missing, with fewer than five, or when more than half of them are equal.
    """
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    middle = numbers.median()
    spread = 1.4826 * (numbers - middle).abs().median()
    if numbers.notna().sum() < _LEAST or not spread > 0:
        return pd.Series(np.nan, index=numbers.index)
    return (numbers - middle) / spread


def rank_outliers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the images with what is odd about them, the oddest first.

    Parameters
    ----------
    table : DataFrame
        One row per image; any of the columns `OUTLIER_MEASURES`, and others, which are kept.

    Returns
    -------
    DataFrame
        ``rank`` (from 1), the columns that are no measures, ``flagged``, ``worst_z``, ``reasons``,
        then each measure followed by its ``_z``, positive in the odd direction.
    """
    known = [name for name in OUTLIER_MEASURES if name in table]
    z = pd.DataFrame(
        {name: OUTLIER_MEASURES[name][0] * robust_z(table[name]) for name in known},
        index=table.index,
    )
    worst = z.max(axis=1) if known else pd.Series(np.nan, index=table.index)
    result = table.drop(columns=known)
    result["flagged"] = np.where(worst > FLAGGED_ABOVE, "yes", "no")
    result["worst_z"] = worst
    result["reasons"] = [_reasons(row) for _, row in z.iterrows()]
    for name in known:
        result[name], result[f"{name}_z"] = table[name], z[name]
    order = worst.sort_values(ascending=False, kind="stable", na_position="last").index
    result = result.loc[order].reset_index(drop=True)
    result.insert(0, "rank", range(1, len(result) + 1))
    return result


def _reasons(z: pd.Series) -> str | None:
    odd = z[z > FLAGGED_ABOVE].sort_values(ascending=False, kind="stable")
    reasons = (f"{OUTLIER_MEASURES[str(name)][1]} (z {value:.1f})" for name, value in odd.items())
    return "; ".join(reasons) or None

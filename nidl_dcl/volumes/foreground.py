"""Tell the voxels of a head from the background around it, whatever the unit of the values.

What is done with them is left to `preparation` and `reading`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nidl_dcl.status import UnreadableVolumeError

COUNTED = 2**16
"""Values from which quantiles are taken."""

Float32 = NDArray[np.float32]


def thinned(values: Float32) -> Float32:
    """Return at most 2**16 of many values, evenly spaced: enough for any quantile."""
    if not values.size:
        raise UnreadableVolumeError("Nothing of it lies in the field of view.", "affine")
    flat = values.ravel()
    return flat[:: max(1, -(-flat.size // COUNTED))]


def foreground_threshold(values: Float32) -> tuple[float, float]:
    """Return the darkest level that counts (1st percentile), and Otsu's threshold above it.

    A constant added to all values is added to both, and changes nothing else.
    """
    counted = thinned(values)
    low = float(np.percentile(counted, 1))
    above = np.maximum(counted - np.float32(low), 0)
    top = float(np.percentile(above, 99.5)) or float(values.max()) - low
    counts, edges = np.histogram(above, bins=256, range=(0.0, top))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    rest = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * rest * (sums / below - (sums[-1] - sums) / rest) ** 2
    return low, float(edges[1:][np.argmax(np.nan_to_num(between))])


def foreground(values: Float32) -> NDArray[np.bool_]:
    """Return where `values` exceed Otsu's threshold, counted from the darkest level."""
    low, threshold = foreground_threshold(values)
    return np.asarray(values - np.float32(low) > threshold)

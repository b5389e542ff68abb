"""Measure the sharpness, noise and contrast of a prepared volume, without a reference.

The measures are cheap and coarse, meant for comparing cohorts. Deciding whether a file can be used is
left to `reading`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

QUALITY_METRICS = {
    "voxel_mm": "Longest side of a voxel of the image as it came, in mm",
    "sharpness": "Mean gradient magnitude inside the prepared volume, per mm",
    "noise": "Noise inside the prepared volume: median absolute Laplacian, as the standard "
    "deviation of white noise that has it; anatomy adds to it",
    "contrast_to_noise": "Distance of the 10th and the 90th percentile inside, divided by the noise",
}
"""The measures and their descriptions."""

_LEAST = 27
"""Voxels inside, fewer of which are not measured."""

_WHITE = 0.6745 * 42**0.5
"""Median absolute six-neighbor Laplacian of white noise of standard deviation 1."""


def measure_quality(volume: NDArray[np.float32], spacing: Sequence[float]) -> dict[str, float]:
    """Return the measures of one prepared volume.

    Inside is where values exceed a tenth of their 99th percentile, without the outermost voxel: the
    edge of a brain mask is not sharpness.

    Parameters
    ----------
    volume : ndarray of float32, shape (d, h, w)
        Prepared values.
    spacing : sequence of three float
        Voxel size in mm.

    Returns
    -------
    dict
        ``sharpness``, ``noise`` and ``contrast_to_noise``; NaN where too little is inside.
    """
    values = np.asarray(volume, dtype=np.float64)
    size = np.abs(values)
    inside = ndimage.binary_erosion(size > 0.1 * np.percentile(size, 99))
    undefined = dict.fromkeys(("sharpness", "noise", "contrast_to_noise"), float("nan"))
    if inside.sum() < _LEAST or min(values.shape) < 3:
        return undefined
    slopes = np.gradient(values, *spacing)
    sharpness = np.sqrt(sum(slope**2 for slope in slopes))[inside].mean()
    noise = np.median(np.abs(ndimage.laplace(values)[inside])) / _WHITE
    low, high = np.percentile(values[inside], [10, 90])
    return {
        "sharpness": float(sharpness),
        "noise": float(noise),
        "contrast_to_noise": float((high - low) / noise) if noise > 0 else float("nan"),
    }

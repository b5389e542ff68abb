"""Judge whether a brain mask lies on the head that it is paired with.

Applying masks is left to `preparation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.foreground import foreground_threshold
from nidl_dcl.volumes.grid import Grid, disagreement
from nidl_dcl.volumes.reading import Sample, joined, look_at, read_volume

_AIR = 0.25
"""Share of Otsu's threshold below which a voxel is background: fluid in a T1w is brighter."""

_MOST_AIR = 0.1
"""Share of background in a mask that is warned of."""


@dataclass(frozen=True, eq=False)
class Background:
    """Where the background of a head is, at evenly spaced voxels: 8 kB."""

    grid: Grid
    step: int
    count: int
    bits: NDArray[np.uint8]

    @classmethod
    def of(cls, sample: Sample) -> Background:
        """Return the background of an image."""
        low, threshold = foreground_threshold(sample.values)
        dark = sample.values - np.float32(low) <= _AIR * threshold
        return cls(sample.grid, sample.step, dark.size, np.packbits(dark))


def check_mask(path: Path, head: Background | None) -> Check:
    """Return whether a mask can be used, and a warning where it does not fit its image.

    Parameters
    ----------
    path : Path
        The mask.
    head : Background or None
        Of the image; None where it cannot be used.
    """
    check, sample = look_at(path, intensity="probability")
    if head is None or sample is None:
        return check
    odd = [] if check.code == "ok" else [check]
    (own, own_shape), (affine, shape) = (_upright(grid) for grid in (sample.grid, head.grid))
    if own_shape == shape and (apart := disagreement(own, affine, shape)):
        text = f"It has the shape of its image, but lies elsewhere: {apart}."
        odd.append(Check("warn", "mask", text))
    share = _share_of_background(path, head)
    if share > _MOST_AIR:
        text = f"{share:.0%} of it covers background of its image."
        odd.append(Check("warn", "mask", text))
    return joined(odd)


def _upright(grid: Grid) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    """Return affine and shape in the closest RAS order: how a file is stored says nothing of a place."""
    axes = nib.io_orientation(grid.affine)
    shape = tuple(grid.shape[int(k)] for k in np.argsort(axes[:, 0]))
    return grid.affine @ nib.orientations.inv_ornt_aff(axes, grid.shape), shape


def _share_of_background(path: Path, head: Background) -> float:
    """Return how much of a mask covers background; 0 where it is not on the image at all."""
    try:
        mask = read_volume(path)
    except UnreadableVolumeError:
        return 0.0
    numbers = np.arange(head.count) * head.step
    voxels = np.array(np.unravel_index(numbers, head.grid.shape, head.grid.order), np.float64)
    to_mask = np.linalg.inv(mask.affine) @ head.grid.affine
    at = np.rint(to_mask[:3, :3] @ voxels + to_mask[:3, 3:]).astype(np.int64)
    there = np.all((at >= 0) & (at < np.array(mask.shape)[:, None]), axis=0)
    inside = np.zeros(head.count, bool)
    inside[there] = mask.dataobj[tuple(at[:, there])] > 0.5
    dark = np.unpackbits(head.bits, count=head.count).astype(bool)
    return float(dark[inside].mean()) if inside.any() else 0.0

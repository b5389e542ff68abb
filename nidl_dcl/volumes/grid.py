"""The grid of voxels that a header describes, and the checks of its shape and affine.

Reading the header of each format is left to `nifti`, `mgh` and `npy`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from nidl_dcl.status import Check, UnreadableVolumeError

MAX_VOXELS = 2**28  # 0.35 mm over a whole head: 1 GB as float32
MIN_SIDE = 8
VOXEL_MM = (0.1, 20.0)
APART = 0.5  # degrees and mm by which two places must differ to be told apart
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a header says of an image, checked by itself but not against the data."""

    shape: Shape  # along the stored axes, without axes of length one before or after them
    affine: NDArray[np.float64]  # (4, 4), from voxels to mm (right, front, up)
    dtype: np.dtype[Any]  # of the stored numbers: real, 8 to 64 bits
    offset: int  # byte of the content, inflated if need be, at which the numbers start
    slope: float = 1.0  # the value of a voxel is number * slope + inter
    inter: float = 0.0
    order: Literal["F", "C"] = "F"  # whether the first or the last axis runs fastest
    repairs: list[Check] = dataclasses.field(default_factory=list)  # warnings of what was repaired


def spatial_shape(lengths: Sequence[int]) -> Shape:
    """Return the lengths of a volume's three axes, without trailing axes of length one.

    Raises
    ------
    UnreadableVolumeError
        For several volumes, fewer axes than three, and sizes that make no sense.
    """
    sides = list(lengths)
    if not sides or min(sides) < 1:
        raise UnreadableVolumeError(
            f"The header's dimensions make no sense: {sides}.", "dimensions"
        )
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) > 3:
        raise UnreadableVolumeError(
            f"It holds {math.prod(sides[3:])} volumes; one is needed: pick or average them.",
            "dimensions",
        )
    if len(sides) < 3 or min(sides) == 1:
        raise UnreadableVolumeError(f"It is not three-dimensional: {sides}.", "dimensions")
    if min(sides) < MIN_SIDE:
        raise UnreadableVolumeError(
            f"Fewer than {MIN_SIDE} voxels on a side: {sides}.", "too_small"
        )
    if math.prod(sides) > MAX_VOXELS:
        raise UnreadableVolumeError(f"More than {MAX_VOXELS} voxels: {sides}.", "too_large")
    return sides[0], sides[1], sides[2]


def require_affine(affine: NDArray[np.float64]) -> None:
    """Refuse an affine that is not finite, is singular, shears, or gives voxels of unlikely sizes."""
    if affine.shape != (4, 4) or not np.all(np.isfinite(affine)):
        raise UnreadableVolumeError("The affine has non-finite entries.", "affine")
    sizes = voxel_sizes(affine)
    if np.any(sizes == 0) or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise UnreadableVolumeError("The affine is singular: it flattens the image.", "affine")
    if np.any(sizes < VOXEL_MM[0]) or np.any(sizes > VOXEL_MM[1]):
        raise UnreadableVolumeError(
            f"Voxels of {' x '.join(f'{s:.3g}' for s in sizes)} mm: from {VOXEL_MM[0]} to "
            f"{VOXEL_MM[1]} mm are accepted (is the unit wrong?).",
            "spacing",
        )
    axes = affine[:3, :3] / sizes
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.2:
        raise UnreadableVolumeError("The affine shears the image by over 11 degrees.", "affine")


def disagreement(one: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]) -> str:
    """Return by how much two affines place the same voxels differently, in words; empty if they agree.

    Parameters
    ----------
    one, other : ndarray of float64, shape (4, 4)
        Both accepted by `require_affine`.
    shape : sequence of three int
        Voxels along the axes.
    """
    axes = [affine[:3, :3] / voxel_sizes(affine) for affine in (one, other)]
    left, _, right = np.linalg.svd(axes[0] @ np.linalg.inv(axes[1]))
    turn = left @ right
    said = []
    if np.linalg.det(turn) < 0:
        said.append("left and right are swapped")
        turn = np.diag([-1.0, 1.0, 1.0]) @ turn
    angle = float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))
    if angle > APART:
        said.append(f"{angle:.1f} degrees")
    middle = np.append((np.array(shape) - 1) / 2, 1.0)
    shift = float(np.linalg.norm(((one - other) @ middle)[:3]))
    if shift > APART:
        said.append(f"{shift:.1f} mm at the center")
    sizes = [voxel_sizes(affine) for affine in (one, other)]
    if np.abs(sizes[0] - sizes[1]).dot(shape) > 2 * APART and np.any(
        np.abs(sizes[0] - sizes[1]) > 0.01 * sizes[1]
    ):
        a, b = (" x ".join(f"{size:.3g}" for size in each) for each in sizes)
        said.append(f"voxels of {a} and {b} mm")
    return ", ".join(said)

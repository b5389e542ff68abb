"""How well an image was aligned, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.head import Head
from nidl_dcl.preprocessing.registration import TURNS, find_pose, score_turn
from nidl_dcl.preprocessing.shrinking import shrink
from nidl_dcl.preprocessing.template import Template
from nidl_dcl.volumes.reading import Float32

__all__ = ["MEASURES", "Measures", "measure_alignment", "measure_brain", "overlap"]

Floats = NDArray[np.float64]

MEASURES = {
    "mask_ml": "Volume of the brain mask in the image's own space, in ml",
    "upright": "Correlation with the template at 8 mm, outlines included",
    "lead": "By how much that is more than for the best of 23 other orientations",
    "at_edge": "Share of the mask's surface that lies at the edge of what was scanned",
    "determinant": "Of the affine transform: how many times larger it makes the brain",
    "stretch": "Longest over shortest axis of what the affine transform makes of a ball",
    "shear_degrees": "Largest departure from a right angle of what the transform makes of the axes",
    "overlap": "Dice coefficient of the aligned brain mask and the template's",
    "correlation": "With the template, where both masks are",
    "clipped": "Share of the brain mask beyond the template's field of view",
}
"""The measures and what they are."""


@dataclass(frozen=True)
class Measures:
    """The numbers that `MEASURES` explains; None where nothing was aligned.

    Then `upright` and `lead` are those of an alignment by center, volume and rotation.
    """

    mask_ml: float
    upright: float
    lead: float
    at_edge: float
    determinant: float | None = None
    stretch: float | None = None
    shear_degrees: float | None = None
    overlap: float | None = None
    correlation: float | None = None
    clipped: float | None = None


def measure_alignment(
    head: Head,
    mask: NDArray[np.bool_],
    matrix: Floats,
    aligned: Float32,
    aligned_mask: NDArray[np.bool_],
    template: Template,
    *,
    stripped: bool = False,
) -> Measures:
    """Return the measures of one image.

    Parameters
    ----------
    head : Head
        The image.
    mask : ndarray of bool
        Its brain, on its own grid; not empty.
    matrix : ndarray of float64, shape (4, 4)
        From mm of the image to mm of the template.
    aligned, aligned_mask : ndarray of float32 and of bool
        The masked brain and its mask on the template's grid.
    template : Template
        What they were aligned to.
    stripped : bool, default=False
        Beyond the brain everything is 0, wherever the scan ended.
    """
    linear = matrix[:3, :3]
    determinant = float(np.linalg.det(linear))
    stretches = np.linalg.svd(linear, compute_uv=False)
    axes = linear / np.linalg.norm(linear, axis=0)
    cosines = (axes.T @ axes)[np.triu_indices(3, 1)]
    mask_ml = float(mask.sum()) * head.voxel_ml
    volume = aligned_mask.sum() * abs(np.linalg.det(template.affine[:3, :3])) / 1000
    upright, lead = _likeness(aligned, aligned_mask, template.affine, TURNS[0])
    return Measures(
        mask_ml=mask_ml,
        determinant=determinant,
        stretch=float(stretches[0] / stretches[-1]),
        shear_degrees=float(np.degrees(np.arcsin(np.abs(cosines).max()))),
        overlap=overlap(aligned_mask, template.mask),
        correlation=_correlation(aligned, template.data, aligned_mask & template.mask),
        upright=upright,
        lead=lead,
        at_edge=_share_at_edge(mask if stripped else mask[_scanned(head.data)]),
        clipped=max(0.0, 1 - float(volume) / (mask_ml * determinant)),
    )


def measure_brain(
    head: Head, mask: NDArray[np.bool_], brain: Float32, turn: Floats, *, stripped: bool = False
) -> Measures:
    """Return the measures of one image that is not aligned.

    Parameters
    ----------
    head, mask, stripped
        As in `measure_alignment`.
    brain : ndarray of float32
        The masked brain on the head's grid.
    turn : ndarray of float64, shape (3, 3)
        Rotation near which the head is upright.
    """
    small, grid = shrink(brain, head.affine, 8.0)
    inside = shrink(mask, head.affine, 8.0)[0] > 0.5
    pose = find_pose(small, inside, grid, turn)
    upright, lead = _likeness(small, inside, grid, pose)
    return Measures(
        mask_ml=float(mask.sum()) * head.voxel_ml,
        upright=upright,
        lead=lead,
        at_edge=_share_at_edge(mask if stripped else mask[_scanned(head.data)]),
    )


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the Dice coefficient of two masks; 0 when both are empty."""
    return 2 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))


def _likeness(
    brain: Float32, mask: NDArray[np.bool_], affine: Floats, pose: Floats
) -> tuple[float, float]:
    """Return the correlation in a pose, and by how much it is more than for other turns of it."""
    upright, *others = (score_turn(brain, mask, affine, turn @ pose) for turn in TURNS)
    return upright, upright - max(others)


def _correlation(a: Float32, b: Float32, where: NDArray[np.bool_]) -> float:
    """Return Pearson's correlation of some voxels, 0 where it is not defined."""
    x, y = a[where].astype(np.float64), b[where].astype(np.float64)
    if x.size < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _share_at_edge(inside: NDArray[np.bool_]) -> float:
    """Return the share of a mask's surface that lies at the edge of the array."""
    surface = inside & ~ndimage.binary_erosion(inside)
    edge = np.ones(inside.shape, bool)
    edge[1:-1, 1:-1, 1:-1] = False
    return int((surface & edge).sum()) / max(1, int(surface.sum()))


def _scanned(data: Float32) -> tuple[slice, ...]:
    """Return the part of an image within planes of one value, which were not scanned."""
    part = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        varied = np.flatnonzero(data.max(axis=others) > data.min(axis=others))
        part.append(slice(int(varied[0]), int(varied[-1]) + 1))
    return tuple(part)

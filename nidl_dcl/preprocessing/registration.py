"""Affine registration of a brain to a template, begun from any of 24 orientations.

What the images are, and whether the result is good, is said elsewhere.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nidl_dcl.preprocessing.itk import LPS, to_itk
from nidl_dcl.preprocessing.resampling import resample
from nidl_dcl.preprocessing.shrinking import shrink
from nidl_dcl.preprocessing.template import Template, load_template
from nidl_dcl.volumes.reading import Float32

__all__ = ["TURNS", "find_pose", "register_affine", "score_turn", "to_rigid"]

Floats = NDArray[np.float64]


def _turns() -> list[Floats]:
    signed = (
        np.diag(signs)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1.0, -1.0), repeat=3)
    )
    return [matrix for matrix in signed if np.linalg.det(matrix) > 0]


TURNS = _turns()
"""The 24 rotations by quarter turns, none of which swaps left and right; the first changes nothing."""


_TILTS = {"x": (-45, -30, -15, 15, 30, 45), "z": (-30, -15, 15, 30), "y": (-30, -15, 15, 30)}
"""Degrees about each axis (nodding, shaking, leaning) that registration may begin from: without, one
head in four that nods by 30 degrees or more ends in a wrong optimum."""


def register_affine(
    brain: Float32, mask: NDArray[np.bool_], affine: Floats, turn: Floats = TURNS[0]
) -> Floats:
    """Return the affine transform from mm of the image to mm of the template, shape (4, 4).

    It maximizes the correlation of the two brains, zero outside of their masks, within 6 mm of the
    template's mask: brains of one contrast are compared, and so are their outlines.

    Parameters
    ----------
    brain : ndarray of float32, shape (i, j, k)
        The masked brain, without bias field.
    mask : ndarray of bool, shape (i, j, k)
        Where it is.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm.
    turn : ndarray of float64, shape (3, 3)
        Rotation near which to begin; place and size are those of the masks.
    """
    from SimpleITK import AffineTransform, ImageRegistrationMethod, sitkLinear

    template = load_template(2)
    turn = find_pose(brain, mask, affine, turn)
    start = LPS @ np.linalg.inv(_by_moments(mask, affine, template, turn)) @ LPS
    center = LPS[:3, :3] @ _center(template.mask, template.affine)
    transform = AffineTransform(3)
    transform.SetCenter(center.tolist())
    transform.SetMatrix(start[:3, :3].ravel().tolist())
    transform.SetTranslation((start[:3, :3] @ center + start[:3, 3] - center).tolist())
    method = ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums in one order: the same bits on any machine of a type
    method.SetMetricAsCorrelation()
    around = ndimage.binary_dilation(template.mask, iterations=3)
    method.SetMetricFixedMask(to_itk(around, template.affine))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([1.0, 0.25], 1)
    method.SetInterpolator(sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        2.0, 1e-2, 100, relaxationFactor=0.5, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([4, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, True)
    method.Execute(to_itk(template.data, template.affine), to_itk(*shrink(brain, affine, 2.0)))
    pull = np.eye(4)
    pull[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    pull[:3, 3] = center + transform.GetTranslation() - pull[:3, :3] @ center
    return np.asarray(LPS @ np.linalg.inv(pull) @ LPS)


def score_turn(
    brain: Float32, mask: NDArray[np.bool_], affine: Floats, turn: Floats = TURNS[0]
) -> float:
    """Return the correlation with the template at 8 mm, by center and volume alone.

    Parameters
    ----------
    brain, mask, affine, turn
        As in `register_affine`.
    """
    if not mask.any():
        return -1.0
    template = load_template(8)
    matrix = _by_moments(mask, affine, template, turn)
    there = resample(*shrink(brain, affine, 8.0), matrix, template, order=1)
    around = ndimage.binary_dilation(template.mask)
    if there[around].std() == 0:
        return -1.0
    return float(np.corrcoef(there[around], template.data[around])[0, 1])


def find_pose(
    brain: Float32, mask: NDArray[np.bool_], affine: Floats, turn: Floats = TURNS[0]
) -> Floats:
    """Return the rotation near `turn` that scores best, found about one axis after the other.

    Parameters
    ----------
    brain, mask, affine, turn
        As in `register_affine`.
    """
    small, grid = shrink(brain, affine, 8.0)
    inside = shrink(mask, affine, 8.0)[0] > 0.5
    if not inside.any():
        return turn
    best = score_turn(small, inside, grid, turn)
    for axis, angles in _TILTS.items():
        before = turn
        for angle in angles:
            tried = Rotation.from_euler(axis, angle, degrees=True).as_matrix() @ before
            score = score_turn(small, inside, grid, tried)
            if score > best:
                best, turn = score, tried
    return turn


def _by_moments(
    mask: NDArray[np.bool_], affine: Floats, template: Template, turn: Floats
) -> Floats:
    """Return the transform that gives the mask the center and the volume of the template's."""
    ml = mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    matrix = np.eye(4)
    matrix[:3, :3] = (template.volume_ml / ml) ** (1 / 3) * turn
    center = _center(template.mask, template.affine)
    matrix[:3, 3] = center - matrix[:3, :3] @ _center(mask, affine)
    return matrix


def _center(mask: NDArray[np.bool_], affine: Floats) -> Floats:
    """Return the center of mass in mm."""
    return np.asarray(affine[:3, :3] @ ndimage.center_of_mass(mask) + affine[:3, 3])


def to_rigid(matrix: Floats, center: Floats) -> Floats:
    """Return the rotation in an affine transform, by polar decomposition, with its translation.

    Parameters
    ----------
    matrix : ndarray of float64, shape (4, 4)
        Of positive determinant.
    center : ndarray of float64, shape (3,)
        The point that both transforms send to the same place.
    """
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = left @ right
    rigid[:3, 3] = matrix[:3, :3] @ center + matrix[:3, 3] - rigid[:3, :3] @ center
    return rigid

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nidl_dcl.preprocessing.registration import TURNS, register_affine, score_turn, to_rigid
from nidl_dcl.preprocessing.template import load_template

GRID = np.diag([4.0, 4.0, 4.0, 1.0])
GRID[:3, 3] = (-104, -116, -110)
SHAPE = (53, 59, 56)


def pose(angles, scales, shift, turn=TURNS[0]):
    """Return an affine transform from an image to the template."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(scales)
    matrix[:3, :3] = matrix[:3, :3] @ turn
    matrix[:3, 3] = shift
    return matrix


def brain_in(matrix):
    """Return the template's brain as an image that `matrix` aligns, and its mask."""
    template = load_template(4)
    to_template = np.linalg.inv(template.affine) @ matrix @ GRID
    brain, mask = (
        ndimage.affine_transform(values, to_template, output_shape=SHAPE, order=1)
        for values in (template.data, template.mask.astype(np.float32))
    )
    return brain, mask > 0.5


def error_mm(found, true):
    """Return the largest distance between two transforms of the brain."""
    corners = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-90, 60) for z in (-50, 70)]).T
    there = np.linalg.inv(true) @ corners  # corners are of the template
    return np.linalg.norm(((found @ there) - corners)[:3], axis=0).max()


def test_turns_are_the_24_rotations_by_right_angles():
    assert len({matrix.tobytes() for matrix in TURNS}) == 24
    np.testing.assert_array_equal(TURNS[0], np.eye(3))
    for matrix in TURNS:
        assert np.linalg.det(matrix) == pytest.approx(1)
        np.testing.assert_array_equal(matrix @ matrix.T, np.eye(3))


@pytest.mark.parametrize(
    ("angles", "scales", "shift"),
    [
        ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
        ((12, -6, 9), (1.2, 1.1, 1.15), (14, -20, 9)),
        ((40, 0, 0), (1.1, 1.1, 1.1), (0, 0, 0)),
        ((-25, 5, -4), (0.9, 0.95, 0.85), (-8, 18, -12)),
    ],
)
def test_a_known_pose_is_found(angles, scales, shift):
    pytest.importorskip("SimpleITK")
    true = pose(angles, scales, shift)
    brain, mask = brain_in(true)
    found = register_affine(brain, mask, GRID)
    assert error_mm(found, true) < 2.5


@pytest.mark.parametrize("number", [1, 7, 14, 23])
def test_the_turn_that_brings_a_turned_brain_back_scores_best(number):
    brain, mask = brain_in(pose((8, 5, -6), (1.1, 1.1, 1.1), (0, 0, 0), TURNS[number]))
    scores = np.array([score_turn(brain, mask, GRID, turn) for turn in TURNS])
    assert scores.argmax() == number
    assert scores.max() - np.sort(scores)[-2] > 0.1


def test_an_image_that_is_flat_scores_lowest():
    brain, mask = brain_in(np.eye(4))
    assert score_turn(np.zeros_like(brain), mask, GRID) == -1


def test_registration_from_the_right_turn_ends_there():
    pytest.importorskip("SimpleITK")
    true = pose((8, 5, -6), (1.1, 1.1, 1.1), (0, 10, 0), TURNS[9])
    brain, mask = brain_in(true)
    found = register_affine(brain, mask, GRID, TURNS[9])
    assert error_mm(found, true) < 2.5
    assert np.linalg.det(found[:3, :3]) > 0


def test_the_rigid_part_keeps_lengths_and_the_center():
    matrix = pose((12, -6, 9), (1.2, 1.1, 1.15), (14, -20, 9))
    center = np.array([3.0, -17.0, 8.0])
    rigid = to_rigid(matrix, center)
    np.testing.assert_allclose(rigid[:3, :3] @ rigid[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rigid[:3, :3]) == pytest.approx(1)
    np.testing.assert_allclose((rigid @ [*center, 1])[:3], (matrix @ [*center, 1])[:3])
    np.testing.assert_allclose(to_rigid(rigid, center), rigid, atol=1e-12)

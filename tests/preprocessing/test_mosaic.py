from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest

from nidl_dcl.preprocessing.head import Head
from nidl_dcl.preprocessing.mosaic import draw_mosaic
from nidl_dcl.preprocessing.pipeline import AlignedBrain, Brain
from nidl_dcl.preprocessing.template import load_template


@pytest.fixture
def brain():
    """Return the template as a head of thin and thick voxels, aligned to itself."""
    template = load_template(2)
    data, mask = template.data[:, :, ::3], template.mask[:, :, ::3]
    affine = template.affine @ np.diag([1, 1, 3, 1])
    head = Head(data, affine, data.shape, affine)
    return AlignedBrain(
        head, data * 700, mask, np.eye(4), template.data * 700, template.mask, template
    )


def drawn(png):
    picture = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    return picture, picture.max(axis=2) - picture.min(axis=2) > 0.2


def test_both_rows_show_the_same_brain_with_its_outline(brain):
    png = draw_mosaic(brain)
    picture, colored = drawn(png)
    assert len(png) < 60_000
    assert 300 < len(picture) < 400 < 600 < picture.shape[1] < 900
    upper, lower = np.array_split(colored, 2)
    assert upper.sum() == pytest.approx(lower.sum(), rel=0.15)
    orange = picture[..., 0] > picture[..., 2]
    assert orange[: len(upper)][upper].all()
    assert not orange[len(upper) :][lower].any()
    assert png == draw_mosaic(brain)


@pytest.mark.parametrize(
    ("axis", "brighter"),
    [
        (0, ["right", "right", "right", "right", None]),
        (1, ["up", "up", "up", None, "right"]),
        (2, [None, None, None, "up", "up"]),
    ],
)
def test_right_is_right_and_front_and_top_are_up(axis, brighter):
    data = np.moveaxis(np.broadcast_to(np.linspace(0.2, 1, 60), (60, 60, 60)), 2, axis)
    mask = np.zeros(data.shape, bool)
    mask[20:40, 20:40, 20:40] = True
    affine = np.diag([2.0, 2, 2, 1])
    head = Head(data.astype(np.float32), affine, data.shape, affine)
    picture, colored = drawn(draw_mosaic(Brain(head, head.data, mask)))
    gray = np.where(colored, np.nan, picture[..., 0])
    for tile, towards in zip(np.array_split(gray, 5, axis=1), brighter, strict=True):
        left, right = (np.nanmean(half) for half in np.array_split(tile, 2, axis=1))
        upper, lower = (np.nanmean(half) for half in np.array_split(tile, 2))
        assert (right - left > 0.1) == (towards == "right")
        assert (upper - lower > 0.1) == (towards == "up")


def test_a_brain_that_was_not_aligned_has_one_row(brain):
    both, _ = drawn(draw_mosaic(brain))
    one, colored = drawn(draw_mosaic(Brain(brain.head, brain.corrected, brain.mask)))
    assert len(one) < 0.6 * len(both)
    assert colored.any()


def test_a_brain_of_a_single_voxel_is_drawn(brain):
    mask = np.zeros_like(brain.mask)
    mask[40, 50, 10] = True
    picture, _ = drawn(draw_mosaic(Brain(brain.head, brain.corrected, mask)))
    assert picture.size

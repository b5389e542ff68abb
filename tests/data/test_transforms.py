from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_images import head
from monai.data import MetaTensor
from scipy import stats
from torch.nn import functional as F

from nidl_dcl.data.transforms import (
    RandBiasField,
    RandBlur,
    RandContrast,
    RandCutout,
    RandForegroundNoise,
    RandSpatial,
    normals,
)
from nidl_dcl.data.views import STRENGTHS, draw_view, volume_views


def test_metadata_and_arrays_are_taken_as_plain_tensors():
    expected = draw_view(volume_views(), head(), 1)
    for given in (MetaTensor(head()), head().numpy(), head().double()):
        found = draw_view(volume_views(), given, 1)
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_what_is_no_volume_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8, 8\)"):
        RandBlur()(torch.zeros(1, 1, 8, 8, 8))


def test_a_draw_can_be_repeated():
    views = RandSpatial().set_random_state(seed=1)
    assert torch.equal(views(head()), views(head(), randomize=False))


def test_the_flip_is_left_right():
    x = head()
    assert torch.equal(RandSpatial(prob=0, flip=1)(x), x.flip(1))
    assert torch.equal(RandSpatial(prob=0, flip=0)(x), x)


def likeness(first, second) -> float:
    return torch.corrcoef(torch.stack([first.ravel(), second.ravel()]))[0, 1].item()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_front_stays_front_and_up_stays_up(strength):
    spatial, x, seen = RandSpatial(**STRENGTHS[strength]["placement"]), head(), set()
    for key in range(30):
        view = draw_view(spatial, x, key)
        seen.add(
            max((0, 1, 2, 3), key=[likeness(view, x.flip(axis)) for axis in range(4)].__getitem__)
        )
    # Flipping axis 0, that of the channel, leaves a volume as it is.
    assert seen == {0, 1}


def test_flip_and_placement_are_one_resampling():
    placed = RandSpatial(prob=1, flip=1).set_random_state(seed=3)
    plain = RandSpatial(prob=1, flip=0).set_random_state(seed=3)
    x = head()
    torch.testing.assert_close(placed(x), plain(x).flip(1), atol=1e-5, rtol=0)


def smooth(*sides: int) -> torch.Tensor:
    """Return waves that linear interpolation follows well, fading out towards the edges."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sides), indexing="ij")
    waves = torch.sin(3 * x + 1) + torch.cos(4 * y) + torch.sin(2 * z - 3 * x * y)
    return (waves * torch.exp(-4 * (x**4 + y**4 + z**4)))[None]


def resampled_once(spatial: RandSpatial, volume: torch.Tensor) -> torch.Tensor:
    """Return what one trilinear interpolation makes of the map that was drawn."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(spatial._angles), np.sin(spatial._angles)
    turns = (
        np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
        @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
        @ np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    )
    matrix = spatial._size * turns @ np.diag([spatial._flip, 1.0, 1.0])
    sides = np.array(volume.shape[-3:])
    at = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in sides), indexing="ij"), -1)
    at = at @ matrix.T + spatial._offset * sides
    grid = torch.as_tensor((2 * at / sides)[..., ::-1].copy(), dtype=torch.float32)
    return F.grid_sample(volume[None], grid[None], align_corners=False)[0]


@pytest.mark.parametrize("degrees", [0.0, 9.0])
@pytest.mark.parametrize("sides", [(40, 48, 36), (33, 30, 41)])
def test_placement_equals_one_trilinear_interpolation(degrees, sides):
    spatial = RandSpatial(prob=1, degrees=degrees, scale=0.08, crop=0.15, shift=0.04)
    x = smooth(*sides)
    x = torch.cat([x, -x])
    for seed in range(8):
        moved = spatial.set_random_state(seed=seed)(x)
        difference = (moved - resampled_once(spatial, x)).abs()
        assert difference[:, 3:-3, 3:-3, 3:-3].max() < 0.01 * (x.max() - x.min())


def test_a_crop_enlarges_and_stays_inside_the_field():
    crop = RandSpatial(prob=1, degrees=0, scale=0, crop=0.3, shift=0, flip=0)
    x = torch.ones(1, 20, 20, 20)
    for seed in range(10):
        # Beyond the field are zeros; at most the outermost half voxel may feel them.
        assert crop.set_random_state(seed=seed)(x)[:, 1:-1, 1:-1, 1:-1].min() > 0.999


def test_blur_keeps_the_sum_where_zeros_are_values():
    x = torch.zeros(1, 15, 15, 15)
    x[0, 7, 7, 7] = 1
    blur = RandBlur(prob=1, sigma=0.8, keep_zero=False).set_random_state(seed=1)
    assert blur(x).sum() == pytest.approx(1, abs=1e-5)
    assert blur(x)[0, 7, 7, 8] > 0


def test_noise_is_relative_to_the_foreground():
    noise, x = RandForegroundNoise(prob=1, std=0.2), head()
    for scale in (1, 1000):
        noise.set_random_state(seed=1)
        change = (noise(x * scale) - x * scale)[x != 0]
        expected = noise._std * (x[x != 0] * scale).std()
        assert change.std() == pytest.approx(expected.item(), rel=0.1)


def test_the_bias_field_is_smooth_and_bounded():
    bias, x = RandBiasField(prob=1, amplitude=0.3), torch.ones(1, 24, 24, 24)
    for seed in range(10):
        field = bias.set_random_state(seed=seed)(x).log()
        assert field.abs().max() == pytest.approx(bias._peak, rel=1e-4)
        assert field.diff(dim=1).abs().max() < 0.1


def test_contrast_keeps_order_and_signs():
    x = torch.linspace(-2, 2, 27).reshape(1, 3, 3, 3)
    contrast = RandContrast(prob=1, gain=0.2, gamma=0.3)
    for seed in range(10):
        changed = contrast.set_random_state(seed=seed)(x).ravel()
        assert torch.all(changed.diff() > 0)
        assert torch.equal(changed.sign(), x.ravel().sign())
        assert changed.abs().max() == pytest.approx(2 * contrast._gain, rel=1e-5)


def test_cutout_takes_boxes_and_nothing_else():
    cutout, x = RandCutout(prob=1, boxes=2, side=0.3), torch.ones(2, 20, 20, 20)
    for seed in range(10):
        cut = cutout.set_random_state(seed=seed)(x)
        share = (cut == 0).float().mean().item()
        assert 0 < share <= 2 * 0.3**3 * 1.3
        assert torch.equal(cut[0], cut[1])
        assert set(cut.unique().tolist()) == {0.0, 1.0}


def test_blur_equals_a_convolution_with_a_gaussian():
    x = smooth(20, 22, 24)
    blur = RandBlur(prob=1, sigma=2.0, keep_zero=False).set_random_state(seed=3)
    made, expected = blur(x), x
    assert len(blur._taps[0]) > 1
    for axis, taps in zip((2, 3, 4), blur._taps, strict=True):
        kernel = torch.tensor([*taps[:0:-1], *taps]).view(
            [-1 if a == axis else 1 for a in range(5)]
        )
        padding = [len(taps) - 1 if a == axis else 0 for a in (2, 3, 4)]
        expected = F.conv3d(expected.view(1, 1, 20, 22, 24), kernel, padding=padding)[0]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_noise_is_standard_normal_and_independent():
    drawn = normals((200, 100, 50), 7).numpy().ravel().astype(np.float64)
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / n)
    assert stats.kstest(drawn, "norm").statistic < 2 / math.sqrt(n)
    for lag in (1, 2, 3, 4, 50, 5000):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4 / math.sqrt(n)
    other = normals((200, 100, 50), 8).numpy().ravel()
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 4 / math.sqrt(n)
    assert torch.equal(normals((3, 5), 7), normals((3, 5), 7))
    assert normals((1, 2, 3, 5), 0).shape == (1, 2, 3, 5)

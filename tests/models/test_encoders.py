from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from nidl_dcl import DCL
from nidl_dcl.models.encoders import (
    ENCODERS,
    ProjectionHead,
    RegionalEncoder,
    StridedCNN,
    _BlockPool,
    _GlobalMean,
    _GridMean,
)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_gives_as_many_features_as_it_states(name: str) -> None:
    encoder = ENCODERS[name]().eval()
    with torch.no_grad():
        out = encoder(torch.randn(1, 1, 40, 48, 40))
    regions = [encoder.n_regions] if name == "regional" else []
    assert out.shape == (1, *regions, encoder.n_features)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_stem_of_a_resnet_has_stride_2(name: str) -> None:
    assert ENCODERS[name]().network.conv1.stride == (2, 2, 2)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_no_pooling_whose_gradient_is_random_on_a_gpu(name: str) -> None:
    kinds = (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)
    assert not [m for m in ENCODERS[name]().modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_is_rebuilt_from_its_arguments(name: str) -> None:
    encoder = ENCODERS[name](in_channels=2)
    twin = type(encoder)(**encoder.arguments)
    shapes = {k: v.shape for k, v in encoder.state_dict().items()}
    assert {k: v.shape for k, v in twin.state_dict().items()} == shapes


def test_pooling_equals_torchs_where_blocks_fit() -> None:
    x = torch.randn(2, 3, 8, 6, 4)
    torch.testing.assert_close(_BlockPool("mean")(x), functional.avg_pool3d(x, 2))
    torch.testing.assert_close(_BlockPool("max")(x), functional.max_pool3d(x, 2))
    torch.testing.assert_close(_GlobalMean()(x), functional.adaptive_avg_pool3d(x, 1).flatten(1))


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 17, 33), (2, 3, 5), (1, 2, 4)])
def test_means_in_a_grid_equal_torchs_adaptive_pooling(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(
        _GridMean((4, 3, 2))(x), functional.adaptive_avg_pool3d(x, (4, 3, 2))
    )


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 8, 13), (40, 48, 40)])
def test_the_regional_encoder_takes_any_size_from_8_voxels(size: tuple[int, ...]) -> None:
    encoder = RegionalEncoder(2, widths=(4, 6, 5), grid=(2, 3, 4))
    assert encoder(torch.randn(2, 2, *size)).shape == (2, 24, 5 + 8 * 4)
    assert encoder.n_features == 37


def test_a_region_has_the_means_of_the_last_maps_and_of_the_first_ones_in_its_eight_parts() -> None:
    encoder = RegionalEncoder(widths=(2, 3, 4), grid=(2, 2, 2)).eval()
    x = torch.randn(3, 1, 32, 32, 32)
    with torch.no_grad():
        found = encoder(x).reshape(3, 2, 2, 2, -1)
        first = encoder.convolutions[0](x)
        last = encoder.convolutions(x)
    cell = last[:, :, 4:, :4, 4:].mean((2, 3, 4))
    part = first[:, :, 12:, :4, 8:12].mean((2, 3, 4))  # the last part along the first axis
    torch.testing.assert_close(found[:, 1, 0, 1, :4], cell)
    torch.testing.assert_close(found[:, 1, 0, 1, 4:].reshape(3, 2, 2, 2, 2)[:, :, 1, 0, 0], part)


def test_regions_that_the_images_of_the_training_hardly_cover_are_0() -> None:
    encoder = RegionalEncoder(widths=(2, 3, 4), grid=(2, 2, 2))
    x = torch.rand(4, 1, 32, 32, 32) + 1
    x[..., 16:, :, :] = 0
    x[..., 16:18, :8, :8] = 1  # a quarter of one part
    whole = torch.rand(4, 1, 32, 32, 32)
    for _ in range(40):
        assert encoder(x).count_nonzero() > 0
    found = encoder.eval()(whole).reshape(4, 2, 2, 2, -1)
    assert found[:, 0].abs().sum((0, 3)).all()
    assert not found[:, 1, 0, 1].any()
    assert not found[:, 1, 1].any()
    parts = found[:, 1, 0, 0, 4:].reshape(4, 2, 8)
    assert parts[:, :, 0].any()
    assert not parts[:, :, 1:].any()
    assert found[:, 1, 0, 0, :4].any()


def test_a_region_sees_its_place_alone() -> None:
    encoder = RegionalEncoder(grid=(2, 3, 4)).eval()
    x = torch.randn(1, 1, 64, 72, 80)
    changed = x.clone()
    changed[..., 44:, 34:38, 72:] += 1  # within cell (1, 1, 3), 10 voxels from its borders
    with torch.no_grad():
        difference = (encoder(changed) - encoder(x)).abs().amax(dim=(0, 2))
    assert difference.nonzero().flatten().tolist() == [(1 * 3 + 1) * 4 + 3]


@pytest.mark.parametrize("grid", [(4, 4), (4, 0, 4)])
def test_a_grid_that_is_none_is_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three numbers"):
        RegionalEncoder(grid=grid)


def test_pooling_leaves_an_axis_of_one_voxel_and_drops_an_odd_end() -> None:
    assert _BlockPool("max")(torch.randn(1, 1, 1, 5, 2)).shape == (1, 1, 1, 2, 1)


def test_the_projection_head_names_its_layers_as_the_reference_does() -> None:
    names = set(ProjectionHead(4, 8, 2).state_dict())
    assert names == {f"layers.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_a_head_of_regions_adds_a_vector_of_each_before_layers_that_all_share() -> None:
    head = ProjectionHead(4, 8, 2, n_regions=3)
    names = {name for name, _ in head.named_parameters()}
    assert names - set(ProjectionHead(4, 8, 2).state_dict()) == {"region_bias"}
    h = torch.randn(5, 3, 4)
    torch.testing.assert_close(head(h), torch.stack([head.layers(h[:, k]) for k in range(3)], 1))
    with torch.no_grad():
        head.region_bias[1] = 1.0
    torch.testing.assert_close(head(h)[:, 1], head.layers(h[:, 1] + 1))
    torch.testing.assert_close(head(h)[:, 2], head.layers(h[:, 2]))


def test_a_head_that_does_not_fit_is_an_error_with_both_numbers() -> None:
    model = DCL(StridedCNN(width=4), proj_input_dim=100, accelerator="cpu")
    with pytest.raises(ValueError, match=r"64.*100"):
        model.fit(torch.randn(4, 1, 16, 16, 16))


def test_a_head_that_does_not_fit_an_encoder_without_n_features_is_the_same_error() -> None:
    model = DCL(
        nn.Linear(6, 5), proj_input_dim=4, accelerator="cpu", lr_scheduler=None, max_epochs=1
    )
    with pytest.raises(ValueError, match=r"5.*4"):
        model.fit(torch.randn(8, 6))

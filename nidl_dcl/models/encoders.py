"""Encoders of 3D volumes, and the projection head between an encoder and the loss.

Every encoder maps (n, channels, depth, height, width) to (n, n_features), the regional one to
(n, n_regions, n_features). Pooling is written with means and maxima over blocks and with products, whose
gradients are deterministic on GPUs too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from monai.networks.nets import DenseNet121 as MonaiDenseNet121
from monai.networks.nets import resnet18, resnet50
from torch import Tensor, nn


class StridedCNN(nn.Module):
    """Small convolutional encoder that trains on a CPU.

    Four convolutions with stride 2, each followed by batch normalization and ReLU, then the average
    and the maximum of each map. Batch normalization keeps it from collapsing on aligned brains,
    which are nearly equal: a normalization of each sample does not bring out their differences.

    Parameters
    ----------
    in_channels : int, default=1
        Channels of the volumes.
    width : int, default=32
        Maps of the first convolution; doubled at each of the next three up to 8 times.

    Attributes
    ----------
    n_features : int
        Length of the embedding, ``2 * 8 * width``: averages, then maxima.
    """

    def __init__(self, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.arguments = {"in_channels": in_channels, "width": width}
        sizes = [in_channels, width, 2 * width, 4 * width, 8 * width]
        self.convolutions = nn.Sequential(*(_convolution(*pair, 2) for pair in pairwise(sizes)))
        self.n_features = 2 * sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings of shape (n, n_features)."""
        maps = self.convolutions(x).flatten(2)
        return torch.cat([maps.mean(2), maps.amax(2)], dim=1)


class RegionalEncoder(nn.Module):
    """Small convolutional encoder of a grid of regions, which keeps where things are.

    Convolutions of 3 x 3 x 3 voxels, the first two with stride 2, each followed by batch
    normalization and ReLU. A region's embedding is the average of each map of the last convolution
    in its cell, then the averages of each map of the first convolution in the cell's eight parts.
    With `DCL`, each region is told apart from the same region of other participants.

    Parameters
    ----------
    in_channels : int, default=1
        Channels of the volumes.
    widths : sequence of int, default=(16, 32, 64)
        Maps of each convolution.
    grid : sequence of three int, default=(4, 4, 4)
        Cells along each axis, over the whole field of view. Where there are fewer voxels than cells,
        neighboring cells are the same.

    Attributes
    ----------
    n_features : int
        Length of the embedding of one region, ``widths[-1] + 8 * widths[0]``.
    n_regions : int
        Number of cells. That of cell (i, j, k) is ``(i * grid[1] + j) * grid[2] + k``, counted from
        left, back and bottom in volumes that nidl_dcl prepares.
    coverage : Tensor, shape (2 * grid[0], 2 * grid[1], 2 * grid[2])
        Share of each part of a cell that is not background (exactly 0), a running mean over the
        batches of a training, as those of batch normalization. Embeddings are 0 in parts of which
        less than a tenth is covered: they hardly vary there, and scaling them would amplify noise.
    """

    coverage: Tensor

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        grid: Sequence[int] = (4, 4, 4),
    ) -> None:
        super().__init__()
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid must be three numbers of cells of 1 or more, got {grid!r}.")
        self.arguments = {"in_channels": in_channels, "widths": [*widths], "grid": [*grid]}
        pairs = enumerate(pairwise([in_channels, *widths]))
        self.convolutions = nn.Sequential(
            *(_convolution(*pair, 2 if i < 2 else 1) for i, pair in pairs)
        )
        parts = [2 * cells for cells in grid]
        self.pool, self.pool_parts = _GridMean(grid), _GridMean(parts)
        self.n_features, self.n_regions = widths[-1] + 8 * widths[0], math.prod(grid)
        self.register_buffer("coverage", torch.ones(parts))

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings of shape (n, n_regions, n_features)."""
        if self.training:
            self._watch(x)
        first = self.convolutions[0](x)
        maps, parts = self.pool(self.convolutions[1:](first)), self.pool_parts(first)
        if not self.training:
            covered = self.coverage > _COVERED
            parts = parts * covered
            maps = maps * _by_cell(covered[None, None]).any(2).reshape(maps.shape[2:])
        return torch.cat([maps.flatten(2).transpose(1, 2), _by_cell(parts)], dim=2)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        """Bring the coverage up to date."""
        background = (x == 0).all(1, keepdim=True)
        covered = self.pool_parts((~background).to(self.coverage.dtype)).mean((0, 1))
        self.coverage.lerp_(covered, 0.1)


_COVERED = 0.1
"""Share of a part of a cell from which on its averages are used."""


def _by_cell(parts: Tensor) -> Tensor:
    """Return (n, maps, 2a, 2b, 2c) as (n, a * b * c, maps * 8)."""
    n, c, d, h, w = parts.shape
    cells = parts.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, (d * h * w) // 8, c * 8)


class _MonaiEncoder(nn.Module):
    network: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings of shape (n, n_features)."""
        out: Tensor = self.network(x)
        return out


class ResNet18(_MonaiEncoder):
    """MONAI's 3D ResNet18 with a stem of stride 2, for volumes of `in_channels`; 512 features."""

    _build: Callable[..., nn.Module] = staticmethod(resnet18)
    _n_features = 512

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.arguments = {"in_channels": in_channels}
        network = self._build(
            spatial_dims=3,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            feed_forward=False,
            shortcut_type="B",
            bias_downsample=False,
        )
        network.maxpool = _BlockPool("max")
        network.avgpool = _GlobalMean()
        self.network = network
        self.n_features = self._n_features


class ResNet50(ResNet18):
    """MONAI's 3D ResNet50 with a stem of stride 2, for volumes of `in_channels`; 2048 features."""

    _build = staticmethod(resnet50)
    _n_features = 2048


class DenseNet121(_MonaiEncoder):
    """MONAI's 3D DenseNet121 without classifier, for volumes of `in_channels`; 1024 features."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.arguments = {"in_channels": in_channels}
        network = MonaiDenseNet121(spatial_dims=3, in_channels=in_channels, out_channels=1).features
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.MaxPool3d):
                    setattr(module, name, _BlockPool("max"))
                elif isinstance(child, nn.AvgPool3d):
                    setattr(module, name, _BlockPool("mean"))
        self.network = nn.Sequential(network, nn.ReLU(inplace=True), _GlobalMean())
        self.n_features = 1024


class ProjectionHead(nn.Module):
    """Two-layer perceptron between the embedding and the loss (SimCLR's head).

    Parameters
    ----------
    input_dim, hidden_dim, output_dim : int
        Lengths of the embedding, the hidden layer and the projection.
    n_regions : int, optional
        With a number, the embedding has so many regions. The layers are shared by all of them, and a
        learned vector of each, `region_bias`, is added before; it tells the layers which region it is.
    """

    region_bias: nn.Parameter | None

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, n_regions: int | None = None
    ) -> None:
        super().__init__()
        bias = None if n_regions is None else nn.Parameter(torch.zeros(n_regions, input_dim))
        self.register_parameter("region_bias", bias)
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Project embeddings (n, input_dim) or (n, regions, input_dim), along their last axis."""
        z: Tensor = self.layers(h if self.region_bias is None else h + self.region_bias)
        return z


ENCODERS: dict[str, type[nn.Module]] = {
    "cnn": StridedCNN,
    "regional": RegionalEncoder,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "densenet121": DenseNet121,
}
"""The encoders that the command line knows by name."""


def _convolution(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(n_in, n_out, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm3d(n_out),
        nn.ReLU(inplace=True),
    )


class _GridMean(nn.Module):
    """Mean in each cell of a grid: AdaptiveAvgPool3d with a deterministic gradient."""

    def __init__(self, grid: Sequence[int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        for cells in self.grid:
            # The first spatial axis becomes the last one, as means over the voxels of each cell.
            n = x.shape[2]
            voxel, cell = (torch.arange(k, device=x.device) for k in (n, cells))
            low, high = cell * n // cells, -((cell + 1) * n // -cells)
            inside = ((voxel >= low[:, None]) & (voxel < high[:, None])).to(x.dtype)
            x = torch.tensordot(x, inside / inside.sum(1, keepdim=True), dims=([2], [1]))
        return x


class _GlobalMean(nn.Module):
    """Mean over all voxels, flattened: AdaptiveAvgPool3d(1) with a deterministic gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


class _BlockPool(nn.Module):
    """Mean or maximum over blocks of 2 x 2 x 2 voxels; axes of one voxel are left alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        edges = [min(2, s) for s in size]
        counts = [s // e for s, e in zip(size, edges, strict=True)]
        d, h, w = (k * e for k, e in zip(counts, edges, strict=True))
        interleaved = [k for pair in zip(counts, edges, strict=True) for k in pair]
        blocks = x[:, :, :d, :h, :w].reshape(n, c, *interleaved)
        return blocks.mean(dim=(3, 5, 7)) if self.kind == "mean" else blocks.amax(dim=(3, 5, 7))

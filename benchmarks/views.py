"""Two views of one volume: nidl, stock MONAI and nidl_dcl with the same operations.

    python benchmarks/views.py

Resized crop (30 to 100 % of the volume, sides 0.75 to 1.33), flip (1/2), blur (1/2, sigma up to 2
voxels, each axis), noise (standard deviation 0 to 1), one box erased (2 to 33 %): the same
probabilities and distributions in each arm, one thread. The crop, the noise and the box of nidl_dcl's
arm are made here, in the way of its own transforms. MONAI's arm cuts the same boxes by the same
draws, its other operations are stock, metadata are not tracked. Then what torchio's users do, with
its operations and MONAI's: rotation (up to 10 degrees about each axis) and scaling (up to 10 %) in one
interpolation, flip (1/2), blur (1/2, sigma up to 2 voxels), noise (standard deviation 0 to 1). nidl and
torchio are timed where they are installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    RandAffine,
    RandCoarseDropout,
    RandFlip,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandomizableTransform,
    Resize,
)
from torch.nn import functional as F

from nidl_dcl.data.transforms import (
    RandBlur,
    RandForegroundNoise,
    RandSpatial,
    _gaussian,
    _VolumeTransform,
    normals,
)
from nidl_dcl.data.views import draw_view

SHAPES = ((64, 64, 64), (96, 96, 96), (121, 145, 121))
SCALE, RATIO = (0.3, 1.0), (0.75, 1.33)
PAIRS = {64: 8, 96: 4, 121: 2}
TARGETS = {64: (6.0, 4.5), 96: (6.0, 4.5), 121: (5.0, 4.0)}


class _Box(_VolumeTransform):
    """Acts on a random box of a share of the volume (`scale`) and with sides in a `ratio`."""

    def __init__(self, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        super().__init__(prob=1.0)
        self.scale, self.ratio, self.box = scale, ratio, [(0, 0)] * 3

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self.box = random_box(self.R, data.shape[-3:], self.scale, self.ratio)

    def draw(self) -> None:
        """Draw nothing but the box."""


class ResizedCrop(_Box):
    """The box, resized to the shape of the volume, as by trilinear F.interpolate."""

    def apply(self, volume: torch.Tensor) -> torch.Tensor:
        depth, height, width = volume.shape[-3:]
        for axis, (start, side) in zip((-3, -2, -1), self.box, strict=True):
            volume = volume.narrow(axis, start, side)
        n, rows, columns = volume.shape[-3:]
        grid = torch.empty(1, height, width, 2)
        grid[0, ..., 1] = _outer_edges(height)[:, None]
        grid[0, ..., 0] = _outer_edges(width)
        planes = F.grid_sample(
            volume.reshape(1, -1, rows, columns), grid, align_corners=False, padding_mode="border"
        ).view(*volume.shape[:-2], height, width)
        at = ((torch.arange(depth, dtype=torch.float64) + 0.5) * n / depth - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        weight = (at - low).to(torch.float32)[:, None, None]
        upper = planes.index_select(-3, (low + 1).clamp(max=n - 1))
        return planes.index_select(-3, low).mul_(1 - weight).addcmul_(upper, weight)


def _outer_edges(n: int) -> torch.Tensor:
    """Return the centers of `n` voxels where -1 and 1 are the outer edges, as grid_sample counts."""
    return (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * (2 / n)


class Erasing(_Box):
    """The box set to 0."""

    def apply(self, volume: torch.Tensor) -> torch.Tensor:
        cut = volume.clone()
        x, y, z = (slice(a, a + n) for a, n in self.box)
        cut[..., x, y, z] = 0
        return cut


class BlurByAxis(RandBlur):
    """A sigma of its own for each axis."""

    def draw(self) -> None:
        self._taps = [_gaussian(sigma) for sigma in self.R.uniform(0, self.sigma, 3)]


class Noise(RandForegroundNoise):
    """Noise on every voxel, its standard deviation in the units of the volume."""

    def apply(self, volume: torch.Tensor) -> torch.Tensor:
        return normals(volume.shape, self._noise_seed).mul_(self._std).add_(volume)


class FreshNoise(Noise):
    """Noise from torch.randn, in which no two values are of one table."""

    def apply(self, volume: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(volume.shape, generator=torch.Generator().manual_seed(self._noise_seed))
        return noise.mul_(self._std).add_(volume)


def random_box(
    R: np.random.RandomState, shape: Any, scale: tuple[float, float], ratio: tuple[float, float]
) -> list[tuple[int, int]]:
    """Return first voxel and side, along each axis, of a box that fits in.

    Of ten draws the first that fits, else a cube, else everything.
    """
    sides = np.array(shape)
    low, high = (math.log(r) for r in ratio)
    for attempt in range(11):
        edge = np.cbrt(R.uniform(*scale) * sides.prod())
        stretch = np.exp(R.uniform(low, high, 3)) if attempt < 10 else np.ones(3)
        box = np.rint(edge * stretch / np.cbrt(stretch.prod())).astype(int)
        if np.all(box <= sides) and np.all(box >= 1):
            first = (R.uniform(size=3) * (sides - box + 1)).astype(int)
            return list(zip(first.tolist(), box.tolist(), strict=True))
    return [(0, int(n)) for n in sides]


class _StockCrop(RandomizableTransform):
    """MONAI's Resize of the boxes that the other arms cut."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(1.0)
        self.shape, self.resize = shape, Resize(shape, mode="trilinear")

    def __call__(self, volume: torch.Tensor) -> Any:
        (a, i), (b, j), (c, k) = random_box(self.R, self.shape, SCALE, RATIO)
        return self.resize(volume[:, a : a + i, b : b + j, c : c + k])


def ours(noise: type[Noise] = Noise) -> Compose:
    return Compose(
        [
            ResizedCrop(SCALE, RATIO),
            RandSpatial(prob=0.0, flip=0.5),
            BlurByAxis(0.5, 2.0, keep_zero=False),
            noise(1.0, 1.0),
            Erasing((0.02, 0.33), (1.0, 3.0)),
        ]
    )


def stock(shape: tuple[int, ...]) -> Compose:
    sigma = (0.0, 2.0)
    return Compose(
        [
            _StockCrop(shape),
            RandFlip(0.5, spatial_axis=0),
            RandGaussianSmooth(sigma, sigma, sigma, prob=0.5),
            RandGaussianNoise(1.0, std=1.0, sample_std=True),
            RandCoarseDropout(
                holes=1,
                spatial_size=[round(0.27 * n) for n in shape],
                max_spatial_size=[round(0.69 * n) for n in shape],
                fill_value=0,
                prob=1.0,
            ),
        ]
    )


def nidl(shape: tuple[int, ...]) -> Callable[[Any], Any]:
    import SimpleITK as sitk

    peer = measure.nidl_transforms("augmentation")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    steps = [
        peer.RandomResizedCrop(shape, scale=SCALE, ratio=RATIO),
        peer.RandomFlip(axes=0, p=0.5),
        peer.RandomGaussianBlur(sigma=(0, 2), p=0.5),
        peer.RandomGaussianNoise(std=(0.0, 1.0)),
        peer.RandomErasing(scale=(0.02, 0.33), ratio=(1.0, 3.0)),
    ]

    def apply(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return torch.as_tensor(np.ascontiguousarray(x))

    return apply


def _agree(found: dict[str, list[torch.Tensor]]) -> None:
    """The arms draw from the same distributions: their views have alike means and spreads."""
    means = {n: np.mean([v.mean().item() for v in vs]) for n, vs in found.items()}
    spreads = {n: np.mean([v.std().item() for v in vs]) for n, vs in found.items()}
    for values in (means, spreads):
        if max(values.values()) - min(values.values()) > 0.15 * max(spreads.values()):
            raise AssertionError(f"The arms differ: means {means}, spreads {spreads}")


def rotated() -> Compose:
    return Compose(
        [
            RandSpatial(1.0, degrees=10.0, scale=0.1, crop=0.0, shift=0.0, flip=0.5),
            BlurByAxis(0.5, 2.0, keep_zero=False),
            Noise(1.0, 1.0),
        ]
    )


def stock_rotated() -> Compose:
    sigma, radians = (0.0, 2.0), (np.deg2rad(10.0),) * 3
    return Compose(
        [
            RandAffine(1.0, radians, scale_range=(0.1,) * 3, mode="bilinear", padding_mode="zeros"),
            RandFlip(0.5, spatial_axis=0),
            RandGaussianSmooth(sigma, sigma, sigma, prob=0.5),
            RandGaussianNoise(1.0, std=1.0, sample_std=True),
        ]
    )


def torchio() -> Callable[[Any], Any]:
    import SimpleITK as sitk
    import torchio as tio

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    steps = tio.Compose(
        [
            tio.RandomAffine(scales=0.1, degrees=10, isotropic=True, default_pad_value=0),
            tio.RandomFlip(axes=0, flip_probability=0.5),
            tio.RandomBlur(std=(0, 2), p=0.5),
            tio.RandomNoise(std=(0, 1)),
        ]
    )
    return lambda x: steps(tio.ScalarImage(tensor=x)).data


def _check_crop() -> None:
    """A crop resized in two steps equals F.interpolate of the box: a fast wrong answer is no result."""
    crop, x = ResizedCrop(SCALE, RATIO), torch.rand(2, 21, 30, 25)
    for seed in range(20):
        made = crop.set_random_state(seed=seed)(x)
        (a, i), (b, j), (c, k) = crop.box
        box = x[None, :, a : a + i, b : b + j, c : c + k]
        expected = F.interpolate(box, x.shape[1:], mode="trilinear", align_corners=False)[0]
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def main(rounds: int = 9) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    _check_crop()
    set_track_meta(False)
    rows = []
    for shape in SHAPES:
        axes = [torch.linspace(-1, 1, n) for n in shape]
        head = sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")) < 0.8
        volume = (head * (0.6 + 0.2 * torch.rand(shape)))[None]
        array = volume.numpy()
        size = "x".join(map(str, shape))
        makers: dict[str, Callable[[int], Any]] = {
            "ours": lambda key, v=ours(): draw_view(v, volume, key),
            "ours, torch.randn": lambda key, v=ours(FreshNoise): draw_view(v, volume, key),
            "MONAI": lambda key, v=stock(shape): draw_view(v, volume, key),
        }
        if importlib.util.find_spec("nidl"):
            makers["nidl"] = lambda key, v=nidl(shape): v(array)
        box = volume[None, :, : shape[0] - 9, : shape[1] - 9, : shape[2] - 9]
        limit = {"F.interpolate": lambda key: F.interpolate(box, shape, mode="trilinear")}
        best, fresh = TARGETS[shape[0]]
        pairs = (
            ("ours", "nidl", best),
            ("ours, torch.randn", "nidl", fresh),
            ("ours", "MONAI", 3.0),
            ("ours", "F.interpolate", None),
        )
        rows += _compared(f"two views, {size}", makers, limit, pairs, PAIRS[shape[0]], rounds)
        makers = {
            "ours": lambda key, v=rotated(): draw_view(v, volume, key),
            "MONAI": lambda key, v=stock_rotated(): draw_view(v, volume, key),
        }
        if importlib.util.find_spec("torchio"):
            makers["torchio"] = lambda key, v=torchio(): v(volume)
        pairs = (("ours", "torchio", None), ("ours", "MONAI", None))
        name = f"two rotated views, {size}"
        rows += _compared(name, makers, {}, pairs, max(1, PAIRS[shape[0]] // 2), rounds)
    set_track_meta(True)
    return rows


def _compared(
    name: str,
    makers: dict[str, Callable[[int], Any]],
    limits: dict[str, Callable[[int], Any]],
    ratios: Any,
    pairs: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Time the makers of views in turn, after a look at whether they make the same."""
    _agree({arm: [torch.as_tensor(make(k)) for k in range(60)] for arm, make in makers.items()})
    keys = itertools.count()
    arms: dict[str, Callable[[], Any]] = {
        arm: lambda make=make: [make(next(keys)) for _ in range(2 * pairs)]
        for arm, make in {**makers, **limits}.items()
    }
    times = measure.interleave(arms, rounds)
    cpu = {arm: [t / pairs for t in taken.cpu] for arm, taken in times.items()}
    return [
        measure.row(
            f"{name}: {peer} / {arm}",
            cpu[arm],
            cpu[peer],
            target,
            at_most=False,
            note="CPU s a pair",
        )
        if peer in cpu
        else measure.skipped(f"{name}: {peer} / {arm}", peer)
        for arm, peer, target in ratios
    ]


if __name__ == "__main__":
    measure.print_table(main())

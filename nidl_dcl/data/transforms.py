"""Random changes of a volume, as MONAI transforms that are fast on a CPU.

Each draws from its own ``R``, as MONAI's do. Which are combined, and how strongly, is left to `views`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class _VolumeTransform(RandomizableTransform, ABC):
    """A MONAI array transform of the last three axes that never writes into its input.

    MONAI's own are slower at these sizes, mostly for their tracking of metadata.
    """

    def __call__(self, img: Any, randomize: bool = True) -> Tensor:
        """Return the changed volume; ``randomize=False`` repeats the last draw."""
        volume: Tensor = convert_to_tensor(img, dtype=torch.float32, track_meta=False)
        if volume.ndim not in (3, 4):
            raise ValueError(
                f"{type(self).__name__} takes (c, d, h, w) or (d, h, w), "
                f"got shape {tuple(volume.shape)}."
            )
        if randomize:
            self.randomize(volume)
        return self.apply(volume) if self._do_transform else volume

    def randomize(self, data: Any = None) -> None:
        """Draw whether to act and, if so, how."""
        super().randomize(None)
        if self._do_transform:
            self.draw()

    @abstractmethod
    def draw(self) -> None:
        """Draw this transform's parameters from ``self.R``."""

    @abstractmethod
    def apply(self, volume: Tensor) -> Tensor:
        """Return the changed volume for the parameters drawn."""

    def _around_zero(self, limit: float, size: int | None = None) -> Any:
        return self.R.uniform(-limit, limit, size)


class RandSpatial(_VolumeTransform):
    """Left-right flip, rotation, scaling, resized crop and shift, by linear interpolation.

    Parameters
    ----------
    prob : float
        Probability of everything but the flip.
    degrees, scale, crop, shift : float
        Limits, see `nidl_dcl.data.views.volume_views`.
    flip : float
        Probability of the flip of the first spatial axis.

    Notes
    -----
    A map of all three axes at once is two steps: within the planes across the first axis, each moved
    its own way, then along the first axis. Every axis is interpolated once, as in one trilinear
    interpolation, and almost equal to it, but by torch's bilinear one, which is vectorized where the
    trilinear one is not: two to three times as fast.
    """

    def __init__(
        self,
        prob: float = 0.9,
        degrees: float = 5.0,
        scale: float = 0.04,
        crop: float = 0.08,
        shift: float = 0.02,
        flip: float = 0.5,
    ) -> None:
        super().__init__(prob=1.0)
        self.move_prob, self.flip_prob = prob, flip
        self.degrees, self.scale, self.crop, self.shift = degrees, scale, crop, shift
        self._flip, self._moves, self._size = 1.0, False, 1.0
        self._angles, self._offset = np.zeros(3), np.zeros(3)

    def draw(self) -> None:
        """Draw the map from the view's coordinates, centered, to the input's."""
        self._flip = -1.0 if self.R.rand() < self.flip_prob else 1.0
        self._moves = self.R.rand() < self.move_prob
        if not self._moves:
            return
        self._angles = np.deg2rad(self._around_zero(self.degrees, 3))
        kept = 1 - self.R.uniform(0, self.crop)
        self._size = kept * math.exp(self._around_zero(self.scale))
        # A crop of `kept` may lie anywhere in the field: half the rest to either side.
        self._offset = self._around_zero((1 - kept) / 2, 3) + self._around_zero(self.shift, 3)

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume moved by the map drawn; 0 beyond its field."""
        if not self._moves:
            return volume.flip(-3) if self._flip < 0 else volume
        offset = self._offset * volume.shape[-3:]
        if not self._angles.any():
            return _scaled(volume, (self._flip * self._size, self._size, self._size), offset)
        return _moved(volume, self.matrix(), offset)

    def matrix(self) -> NDArray[np.float64]:
        """Return the map drawn, from the view's coordinates, centered, to the input's."""
        (ca, cb, cc), (sa, sb, sc) = np.cos(self._angles), np.sin(self._angles)
        turns = (
            np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]]),
            np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]]),
            np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]]),
        )
        flip = np.diag([self._flip, 1.0, 1.0])
        matrix: NDArray[np.float64] = self._size * np.linalg.multi_dot(turns) @ flip
        return matrix


class RandBlur(_VolumeTransform):
    """Gaussian blur of up to `sigma` voxels; with `keep_zero` the background stays exactly 0.

    Parameters
    ----------
    prob : float
        Probability.
    sigma : float
        Limit of the standard deviation, in voxels.
    keep_zero : bool
        Whether voxels that are exactly 0 stay so.
    """

    def __init__(self, prob: float = 0.5, sigma: float = 0.6, keep_zero: bool = True) -> None:
        super().__init__(prob)
        self.sigma, self.keep_zero = sigma, keep_zero
        self._taps = [[1.0]] * 3

    def draw(self) -> None:
        """Draw sigma, and from it the weights of a voxel's neighbors along each axis."""
        self._taps = [_gaussian(self.R.uniform(0, self.sigma))] * 3

    def apply(self, volume: Tensor) -> Tensor:
        """Return the blurred volume; beyond its field are zeros."""
        blurred = volume
        for axis, taps in zip((-3, -2, -1), self._taps, strict=True):
            n, source = volume.shape[axis], blurred
            blurred = source * taps[0]
            for distance, weight in enumerate(taps[1:], 1):
                if (rest := n - distance) > 0:
                    lower, upper = source.narrow(axis, 0, rest), source.narrow(axis, distance, rest)
                    blurred.narrow(axis, distance, rest).add_(lower, alpha=weight)
                    blurred.narrow(axis, 0, rest).add_(upper, alpha=weight)
        return blurred * (volume != 0) if self.keep_zero else blurred


class RandContrast(_VolumeTransform):
    """Gain of 1 ± `gain` and a power of up to exp(± `gamma`), which keeps 0 and the extremes.

    Parameters
    ----------
    prob : float
        Probability.
    gain : float
        Limit of the gain's distance from 1.
    gamma : float
        Limit of the power's absolute logarithm.
    """

    def __init__(self, prob: float = 0.8, gain: float = 0.1, gamma: float = 0.1) -> None:
        super().__init__(prob)
        self.gain, self.gamma, self._gain, self._power = gain, gamma, 1.0, 1.0

    def draw(self) -> None:
        """Draw gain and power."""
        self._gain = 1 + self._around_zero(self.gain)
        self._power = math.exp(self._around_zero(self.gamma))

    def apply(self, volume: Tensor) -> Tensor:
        """Return sign(x) m (abs(x) / m) ** power times the gain, m being the largest abs(x)."""
        if self._power == 1:
            return volume * self._gain
        largest = max(float(volume.abs().max()), 1e-12)
        bent = (volume.abs() / largest).pow_(self._power).mul_(largest * self._gain)
        return torch.copysign(bent, volume)


class RandBiasField(_VolumeTransform):
    """Smooth multiplicative field, exp of cosines of at most one wave per axis.

    Parameters
    ----------
    prob : float
        Probability.
    amplitude : float
        Limit of the field's largest absolute logarithm.
    """

    def __init__(self, prob: float = 0.5, amplitude: float = 0.2) -> None:
        super().__init__(prob)
        self.amplitude, self._weights, self._peak = amplitude, np.zeros((3, 3, 3)), 0.0

    def draw(self) -> None:
        """Draw the weights of the cosines, the slow ones larger, and the peak."""
        order = np.add.outer(np.add.outer(np.arange(3), np.arange(3)), np.arange(3))
        self._weights = self.R.standard_normal((3, 3, 3)) / np.maximum(1, order) ** 2
        self._weights[0, 0, 0] = 0
        self._peak = self.R.uniform(0, self.amplitude)

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume times the field."""
        field = torch.as_tensor(self._weights, dtype=torch.float32, device=volume.device)
        for n in volume.shape[-3:]:
            at = (torch.arange(n, dtype=torch.float32, device=volume.device) + 0.5) * (math.pi / n)
            # One axis of weights becomes one axis of voxels, added in a fixed order.
            field = sum(
                (field[k].unsqueeze(-1) * torch.cos(k * at) for k in (1, 2)),
                field[0].unsqueeze(-1) * torch.ones(n, device=volume.device),
            )
        return volume * field.mul_(self._peak / max(float(field.abs().max()), 1e-6)).exp_()


class RandForegroundNoise(_VolumeTransform):
    """Gaussian noise where the volume is not exactly 0, relative to its standard deviation there.

    Parameters
    ----------
    prob : float
        Probability.
    std : float
        Limit of the noise's share of the foreground's standard deviation.
    """

    def __init__(self, prob: float = 0.5, std: float = 0.06) -> None:
        super().__init__(prob)
        self.std, self._std, self._noise_seed = std, 0.0, 0

    def draw(self) -> None:
        """Draw the standard deviation and the seed of the noise."""
        self._std = self.R.uniform(0, self.std)
        self._noise_seed = int(self.R.randint(2**31))

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume with noise added."""
        foreground = volume != 0
        count = max(1, int(foreground.sum()))
        mean, squares = float(volume.sum()) / count, float(volume.square().sum()) / count
        spread = math.sqrt(max(squares - mean**2, 0.0))
        noise = normals(volume.shape, self._noise_seed).to(volume.device)
        return noise.mul_(self._std * spread).mul_(foreground).add_(volume)


class RandCutout(_VolumeTransform):
    """Boxes set to 0, each side 10 % to `side` of the volume's.

    Parameters
    ----------
    prob : float
        Probability.
    boxes : int
        Largest number of boxes; the smallest is 1.
    side : float
        Limit of a side, as a share of the volume's.
    """

    def __init__(self, prob: float = 0.5, boxes: int = 2, side: float = 0.25) -> None:
        super().__init__(prob)
        self.boxes, self.side, self._boxes = boxes, side, np.zeros((0, 2, 3))

    def draw(self) -> None:
        """Draw the boxes as shares of the volume."""
        count = self.R.randint(1, self.boxes + 1)
        sides = self.R.uniform(min(0.1, self.side), self.side, (count, 3))
        self._boxes = np.stack([self.R.uniform(size=(count, 3)) * (1 - sides), sides], axis=1)

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume without the boxes."""
        cut = volume.clone()
        for start, side in self._boxes:
            first = np.rint(start * volume.shape[-3:]).astype(int)
            x, y, z = (
                slice(a, a + b)
                for a, b in zip(first, np.rint(side * volume.shape[-3:]).astype(int), strict=True)
            )
            cut[..., x, y, z] = 0
        return cut


def normals(shape: Any, seed: int) -> Tensor:
    """Return float32 normal deviates of mean 0 and variance 1, whose bits depend on `seed` alone.

    Each is one of 65,536 quantiles of the normal distribution, the middles of as many equally likely
    intervals, chosen by 16 bits of the generator SFC64: independent of one another, up to 4.2 in size,
    in half the time of ``torch.randn``.

    Parameters
    ----------
    shape : sequence of int
        Of the result.
    seed : int
        0 or more.
    """
    count = math.prod(shape)
    bits: Any = np.random.SFC64(seed).random_raw(-(-count // 4))
    drawn = np.empty(count, dtype=np.float32)
    np.take(_quantiles(), bits.view(np.uint16)[:count], out=drawn, mode="clip")
    return torch.from_numpy(drawn).view(*shape)


@cache
def _quantiles() -> NDArray[np.float32]:
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).to(torch.float32).numpy()


def _gaussian(sigma: float) -> list[float]:
    sigma = max(1e-3, sigma)
    taps = np.exp(-0.5 * (np.arange(math.ceil(3 * sigma) + 1) / sigma) ** 2)
    weights: list[float] = (taps / (taps[0] + 2 * taps[1:].sum())).tolist()
    return weights


def _moved(volume: Tensor, matrix: NDArray[np.float64], offset: NDArray[np.float64]) -> Tensor:
    """Return linear interpolation of a volume at ``matrix @ (x, y, z) + offset``.

    Parameters
    ----------
    volume : Tensor of shape (…, d, h, w)
    matrix : ndarray of shape (3, 3)
        From the result's coordinates to the input's, in voxels from the center; its first entry is
        not small.
    offset : ndarray of shape (3,)
    """
    stack = volume.reshape(-1, *volume.shape[-3:]).movedim(0, 1)
    depth, _, height, width = stack.shape
    x, y, z = (
        torch.arange(n, dtype=torch.float32, device=volume.device) - (n - 1) / 2
        for n in (depth, height, width)
    )
    # Within the planes: what x of the result lies at an x of the input depends on y and z.
    lean = matrix[1:, 0] / matrix[0, 0]
    inner = matrix[1:, 1:] - np.outer(lean, matrix[0, 1:])
    start = offset[1:] - lean * offset[0]
    grid = torch.empty(depth, height, width, 2, device=volume.device)
    for column, n, a, (b, c), o in zip((1, 0), (height, width), lean, inner, start, strict=True):
        # grid_sample counts from -1 to 1 between the outer edges of the voxels, last axis first.
        first, second, third = ((k * 2 / n).item() for k in (a, b, c))
        planes = (y * second)[:, None] + z * third
        torch.add((x * first + o * 2 / n)[:, None, None], planes, out=grid[..., column])
    stack = F.grid_sample(stack, grid, align_corners=False)
    # Along the first axis, as planes across the second.
    first, second, third = (matrix[0] * 2 / depth).tolist()
    grid = torch.empty(height, depth, width, 2, device=volume.device)
    grid[..., 0] = z * (2 / width)
    planes = (x * first)[:, None] + z * third
    torch.add((y * second + offset[0] * 2 / depth)[:, None, None], planes, out=grid[..., 1])
    moved = F.grid_sample(stack.permute(2, 1, 0, 3), grid, align_corners=False)
    return moved.permute(1, 2, 0, 3).reshape(volume.shape)


def _scaled(volume: Tensor, scales: tuple[float, float, float], offset: Any) -> Tensor:
    """Return linear interpolation of a volume at ``scales * (x, y, z) + offset``.

    As `_moved`, for a map that leaves the axes where they are, and several times as fast.
    """
    depth, height, width = volume.shape[-3:]
    grid = torch.empty(1, height, width, 2, device=volume.device)
    for axis, n in ((1, height), (2, width)):
        at = torch.arange(n, dtype=torch.float32, device=volume.device) - (n - 1) / 2
        at = at * (2 * scales[axis] / n) + 2 * float(offset[axis]) / n
        # grid_sample counts from -1 to 1 between the outer edges of the voxels, last axis first.
        grid[0, ..., 2 - axis] = at[:, None] if axis == 1 else at
    planes = F.grid_sample(volume.reshape(1, -1, height, width), grid, align_corners=False)
    planes = planes.view(volume.shape)
    middle = (depth - 1) / 2
    at = (torch.arange(depth, dtype=torch.float64) - middle) * scales[0] + float(offset[0]) + middle
    low = at.floor()
    parts = []
    for index, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
        weight = (weight * ((index >= 0) & (index < depth))).to(volume.device, torch.float32)
        near = index.clamp(0, depth - 1).long().to(volume.device)
        parts.append((planes.index_select(-3, near), weight[:, None, None]))
    (first, u), (second, v) = parts
    return first.mul_(u).addcmul_(second, v)

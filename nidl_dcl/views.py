"""Random views of a volume: how one is drawn under a key, and what it may change in a brain.

MONAI transforms through and through; which participants are drawn, and when, is the loader's.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, Randomizable, RandomizableTransform
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F

from nidl_dcl.errors import UsageError
from nidl_dcl.monai_random import warn_of_untested
from nidl_dcl.randomness import key_seed, keyed

__all__ = [
    "STRENGTHS",
    "MultiViewsTransform",
    "RandBias",
    "RandBlur",
    "RandContrast",
    "RandCutout",
    "RandForegroundNoise",
    "RandPlacement",
    "TwoViews",
    "draw_view",
    "volume_views",
]

# Twice "light" is "default", about twice "default" is "strong"; the flip has no strength.
STRENGTHS: dict[str, dict[str, dict[str, Any]]] = {
    "light": {
        "placement": {"prob": 0.7, "degrees": 2.5, "scale": 0.02, "crop": 0.04, "shift": 0.01},
        "blur": {"prob": 0.25, "sigma": 0.4},
        "contrast": {"prob": 0.5, "gain": 0.05, "gamma": 0.05},
        "bias": {"prob": 0.3, "amplitude": 0.1},
        "noise": {"prob": 0.3, "std": 0.03},
        "cutout": {"prob": 0.3, "boxes": 1, "side": 0.2},
    },
    "default": {
        "placement": {"prob": 0.9, "degrees": 5.0, "scale": 0.04, "crop": 0.08, "shift": 0.02},
        "blur": {"prob": 0.5, "sigma": 0.6},
        "contrast": {"prob": 0.8, "gain": 0.1, "gamma": 0.1},
        "bias": {"prob": 0.5, "amplitude": 0.2},
        "noise": {"prob": 0.5, "std": 0.06},
        "cutout": {"prob": 0.5, "boxes": 2, "side": 0.25},
    },
    "strong": {
        "placement": {"prob": 1.0, "degrees": 9.0, "scale": 0.08, "crop": 0.15, "shift": 0.04},
        "blur": {"prob": 0.7, "sigma": 0.8},
        "contrast": {"prob": 0.9, "gain": 0.2, "gamma": 0.2},
        "bias": {"prob": 0.7, "amplitude": 0.35},
        "noise": {"prob": 0.7, "std": 0.12},
        "cutout": {"prob": 0.7, "boxes": 4, "side": 0.3},
    },
}


class MultiViewsTransform:
    """Several views of one input, as a list.

    Parameters
    ----------
    transforms : callable or sequence of callables
        One callable is applied `n_views` times, several are applied once each.
    n_views : int, optional
        How often one callable is applied, 0 or more; None means 1. With a sequence: None or 1.

    Raises
    ------
    TypeError
        A transform is not callable, or `n_views` is not an int.
    ValueError
        `n_views` is negative, or not 1 beside a sequence.
    """

    def __init__(
        self,
        transforms: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
        n_views: int | None = None,
    ) -> None:
        if n_views is not None:
            if isinstance(n_views, bool) or not isinstance(n_views, Integral):
                raise TypeError(f"n_views must be an int or None, got {type(n_views).__name__}.")
            if n_views < 0:
                raise ValueError(f"n_views must be 0 or more, got {n_views}.")
        if callable(transforms):
            self.transforms = [transforms] * (1 if n_views is None else int(n_views))
            return
        if isinstance(transforms, str) or not isinstance(transforms, Sequence):
            raise TypeError(
                "transforms must be a callable or a sequence of callables, "
                f"got {type(transforms).__name__}."
            )
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"Each transform must be callable, got {transform!r}.")
        if n_views not in (None, 1):
            raise ValueError(
                f"n_views must be None or 1 beside a sequence of transforms, got {n_views}: "
                "each transform gives one view."
            )
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> list[Any]:
        """Return one view of `x` per transform."""
        return [transform(x) for transform in self.transforms]


class TwoViews:
    """Two random views of one input: what a contrastive loss compares.

    Parameters
    ----------
    views : callable, optional
        One input in, one view out: a MONAI transform or Compose, or any function. Default:
        `volume_views()`.

    Notes
    -----
    A view depends on its key alone (see `draw_view`). Without a key one is drawn from torch's
    global generator, which a DataLoader seeds differently in each worker. A warning names the
    random transforms of MONAI in `views` that are not tested to obey a key.
    """

    def __init__(self, views: Callable[[Any], Any] | None = None) -> None:
        if views is not None and not callable(views):
            raise TypeError(f"views must be callable, got {type(views).__name__}.")
        self.views = volume_views() if views is None else views
        warn_of_untested(self.views)

    def __call__(self, x: Any, key: Any = None) -> list[Any]:
        """Return views 1 and 2 of `x`, drawn under ``(*key, 1)`` and ``(*key, 2)``.

        Parameters
        ----------
        x : Tensor
            As the views take it; `volume_views` take float32 (c, d, h, w).
        key : tuple or scalar, optional
            For instance (seed, epoch, participant).
        """
        if key is None:
            key = int(torch.randint(2**62, ()).item())
        parts = key if isinstance(key, tuple) else (key,)
        return [draw_view(self.views, x, *parts, view) for view in (1, 2)]


def draw_view(views: Callable[[Any], Any], x: Any, *key: object) -> Any:
    """Return one view of `x` that depends on `x` and `key` alone, without MONAI's metadata.

    Parameters
    ----------
    views : callable
        One input in, one view out. It runs under generators of torch, numpy and `random` seeded
        by `key`; MONAI transforms, inside composes too, get their own by ``set_random_state``.
    x : Tensor
        As `views` takes it; they get a copy, since some of MONAI's transforms write into their
        input.
    *key : object
        For instance seed, epoch, participant, view.

    Notes
    -----
    The caller's generators are left as they were. The view is computed on one thread, as it is
    in a loader's worker, so that no bit depends on who computes it. A MONAI transform hidden in
    a function is beyond reach: pass it in a Compose.
    """
    with _one_thread(), keyed(*key):
        _seed(views, key)
        view = views(x.clone() if isinstance(x, Tensor) else copy.copy(x))
    return view.as_tensor() if isinstance(view, MetaTensor) else view


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _seed(views: Any, key: tuple[object, ...]) -> None:
    if isinstance(views, Randomizable):
        views.set_random_state(seed=key_seed(*key, "monai"))
        return
    parts = getattr(views, "transforms", ())
    for i, part in enumerate(parts if isinstance(parts, list | tuple) else ()):
        _seed(part, (*key, i))


def volume_views(strength: str = "default", kind: str = "intensity") -> Compose:
    """Return the random changes that a brain keeps its identity under, as a MONAI Compose.

    Parameters
    ----------
    strength : {"light", "default", "strong"}
        How far and how often, see the table.
    kind : {"intensity", "probability", "signed"}
        What the numbers are. Tissue maps and signed maps get no gamma and no bias field.

    Returns
    -------
    monai.transforms.Compose
        Takes and gives float32 (c, d, h, w) or (d, h, w), the first spatial axis left to right
        (RAS), voxels of about equal sides. Voxels that are exactly 0 count as background.

    Notes
    -----
    In this order; magnitudes are drawn uniformly up to the limit given:

    ============  ==========================================  ======  =======  ======
    change        limit                                       light   default  strong
    ============  ==========================================  ======  =======  ======
    flip          left-right only, probability                0.5     0.5      0.5
    placement     probability                                 0.7     0.9      1.0
    .             rotation about each axis, ± degrees         2.5     5        9
    .             scaling, ±                                  2 %     4 %      8 %
    .             resized crop: cut off each side length      4 %     8 %      15 %
    .             shift, ± of each side length                1 %     2 %      4 %
    blur          probability                                 0.25    0.5      0.7
    .             sigma in voxels                             0.4     0.6      0.8
    contrast      probability                                 0.5     0.8      0.9
    .             gain, ±                                     5 %     10 %     20 %
    .             gamma, ± of its logarithm                   0.05    0.1      0.2
    bias field    probability                                 0.3     0.5      0.7
    .             largest ± of the logarithm                  0.1     0.2      0.35
    noise         probability                                 0.3     0.5      0.7
    .             of the foreground's standard deviation      3 %     6 %      12 %
    cutout        probability                                 0.3     0.5      0.7
    .             boxes                                       1       2        4
    .             side of a box, of each side length          20 %    25 %     30 %
    ============  ==========================================  ======  =======  ======

    Background outside a brain mask stays exactly 0, save that placement moves it and cutout adds
    to it. Flip, rotation, scaling, crop and shift are one resampling.
    """
    if strength not in STRENGTHS:
        raise UsageError(f"strength is one of {', '.join(STRENGTHS)}; got {strength!r}.")
    if kind not in ("intensity", "probability", "signed"):
        raise UsageError(f"kind is one of intensity, probability, signed; got {kind!r}.")
    limits = STRENGTHS[strength]
    plain = kind == "intensity"
    steps: list[RandomizableTransform] = [
        RandPlacement(**limits["placement"]),
        RandBlur(**limits["blur"], keep_zero=plain),
        RandContrast(**limits["contrast"] | ({} if plain else {"gamma": 0.0})),
        *([RandBias(**limits["bias"])] if plain else []),
        RandForegroundNoise(**limits["noise"]),
        RandCutout(**limits["cutout"]),
    ]
    return Compose(steps)


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


class RandPlacement(_VolumeTransform):
    """Left-right flip, rotation, scaling, resized crop and shift, in one linear resampling.

    Parameters
    ----------
    prob : float
        Probability of everything but the flip.
    degrees, scale, crop, shift : float
        Limits, see `volume_views`.
    flip : float
        Probability of the flip of the first spatial axis.
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
        self._matrix, self._offset, self._moves = np.eye(3), np.zeros(3), False

    def draw(self) -> None:
        """Draw the map from the view's coordinates, centred, to the input's."""
        flip = np.diag([-1.0 if self.R.rand() < self.flip_prob else 1.0, 1.0, 1.0])
        self._moves = self.R.rand() < self.move_prob
        self._matrix, self._offset = flip, np.zeros(3)
        if not self._moves:
            return
        a, b, c = np.deg2rad(self._around_zero(self.degrees, 3))
        turns = [
            [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]],
            [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]],
            [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]],
        ]
        kept = 1 - self.R.uniform(0, self.crop)
        size = kept * math.exp(self._around_zero(self.scale))
        self._matrix = size * np.linalg.multi_dot([np.array(turn) for turn in turns]) @ flip
        # A crop of `kept` may lie anywhere in the field: half the rest to either side.
        self._offset = self._around_zero((1 - kept) / 2, 3) + self._around_zero(self.shift, 3)

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume resampled by the map drawn; 0 beyond its field."""
        if not self._moves:
            return volume.flip(-3) if self._matrix[0, 0] < 0 else volume
        sides = volume.shape[-3:]
        half = [(n - 1) / 2 for n in sides]
        if self.degrees == 0:
            for axis, n in enumerate(sides):
                at = (torch.arange(n, dtype=torch.float32) - half[axis]) * self._matrix[axis, axis]
                volume = _interpolated(volume, axis - 3, at + half[axis] + self._offset[axis] * n)
            return volume
        x, y, z = (
            torch.arange(n, dtype=torch.float32) - m for n, m in zip(sides, half, strict=True)
        )
        grid = torch.empty(1, *sides, 3)
        for axis, n in enumerate(sides):
            # grid_sample counts from -1 to 1 between the outer voxel centres, last axis first.
            u, v, w = (self._matrix[axis] / max(half[axis], 0.5)).tolist()
            start = self._offset[axis] * n / max(half[axis], 0.5)
            torch.add(
                (u * x + start)[:, None, None] + (v * y)[:, None], w * z, out=grid[0, ..., 2 - axis]
            )
        channels = volume.reshape(1, -1, *sides)
        return F.grid_sample(channels, grid, align_corners=True).reshape(volume.shape)


class RandBlur(_VolumeTransform):
    """Gaussian blur of up to `sigma` voxels; with `keep_zero` the background stays exactly 0."""

    def __init__(self, prob: float = 0.5, sigma: float = 0.6, keep_zero: bool = True) -> None:
        super().__init__(prob)
        self.sigma, self.keep_zero, self._taps = sigma, keep_zero, [1.0]

    def draw(self) -> None:
        """Draw one sigma for the three axes."""
        sigma = max(1e-3, self.R.uniform(0, self.sigma))
        taps = np.exp(-0.5 * (np.arange(math.ceil(3 * sigma) + 1) / sigma) ** 2)
        self._taps = (taps / (taps[0] + 2 * taps[1:].sum())).tolist()

    def apply(self, volume: Tensor) -> Tensor:
        """Return the blurred volume; beyond its field are zeros."""
        blurred = volume
        for axis in (-3, -2, -1):
            n, source = volume.shape[axis], blurred
            blurred = source * self._taps[0]
            for distance, weight in enumerate(self._taps[1:], 1):
                if (rest := n - distance) > 0:
                    lower, upper = source.narrow(axis, 0, rest), source.narrow(axis, distance, rest)
                    blurred.narrow(axis, distance, rest).add_(lower, alpha=weight)
                    blurred.narrow(axis, 0, rest).add_(upper, alpha=weight)
        return blurred * (volume != 0) if self.keep_zero else blurred


class RandContrast(_VolumeTransform):
    """Gain of 1 ± `gain` and a power of up to exp(± `gamma`), which keeps 0 and the extremes."""

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


class RandBias(_VolumeTransform):
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
        field = torch.as_tensor(self._weights, dtype=torch.float32)
        for n in volume.shape[-3:]:
            at = (torch.arange(n, dtype=torch.float32) + 0.5) * (math.pi / n)
            # One axis of weights becomes one axis of voxels, added in a fixed order.
            field = sum(
                (field[k].unsqueeze(-1) * torch.cos(k * at) for k in (1, 2)),
                field[0].unsqueeze(-1) * torch.ones(n),
            )
        return volume * field.mul_(self._peak / max(float(field.abs().max()), 1e-6)).exp_()


class RandForegroundNoise(_VolumeTransform):
    """Gaussian noise where the volume is not exactly 0, relative to its standard deviation."""

    def __init__(self, prob: float = 0.5, std: float = 0.06) -> None:
        super().__init__(prob)
        self.std, self._std, self._noise_seed = std, 0.0, 0

    def draw(self) -> None:
        """Draw the relative standard deviation and the seed of the noise."""
        self._std = self.R.uniform(0, self.std)
        self._noise_seed = int(self.R.randint(2**31))

    def apply(self, volume: Tensor) -> Tensor:
        """Return the volume with noise added."""
        foreground = volume != 0
        count = max(1, int(foreground.sum()))
        variance = float(volume.square().sum()) / count - (float(volume.sum()) / count) ** 2
        # torch draws five times faster than numpy's RandomState, and its own generator
        # leaves the global one alone.
        noise = torch.randn(volume.shape, generator=torch.Generator().manual_seed(self._noise_seed))
        return volume + noise.mul_(self._std * math.sqrt(max(variance, 0.0))).mul_(foreground)


class RandCutout(_VolumeTransform):
    """Boxes set to 0: 1 to `boxes` of them, each side 10 % to `side` of the volume's."""

    def __init__(self, prob: float = 0.5, boxes: int = 2, side: float = 0.25) -> None:
        super().__init__(prob)
        self.boxes, self.side, self._boxes = boxes, side, np.zeros((0, 2, 3))

    def draw(self) -> None:
        """Draw sides and places as shares of the volume."""
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


def _interpolated(volume: Tensor, axis: int, at: Tensor) -> Tensor:
    """Return linear interpolation along one axis at positions in voxels; 0 outside."""
    n = volume.shape[axis]
    shape = [-1 if a == axis % volume.ndim else 1 for a in range(volume.ndim)]
    low = at.floor()
    result = torch.zeros_like(volume)
    for index, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
        weight = weight * ((index >= 0) & (index < n))
        picked = volume.index_select(axis, index.clamp(0, n - 1).long())
        result += picked * weight.view(shape)
    return result

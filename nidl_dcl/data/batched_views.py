"""The built-in views of a whole batch by a few large operations, as a GPU is fast with.

Each volume gets the view that `views.draw_pair` draws under its key, up to rounding, whatever the
others of its batch are. What a change draws is left to `transforms`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor
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
from nidl_dcl.data.views import PairedViews, seed_transforms

_VOXELS = (1, 2, 3, 4)
"""The axes of one volume with its channels."""


def is_batched(views: Any) -> bool:
    """Return whether views are made of built-in changes alone."""
    if type(views) is PairedViews:
        return is_batched(views.shared) and is_batched(views.each)
    return all(type(step) in _CHANGES for step in _steps(views))


def draw_pairs(views: Any, volumes: Tensor, keys: Sequence[tuple[object, ...]]) -> list[Tensor]:
    """Return view 1 and view 2 of each of the volumes.

    Parameters
    ----------
    views : callable
        Of which `is_batched` holds.
    volumes : Tensor of shape (n, c, d, h, w) or (n, d, h, w)
        On any device.
    keys : sequence of tuple
        As of `views.draw_pair`, one for each volume.
    """
    x = volumes.float()
    x = x[:, None] if volumes.ndim == 4 else x
    if isinstance(views, PairedViews):
        x, views = _draw(views.shared, x, [(*key, "both") for key in keys]), views.each
    pair = [_draw(views, x, [(*key, view) for key in keys]) for view in (1, 2)]
    return [view[:, 0] for view in pair] if volumes.ndim == 4 else pair


def _steps(views: Any) -> list[Any]:
    return list(views.transforms) if type(views) is Compose else [views]


def _draw(views: Any, volumes: Tensor, keys: Sequence[tuple[object, ...]]) -> Tensor:
    steps = _steps(views)
    drawn = []
    for key in keys:
        seed_transforms(views, key)
        for step in steps:
            step.randomize()
        drawn.append([copy.copy(step) for step in steps])
    for changes in zip(*drawn, strict=True):
        acting = [i for i, change in enumerate(changes) if change._do_transform]
        if not acting:
            continue
        at = torch.tensor(acting, device=volumes.device)
        changed = _CHANGES[type(changes[0])](volumes[at], [changes[i] for i in acting])
        volumes = volumes.index_copy(0, at, changed)
    return volumes


def _each(values: Any, like: Tensor, axes: int = 4) -> Tensor:
    """Return one number for each volume, on the device of `like`, with so many axes more."""
    numbers = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return numbers.to(like.device).view(-1, *[1] * axes)


def _spatial(volumes: Tensor, changes: Sequence[RandSpatial]) -> Tensor:
    moved = torch.empty_like(volumes)
    turned = []
    for i, change in enumerate(changes):
        if change._moves and change._angles.any():
            turned.append(i)
        else:
            moved[i] = change.apply(volumes[i])
    if turned:
        at = torch.tensor(turned, device=volumes.device)
        matrices = np.stack([changes[i].matrix() for i in turned])
        offsets = np.stack([changes[i]._offset * volumes.shape[-3:] for i in turned])
        moved[at] = _moved(volumes[at], matrices, offsets)
    return moved


def _moved(volumes: Tensor, matrices: Any, offsets: Any) -> Tensor:
    """Return linear interpolation of each volume, in the two steps of `transforms`."""
    n, channels, depth, height, width = volumes.shape
    x, y, z = (
        torch.arange(size, dtype=torch.float32, device=volumes.device) - (size - 1) / 2
        for size in (depth, height, width)
    )
    x, y = x[:, None, None], y[:, None]

    def coordinate(size: int, *factors: Any) -> Tensor:
        # grid_sample counts from -1 to 1 between the outer edges of the voxels.
        a, b, c, o = (_each(factor * 2 / size, volumes, 3) for factor in factors)
        return (x * a + o) + (y * b + z * c)

    lean = matrices[:, 1:, 0] / matrices[:, 0, :1]
    inner = matrices[:, 1:, 1:] - lean[:, :, None] * matrices[:, 0, None, 1:]
    start = offsets[:, 1:] - lean * offsets[:, :1]
    grid = torch.stack(
        [
            coordinate(size, lean[:, k], inner[:, k, 0], inner[:, k, 1], start[:, k])
            for k, size in ((1, width), (0, height))
        ],
        dim=-1,
    )
    planes = volumes.transpose(1, 2).reshape(n * depth, channels, height, width)
    planes = F.grid_sample(planes, grid.view(n * depth, height, width, 2), align_corners=False)
    along = coordinate(depth, *matrices[:, 0].T, offsets[:, 0])  # (n, d, h, w)
    grid = torch.stack([(z * (2 / width)).expand_as(along), along], dim=-1).transpose(1, 2)
    planes = planes.view(n, depth, channels, height, width).permute(0, 3, 2, 1, 4)
    planes = planes.reshape(n * height, channels, depth, width)
    grid = grid.reshape(n * height, depth, width, 2)
    moved = F.grid_sample(planes, grid, align_corners=False)
    return moved.view(n, height, channels, depth, width).permute(0, 2, 3, 1, 4)


def _blur(volumes: Tensor, changes: Sequence[RandBlur]) -> Tensor:
    blurred = volumes
    for number, axis in enumerate((-3, -2, -1)):
        taps = [change._taps[number] for change in changes]
        reach = max(map(len, taps))
        filled = _each([[*t, *[0.0] * (reach - len(t))] for t in taps], volumes)
        weights = filled.view(len(volumes), reach, 1, 1, 1, 1).unbind(1)
        n, source = volumes.shape[axis], blurred
        blurred = source * weights[0]
        for distance, weight in enumerate(weights[1:], 1):
            if (rest := n - distance) > 0:
                lower, upper = source.narrow(axis, 0, rest), source.narrow(axis, distance, rest)
                blurred.narrow(axis, distance, rest).addcmul_(lower, weight)
                blurred.narrow(axis, 0, rest).addcmul_(upper, weight)
    return blurred * (volumes != 0) if changes[0].keep_zero else blurred


def _contrast(volumes: Tensor, changes: Sequence[RandContrast]) -> Tensor:
    gain = _each([change._gain for change in changes], volumes)
    if all(change._power == 1 for change in changes):
        return volumes * gain
    power = _each([change._power for change in changes], volumes)
    largest = volumes.abs().amax(_VOXELS, keepdim=True).clamp(min=1e-12)
    bent = (volumes.abs() / largest).pow_(power).mul_(largest * gain)
    return torch.copysign(bent, volumes)


def _bias(volumes: Tensor, changes: Sequence[RandBiasField]) -> Tensor:
    field = _each([change._weights for change in changes], volumes, 0)
    field = field.view(len(volumes), 3, 3, 3)
    for size in volumes.shape[-3:]:
        at = (torch.arange(size, dtype=torch.float32, device=volumes.device) + 0.5) * (np.pi / size)
        field = sum(
            (field[:, k].unsqueeze(-1) * torch.cos(k * at) for k in (1, 2)),
            field[:, 0].unsqueeze(-1) * torch.ones_like(at),
        )
    peak = _each([change._peak for change in changes], volumes, 3)
    largest = field.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return volumes * (field * (peak / largest)).exp_()[:, None]


def _noise(volumes: Tensor, changes: Sequence[RandForegroundNoise]) -> Tensor:
    foreground = volumes != 0
    count = foreground.sum(_VOXELS, keepdim=True).clamp(min=1)
    mean = volumes.sum(_VOXELS, keepdim=True) / count
    squares = ((volumes - mean) * foreground).square().sum(_VOXELS, keepdim=True)
    share = _each([change._std for change in changes], volumes)
    # Drawn on the CPU, as everywhere: its bits depend on the key alone.
    noise = torch.stack([normals(volumes.shape[1:], change._noise_seed) for change in changes])
    noise = noise.to(volumes.device)
    return noise.mul_(share * (squares / count).sqrt()).mul_(foreground).add_(volumes)


def _cutout(volumes: Tensor, changes: Sequence[RandCutout]) -> Tensor:
    return torch.stack([change.apply(x) for change, x in zip(changes, volumes, strict=True)])


_CHANGES: dict[type, Callable[[Tensor, Any], Tensor]] = {
    RandSpatial: _spatial,
    RandBlur: _blur,
    RandContrast: _contrast,
    RandBiasField: _bias,
    RandForegroundNoise: _noise,
    RandCutout: _cutout,
}

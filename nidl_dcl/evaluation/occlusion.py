"""Occlusion maps: by how much a prediction changes when a block of a volume is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

BLOCK_MM = 24.0
"""Edge of a block; about a gyrus with its neighbors, several voxels of a coarse volume."""

_LEAST_INSIDE = 0.25
"""Blocks with a smaller share of inside are not laid."""

_BATCH_VOXELS = 2**22

_CHUNK = 512

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Overlapping blocks that cover the inside of a volume.

    Attributes
    ----------
    inside : ndarray of bool, shape (d, h, w)
        The voxels that can be hidden.
    spacing : tuple of float
        Size of a voxel in mm.
    size, stride : tuple of int
        Of a block, and from one to the next, in voxels.
    corners : ndarray of int, shape (n_blocks, 3)
        First voxel of each; blocks may reach beyond the volume.
    """

    inside: NDArray[np.bool_]
    spacing: tuple[float, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    corners: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def size_mm(self) -> list[float]:
        """Edges of a block in mm."""
        return [n * mm for n, mm in zip(self.size, self.spacing, strict=True)]

    @property
    def stride_mm(self) -> list[float]:
        """Steps from one block to the next in mm."""
        return [n * mm for n, mm in zip(self.stride, self.spacing, strict=True)]

    @property
    def centres_mm(self) -> NDArray[np.float64]:
        """Middle of each block in mm from the middle of the volume, shape (n_blocks, 3)."""
        middle = (np.array(self.inside.shape) - 1) / 2
        at = self.corners + (np.array(self.size) - 1) / 2
        return np.asarray((at - middle) * self.spacing)

    @property
    def thinned(self) -> NDArray[np.intp]:
        """Numbers of the blocks of every second step, which still cover nearly everything."""
        steps = (self.corners - self.corners.min(axis=0)) // self.stride
        every = np.where(2 * np.array(self.stride) <= self.size, 2, 1)
        return np.flatnonzero((steps % every == 0).all(axis=1))

    def chosen(self, numbers: NDArray[np.intp]) -> Blocks:
        """Return some of the blocks."""
        return replace(self, corners=self.corners[numbers])

    def slices(self, number: int) -> tuple[slice, ...]:
        """Return where a block lies in the volume."""
        return tuple(
            slice(max(0, int(first)), max(0, int(first) + n))
            for first, n in zip(self.corners[number], self.size, strict=True)
        )


def find_inside(volume: Float32) -> NDArray[np.bool_]:
    """Return what belongs to the brain (the head) in a prepared volume, cavities too.

    That is values beyond a tenth of their 99th percentile, and what they enclose.
    """
    size = np.abs(volume)
    bright = size > 0.1 * np.percentile(size, 99)
    return np.asarray(ndimage.binary_fill_holes(bright), dtype=bool)


def lay_blocks(
    inside: NDArray[np.bool_], spacing: Sequence[float], block_mm: float = BLOCK_MM
) -> Blocks:
    """Return blocks at steps of half a block that cover `inside`.

    Parameters
    ----------
    inside : ndarray of bool, shape (d, h, w)
        Not empty.
    spacing : sequence of three float
        Size of a voxel in mm.
    block_mm : float
        Edge of a block; rounded to voxels, at least one.

    Returns
    -------
    Blocks
        Those of which at least a quarter is inside, or that hold the most of it where none does.
    """
    size = tuple(max(1, round(block_mm / mm)) for mm in spacing)
    stride = tuple(max(1, n // 2) for n in size)
    at = np.argwhere(inside)
    starts = [
        np.arange(low - n + step, high + 1, step)
        for low, high, n, step in zip(at.min(axis=0), at.max(axis=0), size, stride, strict=True)
    ]
    corners = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3)
    blocks = Blocks(inside, tuple(map(float, spacing)), size, stride, corners)
    held = np.array([inside[blocks.slices(i)].sum() for i in range(len(corners))])
    kept = held >= min(_LEAST_INSIDE * math.prod(size), held.max())
    return blocks.chosen(np.flatnonzero(kept))


class HiddenBlocks(Dataset[Tensor]):
    """A volume as it is, then with each block hidden, as tensors of shape (1, d, h, w).

    What is inside of a block is set to the volume's mean inside: plain gray that knows nothing of
    the region; the outline stays.
    """

    def __init__(self, volume: Float32, blocks: Blocks) -> None:
        self.volume = np.ascontiguousarray(volume, dtype=np.float32)
        self.blocks = blocks
        self.gray = np.float32(self.volume[blocks.inside].mean(dtype=np.float64))

    def __len__(self) -> int:
        return 1 + len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        changed = self.volume.copy()
        if index > 0:
            at = self.blocks.slices(index - 1)
            changed[at][self.blocks.inside[at]] = self.gray
        return torch.from_numpy(changed[None])


def hidden_features(
    volume: Float32,
    blocks: Blocks,
    embed: Callable[[DataLoader[Tensor]], NDArray[np.floating]],
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the features of a volume as it is, then with each block hidden.

    Parameters
    ----------
    volume : ndarray, shape (d, h, w)
    blocks : Blocks
    embed : callable
        From a loader of batches (n, 1, d, h, w) to features (n, n_features); called for some
        hundreds of volumes at a time, in batches that fit into memory.
    progress : callable, optional
        Called with the number of volumes done since the last call.

    Returns
    -------
    ndarray of float32, shape (1 + n_blocks, n_features)
    """
    samples, rows = HiddenBlocks(volume, blocks), []
    batch = int(np.clip(_BATCH_VOXELS // volume.size, 1, 32))
    for start in range(0, len(samples), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(samples)))
        loader: DataLoader[Tensor] = DataLoader(Subset(samples, chunk), batch_size=batch)
        rows.append(np.asarray(embed(loader), dtype=np.float32))
        if progress is not None:
            progress(len(chunk))
    return np.concatenate(rows)


def spread_changes(changes: NDArray[np.floating], blocks: Blocks) -> Float32:
    """Return a map of the inside: for each voxel the mean change of the blocks that cover it.

    It is 0 outside; the few voxels inside that no block covers have the value of the nearest one.
    """
    total, count = np.zeros(blocks.inside.shape), np.zeros(blocks.inside.shape, dtype=int)
    for number, change in enumerate(changes):
        at = blocks.slices(number)
        total[at] += change
        count[at] += 1
    mean = total / np.maximum(count, 1)
    nearest = ndimage.distance_transform_edt(count == 0, blocks.spacing, False, True)
    return np.where(blocks.inside, mean[tuple(nearest)], 0).astype(np.float32)


def describe_map(
    name: str, units: str, of: str, table: pd.DataFrame, mean: Array, own: Array, untrained: Array
) -> dict[str, Any]:
    """Return the extremes and the checks of one map, as numbers and in words.

    Parameters
    ----------
    name, units : str
        Of the output.
    of : str
        What is predicted, for sentences.
    table : DataFrame
        Columns ``x``, ``y``, ``z``, ``region`` and ``change`` of every block, the strongest first.
    mean, untrained : ndarray, shape (n_few,)
        Changes on the mean brain of the blocks that were hidden in all volumes, by the encoder and
        by one that was not trained.
    own : ndarray, shape (n_participants, n_few)
        Changes of the same blocks on participants' own volumes.
    """
    changes, region = table["change"].to_numpy(), str(table["region"].iloc[0])
    x, y, z = (float(v) for v in table[["x", "y", "z"]].iloc[0])
    total = np.abs(changes).sum()
    tenth = max(1, round(len(changes) / 10))
    held = float(np.abs(changes[:tenth]).sum() / total) if total > 0 else None
    pairs = [_correlation(a, b) for i, a in enumerate(own) for b in own[:i]]
    known = [r for r in pairs if r is not None]
    with_own = _correlation(mean, own.mean(axis=0))
    among = float(np.mean(known)) if known else None
    with_untrained = _correlation(mean, untrained)
    sentences = [
        (
            f"Hiding a block of the mean brain changes the prediction of {of} ({units}) by up to "
            f"{abs(changes[0]):.3g}: at x {x:.0f}, y {y:.0f}, z {z:.0f} mm ({region}), what is there "
            f"makes it {'higher' if changes[0] > 0 else 'lower'}. Over all blocks it adds "
            f"{changes.min():.3g} to {changes.max():.3g}."
        )
    ]
    if held is not None:
        sentences.append(
            f"The strongest tenth of the blocks holds {100 * held:.0f} % of all change; 10 % would "
            "be the same everywhere."
        )
    checks = []
    if with_own is not None:
        checks.append(
            f"the map of the mean brain correlates with that of {len(own)} participants' own "
            f"volumes by r = {with_own:.2f}"
        )
    if among is not None:
        checks.append(f"their maps with one another by {among:.2f} on average")
    if with_untrained is not None:
        checks.append(
            "that of the mean brain with that of the encoder before training, with a readout of "
            f"its own, by {with_untrained:.2f} (near 1: the map shows the form of the network "
            "rather than what it learned)"
        )
    if checks:
        text = "; ".join(checks)
        sentences.append(text[0].upper() + text[1:] + ".")
    return {
        "Name": name,
        "Units": units,
        "Minimum": float(changes.min()),
        "Maximum": float(changes.max()),
        "Peak": [x, y, z],
        "PeakChange": float(changes[0]),
        "PeakRegion": region,
        "StrongestTenth": held,
        "CorrelationParticipants": with_own,
        "CorrelationAmongParticipants": among,
        "CorrelationUntrained": with_untrained,
        "Sentences": sentences,
    }


def name_region(x: float, y: float, z: float) -> str:
    """Name roughly where a point lies.

    Parameters
    ----------
    x, y, z : float
        To the right, front and top, in mm from the middle of the volume.
    """
    words = [
        low if value < -15 else high
        for value, low, high in ((x, "left", "right"), (y, "back", "front"), (z, "low", "high"))
        if abs(value) > 15
    ]
    return " ".join(words) or "middle"


def _correlation(a: Array, b: Array) -> float | None:
    if len(a) < 3 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return None
    return float(np.corrcoef(a, b)[0, 1])

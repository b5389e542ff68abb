"""Where the brain is in a head: the network of deepbet (MIT), with the weights of its wheel.

Only the weights are used, not the package's code: nothing is printed, no window toolkit is imported,
and what comes out depends on the image alone.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from nidl_dcl.volumes.reading import Float32

__all__ = ["extract_brain", "largest_component", "locate_brain"]

_COARSE = (128, 128, 128)
"""Voxels of the whole head, in which the first network finds where to look."""


_FINE = (256, 256, 256)
"""Voxels of the part that the second network looks at."""


_MARGIN = 0.1


_PRESENT = 0.02
"""Share of a plane that is brain, for the plane to count."""


@dataclass(frozen=True, eq=False)
class _Networks:
    coarse: Any
    fine: Any


@lru_cache(maxsize=1)
def _networks() -> _Networks:
    files = {path.name: path for path in importlib.metadata.files("deepbet") or ()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and works
        coarse, fine = (
            torch.jit.load(Path(files[name].locate()), map_location="cpu").eval()
            for name in ("bbox_model.pt", "model.pt")
        )
    return _Networks(coarse, fine)


def extract_brain(data: Float32) -> NDArray[np.bool_]:
    """Return the mask of the brain in a head; empty when none is found.

    Parameters
    ----------
    data : ndarray of float32, shape (i, j, k)
        A T1-weighted head, axes to the right, the front and the top.
    """
    mask = np.zeros(data.shape, bool)
    rough, low, high = _rough_mask(data)
    part = _bounding_box(rough, data.shape)
    if part is None:
        return mask
    near = _resized(data[part], _FINE)
    with torch.inference_mode():
        shares = _networks().fine(_normalized(near, low, high))[:, 1:]
        shares = functional.adaptive_avg_pool3d(shares, data[part].shape)[0, 0]
    mask[part] = ndimage.binary_fill_holes(largest_component(shares.numpy() > 0.5))
    return mask


def locate_brain(data: Float32) -> NDArray[np.bool_]:
    """Return a rough mask of the brain, in a sixth of the time."""
    rough = _resized(_rough_mask(data)[0].astype(np.float32), data.shape)
    return np.asarray(rough[0, 0].numpy() > 0.5)


def _rough_mask(data: Float32) -> tuple[NDArray[np.bool_], float, float]:
    """Return where the brain is in the whole head, and the range of values."""
    small = _resized(data, _COARSE)
    low, high = (float(x) for x in np.quantile(small.numpy(), (0.005, 0.995)))
    if not high > low:
        return np.zeros(_COARSE, bool), low, high
    with torch.inference_mode():
        shares = _networks().coarse(_normalized(small, low, high))[0, 1]
    return largest_component(shares.numpy() > 0.5), low, high


def _resized(data: Float32, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(data))[None, None]
    return functional.interpolate(values, shape, mode="nearest-exact")


def _normalized(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return values as the networks learnt them."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return 0.226 * (x - x.mean()) / x.std() + 0.449


def _bounding_box(inside: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """Return where the brain is in an array of `shape`, with a margin; None if there is none."""
    parts = []
    for axis, length in enumerate(shape):
        share = inside.mean(axis=tuple(a for a in range(3) if a != axis))
        planes = np.flatnonzero(share > _PRESENT)
        if not planes.size:
            return None
        scale = length / inside.shape[axis]
        middle = scale * (planes[0] + planes[-1] + 1) / 2
        reach = scale * (planes[-1] + 1 - planes[0]) * (0.5 + _MARGIN)
        parts.append(slice(max(0, int(middle - reach)), min(length, int(middle + reach))))
    return tuple(parts)


def largest_component(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected part, corners included; empty where all is."""
    labels, count = ndimage.label(inside, np.ones((3, 3, 3)))
    if count < 2:
        return inside
    return np.asarray(labels == 1 + np.bincount(labels.ravel())[1:].argmax())

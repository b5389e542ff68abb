"""The template that brains are aligned to: the MNI152 T1 of nilearn's wheel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.bids.presets import PREPROCESSED_SPACE
from nidl_dcl.preprocessing.shrinking import shrink
from nidl_dcl.volumes.reading import Float32

__all__ = ["SPACE", "Template", "load_template"]

SPACE = PREPROCESSED_SPACE
"""BIDS name of the template's space."""


_BRAIN = 0.2
"""Brightness from which nilearn counts a voxel as brain."""


@dataclass(frozen=True, eq=False)
class Template:
    """A brain without skull, and where it is.

    Attributes
    ----------
    data : ndarray of float32, shape (i, j, k)
        Brightness, 0 to 1.
    mask : ndarray of bool, shape (i, j, k)
        The brain with the fluid inside and around it.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm.
    """

    data: Float32
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]

    @property
    def volume_ml(self) -> float:
        """Volume of the mask in ml."""
        return float(self.mask.sum() * abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@lru_cache(maxsize=4)
def load_template(mm: int = 2) -> Template:
    """Return the template on a grid of `mm` mm: 1, 2, or a multiple of 2."""
    if mm > 2:
        fine = load_template(2)
        data, affine = shrink(fine.data, fine.affine, mm)
        mask = shrink(fine.mask, fine.affine, mm)[0] > 0.5
    else:
        from nilearn import datasets  # takes seconds to import

        image = datasets.load_mni152_template(resolution=mm)
        affine, data = image.affine, image.get_fdata(dtype=np.float32)
        mask = ndimage.binary_fill_holes(data > _BRAIN)
        data = data * mask
    data.setflags(write=False)
    mask.setflags(write=False)
    return Template(data, mask, affine)

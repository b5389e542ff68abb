"""The template that brains are aligned to: the MNI152 T1 of nilearn's wheel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.volumes.reading import Float32

__all__ = ["SPACE", "Template", "load_template"]

SPACE = "MNI152NLin2009aSym"
"""BIDS name of the template's space."""


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


@lru_cache(maxsize=2)
def load_template(resolution: float = 2.0) -> Template:
    """Return the template on a grid of `resolution` mm."""
    image = datasets.load_mni152_template(resolution=resolution)
    data = image.get_fdata(dtype=np.float32)
    mask = ndimage.binary_fill_holes(
        datasets.load_mni152_brain_mask(resolution=resolution).get_fdata() > 0
    )
    data *= mask
    data.setflags(write=False)
    mask.setflags(write=False)
    return Template(data, mask, image.affine)

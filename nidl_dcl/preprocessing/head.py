"""One raw head as an array whose axes run to the right, the front and the top."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from nidl_dcl.volumes.preparation import canonical, mask_on_grid
from nidl_dcl.volumes.reading import Float32, errors_naming, read_header, read_volume

__all__ = ["Head", "read_head", "read_mask"]


@dataclass(frozen=True, eq=False)
class Head:
    """An image in the closest RAS orientation; nothing is interpolated.

    Attributes
    ----------
    data : ndarray of float32, shape (i, j, k)
        Values as the file gives them.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm.
    stored_shape : tuple of int
        Voxels along the axes of the file.
    stored_affine : ndarray of float64, shape (4, 4)
        From voxels of the file to mm.
    side_in_doubt : bool
        The two forms that a NIfTI header may hold disagree about left and right.
    place_in_doubt : str
        What is odd about the orientation that the header holds; empty if nothing is.
    """

    data: Float32
    affine: NDArray[np.float64]
    stored_shape: tuple[int, ...]
    stored_affine: NDArray[np.float64]
    side_in_doubt: bool = False
    place_in_doubt: str = ""

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def as_stored(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return values on the grid of `data` in the orientation of the file."""
        to_file = nib.orientations.ornt_transform(
            nib.io_orientation(self.affine), nib.io_orientation(self.stored_affine)
        )
        stored: NDArray[np.generic] = nib.apply_orientation(values, to_file)
        return stored


def read_head(path: str | os.PathLike[str]) -> Head:
    """Read an image, checked and repaired as every image of the package is.

    Parameters
    ----------
    path : path-like
        As for `nidl_dcl.volumes.reading.read_volume`.

    Returns
    -------
    Head
        Axes permuted and turned to the closest RAS order.

    Raises
    ------
    UnreadableVolumeError
        The file cannot be used.
    """
    image = read_volume(path)
    data, affine = canonical(image)
    data = np.ascontiguousarray(data)
    odd = [c.message for c in read_header(Path(path)).repairs if c.code == "affine"]
    return Head(data, affine, image.shape, image.affine, _forms_disagree(Path(path)), " ".join(odd))


def read_mask(path: str | os.PathLike[str], head: Head) -> NDArray[np.bool_]:
    """Read a mask (inside: > 0.5), on any grid, and return it on the grid of a head.

    Raises
    ------
    UnreadableVolumeError
        The file cannot be used, or does not overlap with the head.
    """
    mask = read_volume(path)
    with errors_naming(path):
        return mask_on_grid(head.data.shape, head.affine, mask)


def _forms_disagree(path: Path) -> bool:
    """Return whether sform and qform, both in use, mirror each other."""
    try:
        header: Any = nib.load(path).header
        forms = (header.get_sform(coded=True), header.get_qform(coded=True))
        sides = [np.linalg.det(form) for form, code in forms if code]
    except Exception:  # no NIfTI, or a form that the reader has judged already
        return False
    return any(side > 0 for side in sides) and any(side < 0 for side in sides)

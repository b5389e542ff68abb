"""Read the header of FreeSurfer's MGH format (.mgh, .mgz) from bytes and believe none of it.

The file around it, and the numbers after it, are the work of `image_file`. The format is described
at https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat.
"""

from __future__ import annotations

import struct

import numpy as np

from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.grid import Grid, require_affine, spatial_shape

__all__ = ["BYTES", "parse"]

BYTES = 284
"""Length of the header; the numbers follow."""


_LAYOUT = struct.Struct(">7i h 3f 9f 3f")  # always big-endian


_VERSION = 1


_DTYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}


_OTHERS = {7: "complex", 8: "complex", 9: "color"}


# Without directions, FreeSurfer means a coronal volume of 1 mm around the origin.
_CORONAL = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def parse(block: bytes) -> Grid:
    """Return the grid of an MGH image from the first `BYTES` bytes of its content.

    Raises
    ------
    UnreadableVolumeError
        For another content, and for fields that make no sense or ask for what is not read here.

    Notes
    -----
    The header holds the voxel sizes, the direction of each axis (right, front, up), and where the
    voxel ``shape / 2`` lies. Where its flag says that these are not to be trusted, FreeSurfer's
    default orientation is assumed, with a warning.
    """
    if len(block) < 4 or int.from_bytes(block[:4], "big") != _VERSION:
        raise UnreadableVolumeError("The content is not a FreeSurfer image (MGH).", "not_nifti")
    if len(block) < BYTES:
        raise UnreadableVolumeError("The file ends inside the header.", "truncated")
    fields = _LAYOUT.unpack_from(block)
    shape = spatial_shape(fields[1:5])
    code, oriented = fields[5], fields[7] > 0
    if code not in _DTYPES:
        raise UnreadableVolumeError(
            f"Values are of {_OTHERS.get(code, 'unknown')} type (MGH code {code}); real numbers "
            "are needed.",
            "dtype",
        )
    numbers = np.array(fields[8:], np.float64)
    axes, center = _CORONAL, np.zeros(3)
    repairs = []
    if oriented:
        axes, center = numbers[3:12].reshape(3, 3).T * numbers[:3], numbers[12:]
    else:
        text = "No orientation is stored; FreeSurfer's default (coronal, 1 mm) is assumed."
        repairs.append(Check("warn", "affine", text))
    affine = np.eye(4)
    with np.errstate(all="ignore"):  # of numbers that the next check refuses by name
        affine[:3, :3] = axes
        affine[:3, 3] = center - axes @ np.array(shape) / 2
        require_affine(affine)
    return Grid(shape, affine, np.dtype(_DTYPES[code]), BYTES, repairs=repairs)

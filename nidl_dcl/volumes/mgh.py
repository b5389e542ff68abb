"""Read the header of FreeSurfer's MGH format (.mgh, .mgz) and check that it makes sense.

The file around it, and the numbers after it, are left to `reading`. The format is described at
https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat.
"""

from __future__ import annotations

import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, header_dtype

from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.grid import Grid, require_affine, spatial_shape

BYTES = DATA_OFFSET
_DTYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}  # nibabel 5.3 does not know 10
_OTHERS = {7: "complex", 8: "complex", 9: "color"}

# FreeSurfer's default: a coronal volume of 1 mm around the origin. nibabel's is upside down.
_CORONAL = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def parse(block: bytes) -> Grid:
    """Return the grid of an MGH image from the first `BYTES` bytes of its content.

    Raises
    ------
    UnreadableVolumeError
        For another content, and for fields that make no sense or that are not supported.

    Notes
    -----
    The header holds the voxel sizes, the direction of each axis (right, front, up), and where the
    voxel ``shape / 2`` lies. Where its flag says that these are not to be trusted, FreeSurfer's
    default orientation is assumed, with a warning.
    """
    if block[:4] != b"\0\0\0\1":
        raise UnreadableVolumeError("The content is not a FreeSurfer image (MGH).", "not_nifti")
    if len(block) < BYTES:
        raise UnreadableVolumeError("The file ends inside the header.", "truncated")
    # nibabel's layout, not its MGHHeader, which sets the flag for directions that are not stored.
    header = np.frombuffer(block, header_dtype, count=1)[0]
    shape = spatial_shape([int(n) for n in header["dims"]])
    code = int(header["type"])
    if code not in _DTYPES:
        raise UnreadableVolumeError(
            f"Values are of {_OTHERS.get(code, 'unknown')} type (MGH code {code}); real numbers "
            "are needed.",
            "dtype",
        )
    affine, repairs = np.eye(4), []
    with np.errstate(all="ignore"):  # of numbers that the next check refuses by name
        if header["goodRASFlag"] > 0:
            axes, center = header["Mdc"].T.astype(float) * header["delta"], header["Pxyz_c"]
        else:
            axes, center = _CORONAL, np.zeros(3)
            text = "No orientation is stored; FreeSurfer's default (coronal, 1 mm) is assumed."
            repairs.append(Check("warn", "affine", text))
        affine[:3, :3] = axes
        affine[:3, 3] = center - axes @ np.array(shape) / 2
        require_affine(affine)
    return Grid(shape, affine, np.dtype(_DTYPES[code]), BYTES, repairs=repairs)

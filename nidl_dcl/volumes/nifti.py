"""Read a NIfTI header, version 1 or 2, and check that it makes sense.

The file around it, and the numbers after it, are left to `reading`.
"""

from __future__ import annotations

import math
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes.grid import Grid, require_affine, spatial_shape

# By the number that a file starts with, which is the length of its header.
_HEADERS: dict[int, type[nib.Nifti1Header]] = {
    header.sizeof_hdr: header for header in (nib.Nifti1Header, nib.Nifti2Header)
}

BYTES = max(_HEADERS)
_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # NIfTI codes of real 8 to 64 bit numbers


def parse(block: bytes) -> Grid:
    """Return the grid of a NIfTI image from the first `BYTES` bytes of its content.

    Raises
    ------
    UnreadableVolumeError
        For another content, and for fields that make no sense or that are not supported.
    """
    length, endianness = int.from_bytes(block[:4], "little"), "little"
    if length not in _HEADERS:
        length, endianness = int.from_bytes(block[:4], "big"), "big"
    if length not in _HEADERS:
        raise UnreadableVolumeError("The content is not NIfTI.", "not_nifti")
    if len(block) < length:
        raise UnreadableVolumeError("The file ends inside the header.", "truncated")
    header = _HEADERS[length](block[:length], endianness, check=False)
    if header["magic"] != header.single_magic:
        raise UnreadableVolumeError("It is no single-file NIfTI image (.nii).", "not_nifti")

    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise UnreadableVolumeError(f"The header's dimensions make no sense: {dim}.", "dimensions")
    shape = spatial_shape(dim[1 : dim[0] + 1])
    code = int(header["datatype"])
    if code not in _TYPES:
        what = {32: "complex", 1792: "complex", 128: "color", 2304: "color"}.get(code, "unknown")
        raise UnreadableVolumeError(
            f"Values are of {what} type (NIfTI code {code}); real numbers are needed.", "dtype"
        )
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) or slope == 0:
        slope, inter = 1.0, 0.0  # by the standard, and in nibabel: not scaled
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise UnreadableVolumeError(f"The scaling is {slope} x + {inter}.", "scaling")
    offset = float(header["vox_offset"]) or float(length + 4)
    if not length <= offset <= 2**30:
        raise UnreadableVolumeError(f"The header puts the data at byte {offset}.", "not_nifti")
    with np.errstate(all="ignore"):  # of numbers that the next checks refuse by name
        affine, repairs = _affine(header)
    dtype = header.get_data_dtype()
    return Grid(shape, affine, dtype, int(offset), slope, inter, repairs=repairs)


def _affine(header: Any) -> tuple[NDArray[np.float64], list[Check]]:
    """Return the sform, else the qform, else nibabel's guess from the voxel sizes."""
    forms = [name for name in ("sform", "qform") if int(header[f"{name}_code"]) > 0]
    if not forms:
        affine = np.asarray(header.get_base_affine(), np.float64)
        require_affine(affine)
        return affine, [
            Check("warn", "affine", "No orientation is stored; nibabel's default (LAS) is assumed.")
        ]
    failed: UnreadableVolumeError | None = None
    for name in forms:
        try:
            affine = np.asarray(getattr(header, f"get_{name}")(), np.float64)
            require_affine(affine)
        except UnreadableVolumeError as error:
            failed = failed or error
        except (HeaderDataError, ValueError) as error:
            failed = failed or UnreadableVolumeError(f"The {name} is broken ({error}).", "affine")
        else:
            if failed:
                return affine, [Check("warn", "affine", f"{failed} The {name} is used instead.")]
            stored, sizes = np.abs(header["pixdim"][1:4]), voxel_sizes(affine)
            if np.all(np.isfinite(stored)) and np.any(np.abs(stored - sizes) > 0.05 * sizes):
                text = f"Voxel sizes disagree: pixdim {stored}, {name} {sizes.round(3)} (used)."
                return affine, [Check("warn", "spacing", text)]
            return affine, []
    assert failed is not None
    raise failed

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
from nidl_dcl.volumes.grid import Grid, Shape, disagreement, require_affine, spatial_shape

# By the number that a file starts with, which is the length of its header.
_HEADERS: dict[int, type[nib.Nifti1Header]] = {
    header.sizeof_hdr: header for header in (nib.Nifti1Header, nib.Nifti2Header)
}

BYTES = max(_HEADERS)
_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # NIfTI codes of real 8 to 64 bit numbers

_UNITS = {1: ("meter", 1e3), 3: ("micron", 1e-3)}  # in mm, by NIfTI's code; others count as mm
_HEAD_MM = (50.0, 1000.0)  # longest side of a field of view that can be meant


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
        affine, repairs = _affine(header, shape)
    dtype = header.get_data_dtype()
    return Grid(shape, affine, dtype, int(offset), slope, inter, repairs=repairs)


def _affine(header: Any, shape: Shape) -> tuple[NDArray[np.float64], list[Check]]:
    """Return the sform, else the qform, else nibabel's guess from the voxel sizes; all in mm."""
    forms = [name for name in ("sform", "qform") if int(header[f"{name}_code"]) > 0]
    scale, repairs = unit(header, shape)
    if not forms:
        affine = in_mm(header.get_base_affine(), scale)
        require_affine(affine)
        text = "No orientation is stored; nibabel's default (LAS) is assumed."
        return affine, [*repairs, Check("warn", "affine", text)]
    found: dict[str, NDArray[np.float64]] = {}
    failed: UnreadableVolumeError | None = None
    for name in forms:
        try:
            affine = in_mm(getattr(header, f"get_{name}")(), scale)
            require_affine(affine)
        except UnreadableVolumeError as error:
            failed = failed or error
        except (HeaderDataError, ValueError) as error:
            failed = failed or UnreadableVolumeError(f"The {name} is broken ({error}).", "affine")
        else:
            found[name] = affine
    if not found:
        assert failed is not None
        raise failed
    name, affine = next(iter(found.items()))
    if name != forms[0]:
        repairs.append(Check("warn", "affine", f"{failed} The {name} is used instead."))
        return affine, repairs
    stored, sizes = scale * np.abs(header["pixdim"][1:4]), voxel_sizes(affine)
    if np.all(np.isfinite(stored)) and np.any(np.abs(stored - sizes) > 0.05 * sizes):
        text = f"Voxel sizes disagree: pixdim {stored}, {name} {sizes.round(3)} (used)."
        repairs.append(Check("warn", "spacing", text))
    if len(found) > 1 and (apart := disagreement(found["sform"], found["qform"], shape)):
        codes = [int(header[f"{name}_code"]) for name in forms]
        text = (
            f"Its two orientations disagree: {apart} (sform, code {codes[0]}, used; qform, code "
            f"{codes[1]}). Programs differ in which one they read."
        )
        repairs.append(Check("warn", "affine", text))
    return affine, repairs


def in_mm(affine: Any, scale: float) -> NDArray[np.float64]:
    """Return an affine whose unit of length is `scale` mm in mm."""
    scaled = np.array(affine, np.float64)
    scaled[:3] *= scale
    return scaled


def unit(header: Any, shape: Shape) -> tuple[float, list[Check]]:
    """Return how many mm the unit of length is, and a warning where its name cannot be true."""
    unit = _UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        return 1.0, []
    name, scale = unit
    field = float(np.max(np.abs(header["pixdim"][1:4]) * shape))
    if _HEAD_MM[0] <= field * scale <= _HEAD_MM[1] or not _HEAD_MM[0] <= field <= _HEAD_MM[1]:
        return scale, []
    text = (
        f"Its unit of length is declared as {name}, which would make the image {field * scale:.3g} "
        "mm long; taken as mm."
    )
    return 1.0, [Check("warn", "spacing", text)]

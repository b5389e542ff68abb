"""Read the header of a NumPy array (.npy) and check that it makes sense.

The file around it, and the numbers after it, are left to `reading`.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from nidl_dcl.status import UnreadableVolumeError
from nidl_dcl.volumes.grid import Grid, Shape, spatial_shape

BYTES = 10_000
"""More than the header of any array of numbers is long."""


def _mni(size: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the affine of a grid from right to left that starts at 90, -126, -72 mm."""
    affine = np.diag([-size, size, size, 1.0])
    affine[:3, 3] = 90, -126, -72
    return affine


GRIDS = {(121, 145, 121): _mni(1.5), (182, 218, 182): _mni(1.0)}
"""The shapes whose place in MNI152 space is known, with their affines (see `parse`)."""

_MAGIC = b"\x93NUMPY"
_LENGTH = {1: 2, 2: 4, 3: 4}  # by version: bytes that say how long the header is
_PAIR = r"'(descr|fortran_order|shape)'\s*:\s*('[^']*'|\[[^\]]*\]|True|False|\([\dL,\s]*\))"
_HEADER = re.compile(rf"\s*\{{\s*{_PAIR}\s*,\s*{_PAIR}\s*,\s*{_PAIR}\s*,?\s*\}}\s*")
_NUMBERS = re.compile("'([<>|=]?[buif][1248])'")


def parse(block: bytes) -> Grid:
    """Return the grid of a NumPy array from the first `BYTES` bytes of its content.

    Only plain arrays of real numbers are read. Arrays of Python objects, which would have to be
    unpickled, are refused by their type. The header is matched as text, while
    `numpy.lib.format.read_array_header_1_0` evaluates it as a Python literal: that can end in a
    ``MemoryError`` or a ``RecursionError``, and accepts records, negative lengths and subarrays.

    Raises
    ------
    UnreadableVolumeError
        For another content, and for fields that make no sense or that are not supported.

    Notes
    -----
    The file says nothing of orientation. Two shapes are known, with axes of length one (sample,
    channel) before or after them, both from right to left, back to front, down to up (LAS):

    (121, 145, 121)
        1.5 mm, the grid of CAT12's normalized images: SPM's bounding box from (-90, -126, -72) to
        (90, 90, 108) mm, which SPM writes with the first voxel on the right.
    (182, 218, 182)
        1 mm, the grid of FSL's ``MNI152_T1_1mm``, whose first voxel is at (90, -126, -72) mm.

    OpenBHB's arrays were saved from such images as nibabel read them, without turning any axis
    (brainprep, ``quasiraw`` and ``load_images``), so they have the images' axes. TemplateFlow's
    MNI152NLin6Asym has the second shape too and runs from left to right: arrays made from it would
    be read mirrored, all alike.
    """
    if not block.startswith(_MAGIC):
        raise UnreadableVolumeError("The content is not a NumPy array (.npy).", "not_nifti")
    width = _LENGTH.get(block[6]) if len(block) > 6 else 0
    if width is None:
        raise UnreadableVolumeError(
            f"It is a NumPy array of the unknown version {block[6]}.", "not_nifti"
        )
    start = 8 + width
    length = int.from_bytes(block[8:start], "little")
    if start + length > BYTES:
        raise UnreadableVolumeError(
            f"The header is {length} bytes long, too long for an array of numbers.", "not_nifti"
        )
    if not width or len(block) < start + length:
        raise UnreadableVolumeError("The file ends inside the header.", "truncated")
    found = _HEADER.fullmatch(block[start : start + length].decode("latin-1"))
    groups = () if found is None else found.groups()
    fields = dict(zip(groups[::2], groups[1::2], strict=True))
    fortran, lengths = fields.get("fortran_order", ""), fields.get("shape", "")
    if fortran not in ("True", "False") or not lengths.startswith("(") or "descr" not in fields:
        raise UnreadableVolumeError("The header of the NumPy array makes no sense.", "not_nifti")
    dtype = _dtype(fields["descr"])
    shape = _shape([int(n[:12]) for n in re.findall(r"\d+", lengths)])
    if shape not in GRIDS:
        known = " or ".join(" x ".join(map(str, grid)) for grid in GRIDS)
        raise UnreadableVolumeError(
            f"An array of {' x '.join(map(str, shape))} voxels: a .npy file does not say where "
            f"they lie, which is known for {known} alone. Save the image as NIfTI.",
            "affine",
        )
    order: Literal["F", "C"] = "F" if fortran == "True" else "C"
    return Grid(shape, GRIDS[shape].copy(), dtype, start + length, order=order)


def _dtype(text: str) -> np.dtype[np.generic]:
    match = _NUMBERS.fullmatch(text)
    try:
        if match is not None:
            return np.dtype(match[1])
    except TypeError:
        pass
    what = "Python objects, which are never unpickled" if "O" in text else f"of type {text}"
    raise UnreadableVolumeError(f"Values are {what}; real numbers are needed.", "dtype")


def _shape(sides: list[int]) -> Shape:
    """Return the lengths of the three spatial axes; samples and channels come before them."""
    while len(sides) > 3 and sides[0] == 1:
        del sides[0]
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) > 3 and min(sides) > 0:
        raise UnreadableVolumeError(
            f"It holds several volumes or channels, its axes are {sides}; one is needed.",
            "dimensions",
        )
    return spatial_shape(sides)

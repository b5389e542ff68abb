"""A picture to judge an image by: the brain found in the head, and the aligned brain in the template.

Drawn in numpy with a palette, so that a picture is small, quick, and the same on any machine.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.pipeline import AlignedBrain, Brain
from nidl_dcl.preprocessing.resampling import around

__all__ = ["draw_mosaic"]

Pixels = NDArray[np.uint8]

_PIXEL_MM = 1.4

_GAP = 6
"""Pixels between slices."""

_MARGIN_MM = 20.0
"""What is shown of the head beyond its brain."""

_PLACES = ((2, 0.3), (2, 0.5), (2, 0.7), (1, 0.45), (0, 0.52))
"""Three axial, a coronal and a sagittal slice: axis, and where between the ends of the brain."""

_GRAYS = 32
"""Shades: more cannot be told apart beside each other, and take more room in the file."""

_OUTLINES = ((255, 176, 0), (64, 200, 255))
"""Orange for the brain found, blue for the template's."""


def draw_mosaic(brain: Brain) -> bytes:
    """Draw the head with the outline of its brain; below, the aligned brain in the template's.

    Parameters
    ----------
    brain : Brain
        The lower row is for an `AlignedBrain` alone.

    Returns
    -------
    bytes
        A PNG of at most about 800 x 350 pixels. Three axial slices, a coronal and a sagittal one;
        the left of the picture is the left of the head, for the sagittal slice its back.
    """
    sizes = voxel_sizes(brain.head.affine)
    top = float(np.percentile(brain.corrected[brain.mask], 99.5))
    rows = [_row(brain.corrected / top, brain.mask, sizes, _GRAYS, _MARGIN_MM)]
    if isinstance(brain, AlignedBrain):
        sizes = voxel_sizes(brain.template.affine)
        rows.append(_row(brain.aligned / top, brain.template.mask, sizes, _GRAYS + 1, 12.0))
    return _png(_stacked(rows, axis=0))


def _row(
    data: NDArray[np.float32],
    mask: NDArray[np.bool_],
    sizes: NDArray[np.float64],
    color: int,
    mm: float,
) -> Pixels:
    """Return slices side by side, with the outline of a mask and `mm` of what lies beyond it."""
    bounds = ndimage.find_objects(mask.astype(np.uint8))[0]
    part = around(mask, np.ceil(mm / sizes).astype(int))
    tiles = []
    for axis, place in _PLACES:
        index = round(bounds[axis].start + place * (bounds[axis].stop - 1 - bounds[axis].start))
        cut = [index if a == axis else part[a] for a in range(3)]
        scales = np.delete(sizes, axis) / _PIXEL_MM
        shades, inside = (
            _zoomed(values[tuple(cut)].astype(np.float32), scales) for values in (data, mask)
        )
        tile = np.clip(np.rint(shades * (_GRAYS - 1)), 0, _GRAYS - 1).astype(np.uint8)
        solid = inside > 0.5
        tile[solid & ~ndimage.binary_erosion(solid)] = color
        tiles.append(tile.T[::-1])  # up and front are up
    return _stacked(tiles, axis=1)


def _zoomed(plane: NDArray[np.float32], scales: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a slice in pixels, by linear interpolation."""
    shape = tuple(max(1, round(n * scale)) for n, scale in zip(plane.shape, scales, strict=True))
    # Edges of pixels and of voxels coincide, not their centers.
    steps = [n / m for n, m in zip(plane.shape, shape, strict=True)]
    first = [step / 2 - 0.5 for step in steps]
    return np.asarray(
        ndimage.affine_transform(plane, steps, first, output_shape=shape, order=1, mode="nearest")
    )


def _stacked(parts: list[Pixels], axis: int) -> Pixels:
    """Return pictures beside (1) or below (0) each other on black, centered, with gaps."""
    longest = max(part.shape[1 - axis] for part in parts)
    padded = []
    for part in parts:
        rest = longest - part.shape[1 - axis]
        edges = [(_GAP // 2, _GAP // 2), (_GAP // 2, _GAP // 2)]
        edges[1 - axis] = (rest // 2, rest - rest // 2)
        padded.append(np.pad(part, edges))
    return np.concatenate(padded, axis=axis)


def _png(pixels: Pixels) -> bytes:
    """Return a PNG of palette indices."""
    grays = np.repeat(np.linspace(0, 255, _GRAYS).round().astype(np.uint8), 3).tobytes()
    height, width = pixels.shape
    # Filter 2: a line is its difference to the one above, which takes a sixth less room.
    lines = np.diff(pixels, axis=0, prepend=np.uint8(0))
    lines = np.pad(lines, ((0, 0), (1, 0)), constant_values=((0, 0), (2, 0)))
    packer = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", grays + bytes(value for color in _OUTLINES for value in color)),
        (b"IDAT", packer.compress(lines.tobytes()) + packer.flush()),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )

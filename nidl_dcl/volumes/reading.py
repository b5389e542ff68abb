"""Read one image file and trust nothing in it; what cannot be used has a code and a reason.

Bringing images into one common form is the work of `volumes`.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from nidl_dcl.status import Check, UnreadableVolumeError
from nidl_dcl.volumes import mgh as mgh_header
from nidl_dcl.volumes import nifti as nifti_header
from nidl_dcl.volumes import npy as npy_header
from nidl_dcl.volumes.grid import MAX_VOXELS, VOXEL_MM, Grid, Shape, require_affine, spatial_shape

__all__ = [
    "INTENSITIES",
    "MAX_VOXELS",
    "VOXEL_MM",
    "Check",
    "Float32",
    "Grid",
    "Shape",
    "UnreadableVolumeError",
    "Volume",
    "as_image",
    "check_volume",
    "image_name",
    "named",
    "read_header",
    "read_volume",
    "require_range",
]

_GzipFile: Any = gzip.GzipFile


_DAMAGE: Any = (gzip.BadGzipFile, zlib.error)


with suppress(ImportError):  # twice as fast as zlib, where it is installed
    from isal import igzip, isal_zlib

    _GzipFile = igzip.IGzipFile
    _DAMAGE = (*_DAMAGE, isal_zlib.error)


INTENSITIES = ("robust", "probability", "signed")


# By the end of a name: how to read the header, and how much of the file that takes at most.
_FORMATS: dict[str, tuple[Callable[[bytes], Grid], int]] = {
    ".nii": (nifti_header.parse, nifti_header.BYTES),
    ".nii.gz": (nifti_header.parse, nifti_header.BYTES),
    ".mgh": (mgh_header.parse, mgh_header.BYTES),
    ".mgz": (mgh_header.parse, mgh_header.BYTES),
    ".mgh.gz": (mgh_header.parse, mgh_header.BYTES),
    ".npy": (npy_header.parse, npy_header.BYTES),
}


_COMPRESSED = (".gz", ".mgz")


_POINTERS = (b"/annex/objects/", b"version https://git-lfs")


_CHUNK = 1 << 20


_PIECE = 1 << 17  # values converted at once


_BEHIND = 2**30
"""Bytes that may follow an image in its file."""


_TOO_MUCH = "Over 1 GB follows the image in the file."


_SHORT = "The file is shorter than its header says."


_FETCH = "Its content is not here: fetch it (`datalad get`, `git annex get` or `git lfs pull`)."


Float32 = NDArray[np.float32]


def check_volume(path: str | os.PathLike[str], *, intensity: str = "robust") -> Check:
    """Open an image, read it to its end and say whether it can be used.

    Parameters
    ----------
    path : path-like
        A ``.nii``, ``.nii.gz``, ``.mgz``, ``.mgh`` or ``.npy`` file.
    intensity : {"robust", "probability", "signed"}
        The intensity rule that the values have to suit.

    Returns
    -------
    Check
        Never an exception, whatever the file holds.
    """
    content = hashlib.blake2b(digest_size=16)
    try:
        grid, survey, repairs = _read(Path(path), lambda grid: None, content)
        _require_within(survey.low, survey.high, intensity)
    except UnreadableVolumeError as error:
        return Check("skip", error.code, str(error))
    except Exception as error:  # what a hostile header can make nibabel raise has no list
        return Check("skip", "unreadable", f"It cannot be read ({type(error).__name__}: {error}).")
    found = repairs[0] if repairs else Check("ok", "ok", "")
    return dataclasses.replace(
        found,
        content=content.hexdigest(),
        coarsest=round(float(voxel_sizes(grid.affine).max()), 3),
    )


def read_volume(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Return an image as float32 in memory, checked, repaired and three-dimensional.

    Parameters
    ----------
    path : path-like
        A ``.nii``, ``.nii.gz``, ``.mgz``, ``.mgh`` or ``.npy`` file; a gzip checksum is verified,
        nothing is unpickled.

    Returns
    -------
    nibabel.Nifti1Image
        Scaled values in stored orientation. Of `check_volume`'s warnings, non-finite voxels are
        0, trailing axes of length one are gone, and a missing orientation is the format's default.
        A ``.npy`` file holds no orientation; its shape stands for one (see `npy_header`).

    Raises
    ------
    UnreadableVolumeError
        With the `code` that `check_volume` gives.
    """
    with named(path):
        volume = _load(Path(path))[0]
    return nib.Nifti1Image(volume.dataobj, volume.affine)


def image_name(image: Any) -> str:
    """Return what an image is called in messages: its path, if it has one."""
    return str(getattr(image, "get_filename", lambda: image)() or "An image in memory")


@contextmanager
def named(image: Any) -> Iterator[None]:
    """Put the name of `image` before the message of what goes wrong inside."""
    try:
        yield
    except UnreadableVolumeError as error:
        raise UnreadableVolumeError(f"{image_name(image)}: {error}", error.code) from error
    except (OSError, ValueError, ArithmeticError, EOFError, *_DAMAGE) as error:
        raise UnreadableVolumeError(f"{image_name(image)}: It cannot be read ({error}).") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int, bool]]:
    """Yield the file's stream, its size on disk and whether the stream inflates."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableVolumeError("It is not a regular file.", "not_a_file")
        if status.st_size == 0:
            raise UnreadableVolumeError("The file is empty (0 bytes).", "empty")
        with path.open("rb") as plain:
            start = plain.read(64)
            plain.seek(0)
            if start.startswith(_POINTERS):
                raise UnreadableVolumeError(_FETCH, "not_fetched")
            compressed = start.startswith(b"\x1f\x8b")
            if compressed:
                with _GzipFile(fileobj=plain, mode="rb") as inflating:
                    yield inflating, status.st_size, True
            else:
                yield plain, status.st_size, False
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UnreadableVolumeError(_FETCH, "not_fetched") from error
        raise UnreadableVolumeError("There is no such file.") from error
    except PermissionError as error:
        raise UnreadableVolumeError("You may not read this file.", "permission") from error
    except EOFError as error:
        raise UnreadableVolumeError("The compressed stream ends early.", "truncated") from error
    except _DAMAGE as error:
        raise UnreadableVolumeError(
            f"The compressed stream is damaged ({error}).", "crc"
        ) from error


def read_header(path: Path) -> Grid:
    """Return what a file's header promises, without reading its data."""
    parse, length = _format(path)
    with _opened(path) as (stream, _, _):
        return parse(stream.read(length))


def _format(path: Path) -> tuple[Callable[[bytes], Grid], int]:
    name = path.name.lower()
    ending = next((ending for ending in _FORMATS if name.endswith(ending)), None)
    if ending is None:
        raise UnreadableVolumeError(f"The name ends in none of {' '.join(_FORMATS)}.", "extension")
    return _FORMATS[ending]


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """What a nibabel image of three axes is to `volumes`, made in a tenth of the time.

    Attributes
    ----------
    dataobj : ndarray of float32, shape (i, j, k)
    affine : ndarray of float64, shape (4, 4)
    """

    dataobj: Float32
    affine: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.dataobj.shape


def _load(path: Path) -> tuple[Volume, list[Check]]:
    """Return the image and what was repaired."""
    values: list[Float32] = []

    def make_room(grid: Grid) -> Float32:
        values.append(np.empty(math.prod(grid.shape), np.float32))
        return values[0]

    grid, _, repairs = _read(path, make_room)
    return Volume(values[0].reshape(grid.shape, order=grid.order), grid.affine), repairs


def _read(
    path: Path, make_room: Callable[[Grid], Float32 | None], content: Any = None
) -> tuple[Grid, _Survey, list[Check]]:
    """Read an image to the end of its file, where the checksum of a compressed one stands.

    Parameters
    ----------
    path : Path
        The file.
    make_room : callable
        Returns where the values go; None keeps none, so that memory does not grow with the image.
    content : hash, optional
        Told the shape and the values, in the order of the file.
    """
    parse, length = _format(path)
    with _opened(path) as (stream, size, compressed):
        block = stream.read(length)
        grid = parse(block)
        needed = math.prod(grid.shape) * grid.dtype.itemsize
        # Deflate packs at most 1032:1, so this holds before anything is inflated or allocated.
        if (size * 1032 if compressed else size - grid.offset) < needed:
            raise UnreadableVolumeError(_SHORT, "truncated")
        if size > grid.offset + needed + _BEHIND:  # a hole on disk takes hours, and no room
            raise UnreadableVolumeError(_TOO_MUCH, "too_large")
        _skip(stream, grid.offset - len(block))
        if content is not None:
            content.update(repr(grid.shape).encode())
        survey = _Survey()
        for piece in _pieces(stream, block[grid.offset :][:needed], grid, make_room(grid)):
            survey.take(piece)
            if content is not None:
                content.update(piece.data)
        if compressed:
            _drain(stream)
    repairs = list(grid.repairs)
    if compressed != path.name.lower().endswith(_COMPRESSED):
        words = "is" if compressed else "is not"
        repairs.append(Check("warn", "extension", f"The content {words} compressed; read anyway."))
    return grid, survey, repairs + survey.judge()


def _pieces(
    stream: Any, lead: bytes, grid: Grid, values: Float32 | None
) -> Iterator[NDArray[np.float32]]:
    """Yield the scaled values in the order of the file, a piece at a time while it is in the cache.

    Parameters
    ----------
    stream : binary stream
        Where the rest of the values follows.
    lead : bytes
        The first values, read with the header.
    grid : Grid
        How many there are, and of which type.
    values : ndarray of float32, or None
        Where all of them go; None uses one piece again and again.
    """
    count, size = math.prod(grid.shape), grid.dtype.itemsize
    some = min(count, _PIECE)
    again = np.empty(some, np.float32) if values is None else values
    raw_piece = np.empty(some * size, np.uint8)
    view, held = raw_piece.data, len(lead)
    view[:held] = lead
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        wanted = (stop - start) * size
        while held < wanted:
            got = stream.readinto(view[held:wanted])
            if not got:
                raise UnreadableVolumeError(_SHORT, "truncated")
            held += got
        raw = np.frombuffer(raw_piece, grid.dtype, stop - start)
        piece = again[: stop - start] if values is None else values[start:stop]
        _scale(raw, grid.slope, grid.inter, piece)
        yield piece
        held = 0


def _skip(stream: Any, count: int) -> None:
    while count > 0:
        chunk = stream.read(min(count, _CHUNK))
        if not chunk:
            raise UnreadableVolumeError(_SHORT, "truncated")
        count -= len(chunk)


def _drain(stream: Any) -> None:
    if not stream.read(1):  # as a rule: nothing is there, and no buffer is made for it
        return
    for _ in range(_BEHIND // _CHUNK):
        if not stream.read(_CHUNK):
            return
    raise UnreadableVolumeError(_TOO_MUCH, "too_large")


def _scale(raw: NDArray[Any], slope: float, inter: float, out: Float32) -> None:
    """Put ``raw * slope + inter`` into `out`, computed in double precision as nibabel does."""
    with np.errstate(over="ignore", invalid="ignore"):
        if (slope, inter) == (1.0, 0.0):
            out[...] = raw
        else:
            out[...] = raw * np.float64(slope) + np.float64(inter)


class _Survey:
    """Smallest and largest value, piece by piece; voxels that are not finite are set to 0.

    Attributes
    ----------
    low, high : float
        Of the repaired values.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._count = self._bad = 0

    def take(self, data: Float32) -> None:
        """Look at values, and repair them in place."""
        self._count += data.size
        low, high = float(data.min()), float(data.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # which any NaN makes them, too
            bad = ~np.isfinite(data)
            self._bad += int(bad.sum())
            data[bad] = 0
            low, high = float(data.min()), float(data.max())
        self.low, self.high = min(self.low, low), max(self.high, high)

    def judge(self) -> list[Check]:
        """Return what was repaired; refuse what holds no image."""
        text = f"{self._bad} of {self._count} voxels "
        if self._bad > self._count // 2:
            raise UnreadableVolumeError(f"{text}are NaN or infinite.", "non_finite")
        if self.low == self.high:
            raise UnreadableVolumeError(f"All voxels have one value ({self.low:g}).", "constant")
        if max(-self.low, self.high) > 1e30:
            raise UnreadableVolumeError(f"Values from {self.low:g} to {self.high:g}.", "range")
        if not self._bad:
            return []
        return [Check("warn", "non_finite", f"{text}were NaN or infinite: set to 0.")]


def require_range(data: Float32, intensity: str) -> None:
    """Refuse values that an unscaled map does not have, or that half precision cannot hold."""
    if intensity != "robust":
        _require_within(float(data.min()), float(data.max()), intensity)


def _require_within(low: float, high: float, intensity: str) -> None:
    if intensity == "robust":
        return
    lower, upper = {"probability": (-0.1, 10.0), "signed": (-6e4, 6e4)}[intensity]
    if low < lower or high > upper:
        raise UnreadableVolumeError(
            f"Values from {low:g} to {high:g}; intensity rule {intensity!r} takes "
            f"{lower:g} to {upper:g}.",
            "range",
        )


def as_image(image: Any) -> Volume:
    """Return a path or a nibabel image of any kind as float32, checked and repaired."""
    if not hasattr(image, "dataobj"):
        return _load(Path(image))[0]
    shape = spatial_shape(image.shape)
    raw = np.asanyarray(image.dataobj)
    if raw.dtype.kind not in "buif":
        raise UnreadableVolumeError(f"Values are of type {raw.dtype}.", "dtype")
    affine = np.asarray(image.affine if image.affine is not None else np.nan, np.float64)
    require_affine(affine)
    data = np.empty(shape, np.float32, order="F")
    _scale(raw.reshape(shape), 1.0, 0.0, data)
    survey = _Survey()
    survey.take(data)
    survey.judge()
    return Volume(data, affine)

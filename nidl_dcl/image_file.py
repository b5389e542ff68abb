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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from nidl_dcl.errors import NidlDclError

_GzipFile: Any = gzip.GzipFile
_DAMAGE: Any = (gzip.BadGzipFile, zlib.error)
with suppress(ImportError):  # twice as fast as zlib, where it is installed
    from isal import igzip, isal_zlib

    _GzipFile = igzip.IGzipFile
    _DAMAGE = (*_DAMAGE, isal_zlib.error)

__all__ = [
    "INTENSITIES",
    "MAX_VOXELS",
    "VOXEL_MM",
    "Check",
    "Float32",
    "Grid",
    "Shape",
    "UnreadableVolumeError",
    "as_image",
    "check_volume",
    "image_name",
    "named",
    "read_header",
    "read_volume",
    "require_range",
]

MAX_VOXELS = 2**28  # 0.35 mm over a whole head: 1 GB as float32
MIN_SIDE = 8
VOXEL_MM = (0.1, 20.0)
INTENSITIES = ("robust", "probability", "signed")

_TYPES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}  # NIfTI codes of real 8 to 64 bit numbers
_KINDS = {  # by the number a file starts with: class, length of the header, place of the magic
    348: (nib.Nifti1Header, 348, 344, b"n+1\0"),
    540: (nib.Nifti2Header, 540, 4, b"n+2\0"),
}
_POINTERS = (b"/annex/objects/", b"version https://git-lfs")
_CHUNK = 1 << 20
_HEADER_BYTES = 540  # of NIfTI-2, the longer of the two
_SHORT = "The file is shorter than its header says."
_FETCH = "Its content is not here: fetch it (`datalad get`, `git annex get` or `git lfs pull`)."

Float32 = NDArray[np.float32]
Shape = tuple[int, int, int]


class UnreadableVolumeError(NidlDclError, ValueError):
    """An image that cannot be used; `code` is the word for why in ``logs/inputs.tsv``.

    Parameters
    ----------
    message : str
        Which file, what is wrong with it, what to do.
    code : str
        For instance ``"truncated"``, ``"crc"`` or ``"affine"``.
    """

    exit_status = 3

    def __init__(self, message: str, code: str = "unreadable") -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Check:
    """What opening an image told: the columns `status`, `code`, `message` of ``inputs.tsv``.

    `status` is ``"ok"``, ``"warn"`` (repaired when read, or odd) or ``"skip"`` (not usable). Of an
    image that is usable also: a checksum of its voxels, which copies share whatever file holds them,
    and the longest side of a voxel in mm.
    """

    status: str
    code: str
    message: str
    content: str = dataclasses.field(default="", compare=False)
    coarsest: float = dataclasses.field(default=0.0, compare=False)


def check_volume(path: str | os.PathLike[str], *, intensity: str = "robust") -> Check:
    """Open an image, read it to its end and say whether it can be used.

    Parameters
    ----------
    path : path-like
        A ``.nii`` or ``.nii.gz`` file.
    intensity : {"robust", "probability", "signed"}
        The intensity rule that the values have to suit.

    Returns
    -------
    Check
        Never an exception, whatever the file holds.
    """
    try:
        image, repairs = _load(Path(path))
        data = np.asanyarray(image.dataobj)
        require_range(data, intensity)
    except UnreadableVolumeError as error:
        return Check("skip", error.code, str(error))
    except Exception as error:  # what a hostile header can make nibabel raise has no list
        return Check("skip", "unreadable", f"It cannot be read ({type(error).__name__}: {error}).")
    found = repairs[0] if repairs else Check("ok", "ok", "")
    content = hashlib.blake2b(repr(data.shape).encode(), digest_size=16)
    content.update(data.ravel(order="K").data)
    return dataclasses.replace(
        found,
        content=content.hexdigest(),
        coarsest=round(float(voxel_sizes(image.affine).max()), 3),
    )


def read_volume(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Return an image as float32 in memory, checked, repaired and three-dimensional.

    Parameters
    ----------
    path : path-like
        A ``.nii`` or ``.nii.gz`` file; its gzip checksum is verified.

    Returns
    -------
    nibabel.Nifti1Image
        Scaled values in stored orientation. Of `check_volume`'s warnings, non-finite voxels are
        0, trailing axes of length one are gone, and a missing orientation is nibabel's default.

    Raises
    ------
    UnreadableVolumeError
        With the `code` that `check_volume` gives.
    """
    with named(path):
        return _load(Path(path))[0]


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
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UnreadableVolumeError("The name does not end in .nii or .nii.gz.", "extension")
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


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the header promises, checked for sense but not against the data."""

    shape: Shape
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    repairs: list[Check]


def read_header(path: Path) -> Grid:
    """Return what a file's header promises, without reading its data."""
    with _opened(path) as (stream, _, _):
        return _parse(stream.read(_HEADER_BYTES))


def _load(path: Path) -> tuple[nib.Nifti1Image, list[Check]]:
    """Return the image and what was repaired; the stream is read to its end for the checksum."""
    with _opened(path) as (stream, size, compressed):
        block = stream.read(_HEADER_BYTES)
        grid = _parse(block)
        needed = math.prod(grid.shape) * grid.dtype.itemsize
        # Deflate packs at most 1032:1, so this holds before anything is inflated or allocated.
        if (size * 1032 if compressed else size - grid.offset) < needed:
            raise UnreadableVolumeError(_SHORT, "truncated")
        lead = block[grid.offset :][:needed]
        _skip(stream, grid.offset - len(block))
        buffer = np.empty(needed, np.uint8)
        buffer[: len(lead)] = np.frombuffer(lead, np.uint8)
        view, filled = buffer.data, len(lead)
        while filled < needed:
            count = stream.readinto(view[filled : filled + 4 * _CHUNK])
            if not count:
                raise UnreadableVolumeError(_SHORT, "truncated")
            filled += count
        if compressed:
            _drain(stream)
    raw = buffer.view(grid.dtype).reshape(grid.shape, order="F")
    data = _to_float32(raw, grid.slope, grid.inter)
    repairs = list(grid.repairs)
    if compressed != path.name.lower().endswith(".gz"):
        words = "is" if compressed else "is not"
        repairs.append(Check("warn", "extension", f"The content {words} compressed; read anyway."))
    repairs += _repair_values(data)
    return nib.Nifti1Image(data, grid.affine), repairs


def _skip(stream: Any, count: int) -> None:
    while count > 0:
        chunk = stream.read(min(count, _CHUNK))
        if not chunk:
            raise UnreadableVolumeError(_SHORT, "truncated")
        count -= len(chunk)


def _drain(stream: Any) -> None:
    for _ in range(1024):
        if not stream.read(_CHUNK):
            return
    raise UnreadableVolumeError("Over 1 GB follows the image in the file.", "too_large")


def _parse(block: bytes) -> Grid:
    """Judge a header by its own fields; nothing here depends on the size of the data."""
    sign = "<" if int.from_bytes(block[:4], "little") in _KINDS else ">"
    kind = _KINDS.get(int.from_bytes(block[:4], "little" if sign == "<" else "big"))
    if kind is None:
        raise UnreadableVolumeError("The content is not NIfTI.", "not_nifti")
    make, length, at, magic = kind
    if len(block) < length:
        raise UnreadableVolumeError("The file ends inside the header.", "truncated")
    if block[at : at + 4] != magic:
        raise UnreadableVolumeError("It is no single-file NIfTI image (.nii).", "not_nifti")
    header = make(block[:length], endianness=sign, check=False)

    shape = _spatial_shape([int(n) for n in header["dim"]])
    code = int(header["datatype"])
    if code not in _TYPES:
        what = {32: "complex", 1792: "complex", 128: "colour", 2304: "colour"}.get(code, "unknown")
        raise UnreadableVolumeError(
            f"Values are of {what} type (NIfTI code {code}); real numbers are needed.", "dtype"
        )
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) or slope == 0:
        slope, inter = 1.0, 0.0  # the standard's and nibabel's words for "not scaled"
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise UnreadableVolumeError(f"The scaling is {slope} x + {inter}.", "scaling")
    offset = float(header["vox_offset"]) or float(length + 4)
    if not length <= offset <= 2**30:
        raise UnreadableVolumeError(f"The header puts the data at byte {offset}.", "not_nifti")
    with np.errstate(all="ignore"):  # of numbers that the next checks refuse by name
        affine, repairs = _affine(header)
    return Grid(shape, affine, header.get_data_dtype(), int(offset), slope, inter, repairs)


def _spatial_shape(dim: list[int]) -> Shape:
    count, sides = dim[0], dim[1 : max(0, dim[0]) + 1]
    if not 1 <= count <= 7 or min(sides) < 1:
        raise UnreadableVolumeError(f"The header's dimensions make no sense: {dim}.", "dimensions")
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) > 3:
        raise UnreadableVolumeError(
            f"It holds {math.prod(sides[3:])} volumes; one is needed: pick or average them.",
            "dimensions",
        )
    if len(sides) < 3 or min(sides) == 1:
        raise UnreadableVolumeError(f"It is not three-dimensional: {sides}.", "dimensions")
    if min(sides) < MIN_SIDE:
        raise UnreadableVolumeError(
            f"Fewer than {MIN_SIDE} voxels on a side: {sides}.", "too_small"
        )
    if math.prod(sides) > MAX_VOXELS:
        raise UnreadableVolumeError(f"More than {MAX_VOXELS} voxels: {sides}.", "too_large")
    return sides[0], sides[1], sides[2]


def _affine(header: Any) -> tuple[NDArray[np.float64], list[Check]]:
    """Return the sform, else the qform, else nibabel's guess from the voxel sizes."""
    forms = [
        (name, get)
        for name, get in (("sform", header.get_sform), ("qform", header.get_qform))
        if int(header[f"{name}_code"]) > 0
    ]
    if not forms:
        affine = np.asarray(header.get_base_affine(), np.float64)
        _require_affine(affine)
        return affine, [
            Check("warn", "affine", "No orientation is stored; nibabel's default (LAS) is assumed.")
        ]
    failed: UnreadableVolumeError | None = None
    for name, get in forms:
        try:
            affine = np.asarray(get(), np.float64)
            _require_affine(affine)
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


def _require_affine(affine: NDArray[np.float64]) -> None:
    if affine.shape != (4, 4) or not np.all(np.isfinite(affine)):
        raise UnreadableVolumeError("The affine has non-finite entries.", "affine")
    sizes = voxel_sizes(affine)
    if np.any(sizes == 0) or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise UnreadableVolumeError("The affine is singular: it flattens the image.", "affine")
    if np.any(sizes < VOXEL_MM[0]) or np.any(sizes > VOXEL_MM[1]):
        raise UnreadableVolumeError(
            f"Voxels of {' x '.join(f'{s:.3g}' for s in sizes)} mm: from {VOXEL_MM[0]} to "
            f"{VOXEL_MM[1]} mm are accepted (is the unit wrong?).",
            "spacing",
        )
    axes = affine[:3, :3] / sizes
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.2:
        raise UnreadableVolumeError("The affine shears the image by over 11 degrees.", "affine")


def _to_float32(raw: NDArray[Any], slope: float = 1.0, inter: float = 0.0) -> Float32:
    """Return ``raw * slope + inter``, computed in double precision as nibabel does."""
    data = np.empty(raw.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        if (slope, inter) == (1.0, 0.0):
            data[...] = raw
        else:
            for k in range(raw.shape[2]):  # slabs: no double precision copy of the whole
                data[..., k] = raw[..., k] * np.float64(slope) + np.float64(inter)
    return data


def _repair_values(data: Float32) -> list[Check]:
    """Set a minority of non-finite voxels to 0, in place; refuse what holds no image."""
    repairs = []
    if not np.isfinite(data.sum(dtype=np.float64)):
        bad = ~np.isfinite(data)
        count = int(bad.sum())
        if count > data.size // 2:
            raise UnreadableVolumeError(
                f"{count} of {data.size} voxels are NaN or infinite.", "non_finite"
            )
        data[bad] = 0
        text = f"{count} of {data.size} voxels were NaN or infinite: set to 0."
        repairs.append(Check("warn", "non_finite", text))
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise UnreadableVolumeError(f"All voxels have one value ({low:g}).", "constant")
    if max(-low, high) > 1e30:
        raise UnreadableVolumeError(f"Values from {low:g} to {high:g}.", "range")
    return repairs


def require_range(data: Float32, intensity: str) -> None:
    """Refuse values that an unscaled map does not have, or that half precision cannot hold."""
    lower, upper = {"probability": (-0.1, 10.0), "signed": (-6e4, 6e4)}.get(
        intensity, (-math.inf, math.inf)
    )
    low, high = float(data.min()), float(data.max())
    if low < lower or high > upper:
        raise UnreadableVolumeError(
            f"Values from {low:g} to {high:g}; intensity rule {intensity!r} takes "
            f"{lower:g} to {upper:g}.",
            "range",
        )


def as_image(image: Any) -> nib.Nifti1Image:
    """Return a path or a nibabel image of any kind as `_load` would."""
    if not hasattr(image, "dataobj"):
        return _load(Path(image))[0]
    shape = _spatial_shape([len(image.shape), *image.shape])
    raw = np.asanyarray(image.dataobj)
    if raw.dtype.kind not in "buif":
        raise UnreadableVolumeError(f"Values are of type {raw.dtype}.", "dtype")
    affine = np.asarray(image.affine if image.affine is not None else np.nan, np.float64)
    _require_affine(affine)
    data = _to_float32(raw.reshape(shape))
    _repair_values(data)
    return nib.Nifti1Image(data, affine)

"""One NIfTI image in, one prepared array out: reading that trusts nothing, then a common form.

Finding images and pairing them with masks is `bids_index`'s; random views are `views`'s.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from scipy import ndimage, sparse

from nidl_dcl.errors import NidlDclError, UsageError

_GzipFile: Any = gzip.GzipFile
_DAMAGE: Any = (gzip.BadGzipFile, zlib.error)
with suppress(ImportError):  # twice as fast as zlib, where it is installed
    from isal import igzip, isal_zlib

    _GzipFile = igzip.IGzipFile
    _DAMAGE = (*_DAMAGE, isal_zlib.error)

__all__ = [
    "Check",
    "Preparation",
    "UnreadableVolumeError",
    "check_volume",
    "common_shape",
    "prepare_volume",
    "read_volume",
]

MAX_VOXELS = 2**28  # 0.35 mm over a whole head: 1 GB as float32
MIN_SIDE = 8
VOXEL_MM = (0.1, 20.0)
MASKED_FIELD_MM = (160.0, 192.0, 160.0)  # right-left, front-back, up-down: holds an adult brain
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

    `status` is ``"ok"``, ``"warn"`` (repaired when read, or odd) or ``"skip"`` (not usable).
    """

    status: str
    code: str
    message: str


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
        _require_range(np.asanyarray(image.dataobj), intensity)
    except UnreadableVolumeError as error:
        return Check("skip", error.code, str(error))
    except Exception as error:  # what a hostile header can make nibabel raise has no list
        return Check("skip", "unreadable", f"It cannot be read ({type(error).__name__}: {error}).")
    return repairs[0] if repairs else Check("ok", "ok", "")


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
    with _named(path):
        return _load(Path(path))[0]


def _name(image: Any) -> str:
    return str(getattr(image, "get_filename", lambda: image)() or "An image in memory")


@contextmanager
def _named(image: Any) -> Iterator[None]:
    """Put the name of `image` before the message of what goes wrong inside."""
    try:
        yield
    except UnreadableVolumeError as error:
        raise UnreadableVolumeError(f"{_name(image)}: {error}", error.code) from error
    except (OSError, ValueError, ArithmeticError, EOFError, *_DAMAGE) as error:
        raise UnreadableVolumeError(f"{_name(image)}: It cannot be read ({error}).") from error


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
class _Grid:
    """What the header promises, checked for sense but not against the data."""

    shape: Shape
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    repairs: list[Check]


def _read_header(path: Path) -> _Grid:
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


def _parse(block: bytes) -> _Grid:
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
    return _Grid(shape, affine, header.get_data_dtype(), int(offset), slope, inter, repairs)


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


def _require_range(data: Float32, intensity: str) -> None:
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


def _as_image(image: Any) -> nib.Nifti1Image:
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


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes the array an encoder sees: the input contract of a model.

    Parameters
    ----------
    spacing : tuple of three float
        Size of a prepared voxel in mm, in the order right-left, front-back, up-down.
    shape : tuple of three int, optional
        Voxels after cropping or padding. None: `common_shape` of the single image.
    masked : bool
        Everything outside the brain mask is exactly 0.
    intensity : {"robust", "probability", "signed"}
        ``"robust"`` scales an image of arbitrary unit (see `prepare_volume`); tissue maps
        (``"probability"``) and maps with negative values (``"signed"``) keep their numbers.
    version : int
        Of the rules themselves; another one is refused rather than read with other rules.
    """

    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)
    shape: Shape | None = None
    masked: bool = False
    intensity: str = "robust"
    version: int = 1

    def __post_init__(self) -> None:
        # Equality must mean the same numbers, whether they came from YAML, JSON or the caller.
        object.__setattr__(self, "spacing", tuple(float(mm) for mm in self.spacing))
        if len(self.spacing) != 3 or not all(
            VOXEL_MM[0] <= mm <= VOXEL_MM[1] for mm in self.spacing
        ):
            raise UsageError(
                f"spacing takes three sizes from {VOXEL_MM[0]} to {VOXEL_MM[1]} mm, "
                f"got {self.spacing}."
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
            if len(self.shape) != 3 or min(self.shape) < 1 or math.prod(self.shape) > MAX_VOXELS:
                raise UsageError(f"shape takes three positive counts of voxels, got {self.shape}.")
        if self.intensity not in INTENSITIES:
            raise UsageError(
                f"intensity is one of {', '.join(INTENSITIES)}; got {self.intensity!r}."
            )
        if self.version != 1:
            raise UsageError(
                f"This model prepares images by rules of version {self.version}; "
                "this nidl_dcl knows version 1. Install the nidl_dcl that wrote the model."
            )

    @property
    def field_of_view(self) -> tuple[float, float, float] | None:
        """Extent of the prepared array in mm, None while the shape is open."""
        if self.shape is None:
            return None
        x, y, z = (n * mm for n, mm in zip(self.shape, self.spacing, strict=True))
        return x, y, z

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them; `from_dict` undoes it."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preparation:
        """Return the preparation that `to_dict` described; unknown fields are an error."""
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UsageError(f"Unknown fields of an input contract: {', '.join(sorted(unknown))}.")
        return cls(**fields)


def common_shape(
    images: Iterable[Any],
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0),
    masked: bool = False,
) -> Shape:
    """Return the default shape of prepared volumes, from fields of view.

    Parameters
    ----------
    images : iterable of path-like or nibabel image
        Only headers are read; files that cannot be read are passed over.
    spacing : tuple of three float
        Size of a prepared voxel in mm.
    masked : bool
        True: 160 x 192 x 160 mm, which holds an adult brain, whatever the images are.

    Returns
    -------
    tuple of three int
        The median extent along right-left, front-back and up-down in voxels, rounded up to a
        multiple of 8 (what five halvings and most encoders like).

    Raises
    ------
    UnreadableVolumeError
        Unmasked, and no image has a readable header.
    """
    field: Any = MASKED_FIELD_MM
    if not masked:
        fields = []
        for image in images:
            try:
                grid = image if hasattr(image, "dataobj") else _read_header(Path(image))
            except (UnreadableVolumeError, OSError):
                continue
            fields.append(_extent(grid.shape[:3], grid.affine))
        if not fields:
            raise UnreadableVolumeError("No image has a readable header: no field of view to take.")
        field = np.median(fields, axis=0)
    x, y, z = (8 * math.ceil(mm / size / 8 - 1e-3) for mm, size in zip(field, spacing, strict=True))
    return x, y, z


def prepare_volume(image: Any, preparation: Preparation, mask_path: Any = None) -> Float32:
    """Bring one image into the form that a model was, or will be, trained on.

    Parameters
    ----------
    image : path-like or nibabel image
        One volume.
    preparation : Preparation
        The target form.
    mask_path : path-like or nibabel image, optional
        The brain mask (inside: > 0.5), on any grid; needed when `preparation.masked`, else
        ignored.

    Returns
    -------
    ndarray of float32, shape (1, d, h, w)
        Axes run left to right, back to front, down to up. Values are rounded to half precision,
        so that a cache in half precision changes nothing.

    Raises
    ------
    UnreadableVolumeError
        The image or the mask cannot be used.
    UsageError
        A mask is needed and none was given.

    Notes
    -----
    1. *Orientation*: axes are permuted and flipped to the closest RAS order. The rest of an
       oblique rotation (a few degrees, in most scans) stays: nothing is resampled twice.
    2. *Centre*: the centre of mass of the mask; without mask, of the voxels brighter than Otsu's
       threshold. It gives way where the field of view would otherwise cut off part of a brain (a
       head) that fits in; 0.1 % (1 %) of the voxels per side count as specks and may be cut. An
       image that has the right spacing already moves by whole voxels.
    3. *Spacing and shape*, in one step: along each axis a triangle as wide as the coarser of the
       two voxel sizes, that is linear interpolation when refining and an anti-aliasing average
       when coarsening. Beyond the field of view: 0.
    4. *Mask*: the average is one of brain voxels alone, times the share of brain; with less than
       a tenth of brain it is exactly 0. So the surface keeps its sub-voxel place.
    5. *Intensity* ``"robust"``, masked: the median of the brain goes to 0.65 and its
       interquartile range to 0.3, within 0.02 and 1.5, so that non-zero is brain (in a T1w, white
       matter is near 0.85, fluid near 0.1). Unmasked: the 1st percentile of the whole field goes
       to 0, the 99th of the foreground to 1, within 0 and 1.5. ``"probability"`` and
       ``"signed"`` keep their values.
    """
    if preparation.masked and mask_path is None:
        raise UsageError(f"{_name(image)}: this preparation needs a brain mask, none was given.")
    with _named(image):
        data, affine = _canonical(_as_image(image))
        _require_range(data, preparation.intensity)
    shape = preparation.shape or common_shape(
        [nib.Nifti1Image(data, affine)], preparation.spacing, preparation.masked
    )
    sizes = voxel_sizes(affine)
    field = np.array(shape) * preparation.spacing / sizes
    inside = None
    if preparation.masked:
        with _named(mask_path):
            inside = _mask_on(data.shape, affine, _as_image(mask_path))
        centre = _centre(inside, field, 0.001)
    else:
        centre = 2 * _centre(_foreground(np.abs(data[::2, ::2, ::2])), field / 2, 0.01)
    axes = zip(data.shape, sizes, shape, preparation.spacing, centre, strict=True)
    prepared, share = _resampled(data, inside, [_weights(*axis) for axis in axes])
    if preparation.intensity == "robust":
        with _named(image):
            prepared = _to_unit(prepared, share >= 0.5, masked=preparation.masked)
    prepared *= np.where(share < 0.1, 0, share)
    return prepared.astype(np.float16).astype(np.float32)[None]


def _canonical(image: nib.Nifti1Image) -> tuple[Float32, NDArray[np.float64]]:
    axes = nib.io_orientation(image.affine)
    data = nib.apply_orientation(np.asanyarray(image.dataobj), axes)
    return data, image.affine @ nib.orientations.inv_ornt_aff(axes, image.shape)


def _extent(shape: Any, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the field of view in mm along right-left, front-back and up-down."""
    extent = np.empty(3)
    extent[nib.io_orientation(affine)[:, 0].astype(int)] = shape * voxel_sizes(affine)
    return extent


def _mask_on(
    shape: tuple[int, ...], affine: NDArray[np.float64], mask: nib.Nifti1Image
) -> NDArray[np.bool_]:
    """Return where the mask is above 0.5 on the image's grid, interpolating if grids differ."""
    data, own = _canonical(mask)
    far = np.array([*shape, 1.0])
    same = data.shape == tuple(shape) and np.abs((own - affine) @ np.diag(far)).sum() < 0.25
    if not same:
        to_mask = np.linalg.inv(own) @ affine
        data = ndimage.affine_transform(data, to_mask, output_shape=shape, order=1)
    inside: NDArray[np.bool_] = data > 0.5
    if not inside.any():
        raise UnreadableVolumeError("The mask does not overlap with the image.", "affine")
    return inside


def _foreground(values: Float32) -> NDArray[np.bool_]:
    """Return where `values` (>= 0) exceed Otsu's threshold."""
    top = float(np.percentile(values, 99.5)) or float(values.max())
    counts, edges = np.histogram(values, bins=256, range=(0.0, top))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return np.asarray(values > edges[1:][np.argmax(np.nan_to_num(between))])


def _centre(
    inside: NDArray[np.bool_], field: NDArray[np.float64], tail: float
) -> NDArray[np.float64]:
    """Return the centre of mass in voxels, moved as far as `field` must to hold all but tails."""
    centre = np.zeros(3)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        counts = np.count_nonzero(inside, axis=others)
        share = np.cumsum(counts) / max(1, counts.sum())
        first, last = np.searchsorted(share, [tail, 1 - tail])
        reach = (field[axis] - 1) / 2
        lowest, highest = last - reach, first + reach
        middle = float(counts @ np.arange(counts.size)) / max(1, counts.sum())
        centre[axis] = np.clip(middle, lowest, highest) if lowest < highest else (first + last) / 2
    return centre


def _weights(
    n_in: int, size: float, n_out: int, spacing: float, centre: float
) -> tuple[slice, sparse.csr_matrix]:
    """Return the voxels used along one axis, and how much each adds to each prepared voxel."""
    step = spacing / size
    at = centre + (np.arange(n_out) - (n_out - 1) / 2) * step
    if abs(step - 1) < 1e-3:
        step, at = 1.0, np.floor(at[0] + 0.5) + np.arange(n_out)
    width = max(step, 1.0)
    taps = np.ceil(at - width)[:, None] + np.arange(math.ceil(2 * width) + 1)
    weight = np.maximum(0, 1 - np.abs(taps - at[:, None]) / width)
    weight /= weight.sum(axis=1, keepdims=True)
    weight[(taps < 0) | (taps >= n_in)] = 0
    used = taps[weight > 0].astype(int)
    start, stop = (int(used.min()), int(used.max()) + 1) if used.size else (0, 1)
    rows, columns = np.nonzero(weight)
    matrix = sparse.csr_matrix(
        (weight[rows, columns].astype(np.float32), (rows, taps[rows, columns].astype(int) - start)),
        shape=(n_out, stop - start),
    )
    return slice(start, stop), matrix


def _resampled(
    data: Float32, inside: NDArray[np.bool_] | None, grids: list[tuple[slice, Any]]
) -> tuple[Float32, Float32]:
    """Return the average of what is inside of each prepared voxel, and the share that is."""
    part = tuple(used for used, _ in grids)

    def average(values: Float32) -> Float32:
        # Sparse products add in one fixed order: the same bits on any number of threads.
        for _, matrix in grids:
            flat = np.ascontiguousarray(values).reshape(values.shape[0], -1)
            values = (matrix @ flat).reshape(-1, *values.shape[1:]).transpose(1, 2, 0)
        return values

    if inside is None:
        shares = [np.asarray(matrix.sum(axis=1)).ravel() for _, matrix in grids]
        x, y, z = (np.where(share >= 0.5, share, 0) for share in shares)
        share = np.asarray(x[:, None, None] * y[:, None] * z, np.float32)
        total = average(data[part])
    else:
        weight = inside[part].astype(np.float32)
        share = average(weight)
        total = average(data[part] * weight)
    mean = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    return mean, share if inside is not None else np.asarray(share > 0, np.float32)


def _to_unit(data: Float32, used: NDArray[np.bool_], *, masked: bool) -> Float32:
    """Apply the intensity rule "robust" (see `prepare_volume`) by the statistics of `used`."""
    values = data[used]
    if values.size == 0:
        raise UnreadableVolumeError("Nothing of it lies in the field of view.", "affine")
    if masked:
        low, middle, high = np.percentile(values, [25, 50, 75])
        offset, slope, lowest = 0.65, 0.3, 0.02
    else:
        low = middle = np.percentile(values, 1)
        bright = values[_foreground(np.maximum(values, 0))]
        high = np.percentile(bright, 99) if bright.size else low
        offset, slope, lowest = 0.0, 1.0, 0.0
    if not high > low:
        raise UnreadableVolumeError("The voxels used have one value.", "constant")
    scale = np.float32(slope / (high - low))
    return np.asarray(np.clip((data - np.float32(middle)) * scale + offset, lowest, 1.5))

"""Read one image file and check everything in it; an image that cannot be used gets a code and a reason.

Orientation, spacing and intensities are left to `preparation`.
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
from nidl_dcl.volumes import mgh, nifti, npy
from nidl_dcl.volumes.foreground import COUNTED, foreground_threshold
from nidl_dcl.volumes.grid import Grid, require_affine, spatial_shape

_GzipFile: Any = gzip.GzipFile
_DAMAGE: Any = (gzip.BadGzipFile, zlib.error)

with suppress(ImportError):  # twice as fast as zlib, where it is installed
    from isal import igzip, isal_zlib

    _GzipFile = igzip.IGzipFile
    _DAMAGE = (*_DAMAGE, isal_zlib.error)

# By intensity rule: the least and the greatest value that it takes.
_RANGES = {"robust": (-math.inf, math.inf), "probability": (-0.1, 10.0), "signed": (-6e4, 6e4)}
INTENSITIES = tuple(_RANGES)

# By the end of a name: how to read the header, and how many bytes of the file that takes at most.
_FORMATS: dict[str, tuple[Callable[[bytes], Grid], int]] = {
    **dict.fromkeys((".nii", ".nii.gz"), (nifti.parse, nifti.BYTES)),
    **dict.fromkeys((".mgh", ".mgz", ".mgh.gz"), (mgh.parse, mgh.BYTES)),
    ".npy": (npy.parse, npy.BYTES),
}

_COMPRESSED = (".gz", ".mgz")
_POINTERS = (b"/annex/objects/", b"version https://git-lfs")
_CHUNK = 1 << 20
_PIECE = 1 << 17  # values converted at once, so that they fit into the processor's cache

_MOST_ALIKE = 0.999
"""Share of the voxels that may have one value: a brain fills more than a thousandth of any field."""

_LEAST_SHARE, _LEAST_ML = 0.03, 200.0
"""Share of the field and ml that stand out; an image below both is no whole brain."""

_LONGEST_REST = 2**30
"""Bytes that may follow the values in a file."""

_TOO_MUCH = "Over 1 GB follows the image in the file."
_SHORT = "The file is shorter than its header says."
_FETCH = "Its content is not here: fetch it (`datalad get`, `git annex get` or `git lfs pull`)."

Float32 = NDArray[np.float32]


def check_volume(path: str | os.PathLike[str], *, intensity: str = "robust") -> Check:
    """Read an image to its end and return whether it can be used by an `intensity` rule.

    It never raises, whatever the file holds.
    """
    return look_at(path, intensity=intensity)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """At most 2**16 values of an image, evenly spaced in the order of its file."""

    grid: Grid
    values: Float32
    step: int


def look_at(
    path: str | os.PathLike[str], *, intensity: str = "robust"
) -> tuple[Check, Sample | None]:
    """Return what `check_volume` does, and a sample of the values; None if it cannot be used."""
    content = hashlib.blake2b(digest_size=16)
    try:
        grid, _, survey, repairs = _read(Path(path), keep=False, content=content)
        _require_within(survey.low, survey.high, intensity)
        sample = Sample(grid, survey.sample(), survey.step)
        found = joined([*repairs, *_oddities(sample, intensity)])
    except UnreadableVolumeError as error:
        return Check("skip", error.code, str(error)), None
    except Exception as error:  # nibabel may raise anything on a hostile header
        text = f"It cannot be read ({type(error).__name__}: {error})."
        return Check("skip", "unreadable", text), None
    coarsest = round(float(voxel_sizes(grid.affine).max()), 3)
    return dataclasses.replace(found, content=content.hexdigest(), coarsest=coarsest), sample


def joined(warnings: list[Check]) -> Check:
    """Return one check that says all: the code of the first, the messages of all."""
    if not warnings:
        return Check("ok", "ok", "")
    return dataclasses.replace(warnings[0], message=" ".join(each.message for each in warnings))


def _oddities(sample: Sample, intensity: str) -> list[Check]:
    """Return warnings of values that are no head, or that hide one."""
    values = np.abs(sample.values) if intensity == "signed" else sample.values
    low, threshold = foreground_threshold(values)
    share = float(np.mean(values - np.float32(low) > threshold))
    volume = share * math.prod(sample.grid.shape) * abs(np.linalg.det(sample.grid.affine)) / 1000
    odd = []
    if share < _LEAST_SHARE and volume < _LEAST_ML:
        text = (
            f"Next to nothing stands out from the background: {volume:.3g} ml, {share:.2%} of the "
            "field of view."
        )
        odd.append(Check("warn", "blank", text))
    floor = float(values.min())
    rest = values[values > floor]
    # 0 is no fill value: it is around every brain without its skull.
    if intensity == "robust" and floor != 0 and 0 < rest.size <= 0.99 * values.size:
        least, dark, bright = (float(x) for x in np.percentile(rest, [0.1, 1, 99]))
        if bright > dark and least - floor > 0.5 * (bright - dark):
            text = (
                f"{1 - rest.size / values.size:.0%} of the voxels are {floor:g}, far below all others "
                f"({dark:g} to {bright:g}): the head has little contrast left beside them. Give "
                "the background the lowest value of the head."
            )
            odd.append(Check("warn", "range", text))
    return odd


def image_name(image: Any) -> str:
    """Return how messages name an image: by its path, if it has one."""
    return str(getattr(image, "get_filename", lambda: image)() or "An image in memory")


@contextmanager
def errors_naming(image: Any) -> Iterator[None]:
    """Turn errors into `UnreadableVolumeError` whose message begins with the name of `image`."""
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
            if start.startswith(b"\x1f\x8b"):
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
    """A three-dimensional image in memory. A nibabel image takes ten times as long to make."""

    dataobj: Float32  # (i, j, k)
    affine: NDArray[np.float64]  # (4, 4)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.dataobj.shape


def affine_of(image: Any) -> NDArray[np.float64]:
    """Return the affine of a nibabel image in mm, whatever unit of length its header declares."""
    if image.affine is None:
        return np.asarray(np.nan)
    header = image.header
    scale = nifti.unit(header, image.shape[:3])[0] if isinstance(header, nib.Nifti1Header) else 1.0
    return nifti.in_mm(image.affine, scale)


def read_volume(image: Any) -> Volume:
    """Return an image as float32 in memory, checked and repaired.

    Parameters
    ----------
    image : path-like or nibabel image
        A ``.nii``, ``.nii.gz``, ``.mgz``, ``.mgh`` or ``.npy`` file, which is read to its end, where
        the checksum of a compressed one stands; or an image of any kind.

    Returns
    -------
    Volume
        Scaled values in stored orientation. Of the warnings of `check_volume`, non-finite voxels
        are 0, trailing axes of length one are dropped, and a missing orientation is the format's
        default. A ``.npy`` file holds no orientation; its shape stands for one (see `npy.parse`).

    Raises
    ------
    UnreadableVolumeError
        With the `code` that `check_volume` gives.
    """
    with errors_naming(image):
        if not hasattr(image, "dataobj"):
            grid, values, _, _ = _read(Path(image), keep=True)
            return Volume(values.reshape(grid.shape, order=grid.order), grid.affine)
        shape = spatial_shape(image.shape)
        raw = np.asanyarray(image.dataobj)
        if raw.dtype.kind not in "buif":
            raise UnreadableVolumeError(f"Values are of type {raw.dtype}.", "dtype")
        affine = affine_of(image)
        require_affine(affine)
        data = np.empty(shape, np.float32, order="F")
        _scale(raw.reshape(shape), 1.0, 0.0, data)
        survey = _Survey(data.size)
        survey.add(data)
        survey.repairs()
        return Volume(data, affine)


def _read(
    path: Path, *, keep: bool, content: Any = None
) -> tuple[Grid, Float32, _Survey, list[Check]]:
    """Read an image to the end of its file, where the checksum of a compressed one stands.

    Return all values in the order of the file, or without `keep` only those read last, so that
    memory does not grow with the image. The hash `content` gets the shape and the values.
    """
    parse, length = _format(path)
    with _opened(path) as (stream, size, compressed):
        block = stream.read(length)
        grid = parse(block)
        count = math.prod(grid.shape)
        needed = count * grid.dtype.itemsize
        # Deflate packs at most 1032:1, so this holds before anything is inflated or allocated.
        if (size * 1032 if compressed else size - grid.offset) < needed:
            raise UnreadableVolumeError(_SHORT, "truncated")
        if size > grid.offset + needed + _LONGEST_REST:  # a sparse file takes hours to read
            raise UnreadableVolumeError(_TOO_MUCH, "too_large")
        _skip(stream, grid.offset - len(block))
        if content is not None:
            content.update(repr(grid.shape).encode())
        values = np.empty(count if keep else min(count, _PIECE), np.float32)
        survey = _Survey(count)
        for piece in _pieces(stream, block[grid.offset :][:needed], grid, values):
            survey.add(piece)
            if content is not None:
                content.update(piece.data)
        if compressed:
            _drain(stream)
    repairs = list(grid.repairs)
    if compressed != path.name.lower().endswith(_COMPRESSED):
        words = "is" if compressed else "is not"
        repairs.append(Check("warn", "extension", f"The content {words} compressed; read anyway."))
    return grid, values, survey, repairs + survey.repairs()


def _pieces(stream: Any, lead: bytes, grid: Grid, values: Float32) -> Iterator[Float32]:
    """Yield the scaled values in the order of the file, a piece at a time.

    `lead` holds the first of them, read with the header. They go to `values`: all of them, or one
    piece after the other where there is room for one only.
    """
    count, size = math.prod(grid.shape), grid.dtype.itemsize
    raw_piece = np.empty(min(count, _PIECE) * size, np.uint8)
    view, held = raw_piece.data, len(lead)
    view[:held] = lead
    for start in range(0, count, _PIECE):
        length = min(count - start, _PIECE)
        while held < length * size:
            got = stream.readinto(view[held : length * size])
            if not got:
                raise UnreadableVolumeError(_SHORT, "truncated")
            held += got
        raw = np.frombuffer(raw_piece, grid.dtype, length)
        at = start if values.size == count else 0
        piece = values[at : at + length]
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
    for _ in range(_LONGEST_REST // _CHUNK):
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
    """Range and sample of values that come piece by piece; voxels that are not finite are set to 0."""

    def __init__(self, expected: int) -> None:
        self.low, self.high = math.inf, -math.inf
        self.step = max(1, -(-expected // COUNTED))
        self._count = self._bad = 0
        self._samples: list[Float32] = []

    def add(self, data: Float32) -> None:
        """Include more values, which are repaired in place."""
        first = -self._count % self.step
        self._count += data.size
        low, high = float(data.min()), float(data.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # which any NaN makes them, too
            bad = ~np.isfinite(data)
            self._bad += int(bad.sum())
            data[bad] = 0
            low, high = float(data.min()), float(data.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._samples.append(data.ravel(order="K")[first :: self.step].copy())

    def sample(self) -> Float32:
        """Return every `step`-th value."""
        return np.concatenate(self._samples)

    def repairs(self) -> list[Check]:
        """Return what was repaired; refuse values that are no image."""
        text = f"{self._bad} of {self._count} voxels "
        if self._bad > self._count // 2:
            raise UnreadableVolumeError(f"{text}are NaN or infinite.", "non_finite")
        if self.low == self.high:
            raise UnreadableVolumeError(f"All voxels have one value ({self.low:g}).", "constant")
        if max(-self.low, self.high) > 1e30:
            raise UnreadableVolumeError(f"Values from {self.low:g} to {self.high:g}.", "range")
        sample = self.sample()
        most = np.median(sample)
        same = float(np.mean(sample == most))
        if same > _MOST_ALIKE:
            raise UnreadableVolumeError(
                f"Fewer than one in a thousand of its voxels differ from {most:g}.", "constant"
            )
        if not self._bad:
            return []
        return [Check("warn", "non_finite", f"{text}were NaN or infinite: set to 0.")]


def require_range(data: Float32, intensity: str) -> None:
    """Refuse values that an unscaled map does not have, or that half precision cannot hold."""
    if intensity != "robust":
        _require_within(float(data.min()), float(data.max()), intensity)


def _require_within(low: float, high: float, intensity: str) -> None:
    lower, upper = _RANGES[intensity]
    if low < lower or high > upper:
        raise UnreadableVolumeError(
            f"Values from {low:g} to {high:g}; intensity rule {intensity!r} takes "
            f"{lower:g} to {upper:g}.",
            "range",
        )

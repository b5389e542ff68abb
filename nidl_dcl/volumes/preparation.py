"""Turn one image into the array that an encoder takes: orientation, spacing, mask, intensity.

Reading files is left to `reading`, keeping prepared volumes to `cache`, and drawing views to
`nidl_dcl.data`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage, sparse

from nidl_dcl.errors import UsageError
from nidl_dcl.status import UnreadableVolumeError
from nidl_dcl.volumes.foreground import foreground, thinned
from nidl_dcl.volumes.grid import MAX_VOXELS, VOXEL_MM, Shape
from nidl_dcl.volumes.reading import (
    INTENSITIES,
    Float32,
    Volume,
    affine_of,
    errors_naming,
    image_name,
    read_header,
    read_volume,
    require_range,
)

MASKED_FIELD_MM = (160.0, 192.0, 160.0)  # right-left, front-back, up-down: holds an adult brain


@dataclasses.dataclass(frozen=True)
class Origin:
    """The images that a model was trained on, as they were before preparation."""

    contrast: str  # BIDS suffix: T1w, probseg …
    space: str  # native, or the template whose space they are in
    stripped: bool = False  # without skull already when they were read
    coarsest: float = 0.0  # longest side of a voxel among all images, in mm
    preprocessing: str = "none"  # by this program before that: strip, rigid or align


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes the array that an encoder takes: the input contract of a model.

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
        Of the rules of preparation; models with another version are refused.
    orientation : {"RAS"}
        Of the axes of the prepared array.
    origin : Origin, optional
        The images of the model. It changes no value, so preparations that differ in it are equal.
    """

    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)
    shape: Shape | None = None
    masked: bool = False
    intensity: str = "robust"
    version: int = 1
    orientation: str = "RAS"
    origin: Origin | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        # Equality must mean the same numbers, whether they came from YAML, JSON or the caller.
        object.__setattr__(self, "spacing", tuple(float(mm) for mm in self.spacing))
        low, high = VOXEL_MM
        if len(self.spacing) != 3 or not all(low <= mm <= high for mm in self.spacing):
            raise UsageError(
                f"spacing takes three sizes from {low} to {high} mm, got {self.spacing}."
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
            if len(self.shape) != 3 or min(self.shape) < 1 or math.prod(self.shape) > MAX_VOXELS:
                raise UsageError(f"shape takes three positive counts of voxels, got {self.shape}.")
        if self.intensity not in INTENSITIES:
            raise UsageError(
                f"intensity is one of {', '.join(INTENSITIES)}; got {self.intensity!r}."
            )
        if (self.version, self.orientation) != (1, "RAS"):
            raise UsageError(
                f"This model prepares images by rules of version {self.version} with axes "
                f"{self.orientation}; this nidl_dcl knows version 1 with RAS. Install the nidl_dcl "
                "that wrote the model."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def rules(self) -> dict[str, Any]:
        """Return `to_dict` without `origin`, which changes no prepared value."""
        fields = self.to_dict()
        del fields["origin"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preparation:
        """Return the preparation that `to_dict` described.

        Raises
        ------
        UsageError
            For unknown fields.
        """
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UsageError(f"Unknown fields of an input contract: {', '.join(sorted(unknown))}.")
        origin = fields.get("origin")
        return cls(**{**fields, "origin": None if origin is None else Origin(**origin)})


def common_shape(
    images: Iterable[Any],
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0),
    masked: bool = False,
) -> Shape:
    """Return the default shape of prepared volumes, from fields of view.

    Parameters
    ----------
    images : iterable of path-like or nibabel image
        Only headers are read; files that cannot be read are left out.
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
        fields, failure = [], None
        for image in images:
            try:
                if hasattr(image, "dataobj"):
                    fields.append(_extent(image.shape[:3], affine_of(image)))
                    continue
                grid = read_header(Path(image))
            except (UnreadableVolumeError, OSError) as error:
                failure = failure or f"{image_name(image)}: {error}"
                continue
            fields.append(_extent(grid.shape, grid.affine))
        if not fields:
            raise UnreadableVolumeError(
                "No image has a readable header, so the size of volumes is not known"
                + (f". {failure}" if failure else ".")
            )
        field = np.median(fields, axis=0)
    x, y, z = (8 * math.ceil(mm / size / 8 - 1e-3) for mm, size in zip(field, spacing, strict=True))
    return x, y, z


def prepare_volume(image: Any, preparation: Preparation, mask_path: Any = None) -> Float32:
    """Return one image as the array that a model is trained on.

    Parameters
    ----------
    image : path-like or nibabel image
        One volume.
    preparation : Preparation
        The rules.
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
    2. *Centre*: the center of mass of the mask; without mask, of the voxels brighter than Otsu's
       threshold, counted from the 1st percentile, so that a constant offset (air at -1024) changes
       nothing. It gives way where the field of view would otherwise cut off part of a brain (a
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
       to 0, the 99th of the foreground to 1, within 0 and 1.5. Quantiles of more than 2**16 values
       are those of every second, third … one. ``"probability"`` and ``"signed"`` keep their values.
    """
    if preparation.masked and mask_path is None:
        raise UsageError(
            f"{image_name(image)}: this preparation needs a brain mask, none was given."
        )
    volume = read_volume(image)
    with errors_naming(image):
        data, affine = canonical(volume)
        require_range(data, preparation.intensity)
    shape = preparation.shape or common_shape(
        [nib.Nifti1Image(data, affine)], preparation.spacing, preparation.masked
    )
    sizes = voxel_sizes(affine)
    field = np.array(shape) * preparation.spacing / sizes
    inside = None
    if preparation.masked:
        mask = read_volume(mask_path)
        with errors_naming(mask_path):
            inside = mask_on_grid(data.shape, affine, mask)
        center = _center(inside, field, 0.001)
    else:
        seen = data[::2, ::2, ::2]
        if preparation.intensity != "robust":  # the 0 of a map is its background
            seen = np.abs(seen)
        center = 2 * _center(foreground(seen), field / 2, 0.01)
    axes = zip(data.shape, sizes, shape, preparation.spacing, center, strict=True)
    weights = [_weights(*axis) for axis in axes]
    with errors_naming(image):
        if inside is None:
            prepared = _seen(data, weights, preparation.intensity)
        else:
            prepared = _brain(data, inside, weights, preparation.intensity)
    # Torch rounds ten times faster than numpy, to the same numbers.
    return np.asarray(torch.from_numpy(prepared).half().float())[None]


def canonical(image: Volume) -> tuple[Float32, NDArray[np.float64]]:
    """Return values and affine in the closest RAS order; nothing is interpolated."""
    axes = nib.io_orientation(image.affine)
    data = nib.apply_orientation(image.dataobj, axes)
    return data, image.affine @ nib.orientations.inv_ornt_aff(axes, image.shape)


def _extent(shape: Any, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the field of view in mm along right-left, front-back and up-down."""
    extent = np.empty(3)
    extent[nib.io_orientation(affine)[:, 0].astype(int)] = shape * voxel_sizes(affine)
    return extent


def mask_on_grid(
    shape: tuple[int, ...], affine: NDArray[np.float64], mask: Volume
) -> NDArray[np.bool_]:
    """Return where a mask is above 0.5 on the grid of an image, interpolating if grids differ.

    Parameters
    ----------
    shape : tuple of three int
        Of the image.
    affine : ndarray of float64, shape (4, 4)
        Of the image, whose axes are in the closest RAS order.
    mask : Volume
        As read, in any orientation.

    Raises
    ------
    UnreadableVolumeError
        The mask does not overlap with the image.
    """
    data, own = canonical(mask)
    far = np.array([*shape, 1.0])
    same = data.shape == tuple(shape) and np.abs((own - affine) @ np.diag(far)).sum() < 0.25
    if not same:
        to_mask = np.linalg.inv(own) @ affine
        data = ndimage.affine_transform(data, to_mask, output_shape=shape, order=1)
    inside: NDArray[np.bool_] = data > 0.5
    if not inside.any():
        raise UnreadableVolumeError("The mask does not overlap with the image.", "affine")
    return inside


def _center(
    inside: NDArray[np.bool_], field: NDArray[np.float64], tail: float
) -> NDArray[np.float64]:
    """Return the center of mass in voxels, moved as far as `field` must to hold all but tails."""
    center = np.zeros(3)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        counts = np.count_nonzero(inside, axis=others)
        share = np.cumsum(counts) / max(1, counts.sum())
        first, last = np.searchsorted(share, [tail, 1 - tail])
        reach = (field[axis] - 1) / 2
        lowest, highest = last - reach, first + reach
        middle = float(counts @ np.arange(counts.size)) / max(1, counts.sum())
        center[axis] = np.clip(middle, lowest, highest) if lowest < highest else (first + last) / 2
    return center


def _weights(
    n_in: int, size: float, n_out: int, spacing: float, center: float
) -> sparse.csr_matrix:
    """Return how much each voxel along one axis adds to each prepared voxel, (n_out, n_in)."""
    step = spacing / size
    at = center + (np.arange(n_out) - (n_out - 1) / 2) * step
    if abs(step - 1) < 1e-3:
        step, at = 1.0, np.floor(at[0] + 0.5) + np.arange(n_out)
    width = max(step, 1.0)
    taps = np.ceil(at - width)[:, None] + np.arange(math.ceil(2 * width) + 1)
    weight = np.maximum(0, 1 - np.abs(taps - at[:, None]) / width)
    weight /= weight.sum(axis=1, keepdims=True)
    weight[(taps < 0) | (taps >= n_in)] = 0
    rows, columns = np.nonzero(weight)
    return sparse.csr_matrix(
        (weight[rows, columns].astype(np.float32), (rows, taps[rows, columns].astype(int))),
        shape=(n_out, n_in),
    )


def _average(values: Float32, weights: list[Any]) -> Float32:
    """Return the weighted sums of `values` along all three axes, in C order."""
    if all(_only_moves(matrix) for matrix in weights):
        moved = np.zeros([matrix.shape[0] for matrix in weights], np.float32)
        there = tuple(_span(matrix) for matrix in weights)
        moved[there] = values[tuple(_span(matrix.T.tocsr()) for matrix in weights)]
        return moved
    # In one order of axes and taps, so that the orientation in the file changes no bit: the third
    # axis first, which is the slowest in most files, so that nothing large is copied. Axes that
    # run backwards in memory are turned round by their weights.
    forward = tuple(slice(None, None, -1 if step < 0 else 1) for step in values.strides)
    lying = values[forward].transpose(2, 1, 0)
    for axis in (2, 1, 0):
        matrix = weights[axis]
        if values.strides[axis] < 0:
            mirrored = matrix.shape[1] - 1 - matrix.indices
            matrix = sparse.csr_matrix((matrix.data, mirrored, matrix.indptr), matrix.shape)
        rest = lying.shape[1:]
        # Sparse products add in one fixed order: the same bits on any number of threads.
        lying = (matrix @ np.ascontiguousarray(lying).reshape(len(lying), -1)).reshape(-1, *rest)
        lying = lying.transpose(1, 2, 0)
    return np.ascontiguousarray(lying.transpose(2, 1, 0))


def _only_moves(matrix: Any) -> bool:
    return bool(np.all(matrix.data == 1) and np.all(np.diff(matrix.indptr) <= 1))


def _span(matrix: Any) -> slice:
    """Return the rows that hold anything; they are neighbors."""
    used = np.flatnonzero(np.diff(matrix.indptr))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)


def _seen(data: Float32, weights: list[Any], intensity: str) -> Float32:
    """Return the prepared field of view: 0 where less than half of a voxel was seen."""
    shares = [np.asarray(matrix.sum(axis=1)).ravel() for matrix in weights]
    scales = [np.where(share >= 0.5, 1 / np.maximum(share, 0.5), 0) for share in shares]
    kept = [sparse.diags_array(x) @ m for x, m in zip(scales, weights, strict=True)]
    for matrix in kept:
        matrix.eliminate_zeros()
    prepared = _average(data, [matrix.astype(np.float32) for matrix in kept])
    if intensity == "robust":
        seen = prepared[tuple(_span(matrix) for matrix in kept)]
        values = thinned(seen)
        low = np.percentile(values, 1)
        bright = values[foreground(values)]
        high = np.percentile(bright, 99) if bright.size else low
        _to_unit(seen, low, high - low, offset=0.0, slope=1.0, lowest=0.0)
    return prepared


def _brain(data: Float32, inside: NDArray[np.bool_], weights: list[Any], intensity: str) -> Float32:
    """Return the average of brain voxels alone, times the share of brain."""
    share = _average(inside.astype(np.float32), weights)
    total = _average(data * inside, weights)
    mean = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    if intensity == "robust":
        values = thinned(mean[share >= 0.5])
        low, middle, high = np.percentile(values, [25, 50, 75])
        _to_unit(mean, middle, high - low, offset=0.65, slope=0.3, lowest=0.02)
    share[share < 0.1] = 0
    mean *= share
    return mean


def _to_unit(
    data: Float32, middle: Any, width: Any, *, offset: float, slope: float, lowest: float
) -> None:
    """Scale in place: `middle` goes to `offset`, and a difference of `width` to `slope`."""
    if not width > 0:
        raise UnreadableVolumeError("The voxels used have one value.", "constant")
    data -= np.float32(middle)
    data *= np.float32(slope / width)
    data += np.float32(offset)
    np.clip(data, np.float32(lowest), np.float32(1.5), out=data)

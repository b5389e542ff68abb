"""One image in, one prepared array out: the form that an encoder sees, whatever the image was.

Files are read by `image_file`; finding images and pairing them with masks is `bids_index`'s, random
views are `views`'s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage, sparse

from nidl_dcl.errors import UsageError
from nidl_dcl.image_file import (
    INTENSITIES,
    MAX_VOXELS,
    VOXEL_MM,
    Float32,
    Shape,
    UnreadableVolumeError,
    Volume,
    as_image,
    image_name,
    named,
    read_header,
    require_range,
)

__all__ = ["Origin", "Preparation", "common_shape", "prepare_volume"]

_COUNTED = 2**18  # values from which quantiles are taken

MASKED_FIELD_MM = (160.0, 192.0, 160.0)  # right-left, front-back, up-down: holds an adult brain


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the images were that a model learnt from, before preparation.

    Attributes
    ----------
    contrast : str
        BIDS suffix: ``"T1w"``, ``"probseg"`` …
    space : str
        ``"native"``, or the template whose space they are in.
    stripped : bool
        Without skull already when they were read.
    coarsest : float
        Longest side of a voxel among all images, in mm.
    """

    contrast: str
    space: str
    stripped: bool = False
    coarsest: float = 0.0


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
    orientation : {"RAS"}
        Of the axes of the prepared array.
    origin : Origin, optional
        What the images were; no rule, so preparations that differ in it are equal.
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
        if (self.version, self.orientation) != (1, "RAS"):
            raise UsageError(
                f"This model prepares images by rules of version {self.version} with axes "
                f"{self.orientation}; this nidl_dcl knows version 1 with RAS. Install the nidl_dcl "
                "that wrote the model."
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

    def rules(self) -> dict[str, Any]:
        """Return `to_dict` without `origin`: what decides about the numbers."""
        fields = self.to_dict()
        del fields["origin"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preparation:
        """Return the preparation that `to_dict` described; unknown fields are an error."""
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
                grid = image if hasattr(image, "dataobj") else read_header(Path(image))
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
       to 0, the 99th of the foreground to 1, within 0 and 1.5. Quantiles of more than 2**18 values
       are those of every second, third … one. ``"probability"`` and ``"signed"`` keep their values.
    """
    if preparation.masked and mask_path is None:
        raise UsageError(
            f"{image_name(image)}: this preparation needs a brain mask, none was given."
        )
    with named(image):
        data, affine = _canonical(as_image(image))
        require_range(data, preparation.intensity)
    shape = preparation.shape or common_shape(
        [nib.Nifti1Image(data, affine)], preparation.spacing, preparation.masked
    )
    sizes = voxel_sizes(affine)
    field = np.array(shape) * preparation.spacing / sizes
    inside = None
    if preparation.masked:
        with named(mask_path):
            inside = _mask_on(data.shape, affine, as_image(mask_path))
        centre = _centre(inside, field, 0.001)
    else:
        centre = 2 * _centre(_foreground(np.abs(data[::2, ::2, ::2])), field / 2, 0.01)
    axes = zip(data.shape, sizes, shape, preparation.spacing, centre, strict=True)
    prepared, share = _resampled(data, inside, [_weights(*axis) for axis in axes])
    if preparation.intensity == "robust":
        with named(image):
            prepared = _to_unit(prepared, share >= 0.5, masked=preparation.masked)
    prepared *= np.where(share < 0.1, 0, share)
    # In one order in memory, as from a cache: sums depend on it in the last digit.
    return np.ascontiguousarray(prepared.astype(np.float16), dtype=np.float32)[None]


def _canonical(image: Volume) -> tuple[Float32, NDArray[np.float64]]:
    axes = nib.io_orientation(image.affine)
    data = nib.apply_orientation(image.dataobj, axes)
    return data, image.affine @ nib.orientations.inv_ornt_aff(axes, image.shape)


def _extent(shape: Any, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the field of view in mm along right-left, front-back and up-down."""
    extent = np.empty(3)
    extent[nib.io_orientation(affine)[:, 0].astype(int)] = shape * voxel_sizes(affine)
    return extent


def _mask_on(
    shape: tuple[int, ...], affine: NDArray[np.float64], mask: Volume
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


def _thinned(values: Float32) -> Float32:
    """Return at most 2**18 of many values, evenly spaced: enough for any quantile."""
    flat = values.ravel()
    return flat[:: max(1, -(-flat.size // _COUNTED))]


def _foreground(values: Float32) -> NDArray[np.bool_]:
    """Return where `values` (>= 0) exceed Otsu's threshold."""
    counted = _thinned(values)
    top = float(np.percentile(counted, 99.5)) or float(values.max())
    counts, edges = np.histogram(counted, bins=256, range=(0.0, top))
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
            rest = values.shape[1:]
            if matrix.nnz == len(values) and np.all(matrix.data == 1):  # moved, and nothing else
                first = int(matrix.nonzero()[0][0])
                moved = np.zeros((matrix.shape[0], *rest), np.float32)
                moved[first : first + len(values)] = values
            else:
                flat = np.ascontiguousarray(values).reshape(len(values), -1)
                moved = (matrix @ flat).reshape(-1, *rest)
            values = moved.transpose(1, 2, 0)
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
    values = _thinned(data[used])
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

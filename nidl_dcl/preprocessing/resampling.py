"""One interpolation, from the image as it came to the grid of the template."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.template import Template
from nidl_dcl.volumes.reading import Float32

__all__ = ["around", "resample"]

_FWHM = 2.355  # standard deviations


def resample(
    data: NDArray[Any],
    affine: NDArray[np.float64],
    matrix: NDArray[np.float64],
    template: Template,
    *,
    order: int = 3,
) -> Float32:
    """Return an image on the grid of the template, 0 beyond its field of view.

    Where the template's voxels are coarser than the image's, the image is smoothed first, so that
    an output voxel is an average and not a sample.

    Parameters
    ----------
    data : ndarray, shape (i, j, k)
        Numbers, or a mask.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm.
    matrix : ndarray of float64, shape (4, 4)
        From mm of the image to mm of the template.
    template : Template
        Whose grid is wanted.
    order : {1, 3}
        Of the spline: linear or cubic.
    """
    to_image = np.linalg.inv(matrix @ affine) @ template.affine
    values = np.asarray(data, np.float32)
    # Voxels of the template measured along each axis of the image.
    steps = voxel_sizes(np.linalg.inv(to_image))
    sigma = np.sqrt(np.maximum(0, (1 / steps) ** 2 - 1)) / _FWHM
    if sigma.max() > 0.4:
        values = ndimage.gaussian_filter(values, sigma, truncate=3)
    return np.asarray(
        ndimage.affine_transform(values, to_image, output_shape=template.data.shape, order=order)
    )


def around(mask: NDArray[np.bool_], margin: int | NDArray[np.int_]) -> tuple[slice, ...]:
    """Return the part of an array that holds the mask, and `margin` voxels beyond it."""
    part = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(
        slice(max(0, cut.start - int(more)), cut.stop + int(more))
        for cut, more in zip(part, np.broadcast_to(margin, 3), strict=True)
    )

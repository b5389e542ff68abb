"""Arrays with an affine as SimpleITK images, and transforms as text that ITK and ANTs read.

ITK counts mm to the left and the back, nibabel to the right and the front: that difference stays in
this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nidl_dcl.volumes.reading import Float32

__all__ = ["LPS", "from_itk", "to_itk", "transform_text"]

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From mm of nibabel to mm of ITK, and back."""


def to_itk(data: NDArray[Any], affine: NDArray[np.float64]) -> Any:
    """Return a SimpleITK image of float32, or of uint8 for a mask.

    Parameters
    ----------
    data : ndarray, shape (i, j, k)
        Numbers, or bool for a mask.
    affine : ndarray of float64, shape (4, 4)
        From voxels to mm, as nibabel has it.
    """
    from SimpleITK import GetImageFromArray

    kind = np.uint8 if data.dtype == np.bool_ else np.float32
    image = GetImageFromArray(np.ascontiguousarray(data.T, dtype=kind))
    axes = (LPS @ affine)[:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((axes / sizes).ravel().tolist())
    image.SetOrigin((LPS @ affine)[:3, 3].tolist())
    return image


def from_itk(image: Any) -> Float32:
    """Return the values of a SimpleITK image, shape (i, j, k)."""
    from SimpleITK import GetArrayViewFromImage

    return np.ascontiguousarray(GetArrayViewFromImage(image).T, dtype=np.float32)


def transform_text(matrix: NDArray[np.float64]) -> str:
    """Return an affine transform as an ITK transform file (``.txt``).

    Parameters
    ----------
    matrix : ndarray of float64, shape (4, 4)
        From points of the image to points of the template, in mm as nibabel has them. ITK, and so
        the file, holds the other direction: from template to image, which is what
        ``antsApplyTransforms -i image -r template -t file`` takes to bring the image into the
        template's space.
    """
    pull = LPS @ np.linalg.inv(matrix) @ LPS
    numbers = [*pull[:3, :3].ravel(), *pull[:3, 3]]
    return (
        "#Insight Transform File V1.0\n"
        "#Transform 0\n"
        "Transform: AffineTransform_double_3_3\n"
        f"Parameters: {' '.join(f'{x:.17g}' for x in numbers)}\n"
        "FixedParameters: 0 0 0\n"
    )

"""Affine registration of a brain to a template, and resampling to the template's grid."""

from __future__ import annotations

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.itk import LPS, from_itk, to_itk
from nidl_dcl.preprocessing.template import Template
from nidl_dcl.volumes.reading import Float32

__all__ = ["register_affine", "resample", "to_rigid"]


def register_affine(
    brain: Float32,
    mask: NDArray[np.bool_],
    affine: NDArray[np.float64],
    template: Template,
) -> NDArray[np.float64]:
    """Return the affine transform from mm of the image to mm of the template, shape (4, 4)."""
    import SimpleITK as sitk

    near, far = _center(template.mask, template.affine), _center(mask, affine)
    volume = mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    scale = (volume / template.volume_ml) ** (1 / 3)
    transform = sitk.AffineTransform(3)
    transform.SetCenter((LPS[:3, :3] @ near).tolist())
    transform.SetTranslation((LPS[:3, :3] @ (far - near)).tolist())
    transform.SetMatrix((np.eye(3) * scale).ravel().tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsCorrelation()
    around = ndimage.binary_dilation(template.mask, iterations=3)
    method.SetMetricFixedMask(to_itk(around, template.affine))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([1.0, 0.25], 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        2.0, 1e-2, 100, relaxationFactor=0.5, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([4, 2])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, True)
    method.Execute(to_itk(template.data, template.affine), to_itk(brain, affine))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    center = np.array(transform.GetCenter())
    matrix[:3, 3] = center + transform.GetTranslation() - matrix[:3, :3] @ center
    return np.linalg.inv(LPS @ matrix @ LPS)


def _center(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the center of mass in mm."""
    return np.asarray(affine[:3, :3] @ ndimage.center_of_mass(mask) + affine[:3, 3])


def to_rigid(
    matrix: NDArray[np.float64], center: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return rotation and translation of an affine transform that send `center` where it does."""
    u, _, v = np.linalg.svd(matrix[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = u @ v
    rigid[:3, 3] = matrix[:3, :3] @ center + matrix[:3, 3] - rigid[:3, :3] @ center
    return rigid


def resample(
    data: NDArray[np.generic],
    affine: NDArray[np.float64],
    matrix: NDArray[np.float64],
    template: Template,
    *,
    order: int = 3,
) -> Float32:
    """Return an image on the grid of the template, 0 beyond its field of view."""
    to_source = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ template.affine
    values = np.asarray(data, np.float32)
    steps = voxel_sizes(to_source)  # voxels of the image per voxel of the template
    widths = np.sqrt(np.maximum(0, steps.max() ** 2 - 1)) / 2.355
    if widths > 0.5:
        values = ndimage.gaussian_filter(values, widths, truncate=3)
    return np.asarray(
        ndimage.affine_transform(
            values, to_source, output_shape=template.data.shape, order=order, prefilter=order > 1
        )
    )

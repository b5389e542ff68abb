from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nidl_dcl.preprocessing.itk import LPS, from_itk, to_itk, transform_text
from nidl_dcl.preprocessing.resampling import resample
from nidl_dcl.preprocessing.template import load_template

sitk = pytest.importorskip("SimpleITK")

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [10, -15, 20], degrees=True).as_matrix() * [1, 2, 3]
OBLIQUE[0, 1] += 0.2  # a little shear, which the reader accepts
OBLIQUE[:3, 3] = (-30, 12, 7)


def test_voxels_keep_their_place_and_value():
    data = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    image = to_itk(data, OBLIQUE)
    place = np.array(image.TransformIndexToPhysicalPoint((1, 2, 3)))
    np.testing.assert_allclose(place, (LPS @ OBLIQUE @ [1, 2, 3, 1])[:3], atol=1e-6)
    assert image.GetPixel(1, 2, 3) == data[1, 2, 3]
    np.testing.assert_array_equal(from_itk(image), data)
    assert to_itk(data > 0.5, OBLIQUE).GetPixelID() == sitk.sitkUInt8


def test_itk_resamples_with_the_written_transform_as_we_do(tmp_path):
    """The direction of the file: it brings the image to the template when ITK resamples with it."""
    template = load_template(8)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", [8, -5, 12], degrees=True).as_matrix() * 1.1
    moved[:3, 3] = (9, -14, 5)
    grid = np.diag([8.0, 8, 8, 1])
    grid[:3, 3] = (-100, -110, -90)
    data = ndimage.gaussian_filter(np.random.default_rng(1).random((28, 30, 26)), 2)
    file = tmp_path / "from-T1w_to-MNI_mode-image_xfm.txt"
    file.write_text(transform_text(moved))

    theirs = sitk.Resample(
        to_itk(data, grid),
        to_itk(template.data, template.affine),
        sitk.ReadTransform(str(file)),
        sitk.sitkLinear,
    )

    ours = resample(data, grid, moved, template, order=1)
    np.testing.assert_allclose(
        from_itk(theirs)[5:-5, 5:-5, 5:-5], ours[5:-5, 5:-5, 5:-5], atol=1e-5
    )
    assert ours[5:-5, 5:-5, 5:-5].min() > 0

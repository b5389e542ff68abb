from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from made_images import AFFINE, brain, image, save

from nidl_dcl.errors import NidlDclError
from nidl_dcl.preprocessing.head import read_head


@pytest.mark.parametrize("axes", ["RAS", "LPI", "PSR", "IRA"])
def test_a_head_is_turned_to_ras_and_its_mask_back_to_the_file(tmp_path, axes):
    data = brain()[0]
    upright = image(data)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes)
    )
    path = tmp_path / "head.nii"
    stored = upright.as_reoriented(turn)
    stored.to_filename(path)

    head = read_head(path)

    np.testing.assert_array_equal(head.data, data)
    np.testing.assert_allclose(head.affine, AFFINE)
    np.testing.assert_array_equal(head.as_stored(head.data), stored.get_fdata())
    np.testing.assert_allclose(head.stored_affine, stored.affine)
    assert head.voxel_ml == pytest.approx(0.008)


def test_a_broken_file_is_refused_with_its_code(tmp_path):
    path = save(tmp_path / "head.nii.gz")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(NidlDclError, match="ends early") as error:
        read_head(path)
    assert error.value.code == "truncated"


def test_forms_that_disagree_about_left_and_right_are_said(tmp_path):
    made = image()
    mirrored = AFFINE @ np.diag([-1.0, 1, 1, 1])
    made.set_qform(mirrored, 1)
    made.to_filename(tmp_path / "head.nii")
    assert read_head(tmp_path / "head.nii").side_in_doubt
    image().to_filename(tmp_path / "same.nii")
    assert not read_head(tmp_path / "same.nii").side_in_doubt


def test_forms_that_disagree_about_the_place_are_said(tmp_path):
    made = image()
    moved = AFFINE.copy()
    moved[:3, 3] += [0, 40, -30]
    made.set_sform(moved, 2)
    made.to_filename(tmp_path / "head.nii")
    assert "50.0 mm" in read_head(tmp_path / "head.nii").place_in_doubt
    image().to_filename(tmp_path / "same.nii")
    assert read_head(tmp_path / "same.nii").place_in_doubt == ""

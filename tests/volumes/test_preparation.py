from __future__ import annotations

import json

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
from made_images import AFFINE, SHAPE, brain, image, save

from nidl_dcl.errors import UsageError
from nidl_dcl.volumes.preparation import Preparation, common_shape, prepare_volume
from nidl_dcl.volumes.reading import UnreadableVolumeError


def test_a_preparation_survives_json_and_equals_itself():
    made = Preparation((4, 4, 3.5), (8, 9, 10), masked=True, intensity="signed")
    assert Preparation.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made == Preparation([4.0, 4.0, 3.5], [8, 9, 10], masked=True, intensity="signed")


@pytest.mark.parametrize(
    "fields",
    [
        {"spacing": (4, 4)},
        {"spacing": (4, 4, 0)},
        {"spacing": (4, 4, float("nan"))},
        {"shape": (8, 8)},
        {"shape": (8, 8, 0)},
        {"intensity": "zscore"},
        {"version": 2},
        {"color": True},
    ],
)
def test_a_preparation_that_makes_no_sense_is_refused(fields):
    with pytest.raises(UsageError):
        Preparation.from_dict(fields)


MASKED = Preparation((4, 4, 4), (16, 20, 16), masked=True)


def prepared(preparation=MASKED, data=None, mask=None, affine=AFFINE):
    made, inside = brain()
    mask = image(inside if mask is None else mask, affine, np.uint8)
    return prepare_volume(image(made if data is None else data, affine), preparation, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_the_prepared_array_is_float32_with_the_asked_shape_in_half_precision(masked):
    made = prepared(Preparation((4, 4, 4), (16, 20, 12), masked=masked))
    assert made.shape == (1, 16, 20, 12)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, made.astype(np.float16))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("codes", ["PSR", "LAS", "RAI", "SLP"])
def test_the_stored_orientation_does_not_matter(codes, masked):
    preparation = Preparation((4, 4, 4), (16, 20, 16), masked=masked)
    axes = nib.orientations.axcodes2ornt(codes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), axes)
    data, mask = brain()
    turned, turned_mask = image(data).as_reoriented(turn), image(mask).as_reoriented(turn)
    assert "".join(nib.aff2axcodes(turned.affine)) == codes
    np.testing.assert_array_equal(
        prepare_volume(turned, preparation, turned_mask), prepared(preparation)
    )


def test_prepared_axes_run_left_right_back_front_down_up():
    ramps = np.indices(SHAPE).astype(np.float32)
    for axis in range(3):
        made = prepared(Preparation((4, 4, 4), (6, 6, 6), intensity="signed"), data=ramps[axis])[0]
        # One prepared voxel is 4 mm, one stored voxel (one unit of the ramp) 2 mm.
        np.testing.assert_allclose(np.diff(made, axis=axis), 2, atol=0.05)


@pytest.mark.parametrize("size", [1.5, 3.0, 5.0])
def test_linear_ramps_stay_linear_at_any_spacing(size):
    ramp = np.indices(SHAPE).astype(np.float32)[1] / 10
    made = prepared(Preparation((size,) * 3, (8, 6, 8), intensity="signed"), data=ramp)[0]
    np.testing.assert_allclose(np.diff(made, axis=1), size / 20, atol=0.01)


def test_coarsening_averages_what_it_cannot_show():
    checks = np.indices(SHAPE).sum(axis=0) % 2 + 1.0
    made = prepared(Preparation((4, 4, 4), (12, 12, 12), intensity="signed"), data=checks)
    np.testing.assert_allclose(made[:, 2:-2, 2:-2, 2:-2], 1.5, atol=0.01)


def test_an_image_that_has_the_spacing_is_only_moved_by_whole_voxels():
    data, mask = brain()
    made = prepared(Preparation((2, 2, 2), (30, 40, 30), masked=True, intensity="signed"))[0]
    expected = np.where(mask, data, 0).astype(np.float16)
    assert np.count_nonzero(made) == mask.sum()
    corner = np.argwhere(made).min(axis=0) - np.argwhere(mask).min(axis=0)
    np.testing.assert_array_equal(
        made[made != 0], expected[tuple((np.argwhere(made) - corner).T)].astype(np.float32)
    )


def test_background_is_exactly_zero_and_brain_is_not():
    made = prepared(Preparation((2, 2, 2), (30, 40, 30), masked=True))
    assert np.count_nonzero(made) == brain()[1].sum()
    assert made.min() == 0
    assert np.all(prepared()[:, :2] == 0)


def test_what_lies_outside_the_mask_changes_nothing():
    data, mask = brain()
    np.testing.assert_array_equal(prepared(data=np.where(mask, data, 5000.0)), prepared())


def test_the_median_of_the_brain_is_065_and_its_quartiles_are_03_apart():
    made = prepared(Preparation((2, 2, 2), (32, 40, 32), masked=True))
    low, middle, high = np.percentile(made[made > 0], [25, 50, 75])
    assert middle == pytest.approx(0.65, abs=0.01)
    assert high - low == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_gain_and_offset_of_the_scanner_do_not_matter(masked):
    preparation = Preparation((4, 4, 4), (16, 20, 16), masked=masked)
    scanned = prepared(preparation, data=brain()[0] * 0.25 + (64 if masked else 0))
    np.testing.assert_allclose(scanned, prepared(preparation), atol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [-32768, -1024, -100, 500, 32768])
def test_a_constant_offset_changes_neither_place_nor_values(offset, masked):
    preparation = Preparation((4, 4, 4), (14, 18, 14), masked=masked)
    data, mask = brain(shift=(4, -4, 2))
    data = np.round(data)
    noise = np.random.default_rng(0).integers(0, 30, data.shape)
    made = prepared(preparation, data=data + noise, mask=mask)
    shifted = prepared(preparation, data=data + noise + offset, mask=mask)
    np.testing.assert_allclose(shifted, made, atol=2e-3)
    scaled = prepared(preparation, data=3 * (data + noise) + offset, mask=mask)
    np.testing.assert_allclose(scaled, made, atol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_where_the_head_lies_in_the_field_does_not_matter(masked):
    preparation = Preparation((4, 4, 4), (14, 18, 14), masked=masked)
    data, mask = brain(shift=(4, -4, 2))
    np.testing.assert_allclose(
        prepared(preparation, data=data, mask=mask)[0],
        prepared(preparation)[0],
        atol=1e-3 if masked else 0.3,  # the ramp in the synthetic tissue moves Otsu's threshold
    )


def test_a_brain_that_fits_is_not_cropped():
    mask = brain()[1]
    mask[:, 28:] = False
    mask[14:24, 28:46, 13:21] = True  # a long process: the center of mass is far from the middle
    field = np.ptp(np.argwhere(mask), axis=0) + 3
    made = prepared(
        Preparation((2, 2, 2), tuple(field), masked=True, intensity="signed"), mask=mask
    )
    assert np.count_nonzero(made) > 0.998 * mask.sum()


def test_beyond_the_field_of_view_is_zero():
    made = prepared(Preparation((4, 4, 4), (30, 30, 30)))[0]
    assert np.all(made[:3] == 0)
    assert np.all(made[-3:] == 0)


def test_a_mask_on_another_grid_is_brought_to_the_image():
    mask = image(brain()[1], dtype=np.uint8)
    wide = nib.processing.resample_to_output(mask, (1.0, 1.0, 1.0), order=1, mode="nearest")
    flipped = wide.as_reoriented(nib.orientations.axcodes2ornt("LPI"))
    made = prepare_volume(image(), MASKED, flipped)
    assert np.abs(made - prepared()).mean() < 0.01


def test_a_mask_elsewhere_is_refused():
    far = AFFINE.copy()
    far[:3, 3] += 500
    with pytest.raises(UnreadableVolumeError, match="overlap") as caught:
        prepare_volume(image(), MASKED, image(brain()[1], far, np.uint8))
    assert caught.value.code == "affine"


def test_a_masked_preparation_without_a_mask_is_refused():
    with pytest.raises(UsageError, match="mask"):
        prepare_volume(image(), MASKED)


def test_an_unmasked_preparation_ignores_a_mask():
    plain = Preparation((4, 4, 4), (16, 20, 16))
    np.testing.assert_array_equal(prepared(plain), prepare_volume(image(), plain))


def test_one_value_inside_the_mask_is_refused():
    with pytest.raises(UnreadableVolumeError) as caught:
        prepared(data=np.where(brain()[1], 7.0, 1.0))
    assert caught.value.code == "constant"


def test_tissue_maps_keep_their_values():
    mask = brain()[1]
    tissue = np.where(mask, 0.75, 0)
    made = prepared(Preparation((4, 4, 4), (16, 20, 16), intensity="probability"), data=tissue)
    assert made.max() == 0.75
    assert made.min() == 0


def test_a_file_gives_what_the_image_in_memory_gives(tmp_path):
    mask = brain()[1]
    path = save(tmp_path / "a.nii.gz", dtype=np.int16)
    mask_path = save(tmp_path / "m.nii", mask, dtype=np.uint8)
    from_file = prepare_volume(path, MASKED, mask_path)
    np.testing.assert_array_equal(
        from_file, prepare_volume(nib.load(path), MASKED, nib.load(mask_path))
    )
    np.testing.assert_array_equal(from_file, prepare_volume(str(path), MASKED, str(mask_path)))


def flattened():
    made = image()
    made.affine[0] = made.affine[1]
    return made


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: nib.Nifti1Image(np.ones((8, 8, 8, 2), np.float32), AFFINE), "dimensions"),
        (lambda: nib.Nifti1Image(np.ones(SHAPE, np.complex64), AFFINE), "dtype"),
        (lambda: nib.Nifti1Image(np.ones(SHAPE, np.float32), AFFINE), "constant"),
        (lambda: flattened(), "affine"),
    ],
)
def test_an_image_in_memory_is_checked_as_a_file_is(make, code):
    with pytest.raises(UnreadableVolumeError) as caught:
        prepare_volume(make(), Preparation())
    assert caught.value.code == code


def test_a_broken_mask_is_named(tmp_path):
    (tmp_path / "mask.nii.gz").write_text("no")
    with pytest.raises(UnreadableVolumeError, match=r"mask\.nii\.gz") as caught:
        prepare_volume(image(), MASKED, tmp_path / "mask.nii.gz")
    assert caught.value.code == "not_nifti"


def test_the_default_shape_is_the_median_field_of_view_in_multiples_of_eight(tmp_path):
    fields = [(40, 48, 36), (40, 50, 36), (90, 90, 90)]
    paths = [
        save(tmp_path / f"{i}.nii.gz", np.arange(np.prod(f)).reshape(f))
        for i, f in enumerate(fields)
    ]
    (tmp_path / "broken.nii").write_text("no")
    assert common_shape([*paths, tmp_path / "broken.nii"], (2.5, 2.5, 2)) == (32, 40, 40)


def test_the_default_shape_is_in_ras_order():
    turned = image(np.arange(8 * 48 * 24).reshape(8, 48, 24))
    axes = nib.orientations.axcodes2ornt("PSR")
    turned = turned.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), axes))
    assert turned.shape == (48, 24, 8)
    assert common_shape([turned], (2, 2, 2)) == (8, 48, 24)


def test_the_default_shape_of_masked_brains_is_a_brain():
    assert common_shape([], masked=True) == (40, 48, 40)
    assert common_shape([], (1, 1, 1), masked=True) == (160, 192, 160)


def test_no_readable_header_is_an_error(tmp_path):
    with pytest.raises(UnreadableVolumeError):
        common_shape([tmp_path / "missing.nii"])


def test_real_brains_fill_their_field(ixi_dir):
    for path in sorted(ixi_dir.glob("sub-*/anat/*_T1w.nii.gz"))[:3]:
        name = path.name.replace("_T1w", "_desc-brain_mask")
        mask = ixi_dir / "derivatives" / "dlmuse" / path.relative_to(ixi_dir).parent / name
        made = prepare_volume(path, Preparation(masked=True), mask)[0]
        assert made.shape == (40, 48, 40)
        assert 0.15 < np.mean(made > 0) < 0.6
        # Both hemispheres and the middle of the field hold brain; the corners do not.
        assert made[20, 24, 20] > 0
        assert not made[:4, :4].any()

from __future__ import annotations

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest

from nidl_dcl import volumes
from nidl_dcl.errors import NidlDclError, UsageError
from nidl_dcl.volumes import (
    Check,
    Preparation,
    UnreadableVolumeError,
    check_volume,
    common_shape,
    prepare_volume,
    read_volume,
)

SHAPE = (40, 48, 36)
AFFINE = np.array([[2.0, 0, 0, -40], [0, 2.0, 0, -50], [0, 0, 2.0, -30], [0, 0, 0, 1]])


def brain(shape=SHAPE, shift=(0, 0, 0)):
    """Return an egg with three tissues, different along each axis, and its mask."""
    centre = (np.array(shape) - 1) / 2 + shift
    x, y, z = (g - c for g, c in zip(np.indices(shape), centre, strict=True))
    radius = (x / 12) ** 2 + (y / 17) ** 2 + (z / 11) ** 2
    mask = (radius < 1) & ~((x > 6) & (y > 6))
    data = np.where(radius < 0.5, 900.0, 600.0) + 4 * x - 3 * y + 5 * z
    data[(np.abs(x - 3) < 2) & (np.abs(y) < 5) & (np.abs(z) < 3)] = 150
    return np.where(mask, data, 40.0).astype(np.float32), mask


def image(data=None, affine=AFFINE, dtype=np.float32):
    made = nib.Nifti1Image((brain()[0] if data is None else data).astype(dtype), affine)
    made.set_qform(affine, 1)
    made.set_sform(affine, 1)
    return made


def save(path: Path, data=None, affine=AFFINE, dtype=np.float32, **header) -> Path:
    """Write an image, then overwrite header fields as no library would let one."""
    image(data, affine, dtype).to_filename(path)
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as stream:
        content = bytearray(stream.read())
    if header:
        fields = nib.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in header.items():
            fields[name] = value
        content[:348] = fields.binaryblock
        with opener(path, "wb") as stream:
            stream.write(bytes(content))
    return path


def tree(folder: Path, kind: str) -> Path:
    """Make one broken file."""
    path = folder / "sub-01_T1w.nii.gz"
    plain = folder / "sub-01_T1w.nii"
    data = brain()[0]
    match kind:
        case "missing":
            pass
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "dangling annex link":
            path.symlink_to("../.git/annex/objects/xx/SHA256E-s1--0.nii.gz")
        case "annex pointer":
            path.write_text("/annex/objects/SHA256E-s1--0.nii.gz\n")
        case "lfs pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case "html":
            path.write_text("<html>404</html>")
        case "pair header":
            return save(plain, magic=b"ni1")
        case "data before header":
            return save(plain, vox_offset=12)
        case "other extension":
            return save(plain).rename(folder / "sub-01_T1w.img")
        case "cut gzip":
            content = save(path).read_bytes()
            path.write_bytes(content[: len(content) // 2])
        case "cut gzip trailer":
            path.write_bytes(save(path).read_bytes()[:-4])
        case "cut data":
            save(plain).write_bytes(plain.read_bytes()[:-1])
            return plain
        case "cut header":
            plain.write_bytes(save(plain).read_bytes()[:200])
            return plain
        case "cut before compression":
            path.write_bytes(gzip.compress(save(plain).read_bytes()[:-1000]))
        case "flipped byte":
            content = bytearray(save(path, dtype=np.uint8).read_bytes())
            content[-8] ^= 1
            path.write_bytes(content)
        case "four volumes":
            return save(path, np.stack([data] * 4, axis=-1))
        case "slice":
            return save(path, data[:, :, :1])
        case "plane":
            return save(path, data[:, :, 0])
        case "negative side":
            return save(path, dim=[3, 40, -48, 36, 1, 1, 1, 1])
        case "nine axes":
            return save(path, dim=[9, 40, 48, 36, 1, 1, 1, 1])
        case "huge":
            return save(path, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
        case "lying":
            return save(path, dim=[3, 600, 600, 600, 1, 1, 1, 1])
        case "thin":
            return save(path, data[:, :, :5])
        case "complex":
            return save(path, dtype=np.complex64)
        case "colour":
            return save(path, datatype=128)
        case "infinite slope":
            return save(path, dtype=np.uint8, scl_slope=np.inf, scl_inter=0)
        case "mostly NaN":
            return save(path, np.where(brain()[1], data, np.nan))
        case "zeros":
            return save(path, np.zeros(SHAPE))
        case "astronomic":
            return save(path, data * 1e30)
        case "singular":
            return save(path, sform_code=1, qform_code=0, srow_x=[0, 0, 0, 0])
        case "NaN affine":
            return save(path, qform_code=0, srow_y=[np.nan] * 4)
        case "sheared":
            return save(path, qform_code=0, srow_x=[2, 1.5, 0, 0])
        case "metres":
            return save(path, affine=np.diag([0.002, 0.002, 0.002, 1]))
    return path


BROKEN = {
    "missing": "unreadable",
    "empty": "empty",
    "folder": "not_a_file",
    "fifo": "not_a_file",
    "dangling annex link": "not_fetched",
    "annex pointer": "not_fetched",
    "lfs pointer": "not_fetched",
    "html": "not_nifti",
    "pair header": "not_nifti",
    "data before header": "not_nifti",
    "other extension": "extension",
    "cut gzip": "truncated",
    "cut gzip trailer": "truncated",
    "cut data": "truncated",
    "cut header": "truncated",
    "cut before compression": "truncated",
    "flipped byte": "crc",
    "four volumes": "dimensions",
    "slice": "dimensions",
    "plane": "dimensions",
    "negative side": "dimensions",
    "nine axes": "dimensions",
    "huge": "too_large",
    "lying": "truncated",
    "thin": "too_small",
    "complex": "dtype",
    "colour": "dtype",
    "infinite slope": "scaling",
    "mostly NaN": "non_finite",
    "zeros": "constant",
    "astronomic": "range",
    "singular": "affine",
    "NaN affine": "affine",
    "sheared": "affine",
    "metres": "spacing",
}


@pytest.mark.parametrize("zlib_only", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_skipped_with_its_code(kind, zlib_only, tmp_path, monkeypatch):
    if zlib_only:
        monkeypatch.setattr(volumes, "_GzipFile", gzip.GzipFile)
    path = tree(tmp_path, kind)
    check = check_volume(path)
    assert (check.status, check.code) == ("skip", BROKEN[kind])
    assert check.message.endswith(".")
    with pytest.raises(UnreadableVolumeError, match=path.name) as caught:
        read_volume(path)
    assert caught.value.code == check.code
    assert check.message in str(caught.value)


def test_a_file_one_may_not_read_is_skipped(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "a.nii")
    monkeypatch.setattr(Path, "open", refuse)
    assert check_volume(path).code == "permission"


@pytest.mark.parametrize("kind", ["huge", "lying"])
def test_nothing_is_allocated_for_what_a_header_promises_in_vain(kind, tmp_path):
    path = tree(tmp_path, kind)
    tracemalloc.start()
    check_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def nan_in(data):
    data = data.copy()
    data[3, 4, :5] = np.nan
    return data


ODD = {
    "a few NaN": ("non_finite", lambda p: save(p, nan_in(brain()[0]))),
    "no orientation": ("affine", lambda p: save(p, sform_code=0, qform_code=0)),
    "broken sform": ("affine", lambda p: save(p, srow_x=[np.nan] * 4)),
    "two voxel sizes": (
        "spacing",
        lambda p: save(p, pixdim=[1, 1, 1, 3, 1, 1, 1, 1], qform_code=0),
    ),
    "compressed": ("extension", lambda p: save(p).rename(p.with_suffix(""))),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_repaired_with_a_warning(kind, tmp_path):
    code, make = ODD[kind]
    path = make(tmp_path / "sub-01_T1w.nii.gz")
    assert (check_volume(path).status, check_volume(path).code) == ("warn", code)
    assert np.all(np.isfinite(read_volume(path).get_fdata()))


def test_non_finite_voxels_become_zero(tmp_path):
    path = save(tmp_path / "a.nii.gz", nan_in(brain()[0]))
    np.testing.assert_array_equal(
        read_volume(path).get_fdata(), np.nan_to_num(nan_in(brain()[0]), nan=0)
    )


def test_a_broken_sform_gives_way_to_the_qform(tmp_path):
    path = save(tmp_path / "a.nii.gz", srow_x=[np.nan] * 4)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("make", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_values_and_affine_are_what_nibabel_reads(dtype, order, make, suffix, tmp_path):
    made = make(brain()[0], AFFINE, header=make.header_class(endianness=order))
    made.set_data_dtype(np.dtype(dtype))  # integers get a slope and an intercept
    made.to_filename(tmp_path / f"a{suffix}")
    expected = nib.load(tmp_path / f"a{suffix}")
    found = read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(
        np.asanyarray(found.dataobj), expected.get_fdata().astype(np.float32)
    )
    np.testing.assert_array_equal(found.affine, expected.affine)
    assert check_volume(tmp_path / f"a{suffix}") == Check("ok", "ok", "")


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
    path = save(tmp_path / "a.nii.gz", brain()[0][..., None, None])
    assert read_volume(path).shape == SHAPE
    assert check_volume(path).status == "ok"


def test_several_gzip_members_and_an_extension_are_read(tmp_path):
    made = image()
    made.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 3000))
    content = made.to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]) + bytes(100))
    np.testing.assert_array_equal(read_volume(path).get_fdata(), brain()[0])


@pytest.mark.parametrize(
    ("intensity", "factor", "status"),
    [
        ("robust", 1.0, "ok"),
        ("probability", 1.0, "skip"),
        ("probability", 1e-3, "ok"),
        ("signed", -1.0, "ok"),
        ("signed", 1e3, "skip"),
    ],
)
def test_values_must_suit_the_intensity_rule(intensity, factor, status, tmp_path):
    path = save(tmp_path / "a.nii.gz", brain()[0] * factor)
    check = check_volume(path, intensity=intensity)
    assert check.status == status
    assert check.code == ("ok" if status == "ok" else "range")


def test_the_error_keeps_its_code_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableVolumeError("a.nii: cut.", "truncated")))
    assert (str(error), error.code, error.exit_status) == ("a.nii: cut.", "truncated", 3)
    assert isinstance(error, NidlDclError)


# Preparation ----------------------------------------------------------------------------------


def test_a_preparation_survives_json_and_equals_itself():
    made = Preparation((4, 4, 3.5), (8, 9, 10), masked=True, intensity="signed")
    assert Preparation.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made == Preparation([4.0, 4.0, 3.5], [8, 9, 10], masked=True, intensity="signed")
    assert made.field_of_view == (32, 36, 35)
    assert Preparation().field_of_view is None


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
        {"colour": True},
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
    mask[14:24, 28:46, 13:21] = True  # a long process: the centre of mass is far from the middle
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


def test_real_brains_fill_their_field(ixi):
    for path in sorted(ixi.glob("sub-*/anat/*_T1w.nii.gz"))[:3]:
        name = path.name.replace("_T1w", "_desc-brain_mask")
        mask = ixi / "derivatives" / "dlmuse" / path.relative_to(ixi).parent / name
        made = prepare_volume(path, Preparation(masked=True), mask)[0]
        assert made.shape == (40, 48, 40)
        assert 0.15 < np.mean(made > 0) < 0.6
        # Both hemispheres and the middle of the field hold brain; the corners do not.
        assert made[20, 24, 20] > 0
        assert not made[:4, :4].any()


@pytest.fixture
def ixi():
    beside = Path(__file__).parents[2] / "shared" / "data" / "ixi"
    folder = Path(os.environ.get("NIDL_DCL_IXI", beside))
    if not folder.is_dir():
        pytest.skip("real brains are not here")
    return folder

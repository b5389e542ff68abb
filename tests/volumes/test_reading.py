from __future__ import annotations

import gzip
import os
import pickle
import tracemalloc
from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
from made_images import AFFINE, SHAPE, brain, image, save

from nidl_dcl.errors import NidlDclError
from nidl_dcl.volumes import reading as image_file
from nidl_dcl.volumes.reading import Check, UnreadableVolumeError, check_volume, read_volume


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
        case "color":
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
        case "meters":
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
    "color": "dtype",
    "infinite slope": "scaling",
    "mostly NaN": "non_finite",
    "zeros": "constant",
    "astronomic": "range",
    "singular": "affine",
    "NaN affine": "affine",
    "sheared": "affine",
    "meters": "spacing",
}


@pytest.mark.parametrize("zlib_only", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_skipped_with_its_code(kind, zlib_only, tmp_path, monkeypatch):
    if zlib_only:
        monkeypatch.setattr(image_file, "_GzipFile", gzip.GzipFile)
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
    assert np.all(np.isfinite(read_volume(path).dataobj))


def test_non_finite_voxels_become_zero(tmp_path):
    path = save(tmp_path / "a.nii.gz", nan_in(brain()[0]))
    np.testing.assert_array_equal(
        read_volume(path).dataobj, np.nan_to_num(nan_in(brain()[0]), nan=0)
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
    np.testing.assert_array_equal(found.dataobj, expected.get_fdata().astype(np.float32))
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
    np.testing.assert_array_equal(read_volume(path).dataobj, brain()[0])


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


def moved(degrees=0.0, mm=(0, 0, 0), mirrored=False):
    """Return the affine of the tests after a turn about the x axis and a shift."""
    turn = np.eye(4)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[1:3, 1:3] = [[c, -s], [s, c]]
    turn[:3, 3] = mm
    return turn @ np.diag([-1.0 if mirrored else 1.0, 1, 1, 1]) @ AFFINE


def save_two_forms(path, sform, qform, codes=(1, 1)):
    made = image()
    made.set_sform(sform, codes[0])
    made.set_qform(qform, codes[1])
    made.to_filename(path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"degrees": 15.0}, "15.0 degrees"),
        ({"degrees": -2.0}, "2.0 degrees"),
        ({"mm": (3, 0, 4)}, "5.0 mm"),
        ({"mm": (0, 1, 0)}, "1.0 mm"),
        ({"mirrored": True}, "left and right are swapped"),
    ],
)
@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1)])
def test_two_orientations_that_disagree_are_warned_of_by_how_much(change, words, codes, tmp_path):
    path = save_two_forms(tmp_path / "a.nii.gz", moved(**change), AFFINE, codes)
    check = check_volume(path)
    assert (check.status, check.code) == ("warn", "affine")
    assert words in check.message
    np.testing.assert_allclose(read_volume(path).affine, moved(**change), atol=1e-4)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1)])
def test_one_orientation_or_two_that_agree_are_not_warned_of(codes, tmp_path):
    other = moved(degrees=0.01) if codes == (1, 1) else moved(degrees=15)
    path = save_two_forms(tmp_path / "a.nii.gz", AFFINE, other, codes)
    assert check_volume(path).code == "ok"


@pytest.mark.parametrize(("unit", "per_mm"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1.0)])
@pytest.mark.parametrize("form", ["sform", "qform", "both"])
def test_the_declared_unit_of_length_is_honored(unit, per_mm, form, tmp_path):
    other = AFFINE.copy()
    other[:3] *= per_mm
    made = nib.Nifti1Image(brain()[0], other)
    made.set_sform(other, int(form != "qform"))
    made.set_qform(other, int(form != "sform"))
    made.header.set_xyzt_units(unit)
    made.to_filename(tmp_path / "a.nii.gz")
    assert check_volume(tmp_path / "a.nii.gz").code == "ok"
    for source in (tmp_path / "a.nii.gz", made):
        np.testing.assert_allclose(read_volume(source).affine, AFFINE, rtol=1e-5, atol=1e-4)


def test_a_unit_that_cannot_be_meant_is_warned_of(tmp_path):
    made = image()
    made.header.set_xyzt_units("micron")
    made.to_filename(tmp_path / "a.nii.gz")
    check = check_volume(tmp_path / "a.nii.gz")
    assert (check.status, check.code) == ("warn", "spacing")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").affine, AFFINE)


@pytest.mark.parametrize("value", [1.0, -5.0, 1e6])
def test_an_image_with_one_voxel_that_is_not_zero_is_no_image(value, tmp_path):
    data = np.zeros(SHAPE)
    data[20, 24, 18] = value
    check = check_volume(save(tmp_path / "a.nii.gz", data))
    assert (check.status, check.code) == ("skip", "constant")
    with pytest.raises(UnreadableVolumeError, match="one in a thousand"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("noise", [0, 5])
def test_next_to_nothing_in_the_field_is_warned_of(noise, tmp_path):
    data = np.random.default_rng(0).normal(0, 1, SHAPE) * noise
    data[18:26, 20:28, 15:21] = 800
    check = check_volume(save(tmp_path / "a.nii.gz", data))
    assert (check.status, check.code) == ("warn", "blank")
    assert "3.07 ml" in check.message


def test_zeros_around_a_brain_without_its_skull_are_no_fill_value(tmp_path):
    _, inside = brain()
    values = np.random.default_rng(0).uniform(70, 165, inside.shape)
    check = check_volume(save(tmp_path / "a.nii.gz", np.where(inside, values, 0)))
    assert (check.status, check.code) == ("ok", "ok")


@pytest.mark.parametrize("fill", [-32768, -1024, -700])
def test_a_fill_value_far_below_the_head_is_warned_of(fill, tmp_path):
    data, inside = brain()
    filled = np.where(inside, data, fill)
    check = check_volume(save(tmp_path / "a.nii.gz", filled))
    assert (check.status, check.code) == ("warn", "range")
    assert str(fill) in check.message
    assert check_volume(save(tmp_path / "b.nii.gz", np.where(inside, data, 0))).code == "ok"

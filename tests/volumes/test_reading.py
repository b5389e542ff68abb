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

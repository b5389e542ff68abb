"""FreeSurfer images: whole ones as nibabel reads them, broken ones with their code."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_images import AFFINE, SHAPE, brain, save, save_mgh

from nidl_dcl.volumes import mgh as mgh_header
from nidl_dcl.volumes.preparation import Preparation, prepare_volume
from nidl_dcl.volumes.reading import (
    Check,
    UnreadableVolumeError,
    check_volume,
    read_header,
    read_volume,
)

OBLIQUE = AFFINE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.2, 0.3))


def other_number_type(path: Path) -> Path:
    """Write big-endian numbers of a type that nibabel 5.3 does not know: FreeSurfer's unsigned short."""
    return save_mgh(path, np.round(brain()[0]), dtype=np.int16, type=10)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".mgh.gz"])
@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE, AFFINE[[1, 2, 0, 3]], np.diag([-1, 1, 1, 1])])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_values_and_affine_are_what_nibabel_reads(dtype, affine, suffix, tmp_path):
    path = save_mgh(tmp_path / f"brain{suffix}", np.round(brain()[0] / 5), affine, dtype)
    content = path.read_bytes() if suffix == ".mgh" else gzip.decompress(path.read_bytes())
    expected, found = nib.MGHImage.from_bytes(content), read_volume(path)
    np.testing.assert_array_equal(found.dataobj, expected.get_fdata())
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-9)
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(read_header(path).affine, found.affine)
    assert check_volume(path) == Check("ok", "ok", "")


def test_a_freesurfer_image_is_prepared_as_the_same_nifti_image(tmp_path):
    preparation = Preparation((4, 4, 4), (16, 20, 16))
    turned = nib.Nifti1Image(brain()[0], AFFINE).as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt("LIA")
        )
    )
    path = save_mgh(tmp_path / "brain.mgz", turned.get_fdata(), turned.affine)
    assert "".join(nib.aff2axcodes(read_volume(path).affine)) == "LIA"
    np.testing.assert_array_equal(
        prepare_volume(path, preparation),
        prepare_volume(save(tmp_path / "brain.nii.gz"), preparation),
    )


def test_unsigned_shorts_are_read(tmp_path):
    path = other_number_type(tmp_path / "brain.mgz")
    np.testing.assert_array_equal(read_volume(path).dataobj, np.round(brain()[0]))


def test_what_follows_the_numbers_is_read_to_its_end_and_left_alone(tmp_path):
    path = save_mgh(tmp_path / "brain.mgz")
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + b"tags" * 5000))
    np.testing.assert_array_equal(read_volume(path).dataobj, brain()[0])


def flipped(path: Path) -> Path:
    """Change the checksum at the end of a gzip stream."""
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    return path


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def swapped(path: Path) -> Path:
    """Write the header with its lower bytes first, as no FreeSurfer does."""
    content = save_mgh(path.with_suffix(".mgh")).read_bytes()
    return written(path.with_suffix(".mgh"), b"\1\0\0\0" + content[4:])


NAN_AXES = np.full((3, 3), np.nan)
BROKEN = {
    "empty": ("empty", lambda p: written(p, b"")),
    "html": ("not_nifti", lambda p: written(p, b"<html>404</html>")),
    "three bytes": ("not_nifti", lambda p: written(p, b"\0\0\0")),
    "NIfTI": ("not_nifti", lambda p: save(p.with_suffix(".nii.gz")).rename(p)),
    "another version": ("not_nifti", lambda p: save_mgh(p, version=2)),
    "little-endian": ("not_nifti", swapped),
    "cut header": ("truncated", lambda p: cut(save_mgh(p.with_suffix(".mgh")), 200)),
    "cut data": ("truncated", lambda p: cut(save_mgh(p.with_suffix(".mgh")), 100_000)),
    "cut gzip": ("truncated", lambda p: cut(save_mgh(p), 5000)),
    "flipped byte": ("crc", lambda p: flipped(save_mgh(p))),
    "four frames": ("dimensions", lambda p: save_mgh(p, np.stack([brain()[0]] * 4, -1))),
    "negative side": ("dimensions", lambda p: save_mgh(p, dims=[40, -48, 36, 1])),
    "no frame": ("dimensions", lambda p: save_mgh(p, dims=[40, 48, 36, 0])),
    "surface": ("dimensions", lambda p: save_mgh(p, dims=[163842, 1, 1, 1])),
    "thin": ("too_small", lambda p: save_mgh(p, brain()[0][..., :5])),
    "huge": ("too_large", lambda p: save_mgh(p, dims=[30000, 30000, 30000, 1])),
    "largest": ("too_large", lambda p: save_mgh(p, dims=[2**31 - 1, 2**31 - 1, 2**31 - 1, 1])),
    "lying": ("truncated", lambda p: save_mgh(p, dims=[600, 600, 600, 1])),
    "color": ("dtype", lambda p: save_mgh(p, type=9)),
    "complex": ("dtype", lambda p: save_mgh(p, type=7)),
    "unknown type": ("dtype", lambda p: save_mgh(p, type=-3)),
    "NaN directions": ("affine", lambda p: save_mgh(p, Mdc=NAN_AXES)),
    "no directions": ("affine", lambda p: save_mgh(p, Mdc=np.zeros((3, 3)))),
    "two equal directions": (
        "affine",
        lambda p: save_mgh(p, Mdc=[[1, 0, 0], [1, 0, 0], [0, 0, 1]]),
    ),
    "sheared": ("affine", lambda p: save_mgh(p, Mdc=[[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])),
    "infinite centre": ("affine", lambda p: save_mgh(p, Pxyz_c=[np.inf, 0, 0])),
    "no voxel size": ("affine", lambda p: save_mgh(p, delta=[0, 1, 1])),
    "meters": ("spacing", lambda p: save_mgh(p, delta=[0.001] * 3)),
    "zeros": ("constant", lambda p: save_mgh(p, np.zeros(SHAPE))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_skipped_with_its_code(kind, tmp_path):
    code, make = BROKEN[kind]
    path = make(tmp_path / "brain.mgz")
    tracemalloc.start()
    check = check_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (check.status, check.code) == ("skip", code)
    assert check.message.endswith(".")
    assert peak < 4e6
    with pytest.raises(UnreadableVolumeError, match=path.name) as caught:
        read_volume(path)
    assert caught.value.code == code


def test_without_directions_freesurfers_default_is_assumed_with_a_warning(tmp_path):
    path = save_mgh(tmp_path / "brain.mgz", goodRASFlag=0)
    check = check_volume(path)
    assert (check.status, check.code) == ("warn", "affine")
    found = read_volume(path).affine
    # As FreeSurfer has it; nibabel turns this one upside down.
    assert "".join(nib.aff2axcodes(found)) == "LIA"
    np.testing.assert_array_equal(found @ [20, 24, 18, 1], [0, 0, 0, 1])


def test_a_name_that_hides_the_compression_is_warned_of(tmp_path):
    path = save_mgh(tmp_path / "brain.mgz").rename(tmp_path / "brain.mgh")
    assert (check_volume(path).status, check_volume(path).code) == ("warn", "extension")
    np.testing.assert_array_equal(read_volume(path).dataobj, brain()[0])


@pytest.mark.parametrize("length", [0, 3, 4, 100, 283])
def test_a_header_that_ends_early_is_refused(length):
    with pytest.raises(UnreadableVolumeError):
        mgh_header.parse(b"\0\0\0\1".ljust(length, b"\0")[:length])

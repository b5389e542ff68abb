"""NumPy arrays: those of OpenBHB as they lie in space, others refused, nothing unpickled."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_images import brain
from scipy import ndimage

from nidl_dcl.volumes.npy import BYTES, GRIDS, parse
from nidl_dcl.volumes.preparation import Preparation, prepare_volume
from nidl_dcl.volumes.reading import (
    Check,
    UnreadableVolumeError,
    check_volume,
    read_header,
    read_volume,
)

VBM, QUASIRAW = (121, 145, 121), (182, 218, 182)


def array(shape=VBM, dtype=np.float32):
    """Return an array of a known shape that is different along each axis."""
    x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return ((x * 7 + y * 3 + z) % 101).astype(dtype)


def save_npy(path: Path, made) -> Path:
    np.save(path, made)
    return path


def header(text: str, version: int = 1, length: int | None = None) -> bytes:
    """Return the start of a .npy file, lies included."""
    content = text.encode("latin-1")
    size = (len(content) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + content


def canonical(shape="(1, 1, 121, 145, 121)", descr="'<f4'", order="False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "u1", "?", "<i2", ">i2"])
def test_values_are_what_numpy_reads(dtype, lead, tmp_path):
    made = array(dtype=dtype).reshape(*lead, *VBM)
    path = save_npy(tmp_path / "sub-1_T1w.npy", made)
    np.testing.assert_array_equal(read_volume(path).dataobj, made.reshape(VBM).astype(np.float32))
    assert check_volume(path) == Check("ok", "ok", "")
    assert check_volume(path).coarsest == 1.5


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_both_orders_of_axes_and_all_versions_are_read(order, version, tmp_path):
    made = np.asarray(array(), order=order)
    with (tmp_path / "a.npy").open("wb") as stream:
        np.lib.format.write_array(stream, made, version)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.npy").dataobj, array())


@pytest.mark.parametrize("shape", GRIDS)
def test_the_shape_says_where_the_voxels_lie(shape, tmp_path):
    size = {VBM: 1.5, QUASIRAW: 1.0}[shape]
    path = save_npy(tmp_path / "a.npy", array(shape, np.uint8)[None, None])
    affine = read_header(path).affine
    assert "".join(nib.aff2axcodes(affine)) == "LAS"  # the first voxel is on the right
    np.testing.assert_array_equal(affine, read_volume(path).affine)
    np.testing.assert_array_equal(affine @ [0, 0, 0, 1], [90, -126, -72, 1])
    last = affine @ [*np.array(shape) - 1, 1]
    if shape == VBM:  # SPM's bounding box
        np.testing.assert_array_equal(last, [-90, 90, 108, 1])
    np.testing.assert_array_equal(nib.affines.voxel_sizes(affine), size)


@pytest.mark.parametrize("shape", GRIDS)
def test_the_template_brain_lies_in_these_grids_as_in_its_own(shape, tmp_path):
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=4)
    onto = np.linalg.inv(template.affine) @ GRIDS[shape]
    made = ndimage.affine_transform(template.get_fdata(), onto, output_shape=shape, order=1)
    marked = made.astype(np.float32)
    place = np.rint(np.linalg.inv(GRIDS[shape]) @ [-50, -20, 10, 1]).astype(int)  # on the left
    marked[tuple(slice(i - 6, i + 7) for i in place[:3])] = 3
    path = save_npy(tmp_path / "a.npy", marked[None, None])
    preparation = Preparation((8, 8, 8), (24, 28, 24), intensity="signed")
    found, expected = prepare_volume(path, preparation), prepare_volume(template, preparation)
    left, right = found[0, :12].max(), found[0, 12:].max()
    assert left > 2 > right
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_an_array_of_objects_is_refused_and_nothing_in_it_runs(tmp_path):
    path, trace = tmp_path / "a.npy", tmp_path / "trace"
    np.save(path, np.array([Evil(trace)] * 3, dtype=object), allow_pickle=True)
    check = check_volume(path)
    assert (check.status, check.code) == ("skip", "dtype")
    assert "never unpickled" in check.message
    path.write_bytes(pickle.dumps(Evil(trace)))
    assert check_volume(path).code == "not_nifti"
    path.write_bytes(header(f"__import__('os').mkdir({str(trace)!r})"))
    assert check_volume(path).code == "not_nifti"
    assert not trace.exists()


BROKEN = {
    "nothing": (b"", "empty"),
    "html": (b"<html>404</html>", "not_nifti"),
    "zip": (b"PK\3\4" + bytes(600), "not_nifti"),
    "magic alone": (b"\x93NUMPY", "truncated"),
    "no length": (b"\x93NUMPY\1\0", "truncated"),
    "unknown version": (header(canonical(), version=9), "not_nifti"),
    "cut header": (header(canonical())[:60], "truncated"),
    "huge header": (header(canonical().ljust(60_000)), "not_nifti"),
    "lying header": (header(canonical(), version=2, length=2**32 - 1), "not_nifti"),
    "no data": (header(canonical()), "truncated"),
    "not a dictionary": (header("(1, 2)"), "not_nifti"),
    "nested": (header("(" * 9000), "not_nifti"),
    "a key twice": (header(canonical().replace("'descr'", "'shape'")), "not_nifti"),
    "shape of text": (header(canonical(shape="'abc'")), "not_nifti"),
    "negative side": (header(canonical("(1, 1, -121, 145, 121)")), "not_nifti"),
    "side of zero": (header(canonical("(1, 1, 0, 145, 121)")), "dimensions"),
    "no axes": (header(canonical("()")), "dimensions"),
    "a plane": (header(canonical("(121, 145)")), "dimensions"),
    "two channels": (header(canonical("(1, 2, 121, 145, 121)")), "dimensions"),
    "several subjects": (header(canonical("(3227, 1, 121, 145, 121)")), "dimensions"),
    "regions": (header(canonical("(1, 1, 284)")), "dimensions"),
    "huge": (header(canonical("(30000, 30000, 30000)")), "too_large"),
    "a number of many digits": (header(canonical(f"({'9' * 5000}, 8, 8)")), "too_large"),
    "another grid": (header(canonical("(64, 64, 64)")), "affine"),
    "turned": (header(canonical("(1, 1, 145, 121, 121)")), "affine"),
    "complex": (header(canonical(descr="'<c8'")), "dtype"),
    "text": (header(canonical(descr="'<U8'")), "dtype"),
    "records": (header(canonical(descr="[('a', '<f4')]")), "dtype"),
    "a float of one byte": (header(canonical(descr="'<f1'")), "dtype"),
    "objects": (header(canonical(descr="'|O'")), "dtype"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_skipped_with_its_code(kind, tmp_path):
    content, code = BROKEN[kind]
    path = tmp_path / "sub-1_T1w.npy"
    path.write_bytes(content)
    tracemalloc.start()
    check = check_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (check.status, check.code) == ("skip", code)
    assert check.message.endswith(".")
    assert len(check.message) < 400
    assert peak < 1e6
    with pytest.raises(UnreadableVolumeError, match=path.name):
        read_volume(path)


def test_a_refused_shape_says_which_are_known(tmp_path):
    check = check_volume(save_npy(tmp_path / "a.npy", brain()[0]))
    assert check.code == "affine"
    assert "121 x 145 x 121" in check.message
    assert "182 x 218 x 182" in check.message


def test_a_cut_array_is_truncated(tmp_path):
    path = save_npy(tmp_path / "a.npy", array(dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    assert check_volume(path).code == "truncated"


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling annex link", "annex pointer"])
def test_what_is_no_file_is_never_opened(kind, tmp_path):
    path = tmp_path / "sub-1_T1w.npy"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "dangling annex link":
            path.symlink_to("../.git/annex/objects/xx/SHA256E-s1--0.npy")
        case "annex pointer":
            path.write_text("/annex/objects/SHA256E-s1--0.npy\n")
    expected = "not_a_file" if kind in ("fifo", "folder") else "not_fetched"
    assert check_volume(path).code == expected


def test_numpy_of_python_2_wrote_long_integers():
    grid = parse(header(canonical("(121L, 145L, 121L)")))
    assert grid.shape == VBM


def test_other_orders_of_the_keys_are_read():
    text = "{'shape': (121, 145, 121), 'fortran_order': True, 'descr': '>f4'}"
    grid = parse(header(text))
    assert (grid.order, grid.dtype) == ("F", np.dtype(">f4"))


def test_the_header_of_any_array_of_numbers_fits():
    stream = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (1,) * 60}
    )
    assert len(stream.getvalue()) < BYTES

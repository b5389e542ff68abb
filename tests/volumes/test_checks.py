from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from made_images import AFFINE, brain, image, save
from scipy import ndimage

from nidl_dcl.io.file_cache import FileMemory
from nidl_dcl.volumes.checks import check_images, copies, how_to_fetch, record_checks
from nidl_dcl.volumes.reading import Check

OK = Check("ok", "ok", "")


def table(*rows):
    columns = ["participant_id", "path", "mask_path"]
    return pd.DataFrame(rows, columns=columns).astype("string")


def test_an_image_whose_mask_is_broken_is_skipped_for_that_reason(tmp_path):
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "b.nii.gz")
    image(brain()[1], dtype="uint8").to_filename(tmp_path / "mask.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"")
    (tmp_path / "c.nii.gz").write_bytes(b"")
    told = []
    found = check_images(
        tmp_path,
        table(
            ("sub-1", "a.nii.gz", "mask.nii.gz"),
            ("sub-2", "b.nii.gz", "broken.nii.gz"),
            ("sub-3", "c.nii.gz", "broken.nii.gz"),
        ),
        "robust",
        FileMemory(),
        2,
        lambda *state: told.append(state),
    )
    assert [check.code for check in found] == ["ok", "empty", "empty"]
    assert "mask broken.nii.gz" in found[1].message
    assert "mask" not in found[2].message  # the image's own fault goes first
    assert told[0] == ("checking images", 1, 3)
    assert told[-1] == ("checking masks", 3, 3)


@pytest.mark.parametrize(
    ("people", "contents", "shared"),
    [
        ("12", "xy", "  "),
        ("11", "xx", "  "),  # two names of one scan are still one participant's
        ("12", "xx", "xx"),
        ("123", "xyx", "x x"),
        ("1122", "xyyz", " yy "),
    ],
)
def test_images_that_several_participants_share_are_warned_of(people, contents, shared):
    images = table(*((f"sub-{p}", f"{i}.nii", None) for i, p in enumerate(people)))
    found = [replace(OK, content=c) for c in contents]
    kept, warned = copies(images, found)
    assert [c or " " for c in kept] == list(shared)
    for i, check in enumerate(warned):
        assert (check.status, check.code) == (
            ("warn", "duplicate") if shared[i] != " " else ("ok", "ok")
        )
        assert check.content == contents[i]
    if "x" in shared:
        assert "The same voxels as" in warned[0].message


def test_a_skipped_image_is_nobodys_copy_and_a_warning_keeps_its_code():
    images = table(("sub-1", "a", None), ("sub-2", "b", None), ("sub-3", "c", None))
    found = [
        Check("warn", "affine", "No orientation.", "x"),
        replace(OK, content="x"),
        Check("skip", "crc", "Damaged.", "x"),
    ]
    kept, warned = copies(images, found)
    assert kept == ["x", "x", None]
    assert warned[0].code == "affine"
    assert warned[0].message.startswith("No orientation. The same voxels as b")
    assert warned[2] == found[2]


def test_copies_are_found_whatever_file_holds_them(tmp_path):
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "b.nii")
    save(tmp_path / "c.nii", brain()[0] + 1)
    images = table(
        *((f"sub-{n}", name, None) for n, name in enumerate(["a.nii.gz", "b.nii", "c.nii"]))
    )
    found = check_images(tmp_path, images, "robust", FileMemory(), 1, lambda *_: None)
    assert [c.code for c in copies(images, found)[1]] == ["duplicate", "duplicate", "ok"]


def test_what_was_found_stands_in_the_row_of_the_image():
    inputs = pd.DataFrame(
        {"path": ["n/a", "b", "a"], "status": "ok", "code": "ok", "message": ""}, dtype="string"
    )
    images = table(("s", "a", None), ("s", "b", None))
    told = record_checks(inputs, images, [OK, Check("skip", "crc", "no")])
    assert list(told["code"]) == ["ok", "crc", "ok"]
    assert list(inputs["code"]) == ["ok"] * 3


def test_what_is_not_here_is_summed_up_in_one_command():
    def listed(n, code="not_fetched"):
        paths = [f"sub-{i}/ses-a b/anat/sub-{i}_ses-ab_run-1_T1w.nii.gz" for i in range(n)]
        return pd.DataFrame({"path": [*paths, "n/a"], "code": [*[code] * n, "no_image"]})

    root = Path("/data/my set")
    assert how_to_fetch(root, listed(3, "crc")) == ""
    assert how_to_fetch(root, listed(1)) == (
        "1 of 1 images have not been fetched. To get them: cd '/data/my set' && "
        "datalad get 'sub-0/ses-a b/anat/sub-0_ses-ab_run-1_T1w.nii.gz'"
    )
    assert how_to_fetch(root, listed(600)) == (
        "600 of 600 images have not been fetched. To get them: cd '/data/my set' && "
        "datalad get sub-*/ses-*/anat/*_T1w.nii.gz"
    )


def checked_pair(folder, mask, head=None):
    """Return what is found of an image whose mask has been written, twice with one memory."""
    if not (folder / "a.nii.gz").exists():
        save(folder / "a.nii.gz", head)
    mask.to_filename(folder / "mask.nii.gz")
    images, memory = table(("sub-1", "a.nii.gz", "mask.nii.gz")), FileMemory()
    first, again = (
        check_images(folder, images, "robust", memory, 1, lambda *_: None)[0] for _ in range(2)
    )
    assert first == again
    return first


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (AFFINE, ""),
        (np.array([[1.0, 0, 0, 8], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE, "8.0 mm"),
        (np.diag([-1.0, 1, 1, 1]) @ AFFINE, "2.0 mm"),  # its mirror image about x = 0
    ],
)
def test_a_mask_of_the_same_shape_that_lies_elsewhere_is_warned_of(place, words, tmp_path):
    found = checked_pair(tmp_path, image(brain()[1], place, "uint8"))
    assert (found.status, found.code) == (("warn", "mask") if words else ("ok", "ok"))
    assert words in found.message


@pytest.mark.parametrize("codes", ["LAS", "PSR", "RAI"])
def test_a_mask_stored_in_another_orientation_lies_where_it_did(codes, tmp_path):
    turn = nib.orientations.axcodes2ornt(codes)
    assert checked_pair(tmp_path, image(brain()[1], dtype="uint8").as_reoriented(turn)).code == "ok"


def test_a_mask_that_covers_much_background_is_warned_of(tmp_path):
    inside = brain()[1]
    assert checked_pair(tmp_path, image(inside, dtype="uint8")).code == "ok"
    wide = ndimage.binary_dilation(inside, iterations=2)
    found = checked_pair(tmp_path, image(wide, dtype="uint8"))
    assert (found.status, found.code) == ("warn", "mask")
    assert "of it covers background" in found.message
    # On another grid, and in another orientation, the same is seen.
    other = image(np.roll(inside, 12, axis=1), dtype="uint8").slicer[:, :, 1:]
    turned = other.as_reoriented(nib.orientations.axcodes2ornt("LPS"))
    assert "of it covers background" in checked_pair(tmp_path, turned).message


def test_a_warning_of_the_image_is_kept_beside_that_of_its_mask(tmp_path):
    data = brain()[0]
    data[0, 0, 0] = np.nan
    save(tmp_path / "a.nii.gz", data)
    found = checked_pair(tmp_path, image(np.ones(data.shape), dtype="float32"))
    assert (found.status, found.code) == ("skip", "constant")  # a mask of ones only
    whole = np.ones(data.shape)
    whole[:2] = 0
    found = checked_pair(tmp_path, image(whole, dtype="uint8"))
    assert (found.status, found.code) == ("warn", "non_finite")
    assert "Mask mask.nii.gz" in found.message

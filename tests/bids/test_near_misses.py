"""What lies in place of an image is named, with the reason why it is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from nidl_dcl.bids.index import find_images
from nidl_dcl.errors import UsageError


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return root


def said(root: Path, preset: str = "raw-t1w") -> str:
    inputs = find_images(root, preset=preset).inputs
    (message,) = inputs.loc[inputs["code"] == "no_image", "message"]
    return message


@pytest.mark.parametrize(
    ("file", "preset", "words"),
    [
        ("sub-1/anat/sub-1_T1w_defaced.nii.gz", "raw-t1w", "goes on after T1w, by '_defaced'"),
        ("sub-1/anat/sub-1_T1w__dup-01.nii.gz", "raw-t1w", "by '__dup-01'"),
        ("sub-1/anat/sub-1_T1w_heudiconv1_e2.nii.gz", "raw-t1w", "by '_heudiconv1_e2'"),
        ("sub-1/anat/sub-1_T1wdefaced.nii.gz", "raw-t1w", "by 'defaced'"),
        ("sub-1/Anat/sub-1_T1w.nii.gz", "raw-t1w", "right but for the capitals"),
        ("sub-1/ses-1/sub-1_ses-1_T1w.nii.gz", "raw-t1w", "lie in sub-*/anat or sub-*/ses-*/anat"),
        ("sub-1/anat/sub-1_T2w.nii.gz", "raw-t1w", "does not end in _T1w.nii.gz"),
        ("sub-1/anat/sub-1_UNIT1.nii.gz", "raw-t1w", "does not end in _T1w.nii.gz"),
        (
            "sub-1/anat/sub-1_T1w_space-MNI152NLin2009cAsym_preproc.nii.gz",
            "fmriprep-mni",
            "fMRIPrep before 1.2",
        ),
        (
            "sub-1/anat/sub-1_T1w_space-MNI152NLin2009cAsym_class-GM_probtissue.nii.gz",
            "fmriprep-gm",
            "now it would end in _label-GM_probseg.nii.gz",
        ),
        (
            "sub-1/anat/sub-1_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz",
            "fmriprep-mni",
            "it has space MNI152NLin6Asym, asked for is space MNI152NLin2009cAsym",
        ),
        ("sub-1/anat/mwp2sub-1_T1w.nii", "cat12-vbm", "does not begin with mwp1sub-"),
    ],
)
def test_a_near_miss_is_named_with_the_reason(file, preset, words, tmp_path):
    derivative = "derivatives/fmriprep" if preset.startswith("fm") else "derivatives/cat12"
    home = tmp_path if preset == "raw-t1w" else tmp_path / derivative
    write(home, file)
    (tmp_path / "sub-1").mkdir(exist_ok=True)
    message = said(tmp_path, preset)
    assert file.removeprefix("sub-1/") in message
    assert words in message


def test_a_folder_of_another_name_or_without_images_is_told(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\nsub-1\n")
    write(tmp_path, "Sub-1/anat/sub-1_T1w.nii.gz")
    assert "there is a folder 'Sub-1'" in said(tmp_path)
    (tmp_path / "Sub-1").rename(tmp_path / "elsewhere")
    assert "there is no such folder" in said(tmp_path)
    (tmp_path / "sub-1").mkdir()
    assert "holds no image" in said(tmp_path)


def test_folders_without_sub_are_named(tmp_path):
    write(tmp_path, *(f"01{k}/anat/01{k}_T1w.nii.gz" for k in range(4)))
    (note,) = find_images(tmp_path).notes
    assert "4 folders hold images" in note
    write(tmp_path, "derivatives/freesurfer/077/mri/brain.mgz", "sub-077/anat/sub-077_T1w.nii.gz")
    write(tmp_path, "derivatives/freesurfer/fsaverage/mri/brain.mgz")
    with pytest.raises(UsageError, match="ln -s 077 sub-077"):
        find_images(tmp_path, preset="freesurfer")


def test_advice_that_was_followed_is_not_repeated(tmp_path):
    write(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz")
    (tmp_path / "derivatives" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        find_images(tmp_path, preset="fmriprep-mni", derivatives=["mine"])
    assert "Give the folder" not in str(caught.value)
    assert "lie in sub-*/anat" in str(caught.value)


def test_near_misses_beside_an_image_are_counted(tmp_path):
    write(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w_heudiconv2.nii.gz")
    write(tmp_path, "sub-1/anat/sub-1_mod-T1w_defacemask.nii.gz")
    found = find_images(tmp_path)
    assert len(found.images) == len(found.inputs) == 1
    (note,) = found.notes
    assert note.startswith("1 file is not taken: its name goes on after T1w")
    assert "sub-1_T1w_heudiconv2.nii.gz" in note


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["rec-rms_T1w", "echo-1_T1w", "echo-2_T1w"], ["rec-rms_T1w"]),
        (["T1w", "echo-1_T1w", "echo-2_T1w"], ["T1w"]),
        (["echo-2_T1w", "echo-10_T1w", "echo-3_T1w"], ["echo-2_T1w"]),
        (
            ["run-1_T1w", "run-1_echo-1_T1w", "run-2_echo-1_T1w", "run-2_echo-2_T1w"],
            ["run-1_T1w", "run-2_echo-1_T1w"],
        ),
        (["rec-rms_T1w", "rec-norm_T1w"], ["rec-norm_T1w", "rec-rms_T1w"]),
    ],
)
def test_of_several_echoes_the_combination_is_used_or_the_first(names, kept, tmp_path):
    write(tmp_path, *(f"sub-1/anat/sub-1_{name}.nii.gz" for name in names))
    found = find_images(tmp_path)
    assert [path.split("sub-1_")[1] for path in found.images["path"]] == [
        f"{name}.nii.gz" for name in kept
    ]
    assert any("echoes" in step for step, _ in found.kept) is (len(kept) < len(names))


def test_an_echo_can_be_asked_for(tmp_path):
    write(tmp_path, *(f"sub-1/anat/sub-1_echo-{k}_T1w.nii.gz" for k in (1, 2)))
    found = find_images(tmp_path, filters={"echo": 2})
    assert list(found.images["path"]) == ["sub-1/anat/sub-1_echo-2_T1w.nii.gz"]

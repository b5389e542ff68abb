"""Every preset from the files that its tool writes to two views; names as the tools document them.

Layouts are those of fMRIPrep and sMRIPrep (outputs, lists of their continuous tests), Clinica
(t1-linear, CAPS), brainprep (quasi-raw, versions 1 and 2), CAT12 (manual, naming of files), OpenBHB
(dataset card) and FreeSurfer (recon-all, longitudinal processing).
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from made_images import SHAPE, brain, save, save_mgh

from nidl_dcl import BIDSDataModule
from nidl_dcl.bids.index import find_images
from nidl_dcl.bids.presets import PREPROCESSED_SPACE, PRESETS
from nidl_dcl.data.views import RandBiasField, RandContrast, volume_views
from nidl_dcl.errors import UsageError
from nidl_dcl.workflow.inputs import index
from nidl_dcl.workflow.options import DataOptions, RunOptions

MNI = "space-MNI152NLin2009cAsym"
LIN6 = "space-MNI152NLin6Asym"
OURS = f"_space-{PREPROCESSED_SPACE}"


def prep(who: str, *, session: str = "", space: str = f"_{MNI}", gm: bool = False) -> list[str]:
    """Return image and, for a scan, brain mask of fMRIPrep."""
    folder = f"{who}/{session}/anat" if session else f"{who}/anat"
    stem = f"{folder}/{who}{f'_{session}' if session else ''}{space}"
    if gm:
        return [f"{stem}_label-GM_probseg.nii.gz"]
    return [f"{stem}_desc-preproc_T1w.nii.gz", f"{stem}_desc-brain_mask.nii.gz"]


def caps(who: str, session: str, source: str = "") -> str:
    folder = f"subjects/{who}/{session}/t1_linear"
    return (
        f"{folder}/{who}_{session}{source}_space-MNI152NLin2009cSym_desc-Crop_res-1x1x1_T1w.nii.gz"
    )


def quasiraw(who: str, session: str) -> list[str]:
    stem = f"subjects/{who}/{session}/{who}_{session}_run-1"
    return [f"{stem}_T1w.nii.gz", f"{stem}_mod-T1w_brainmask.nii.gz"]


# By preset: the images, each with its mask or alone, and what else lies there.
FOUND: dict[str, list[list[str]]] = {
    "raw-t1w": [
        ["sub-1/anat/sub-1_T1w.nii.gz"],
        ["sub-2/ses-a/anat/sub-2_ses-a_acq-mprage_run-02_T1w.nii"],
        ["sub-3/anat/sub-3_T1w.nii.gz"],
    ],
    "mp2rage": [
        ["sub-1/anat/sub-1_UNIT1.nii.gz"],
        ["sub-2/ses-a/anat/sub-2_ses-a_acq-highres_UNIT1.nii.gz"],
    ],
    "preprocessed": [prep("sub-1", space=OURS), prep("sub-2", session="ses-1", space=OURS)],
    "preprocessed-native": [prep("sub-1", space=""), prep("sub-2", session="ses-1", space="")],
    "fmriprep-mni": [
        prep("sub-1"),
        prep("sub-2", session="ses-1"),
        prep("sub-3", space=f"_{MNI}_res-1"),
    ],
    "fmriprep-native": [prep("sub-1", space=""), prep("sub-2", session="ses-1", space="")],
    "fmriprep-gm": [prep("sub-1", gm=True), prep("sub-2", session="ses-1", gm=True)],
    "clinica-t1-linear": [
        [caps("sub-1", "ses-M000")],
        [caps("sub-1", "ses-M006", "_T1w")],
        [caps("sub-2", "ses-M000", "_acq-mprage_run-1")],
    ],
    "brainprep-quasiraw": [quasiraw("sub-1", "ses-1"), quasiraw("sub-2", "ses-1")],
    "openbhb-vbm": [
        ["train/derivatives/sub-101/ses-1/sub-101_preproc-cat12vbm_desc-gm_T1w.npy"],
        ["val/derivatives/sub-202/ses-1/sub-202_preproc-cat12vbm_desc-gm_T1w.npy"],
    ],
    "openbhb-quasiraw": [
        ["train/derivatives/sub-101/ses-1/sub-101_preproc-quasiraw_T1w.npy"],
        ["val/derivatives/sub-202/ses-1/sub-202_preproc-quasiraw_T1w.npy"],
    ],
    "cat12-vbm": [
        ["sub-1/anat/mri/mwp1sub-1_T1w.nii"],
        ["sub-4/anat/mwp1sub-4_T1w.nii"],
        ["sub-5/ses-1/anat/mwp1sub-5_ses-1_T1w.nii"],
        ["sub-2/ses-1/anat/mri/mwp1sub-2_ses-1_run-1_T1w.nii"],
        ["sub-3/ses-1/mri/mwp1rsub-3_ses-1_T1w.nii"],
    ],
    "freesurfer": [
        ["sub-1/mri/brain.mgz"],
        ["sub-2_ses-1/mri/brain.mgz"],
        ["sub-2_ses-2/mri/brain.mgz"],
    ],
}
OTHERS: dict[str, list[str]] = {
    "raw-t1w": [
        *("sub-1/anat/sub-1_T1w.json", "sub-1/anat/sub-1_T2w.nii.gz", "sub-1/anat/sub-1_FLAIR.nii"),
        *("sub-1/anat/sub-1_mod-T1w_defacemask.nii.gz", "sub-1/func/sub-1_task-x_bold.nii.gz"),
        "derivatives/x/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
    ],
    "mp2rage": [
        "sub-1/anat/sub-1_T1map.nii.gz",
        *(
            f"sub-1/anat/sub-1_inv-{i}_part-{p}_MP2RAGE.nii.gz"
            for i in "12"
            for p in ("mag", "phase")
        ),
        "sub-1/anat/sub-1_UNIT1.json",
    ],
    "preprocessed": [
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        f"sub-1/anat/sub-1_from-T1w_to-{PREPROCESSED_SPACE}_mode-image_xfm.txt",
        "desc-preproc_measures.tsv",
        "figures/sub-1_desc-preproc_T1w.png",
    ],
    "preprocessed-native": ["desc-preproc_measures.tsv", *prep("sub-1", space=OURS)],
    "fmriprep-mni": [
        *prep("sub-1", space=""),
        *prep("sub-1", space=f"_{LIN6}"),
        *prep("sub-1", gm=True),
        f"sub-1/anat/sub-1_{MNI}_dseg.nii.gz",
        "sub-1/anat/sub-1_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.h5",
        "sub-1/anat/sub-1_hemi-L_white.surf.gii",
        f"sub-1/func/sub-1_task-x_{MNI}_desc-preproc_bold.nii.gz",
        "sub-1.html",
        "sourcedata/freesurfer/sub-1/mri/brain.mgz",
    ],
    "fmriprep-native": [
        *prep("sub-1"),
        "sub-1/anat/sub-1_desc-aseg_dseg.nii.gz",
        "sub-1/anat/sub-1_desc-ribbon_mask.nii.gz",
        "sub-1/anat/sub-1_label-GM_probseg.nii.gz",
    ],
    "fmriprep-gm": [
        *prep("sub-1"),
        *(f"sub-1/anat/sub-1_{MNI}_label-{t}_probseg.nii.gz" for t in ("WM", "CSF")),
        "sub-1/anat/sub-1_label-GM_probseg.nii.gz",
    ],
    "clinica-t1-linear": [
        caps("sub-1", "ses-M000").replace("_desc-Crop", ""),
        caps("sub-1", "ses-M000").replace("_desc-Crop", "").replace("_T1w.nii.gz", "_affine.mat"),
        "subjects/sub-1/ses-M000/t1/spm/segmentation/sub-1_ses-M000_T1w.nii.gz",
    ],
    "brainprep-quasiraw": [
        "subjects/sub-1/ses-1/sub-1_ses-1_run-1_mod-T1w_affine.txt",
        *(
            f"subjects/sub-1/ses-1/sub-1_ses-1_run-1_desc-{d}_T1w.nii.gz"
            for d in ("1std", "6apply")
        ),
        "subjects/sub-1/ses-1/sub-1_ses-1_run-1_T2w.nii.gz",
        "quality_check/pca_T1w.tsv",
    ],
    "openbhb-vbm": [
        "train/derivatives/sub-101/ses-1/sub-101_preproc-quasiraw_T1w.npy",
        "train/derivatives/sub-101/ses-1/sub-101_preproc-cat12vbm_desc-gm_ROI.npy",
        "train/derivatives/sub-101/ses-1/sub-101_preproc-freesurfer_desc-xhemi_T1w.npy",
        "resource/cat12vbm_space-MNI152_desc-gm_TPM.nii.gz",
    ],
    "openbhb-quasiraw": [
        "train/derivatives/sub-101/ses-1/sub-101_preproc-cat12vbm_desc-gm_T1w.npy",
        "train/derivatives/sub-101/ses-1/sub-101_preproc-freesurfer_desc-xhemi_T1w.npy",
        "resource/quasiraw_space-MNI152_desc-brain_T1w.nii.gz",
    ],
    "cat12-vbm": [
        *(f"sub-1/anat/mri/{p}sub-1_T1w.nii" for p in ("p0", "mwp2", "wm", "y_", "rp1", "swmwp1")),
        "sub-1/anat/report/catreport_sub-1_T1w.pdf",
        "sub-1/anat/sub-1_T1w.nii",
    ],
    "freesurfer": [
        *(f"sub-1/mri/{name}.mgz" for name in ("T1", "brainmask", "norm", "orig", "aseg", "wm")),
        "sub-1/mri/brain.finalsurfs.mgz",
        "sub-1/mri/orig/001.mgz",
        "sub-2/mri/brain.mgz",
        "sub-2_ses-1.long.sub-2/mri/brain.mgz",
        "fsaverage/mri/brain.mgz",
    ],
}
DERIVED = {name for name, preset in PRESETS.items() if preset.derivatives}


def write(path: Path, preset: str) -> None:
    """Write a small image that is different for each path; full size where the grid is fixed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gain = 1 + zlib.crc32(path.as_posix().split("/sub-", 1)[1].encode()) % 97 / 200
    data, mask = brain()
    if "mask" in path.name:
        save(path, mask, dtype=np.uint8)
    elif path.suffix == ".npy":
        shape = (121, 145, 121) if preset == "openbhb-vbm" else (182, 218, 182)
        x, y, z = (np.abs(np.linspace(-1.4, 1.4, n, dtype=np.float32)) for n in shape)
        inside = np.maximum(0, 1 - x[:, None, None] - y[:, None] * z) * np.float32(gain)
        np.save(path, inside[None, None])
    elif path.suffix == ".mgz":
        save_mgh(path, np.where(mask, data * gain / 8, 0), dtype=np.uint8)
    elif PRESETS[preset].kind == "probability":
        save(path, np.where(mask, data * gain / 1800, 0))
    else:
        save(path, data * gain, dtype=np.int16)


def tree(root: Path, preset: str) -> Path:
    """Write all that a tool writes; return the dataset."""
    for path in itertools.chain(*FOUND[preset]):
        write(root / path, preset)
    for path in OTHERS[preset]:
        if not (root / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("{}" if path.endswith(".json") else "never opened")
    return root


def in_order(preset: str) -> list[list[str]]:
    """Return image and mask of a preset, in the order of the table."""
    return sorted(([*pair, ""][:2] for pair in FOUND[preset]), key=lambda pair: pair[0])


def test_every_preset_has_a_tree_here():
    assert set(FOUND) == set(OTHERS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_finds_its_images_masks_and_ids_and_no_others(preset, tmp_path):
    index = find_images(tree(tmp_path, preset), preset=preset)
    images = index.images
    assert [
        [i, "" if pd.isna(m) else m]
        for i, m in zip(images["path"], images["mask_path"], strict=True)
    ] == (in_order(preset))
    assert set(index.inputs["status"]) == {"ok"}
    for path, who, session in images[["path", "participant_id", "session_id"]].itertuples(
        index=False
    ):
        folders = path.replace("_ses", "/ses").split("/")
        assert who in folders
        assert (session in folders) if isinstance(session, str) else "ses-" not in path
    assert index.kept[-1][1] == len(images)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_from_files_to_two_finite_views(preset, tmp_path):
    data = BIDSDataModule(tree(tmp_path, preset), preset=preset, spacing=8)
    data.setup()
    assert set(data.inputs["status"]) == {"ok"}
    preparation = data.preparation
    assert preparation.masked == any(len(pair) == 2 for pair in FOUND[preset])
    kind = PRESETS[preset].kind
    assert preparation.intensity == ("robust" if kind == "intensity" else kind)
    people = {who for who, _ in data.participants("train")}
    samples = data.two_views("train")
    assert len(samples) == len(people) == data.images["participant_id"].nunique()
    for i in range(len(samples)):
        first, second = samples[0, i]
        assert first.shape == second.shape == (1, *preparation.shape)
        assert bool(torch.isfinite(first).all() and torch.isfinite(second).all())
        assert first.std() > 0
        assert not torch.equal(first, second)


@pytest.mark.parametrize("preset", sorted(DERIVED - {"openbhb-vbm", "openbhb-quasiraw"}))
def test_a_derivative_is_found_beside_its_raw_dataset(preset, tmp_path):
    place = f"derivatives/{PRESETS[preset].derivatives[0]}"
    tree(tmp_path / place, preset)
    save_as = tmp_path / "sub-1/anat/sub-1_T1w.nii.gz"
    save_as.parent.mkdir(parents=True)
    save(save_as)
    found = find_images(tmp_path, preset=preset).images
    assert list(found["path"]) == [f"{place}/{pair[0]}" for pair in in_order(preset)]


# -- several of one image ----------------------------------------------------------------------


def touched(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize(
    ("there", "filters", "used"),
    [
        (["", "_res-1", "_res-2"], None, [""]),
        (["_res-1", "_res-2"], None, ["_res-1"]),
        (["_res-02", "_res-10"], None, ["_res-02"]),
        (["", "_res-1", "_res-2"], {"res": "2"}, ["_res-2"]),
        (["", "_res-1", "_res-2"], {"res": "*"}, ["_res-1", "_res-2"]),
        (["", "_res-1", "_res-2"], {"res": ["1", None]}, ["", "_res-1"]),
    ],
)
def test_of_several_resolutions_the_finest_is_used_unless_asked_otherwise(
    there, filters, used, tmp_path
):
    names = {res: prep("sub-1", space=f"_{MNI}{res}") for res in there}
    root = touched(tmp_path, *itertools.chain(*names.values()))
    index = find_images(root, preset="fmriprep-mni", filters=filters)
    assert list(index.images["path"]) == [names[res][0] for res in used]
    assert list(index.images["mask_path"]) == [names[res][1] for res in used]
    told = ("finest resolution of each", 1) in index.kept
    assert told is (filters is None)


def test_two_runs_at_two_resolutions_stay_two_images(tmp_path):
    names = [
        f"sub-1/anat/sub-1_run-{r}_{MNI}_res-{s}_desc-preproc_T1w.nii.gz"
        for r in "12"
        for s in "12"
    ]
    found = find_images(touched(tmp_path, *names), preset="fmriprep-mni").images
    assert list(found["run"]) == [1, 2]
    assert all("_res-1_" in path for path in found["path"])


@pytest.mark.parametrize(
    ("preset", "filters", "expected"),
    [
        ("fmriprep-mni", {"space": "MNI152NLin6Asym"}, prep("sub-1", space=f"_{LIN6}")),
        ("fmriprep-mni", {"space": None}, prep("sub-1", space="")),
        ("fmriprep-gm", {"label": "WM"}, [f"sub-1/anat/sub-1_{MNI}_label-WM_probseg.nii.gz"]),
        ("fmriprep-gm", {"space": None}, ["sub-1/anat/sub-1_label-GM_probseg.nii.gz"]),
        (
            "brainprep-quasiraw",
            {"desc": "6apply"},
            ["subjects/sub-1/ses-1/sub-1_ses-1_run-1_desc-6apply_T1w.nii.gz"],
        ),
    ],
)
def test_a_filter_goes_before_what_the_preset_asks(preset, filters, expected, tmp_path):
    root = touched(tmp_path, *itertools.chain(*FOUND[preset]), *OTHERS[preset])
    found = find_images(root, preset=preset, filters=filters, participant_label=["1"], mask="none")
    assert list(found.images["path"]) == expected[:1]


@pytest.mark.parametrize("suffix", ["T2w", "FLAIR", "PDw", "T1map"])
@pytest.mark.parametrize("preset", ["raw-t1w", "fmriprep-native", "brainprep-quasiraw"])
def test_another_contrast_is_a_filter(preset, suffix, tmp_path):
    folder, middle, mask = {
        "raw-t1w": ("anat", "", "desc-brain_mask"),
        "fmriprep-native": ("anat", "_desc-preproc", "desc-brain_mask"),
        "brainprep-quasiraw": ("ses-1", "_ses-1_run-1", f"ses-1_run-1_mod-{suffix}_brainmask"),
    }[preset]
    above = "subjects/" if preset == "brainprep-quasiraw" else ""
    for who in ("sub-1", "sub-2"):
        stem = f"{above}{who}/{folder}/{who}"
        write(tmp_path / f"{stem}{middle}_{suffix}.nii.gz", preset)
        place = "derivatives/masks/" if preset == "raw-t1w" else ""
        write(tmp_path / f"{place}{stem}_{mask}.nii.gz", preset)
        (tmp_path / f"{stem}{middle}_T1w.nii.gz").touch()
    data = BIDSDataModule(tmp_path, preset=preset, filters={"suffix": suffix}, spacing=8)
    data.setup()
    assert all(path.endswith(f"_{suffix}.nii.gz") for path in data.images["path"])
    assert len(data.images) == 2
    assert data.preparation.masked
    assert data.preparation.origin.contrast == suffix
    assert bool(torch.isfinite(data.two_views("train")[0, 0][0]).all())


# -- FreeSurfer's folders ----------------------------------------------------------------------


def test_a_folder_of_freesurfer_is_a_participant_or_a_session_of_one(tmp_path):
    root = touched(
        tmp_path,
        *("sub-1/mri/brain.mgz", "sub-2_ses-a/mri/brain.mgz", "sub-2_ses-b/mri/brain.mgz"),
        *("sub-2/mri/brain.mgz", "sub-2_ses-a.long.sub-2/mri/brain.mgz"),
        *("sub-3_ses-a/mri/brainmask.mgz", "fsaverage/mri/brain.mgz", "bert/mri/brain.mgz"),
    )
    index = find_images(root, preset="freesurfer")
    rows = index.inputs[["participant_id", "session_id", "code"]].astype(object)
    assert rows.where(rows.notna(), None).to_numpy().tolist() == [
        ["sub-1", None, "ok"],
        ["sub-2", "ses-a", "ok"],
        ["sub-2", "ses-b", "ok"],
        ["sub-3", None, "no_image"],
    ]
    only = find_images(root, preset="freesurfer", session_label=["b"]).images
    assert list(only["path"]) == ["sub-2_ses-b/mri/brain.mgz"]


def test_participants_that_openbhb_keeps_in_derivatives_are_no_derivatives(tmp_path):
    image = "derivatives/sub-101/ses-1/sub-101_preproc-quasiraw_T1w.npy"
    index = find_images(touched(tmp_path, image), preset="openbhb-quasiraw")
    assert list(index.images["source"]) == [f"bids:raw:{image}"]
    assert set(index.links) == {"raw"}


# -- maps keep their values --------------------------------------------------------------------


def test_a_tissue_map_keeps_values_and_zeros(tmp_path):
    data = BIDSDataModule(tree(tmp_path, "cat12-vbm"), preset="cat12-vbm", spacing=2)
    data.setup()
    stored = nib.load(data.table.root / data.images["path"][0]).get_fdata()
    prepared = data.volumes[0][0].numpy()
    assert prepared.max() == pytest.approx(stored.max(), abs=1e-3)
    assert np.count_nonzero(prepared) == np.count_nonzero(stored)
    assert prepared.min() == 0


def signed_dataset(root: Path) -> Path:
    """Write maps of the logarithm of a Jacobian, whose values are above and below zero."""
    x = np.indices(SHAPE)[0] / SHAPE[0] - 0.5
    for i in (1, 2, 3):
        path = root / f"derivatives/maps/sub-{i}/anat/sub-{i}_desc-jacobian_T1map.nii.gz"
        path.parent.mkdir(parents=True)
        save(path, np.where(brain()[1], x * i, 0))
    return root


def test_negative_values_of_a_signed_map_survive_preparation_and_views(tmp_path):
    options = {
        "preset": "fmriprep-native",
        "derivatives": ["maps"],
        "filters": {"suffix": "T1map", "desc": "jacobian"},
        "spacing": 4,
        "mask": "none",
    }
    root = signed_dataset(tmp_path)
    data = BIDSDataModule(root, intensity="signed", **options)
    data.setup()
    assert data.preparation.intensity == data.kind == "signed"
    prepared = data.volumes[2]
    assert prepared.min() < -0.3
    assert prepared.max() > 0.3
    for epoch in range(5):
        for view in data.two_views("train")[epoch, 2]:
            assert view.min() < -0.1
            assert view.max() > 0.1
    with pytest.raises(UsageError, match="--intensity signed"):
        _ = BIDSDataModule(root, preparation=data.preparation, **options).preparation
    scanned = BIDSDataModule(root, **options)
    scanned.setup()
    assert scanned.preparation.intensity == "robust"
    assert scanned.volumes[0].min() == 0


def test_values_must_suit_the_rule_that_is_asked_for(tmp_path):
    for i in (1, 2):
        write(tmp_path / f"sub-{i}/anat/sub-{i}_T1w.nii.gz", "raw-t1w")
    data = BIDSDataModule(tmp_path, intensity="probability", max_skipped=1)
    with pytest.raises(Exception, match="2 range"):
        data.check()
    assert set(data.inputs["code"]) == {"range"}
    with pytest.raises(UsageError, match="zscore"):
        BIDSDataModule(tmp_path, intensity="zscore")


@pytest.mark.parametrize("kind", ["probability", "signed"])
@pytest.mark.parametrize("strength", ["light", "default", "strong"])
def test_maps_get_no_bias_field_and_no_gamma(kind, strength):
    steps = volume_views(strength, kind).transforms
    assert not any(isinstance(step, RandBiasField) for step in steps)
    assert [step.gamma for step in steps if isinstance(step, RandContrast)] == [0]
    plain = volume_views(strength).transforms
    assert any(isinstance(step, RandBiasField) for step in plain)


@pytest.mark.parametrize("kind", ["intensity", "probability", "signed"])
def test_flips_are_left_right_only(kind):
    """A mark at the front, on top, on the left may change sides and nothing else."""
    volume = torch.zeros(1, 20, 24, 20)
    volume[:, 2:6, 18:22, 14:18] = 1.0
    views = volume_views("light", kind)
    sides = set()
    for seed in range(40):
        views.set_random_state(seed)
        view = views(volume)[0]
        if view.max() < 0.3:
            continue  # cut out
        x, y, z = (int(i) for i in np.unravel_index(int(view.argmax()), view.shape))
        assert y > 14
        assert z > 10
        sides.add(x < 10)
    assert sides == {True, False}


# -- what is said of a selection ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "runs"), [("all", [None, 1, 2, 10, 1]), ("first", [None]), ("last", [1])]
)
def test_one_of_a_session_is_chosen_by_acquisition_then_run_then_path(select, runs, tmp_path):
    names = ["T1w", "run-10_T1w", "run-2_T1w", "run-1_T1w", "acq-b_run-1_T1w"]
    root = touched(tmp_path, *(f"sub-1/anat/sub-1_{name}.nii.gz" for name in names))
    found = find_images(root, select=select).images
    got = [None if pd.isna(run) else run for run in found["run"]]
    assert sorted(got, key=str) == sorted(runs, key=str)
    if select == "last":
        assert "acq-b" in found["path"][0]


@pytest.mark.parametrize("check", [False, True])
def test_the_index_says_what_each_step_leaves(check, tmp_path, caplog):
    caplog.set_level("INFO", "nidl_dcl.workflow")
    for name in ("acq-a_run-1", "acq-a_run-2", "acq-b"):
        write(tmp_path / f"sub-1/anat/sub-1_{name}_T1w.nii.gz", "raw-t1w")
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"acquisition": "a"}))
    data = DataOptions(bids_filter_file=filters, select="first")
    table, usable = index(tmp_path, data, RunOptions(), check=check)
    assert len(table.splitlines()) == 1 + usable == 2
    assert caplog.messages[:4] == [
        "3 images: T1w by name",
        "2 images: acquisition a",
        "2 images: usable by name",
        "1 image: first image of each session",
    ]
    assert caplog.messages[4:] == (["1 image: usable after opening"] if check else [])

"""Which images a dataset holds, and what is said of every candidate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from nidl_dcl.bids.index import find_images, index_bids
from nidl_dcl.bids.layout import layout
from nidl_dcl.bids.presets import PREPROCESSED_SPACE, PRESETS
from nidl_dcl.errors import UsageError


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    root.mkdir(parents=True, exist_ok=True)
    return root


def paths(root: Path, **options) -> list[str]:
    return list(find_images(root, **{"mask": "none", **options}).images["path"])


def codes(root: Path, **options) -> dict[str, str]:
    inputs = find_images(root, **{"mask": "none", **options}).inputs
    keys = [
        p if p != "n/a" else who
        for p, who in zip(inputs["path"], inputs["participant_id"], strict=True)
    ]
    return dict(zip(keys, inputs["status"] + " " + inputs["code"], strict=True))


@pytest.fixture
def raw(tmp_path):
    return tree(
        tmp_path / "ds",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-1_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-2_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-10_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-mprage_T1w.nii",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
        "derivatives/x/sub-02/anat/sub-02_T1w.nii.gz",
        "sourcedata/sub-03/anat/sub-03_T1w.nii.gz",
    )


# -- the table ---------------------------------------------------------------------------------


def test_one_row_per_image_with_ids_run_and_relative_path(raw):
    table = index_bids(raw)
    assert list(table.columns) == ["participant_id", "session_id", "run", "path"]
    assert list(table["path"]) == [
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-1_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-2_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-10_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-mprage_T1w.nii",
    ]
    assert list(table["run"].fillna(-1)) == [-1, 1, 2, 10, -1]
    assert table.loc[4, "session_id"] is pd.NA
    assert table.loc[0, "session_id"] == "ses-a"


def test_sources_are_bids_uris_and_links_name_their_datasets(raw):
    index = find_images(raw)
    assert index.images.loc[4, "source"] == "bids:raw:sub-02/anat/sub-02_acq-mprage_T1w.nii"
    assert index.links["raw"] == index.root == raw.resolve()


def test_phenotypes_are_joined_when_asked(raw):
    (raw / "participants.tsv").write_text("participant_id\tage\nsub-01\t20\nsub-02\t30\n")
    extra = raw / "more.csv"
    extra.write_text("participant_id,iq\n01,100\n")
    assert list(index_bids(raw, phenotypes=True)["age"]) == [20, 20, 20, 20, 30]
    assert list(index_bids(raw, phenotypes=extra)["iq"].fillna(-1)) == [100] * 4 + [-1]
    assert "age" not in index_bids(raw)


def test_a_plain_find_with_the_strict_rule_gives_the_same_images(raw):
    rule = re.compile(
        r"(sub-[a-zA-Z0-9]+)/(?:(ses-[a-zA-Z0-9]+)/)?anat/"
        r"\1(?(2)_\2)(?:_(?!ses-)[a-z]+-[a-zA-Z0-9]+)*_T1w\.nii(?:\.gz)?"
    )
    found = [p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file()]
    assert sorted(paths(raw)) == sorted(p for p in found if rule.fullmatch(p))


def test_an_index_loads_neither_pybids_nor_torch(raw):
    code = (
        "import sys; from nidl_dcl.bids.index import index_bids;"
        f"index_bids({str(raw)!r}); print(int('bids' in sys.modules), int('torch' in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0", "0"]


def test_the_dataset_is_not_touched(raw):
    before = sorted(str(p) for p in raw.rglob("*"))
    find_images(raw)
    assert sorted(str(p) for p in raw.rglob("*")) == before


# -- candidates that are not used --------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("sub-01/anat/sub-02_T1w.nii.gz", "skip bad_name"),
        ("sub-A_B/anat/sub-A_B_T1w.nii.gz", "skip bad_id"),
        ("sub-01 copy/anat/sub-01_T1w.nii.gz", "skip bad_id"),
        ("sub-01/anat/sub-01_part-phase_T1w.nii.gz", "skip part"),
        ("sub-01/anat/sub-01_part-mag_T1w.nii.gz", "ok ok"),
        ("sub-01/anat/sub-01_T1w.mgz", "skip extension"),
        ("sub-01/anat/sub-01_desc-preproc_T1w.nii.gz", "warn ambiguous"),
    ],
)
def test_a_candidate_has_a_row_that_says_why(tmp_path, path, row):
    assert codes(tree(tmp_path, path))[path] == row


def test_of_two_files_of_one_name_the_second_is_a_duplicate(tmp_path):
    root = tree(tmp_path, "sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_T1w.nii.gz")
    assert codes(root) == {
        "sub-01/anat/sub-01_T1w.nii.gz": "ok ok",
        "sub-01/anat/sub-01_T1w.nii": "skip duplicate",
    }


def test_names_that_mean_the_same_are_used_with_a_warning(tmp_path):
    root = tree(tmp_path, "sub-1/anat/sub-1_run-1_T1w.nii", "sub-1/anat/sub-1_run-01_T1w.nii")
    assert sorted(codes(root).values()) == ["ok ok", "warn ambiguous"]
    assert len(paths(root)) == 2


def test_links_to_nothing_pipes_folders_and_loops_are_told_apart(tmp_path):
    root = tree(tmp_path / "ds", "sub-1/anat/x", "sub-1/anat/sub-1_acq-f_T1w.nii")
    anat = root / "sub-1/anat"
    names = {
        k: anat / f"sub-1_acq-{k}_T1w.nii.gz"
        for k in ("annex", "gone", "loop", "pipe", "dir", "good")
    }
    names["annex"].symlink_to("../../.git/annex/objects/xx/yy/key/key")
    names["gone"].symlink_to("nowhere.nii.gz")
    names["loop"].symlink_to(names["loop"].name)
    os.mkfifo(names["pipe"])
    names["dir"].mkdir()
    names["good"].symlink_to("sub-1_acq-f_T1w.nii")
    found = codes(root)
    assert {k: found[p.relative_to(root).as_posix()] for k, p in names.items()} == {
        "annex": "skip not_fetched",
        "gone": "skip not_fetched",
        "loop": "skip unreadable",
        "pipe": "skip not_a_file",
        "dir": "skip not_a_file",
        "good": "ok ok",
    }
    inputs = find_images(root).inputs.set_index("path")
    assert "datalad get" in inputs.loc["sub-1/anat/sub-1_acq-annex_T1w.nii.gz", "message"]


def test_loops_of_links_end(tmp_path):
    root = tree(tmp_path / "ds", "sub-1/anat/sub-1_T1w.nii")
    (root / "sub-1/anat/anat").symlink_to(".")
    (root / "sub-1/ses-1").symlink_to("..")
    (root / "sub-2").symlink_to("sub-2")
    (root / "sub-3").symlink_to(root)
    (root / "derivatives").mkdir()
    (root / "derivatives/x").symlink_to("x")
    assert paths(root) == ["sub-1/anat/sub-1_T1w.nii"]


def test_a_folder_that_cannot_be_read_is_a_row(tmp_path, monkeypatch):
    root = tree(tmp_path, "sub-1/anat/sub-1_T1w.nii", "sub-2/anat/sub-2_T1w.nii")
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("sub-2/anat"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert codes(root) == {"sub-1/anat/sub-1_T1w.nii": "ok ok", "sub-2/anat": "skip permission"}


def test_nobody_vanishes_without_a_row(tmp_path):
    root = tree(tmp_path, "sub-1/anat/sub-1_T1w.nii", "sub-2/func/x", "sub-bad name/func/x")
    ids = ["01", "sub-9", "sub-A_B", "control-7"]
    (root / "participants.tsv").write_text("participant_id\n" + "\n".join(ids) + "\n")
    index = find_images(root)
    assert codes(root) == {
        "sub-1/anat/sub-1_T1w.nii": "ok ok",
        "sub-2": "skip no_image",
        "sub-9": "skip no_image",
        "sub-A_B": "skip bad_id",
        "sub-bad name": "skip bad_id",
        "sub-control-7": "skip bad_id",
    }
    assert index.inputs["status"].isin(["ok", "warn", "skip"]).all()
    assert len(index.images) == (index.inputs["status"] != "skip").sum()


def test_a_name_that_is_no_text_has_a_row_that_can_be_written(tmp_path):
    tree(tmp_path, os.fsdecode(b"sub-\xe9/anat/sub-1_T1w.nii"))
    row = find_images(tmp_path).inputs.iloc[0]
    assert row["code"] == "bad_id"
    assert row["path"].encode() == b"sub-\\udce9/anat/sub-1_T1w.nii"


def test_a_broken_participants_table_does_not_stop_the_index(tmp_path):
    root = tree(tmp_path, "sub-1/anat/sub-1_T1w.nii")
    (root / "participants.tsv").write_text("name\tage\nx\t1\n")
    with pytest.warns(UserWarning, match="no column participant_id"):
        assert paths(root) == ["sub-1/anat/sub-1_T1w.nii"]


def test_parent_folders_that_look_like_entities_say_nothing(tmp_path):
    root = tree(tmp_path / "sub-99" / "ses-x" / "acq-y", "sub-1/anat/sub-1_T1w.nii")
    table = index_bids(root)
    assert list(table["participant_id"]) == ["sub-1"]
    assert table["session_id"].isna().all()
    assert paths(root, filters={"acquisition": None}) == ["sub-1/anat/sub-1_T1w.nii"]


# -- selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["02"], ["sub-02"], ["02", "sub-02"]])
def test_participants_are_named_with_or_without_prefix(raw, labels):
    assert paths(raw, participant_label=labels) == ["sub-02/anat/sub-02_acq-mprage_T1w.nii"]


def test_no_label_means_all(raw):
    assert len(paths(raw, participant_label=[], session_label=[])) == 5


def test_a_session_leaves_out_images_of_others_and_of_none(raw):
    index = find_images(raw, session_label=["ses-a"])
    assert list(index.images["session_id"]) == ["ses-a"]
    assert list(index.inputs["code"]) == ["ok", "no_image"]


def test_a_participant_of_the_table_alone_is_known(raw):
    (raw / "participants.tsv").write_text("participant_id\nsub-77\n")
    assert codes(raw, participant_label=["77"]) == {"sub-77": "skip no_image"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"participant_label": ["02", "99"]}, "participant sub-99 .* 2, for instance sub-0"),
        ({"session_label": ["z"]}, "session ses-z .* 2, for instance ses-"),
        ({"filters": {"acqisition": "x"}}, "acqisition"),
        ({"preset": "t1"}, "'t1'.*raw-t1w"),
        ({"select": "best"}, "best"),
        ({"mask": "nobody"}, "nobody"),
        ({"derivatives": ["nowhere"]}, "nowhere"),
        ({"derivatives": ["x=.", "x=.."]}, "taken"),
        ({"preset": "fmriprep-mni"}, "--derivatives NAME=PATH"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(raw, options, said):
    with pytest.raises(UsageError, match=said):
        find_images(raw, **options)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_bids_dir_must_be_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=name):
        find_images(tmp_path / name)


def test_an_empty_folder_has_no_images(tmp_path):
    index = find_images(tmp_path)
    assert len(index.images) == len(index.inputs) == 0
    assert list(index.inputs.columns)[-2:] == ["code", "message"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"run": 2}, ["run-2"]),
        ({"run": None, "session": "*"}, ["ses-a_T1w"]),
        ({"acq": "*"}, ["acq-mprage"]),
        ({"t1w": {"acquisition": "mprage"}}, ["acq-mprage"]),
        ({"suffix": "T2w"}, ["sub-02_T2w"]),
        ({"extension": ".nii"}, ["acq-mprage"]),
        ({"run": [1, 10]}, ["run-1", "run-10"]),
    ],
)
def test_filters_choose_images_by_entities(raw, filters, expected):
    found = paths(raw, filters=filters)
    assert len(found) == len(expected)
    assert all(part in path for part, path in zip(expected, found, strict=True))


def test_a_filter_may_ask_for_phase_images(tmp_path):
    root = tree(
        tmp_path, "sub-1/anat/sub-1_part-phase_T1w.nii", "sub-1/anat/sub-1_part-mag_T1w.nii"
    )
    assert paths(root, filters={"part": "phase"}) == ["sub-1/anat/sub-1_part-phase_T1w.nii"]


@pytest.mark.parametrize(("select", "run"), [("first", "run-1_"), ("last", "run-10_")])
def test_one_image_of_each_session_by_acquisition_and_run(raw, select, run):
    found = paths(raw, select=select)
    assert len(found) == 3
    assert run in found[1]


def test_images_kept_are_counted_after_each_step(raw):
    kept = find_images(raw, filters={"session": "b"}, select="last").kept
    assert kept == [
        ("T1w by name", 5),
        ("session b", 3),
        ("usable by name", 3),
        ("last image of each session", 1),
    ]


# -- presets -----------------------------------------------------------------------------------

MNI = "space-MNI152NLin2009cAsym"
CAPS = "subjects/sub-1/ses-M00/t1_linear/sub-1_ses-M00_space-MNI152NLin2009cSym"
LAYOUTS = {
    "mp2rage": (["sub-1/anat/sub-1_UNIT1.nii.gz"], ["sub-1/anat/sub-1_inv-1_MP2RAGE.nii.gz"]),
    "preprocessed": (
        [f"sub-1/anat/sub-1_space-{PREPROCESSED_SPACE}_desc-preproc_T1w.nii.gz"],
        [
            "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
            f"sub-1/anat/sub-1_{MNI}_desc-preproc_T1w.nii.gz",
        ],
    ),
    "preprocessed-native": (
        ["sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"],
        [f"sub-1/anat/sub-1_space-{PREPROCESSED_SPACE}_desc-preproc_T1w.nii.gz"],
    ),
    "fmriprep-mni": (
        [
            f"sub-1/anat/sub-1_{MNI}_desc-preproc_T1w.nii.gz",
            f"sub-2/ses-1/anat/sub-2_ses-1_{MNI}_res-2_desc-preproc_T1w.nii.gz",
        ],
        [
            "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
            f"sub-1/anat/sub-1_{MNI}_desc-brain_mask.nii.gz",
        ],
    ),
    "fmriprep-native": (
        ["sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"],
        [f"sub-1/anat/sub-1_{MNI}_desc-preproc_T1w.nii.gz"],
    ),
    "fmriprep-gm": (
        [f"sub-1/anat/sub-1_{MNI}_label-GM_probseg.nii.gz"],
        [
            f"sub-1/anat/sub-1_{MNI}_label-WM_probseg.nii.gz",
            "sub-1/anat/sub-1_label-GM_probseg.nii.gz",
        ],
    ),
    "clinica-t1-linear": (
        [f"{CAPS}_desc-Crop_res-1x1x1_T1w.nii.gz"],
        [f"{CAPS}_res-1x1x1_T1w.nii.gz"],
    ),
    "brainprep-quasiraw": (
        ["subjects/sub-1/ses-1/sub-1_ses-1_run-1_T1w.nii.gz"],
        ["subjects/sub-1/ses-1/sub-1_ses-1_run-1_mod-T1w_brainmask.nii.gz"],
    ),
    "openbhb-vbm": (
        ["train/derivatives/sub-1/ses-1/sub-1_preproc-cat12vbm_desc-gm_T1w.npy"],
        ["train/derivatives/sub-1/ses-1/sub-1_preproc-quasiraw_T1w.npy"],
    ),
    "openbhb-quasiraw": (
        ["derivatives/sub-1/ses-1/sub-1_preproc-quasiraw_T1w.npy"],
        ["derivatives/sub-1/ses-1/sub-1_preproc-cat12vbm_desc-gm_T1w.npy"],
    ),
    "cat12-vbm": (
        ["sub-1/anat/mri/mwp1sub-1_T1w.nii", "sub-2/ses-1/mri/mwp1sub-2_ses-1_T1w.nii"],
        ["sub-1/anat/mri/mwp2sub-1_T1w.nii", "sub-1/anat/mri/p0sub-1_T1w.nii"],
    ),
    "freesurfer": (
        ["sub-1/mri/brain.mgz", "sub-2_ses-1/mri/brain.mgz"],
        ["sub-1/mri/T1.mgz", "fsaverage/mri/brain.mgz"],
    ),
}


def test_every_preset_but_the_plain_one_has_a_layout_here():
    assert set(LAYOUTS) | {"raw-t1w"} == set(PRESETS)


@pytest.mark.parametrize("preset", LAYOUTS)
def test_a_preset_finds_its_images_and_no_others(tmp_path, preset):
    images, others = LAYOUTS[preset]
    root = tree(tmp_path, *images, *others)
    assert paths(root, preset=preset) == images
    sessions = [m[0] if (m := re.search("ses-[a-zA-Z0-9]+", p)) else None for p in images]
    found = index_bids(root, preset=preset)["session_id"]
    assert [None if pd.isna(s) else s for s in found] == sessions


@pytest.mark.parametrize("how", ["inside", "given by name", "given by path", "by its usual name"])
def test_images_of_a_derivative_are_found_wherever_it_is(tmp_path, how):
    name = "fmriprep-23" if how == "by its usual name" else "prep"
    place = (
        tmp_path / "ds/derivatives" / name
        if how in ("inside", "by its usual name")
        else tmp_path / "out/prep"
    )
    image = "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"
    tree(place, image)
    root = tree(tmp_path / "ds", "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz")
    given = {"given by name": [f"mine={place}"], "given by path": [place]}.get(how, [])
    index = find_images(root, preset="fmriprep-native", derivatives=given)
    path = index.images.loc[0, "path"]
    assert (index.root / path).samefile(place / image)
    label = "mine" if given and "=" in str(given[0]) else name
    assert index.images.loc[0, "source"] == f"bids:{label}:{image}"
    assert index.links[label] == place.resolve()
    assert list(index.inputs["code"]) == ["ok", "no_image"]


def test_images_in_two_derivatives_are_ambiguous(tmp_path):
    image = "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"
    root = tree(tmp_path, f"derivatives/fmriprep-a/{image}", f"derivatives/fmriprep-b/{image}")
    with pytest.raises(UsageError, match=r"fmriprep-a, fmriprep-b.*--derivatives"):
        find_images(root, preset="fmriprep-native")
    chosen = find_images(root, preset="fmriprep-native", derivatives=["fmriprep-b"])
    assert chosen.images.loc[0, "path"] == f"derivatives/fmriprep-b/{image}"


def test_an_unknown_participant_of_a_derivative_is_refused_as_such(tmp_path):
    root = tree(tmp_path, "derivatives/fmriprep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz")
    with pytest.raises(UsageError, match="Unknown participant sub-2"):
        find_images(root, preset="fmriprep-native", participant_label=["2"])


# -- masks -------------------------------------------------------------------------------------


def masked(root: Path, *names: str, images: tuple[str, ...] = ("sub-1_T1w", "sub-2_T1w")) -> Path:
    tree(root, *(f"{image.split('_')[0]}/anat/{image}.nii.gz" for image in images))
    for name in names:
        place, mask = name.split("/")
        tree(root, f"derivatives/{place}/{mask.split('_')[0]}/anat/{mask}.nii.gz")
    return root


def mask_names(root: Path, **options) -> list[str | None]:
    found = find_images(root, **options).images["mask_path"]
    return [None if pd.isna(p) else p.rsplit("/", 1)[-1].split(".")[0] for p in found]


def test_masks_of_the_only_derivative_that_has_them_are_used(tmp_path):
    root = masked(tmp_path, "hd/sub-1_desc-brain_mask", "hd/sub-2_desc-brain_mask", "qc/sub-1_bold")
    assert list(find_images(root).images["mask_path"]) == [
        "derivatives/hd/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "derivatives/hd/sub-2/anat/sub-2_desc-brain_mask.nii.gz",
    ]
    assert mask_names(root, mask="none") == [None, None]


def test_without_masks_there_are_none(tmp_path):
    assert mask_names(masked(tmp_path, "hd/sub-1_desc-head_mask")) == [None, None]


def test_masks_of_some_images_are_an_error_that_counts(tmp_path):
    root = masked(tmp_path, "hd/sub-1_desc-brain_mask")
    with pytest.raises(UsageError, match=r"1 of 2 images .*--mask none"):
        find_images(root)
    assert mask_names(root, participant_label=["1"]) == ["sub-1_desc-brain_mask"]


def test_a_mask_that_is_not_fetched_counts_as_missing(tmp_path):
    root = masked(tmp_path, "hd/sub-1_desc-brain_mask", "hd/sub-2_desc-brain_mask")
    mask = root / "derivatives/hd/sub-2/anat/sub-2_desc-brain_mask.nii.gz"
    mask.unlink()
    mask.symlink_to("../.git/annex/objects/x")
    with pytest.raises(UsageError, match="1 of 2"):
        find_images(root)


def test_masks_in_two_derivatives_need_a_name(tmp_path):
    both = [f"{place}/sub-{i}_desc-brain_mask" for place in ("hd", "synth") for i in (1, 2)]
    root = masked(tmp_path, *both)
    with pytest.raises(UsageError, match=r"hd, synth.*--mask hd"):
        find_images(root)
    assert "derivatives/synth/" in find_images(root, mask="synth").images.loc[0, "mask_path"]


@pytest.mark.parametrize(
    ("image", "masks", "expected"),
    [
        ("sub-1_run-1_T1w", ["sub-1_desc-brain_mask"], "sub-1_desc-brain_mask"),
        (
            "sub-1_run-1_T1w",
            ["sub-1_run-1_desc-brain_mask", "sub-1_run-2_desc-brain_mask"],
            "sub-1_run-1_desc-brain_mask",
        ),
        ("sub-1_run-1_T1w", ["sub-1_run-2_desc-brain_mask"], None),
        ("sub-1_T1w", [f"sub-1_{MNI}_desc-brain_mask"], None),
        (
            "sub-1_T1w",
            [f"sub-1_{MNI}_desc-brain_mask", "sub-1_space-T1w_desc-brain_mask"],
            "sub-1_space-T1w_desc-brain_mask",
        ),
        (
            "sub-1_T1w",
            ["sub-1_desc-brain_mask", "sub-1_acq-a_desc-brain_mask"],
            "sub-1_desc-brain_mask",
        ),
        ("sub-1_T1w", ["sub-1_mod-T2w_desc-brain_mask"], None),
    ],
)
def test_a_mask_has_the_entities_of_its_image(tmp_path, image, masks, expected):
    root = masked(tmp_path, *(f"hd/{mask}" for mask in masks), images=(image,))
    assert mask_names(root) == [expected]


def test_several_masks_that_fit_equally_are_not_guessed(tmp_path):
    root = masked(
        tmp_path,
        *("hd/sub-1_acq-a_desc-brain_mask", "hd/sub-1_acq-b_desc-brain_mask"),
        "hd/sub-2_desc-brain_mask",
    )
    with pytest.raises(UsageError, match="1 of 2"):
        find_images(root)


def test_a_derivative_brings_its_own_masks(tmp_path):
    space = f"sub-1/anat/sub-1_{MNI}_res-1_desc"
    root = tree(
        tmp_path,
        f"derivatives/fmriprep/{space}-preproc_T1w.nii.gz",
        f"derivatives/fmriprep/{space}-brain_mask.nii.gz",
        "derivatives/fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        f"derivatives/other/sub-1/anat/sub-1_{MNI}_desc-brain_mask.nii.gz",
    )
    assert list(find_images(root, preset="fmriprep-mni").images["mask_path"]) == [
        f"derivatives/fmriprep/{space}-brain_mask.nii.gz"
    ]


def test_a_pipeline_may_name_its_masks_otherwise(tmp_path):
    folder = "subjects/sub-1/ses-1/sub-1_ses-1_run-1"
    root = tree(tmp_path, f"{folder}_T1w.nii.gz", f"{folder}_mod-T1w_brainmask.nii.gz")
    found = find_images(root, preset="brainprep-quasiraw").images
    assert list(found["mask_path"]) == [f"{folder}_mod-T1w_brainmask.nii.gz"]


# -- the layout --------------------------------------------------------------------------------


def test_the_layout_is_a_real_one_that_finds_the_same_images(raw):
    bids = pytest.importorskip("bids")
    (raw / "sub-02/anat/sub-02_T2w.json").write_text("{broken")
    (raw / "dataset_description.json").write_text("{broken")
    real = layout(raw)
    assert isinstance(real, bids.BIDSLayout)
    assert sorted(real.get(suffix="T1w", return_type="file")) == sorted(
        str(raw / p) for p in paths(raw)
    )
    assert type(real.get(suffix="T1w")[0]).__name__ == "BIDSImageFile"
    assert type(real.get(extension=".json", suffix="T2w")[0]).__name__ == "BIDSJSONFile"
    assert real.get_subjects() == ["01", "02"]
    assert layout(raw, derivatives=str(raw / "derivatives" / "x")).derivatives.keys() == {"x"}
    assert real.get(subject="01", run=10)[0].entities["session"] == "b"
    assert not real.get(suffix="bold")


def test_the_layout_knows_the_derivative_of_the_preset(tmp_path):
    pytest.importorskip("bids")
    image = "derivatives/fmriprep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz"
    root = tree(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", image)
    found = layout(root, preset="fmriprep-native").get(desc="preproc", return_type="file")
    assert found == [str(root / image)]


# -- the command, on stubs ---------------------------------------------------------------------

STUBS = {
    "runs and sidecars": [
        *("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_inplaneT2.nii.gz"),
        *("sub-02/anat/sub-02_run-01_T1w.nii.gz", "sub-02/anat/sub-02_run-02_T1w.nii.gz"),
        *("sub-02/anat/sub-02_run-01_T1w.json", "T1w.json", "task-x_bold.json", "dwi.bval"),
        *("sub-01/func/sub-01_task-balloon_run-01_bold.nii.gz", "sub-03/func/sub-03_T1w.nii.gz"),
        *("sub-03/anat/sub-03_T1w.nii", "sub-03/anat/sub-03_rec-norm_T1w.nii.gz"),
    ],
    "sessions": [
        *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_T1w.nii.gz" for s in ("test", "retest")),
        *(f"sub-01/ses-{s}/sub-01_ses-{s}_scans.tsv" for s in ("test", "retest")),
        *(f"sub-02/ses-{s}/anat/sub-02_ses-{s}_acq-mprage_run-1_T1w.nii" for s in ("1", "mri2")),
        *("sub-02/ses-1/fmap/sub-02_ses-1_T1w.nii.gz", "sub-02/sub-02_sessions.tsv"),
        *("sub-03/ses-1/anat/sub-03_T1w.nii.gz", "sub-03/anat/sub-03_ses-1_T1w.nii.gz"),
        *("sub-04/anat/sub-04_T1w.nii.gz", "sub-04/ses-1/anat/sub-04_ses-1_T1w.nii.gz"),
    ],
    "derivatives and source data": [
        *("sub-01/anat/sub-01_T1w.nii.gz", "sourcedata/sub-01/anat/sub-01_T1w.nii.gz"),
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        "derivatives/freesurfer/sub-01/mri/T1.mgz",
        *("code/sub-02/anat/sub-02_T1w.nii.gz", "stimuli/sub-01_T1w.nii.gz", ".git/sub-01_T1w.nii"),
        *("phantom-1/anat/sub-1_T1w.nii.gz", "sub-01/anat/.sub-01_acq-hidden_T1w.nii.gz"),
    ],
    "parts, inversions and other contrasts": [
        *(f"sub-1/anat/sub-1_part-{p}_T1w.nii.gz" for p in ("mag", "phase", "real", "imag")),
        *(
            f"sub-1/anat/sub-1_inv-{i}_part-{p}_MP2RAGE.nii.gz"
            for i in "12"
            for p in ("mag", "phase")
        ),
        *("sub-1/anat/sub-1_UNIT1.nii.gz", "sub-1/anat/sub-1_T1map.nii.gz"),
        *("sub-2/anat/sub-2_mod-T1w_defacemask.nii.gz", "sub-2/anat/sub-2_acq-lowres_PDT2.nii.gz"),
        *("sub-2/anat/sub-2_flip-2_mt-off_MTS.nii.gz", "sub-2/anat/sub-2_echo-1_MEGRE.nii.gz"),
        *("sub-2/anat/sub-2_acq-highres_rec-dis2d_run-2_T1w.nii.gz", "sub-2/anat/sub-2_T1rho.nii"),
        *("sub-2/anat/sub-2_T1w_defaced.nii.gz", "sub-2/anat/sub-2_notT1w.nii.gz"),
        *("sub-2/anat/sub-2_ce-gad_T1w.nii.gz", "sub-2/anat/sub-2_acq-a_acq-b_T1w.nii.gz"),
    ],
}
STRICT = re.compile(
    r"(sub-[a-zA-Z0-9]+)/(?:(ses-[a-zA-Z0-9]+)/)?anat/\1(?(2)_\2)"
    r"((?:_(?!sub-|ses-)[a-z]+-[a-zA-Z0-9]+)*)_T1w\.nii(?:\.gz)?"
)


def by_hand(root: Path) -> list[str]:
    """Return the images that a walk of everything and the strict rule of names give."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name).relative_to(root).as_posix()
            match = STRICT.fullmatch(path)
            keys = re.findall("_([a-z]+)-", match[3]) if match else ["x", "x"]
            magnitude = re.search("_part-(phase|real|imag)_", path) is None
            if len(set(keys)) == len(keys) and magnitude:
                found.append(path)
    return sorted(found)


@pytest.mark.parametrize("name", STUBS)
def test_the_command_lists_exactly_the_images_of_a_walk_of_everything(tmp_path, run, name):
    root = tree(tmp_path / "ds", *STUBS[name])
    done = run("index", root)
    assert done.status == 0
    rows = [line.split("\t") for line in done.out.splitlines()]
    usable = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    images = sorted(row["path"] for row in usable if row["status"] != "skip")
    assert images == by_hand(root)
    assert len(images) > 2 or name == "derivatives and source data"


# -- real data ---------------------------------------------------------------------------------


def test_every_real_subject_is_found_with_mask_age_and_sex():
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "ixi"
    root = Path(os.environ.get("NIDL_DCL_IXI", beside))
    if not root.is_dir():
        pytest.skip("no real data here")
    index = find_images(root)
    people = len((root / "participants.tsv").read_text().split("\n")) - 2
    assert len(index.images) == people
    assert index.images["mask_path"].notna().all()
    assert all((root / path).is_file() for path in index.images["mask_path"])
    table = index_bids(root, phenotypes=True)
    assert table["age"].between(18, 90).all()
    assert set(table["sex"]) == {"M", "F"}


def test_a_description_of_the_dataset_is_not_needed(tmp_path):
    root = tree(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz")
    (root / "dataset_description.json").write_text(json.dumps({"DatasetType": "derivative"}))
    assert len(paths(root)) == 1

"""What file names say, compared with pybids itself and with the strict rule."""

from __future__ import annotations

import pytest

from nidl_dcl.bids.entities import NameRule, entities_of, natural_key, passes, read_filters
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.errors import UsageError

RAW = PRESETS["raw-t1w"]
PATHS = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-x01Y2/ses-pre/anat/sub-x01Y2_ses-pre_acq-mprage_run-02_T1w.nii",
    "sub-01/anat/sub-01_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz",
    "sub-01/anat/sub-01_space-MNI152NLin2009cAsym_label-GM_probseg.nii.gz",
    "sub-01/anat/sub-01_rec-norm_echo-1_part-phase_T2w.nii.gz",
    "sub-01/anat/sub-01_inv-1_part-mag_MP2RAGE.nii.gz",
    "subjects/sub-1/ses-M00/t1_linear/sub-1_ses-M00_space-X_desc-Crop_res-1x1x1_T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.json",
    "sub-01/mri/brain.mgz",
]


@pytest.mark.parametrize("path", PATHS)
def test_entities_are_those_pybids_reads_from_the_root_relative_path(path):
    layout = pytest.importorskip("bids.layout")
    assert entities_of(path) == layout.parse_file_entities(f"/{path}")


def test_folders_above_the_root_say_nothing():
    assert entities_of("sub-01/anat/sub-01_T1w.nii.gz")["subject"] == "01"


@pytest.mark.parametrize(
    ("name", "participant", "session", "code", "said"),
    [
        ("sub-01_T1w.nii.gz", "sub-01", None, "ok", ""),
        ("sub-01_ses-a_T1w.nii", "sub-01", "ses-a", "ok", ""),
        ("sub-01_foo-bar_T1w.nii.gz", "sub-01", None, "ok", ""),
        ("sub-02_T1w.nii.gz", "sub-01", None, "bad_name", "sub-02"),
        ("sub-01_ses-b_T1w.nii.gz", "sub-01", "ses-a", "bad_name", "ses-b"),
        ("sub-01_T1w.nii.gz", "sub-01", "ses-a", "bad_name", "no session"),
        ("sub-01_ses-a_T1w.nii.gz", "sub-01", None, "bad_name", "ses-a"),
        ("sub-01_acq-0.8mm_T1w.nii.gz", "sub-01", None, "bad_name", "labels"),
        ("sub-01_acq-a_acq-b_T1w.nii.gz", "sub-01", None, "bad_name", "acq- stands twice"),
        (
            "sub-01_t1w.nii.gz",
            "sub-01",
            None,
            "bad_name",
            "T1w with labels of letters and digits: look at the capitals",
        ),
        ("T1w.nii.gz", "sub-01", None, "bad_name", "T1w"),
        ("tpl-MNI_T1w.nii.gz", "sub-01", None, "bad_name", "T1w"),
        ("sub-A_B_T1w.nii.gz", "sub-A_B", None, "bad_id", "sub-A_B"),
        ("sub-01_T1w.nii.gz", "sub-01 copy", None, "bad_id", "sub-01 copy"),
        ("sub-01_ses-1_T1w.nii.gz", "sub-01", "ses-1 copy", "bad_name", "ses-1 copy"),
        ("sub-01_T1w.NII.GZ", "sub-01", None, "extension", ".NII.GZ"),
        ("sub-01_T1w.mgz", "sub-01", None, "extension", ".mgz"),
    ],
)
def test_a_name_agrees_with_its_folder_and_has_plain_labels(name, participant, session, code, said):
    rule = NameRule(RAW, ["T1w"], RAW.extensions)
    assert rule.stem(name) is not None
    found, message = rule.judge(name, participant, session)
    assert found == code
    assert said in message


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_T1w.json",
        "._sub-01_T1w.nii.gz",
        ".sub-01_T1w.nii.gz",
        "sub-01_T2w.nii.gz",
        "sub-01_mod-T1w_defacemask.nii.gz",
        "sub-01_space-T1w_desc-brain_mask.nii.gz",
        "sub-01_T1w.nii.gz.part",
        "sub-01_T1w copy.nii.gz",
        "sub-01_notT1w.nii.gz",
    ],
)
def test_other_names_are_no_candidates(name):
    assert NameRule(RAW, ["T1w"], RAW.extensions).stem(name) is None


def test_an_older_clinica_keeps_the_name_of_its_input():
    preset = PRESETS["clinica-t1-linear"]
    rule = NameRule(preset, [preset.suffix], preset.extensions)
    name = "sub-1_ses-M00_T1w_space-MNI152NLin2009cSym_desc-Crop_res-1x1x1_T1w.nii.gz"
    assert rule.judge(name, "sub-1", "ses-M00")[0] == "ok"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"acquisition": "mprage"}, {"acquisition": ["mprage"]}),
        ({"acq": ["a", None]}, {"acquisition": ["a", None]}),
        (
            {"t1w": {"session": "ses-1", "run": None}, "bold": {"task": "rest"}},
            {"session": ["1"], "run": [None]},
        ),
        ({"T1w": {"resolution": 1}}, {"res": [1]}),
        ({"reconstruction": "*"}, {"reconstruction": "*"}),
        (
            {"rec": "Query.NONE", "ce": "Query.ANY", "echo": "Query.OPTIONAL"},
            {"reconstruction": [None], "ceagent": "*"},
        ),
        ({"extension": "nii.gz"}, {"extension": [".nii.gz"]}),
    ],
)
def test_filters_are_read_in_both_forms_and_by_both_kinds_of_names(filters, expected):
    assert read_filters(filters, RAW) == expected


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"acquisiton": "x"}, "Did you mean 'acquisition'"),
        ({"t1w": {"nonsense": 1}}, "'nonsense'"),
        ({"bold": {"task": "rest"}}, "'bold'"),
        ({"t1w": {"run": 1}, "session": "1"}, "mixes"),
        ({"run": 1.5}, "1.5"),
        ({"run": True}, "True"),
        ({"suffix": "*"}, "suffix"),
        (["T1w"], "list"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused_by_name(filters, said):
    with pytest.raises(UsageError, match=said.replace("'", "['\"]")):
        read_filters(filters, RAW)


@pytest.mark.parametrize(
    ("value", "allowed", "expected"),
    [
        (1, ["01"], True),
        (1, [1], True),
        (1, [2], False),
        ("01", [1], True),
        ("01", ["1"], False),
        (None, [None], True),
        (1, [None], False),
        ("a", ["b", "a"], True),
        (None, "*", False),
        ("a", "*", True),
    ],
)
def test_values_are_compared_as_text_or_as_numbers(value, allowed, expected):
    assert passes(value, allowed) is expected


def test_names_sort_by_their_numbers():
    assert sorted(["run-10", "run-2", "a"], key=natural_key) == ["a", "run-2", "run-10"]

"""Tables in the participants' folders become one, and say what is odd once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nidl_dcl.bids.tables import scan_tables, session_tables
from nidl_dcl.errors import UsageError

SESSION = ("session_id", "session", "ses")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_columns_of_different_files_are_joined_by_name(tmp_path):
    write(
        tmp_path,
        {
            "sub-1/sub-1_sessions.tsv": "session_id\tage\tmood\nses-1\t20\tgood\n",
            "sub-2/sub-2_sessions.tsv": "mood\tses\tiq\nbad\tses-1\t90\n",
        },
    )
    table = session_tables(tmp_path, ["sub-1", "sub-2", "sub-3"], SESSION)
    assert table.columns == ["participant_id", "session_id", "age", "mood", "iq"]
    assert table.rows == [
        ["sub-1", "ses-1", "20", "good", None],
        ["sub-2", "ses-1", None, "bad", "90"],
    ]
    assert [file.name for file in table.files] == ["sub-1_sessions.tsv", "sub-2_sessions.tsv"]


@pytest.mark.parametrize("name", ["anat/x.nii", "/anat/x.nii", "./anat/x.nii", "anat\\x.nii"])
def test_paths_of_scans_are_below_the_root(tmp_path, name):
    write(tmp_path, {"sub-1/ses-a/sub-1_ses-a_scans.tsv": f"filename\tsnr\n{name}\t1\n"})
    table = scan_tables(tmp_path, ["sub-1", "sub-1/ses-a"])
    assert table.rows == [["sub-1/ses-a/anat/x.nii", "1"]]


def test_what_is_odd_in_many_files_is_said_once(tmp_path):
    files = {f"sub-{i}/sub-{i}_sessions.tsv": "visit\n1\n" for i in range(50)}
    files |= {f"sub-{i}/sub-{i}_sessions.tsv": "ses,a\n1,2\n" for i in range(50, 100)}
    table = session_tables(write(tmp_path, files), [f"sub-{i}" for i in range(100)], SESSION)
    assert table.notes == [
        "sub-0/sub-0_sessions.tsv and 49 more: no column session_id, so it is not used",
        "sub-50/sub-50_sessions.tsv and 49 more: cells are separated by ',', not by tabs",
    ]


def test_the_folder_says_whose_sessions_they_are(tmp_path):
    text = "participant_id\tsession_id\n{}\tses-1\n"
    files = {f"sub-{i}/sub-{i}_sessions.tsv": text.format("1") for i in (1, 2)}
    table = session_tables(write(tmp_path, files), ["sub-1", "sub-2"], SESSION)
    assert table.rows == [["sub-1", "ses-1"], ["sub-2", "ses-1"]]
    assert table.notes == [
        "sub-2/sub-2_sessions.tsv: its participant_id is not that of the folder, which counts"
    ]


def test_codes_and_units_count_where_all_sidecars_agree(tmp_path):
    def sidecar(unit: str) -> str:
        return json.dumps({"age": {"Units": unit}, "iq": {"Levels": {"1": "low"}}})

    files = {f"sub-{i}/sub-{i}_sessions.tsv": "session_id\tage\tiq\n1\t2\t1\n" for i in (1, 2)}
    files |= {f"sub-{i}/sub-{i}_sessions.json": sidecar(u) for i, u in ((1, "year"), (2, "month"))}
    table = session_tables(write(tmp_path, files), ["sub-1", "sub-2"], SESSION)
    assert table.about == {"age": {"Units": None}, "iq": {"Levels": {"1": "low"}}}
    assert "age: Units differ" in " ".join(table.notes)


def test_a_folder_in_place_of_a_table_is_refused(tmp_path):
    (tmp_path / "sub-1" / "sub-1_scans.tsv").mkdir(parents=True)
    with pytest.raises(UsageError, match="not a file"):
        scan_tables(tmp_path, ["sub-1"])

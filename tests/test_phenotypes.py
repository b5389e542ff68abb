"""Phenotypes reach the right images, and what did not match is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.ids import match_ids
from nidl_dcl.phenotypes import participant_ids, read_phenotypes


def images(*rows: tuple[str, str | None], folder: str = "anat") -> pd.DataFrame:
    paths = [
        "/".join(
            [p, *([s] if s else []), folder, f"{'_'.join([p, *([s] if s else [])])}_T1w.nii.gz"]
        )
        for p, s in rows
    ]
    return pd.DataFrame(
        {
            "participant_id": pd.array([p for p, _ in rows], dtype="string"),
            "session_id": pd.array([s for _, s in rows], dtype="string"),
            "path": pd.array(paths, dtype="string"),
        }
    )


def write(root: Path, **tables: str) -> Path:
    """Write tables whose cells are parted by spaces; `__` in a name is a folder."""
    for name, text in tables.items():
        path = root / f"{name.replace('__', '/')}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join("\t".join(line.split()) for line in text.splitlines() if line.strip())
        )
    return root


TWO = images(("sub-1", None), ("sub-2", None))
VISITS = images(("sub-1", "ses-a"), ("sub-1", "ses-b"), ("sub-2", "ses-a"))


def values(root: Path, table: pd.DataFrame, column: str, *files: Path) -> list[object]:
    found = read_phenotypes(root, table, files).table[column]
    return [None if pd.isna(v) else v for v in found]


# -- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "names", "matched"),
    [
        (["sub-01"], ["sub-01"], {"sub-01": ("sub-01", "exact")}),
        (["01"], ["sub-01"], {"01": ("sub-01", "prefix")}),
        (["SUB-a1"], ["sub-A1"], {"SUB-a1": ("sub-A1", "case")}),
        (["1", "02"], ["sub-001", "sub-2"], {"1": ("sub-001", "zeros"), "02": ("sub-2", "zeros")}),
        (["IXI39"], ["sub-IXI039"], {"IXI39": ("sub-IXI039", "zeros")}),
        (["1"], ["sub-01", "sub-001"], {}),
        (["1", "001"], ["sub-01"], {}),
        (
            ["sub-01", "1"],
            ["sub-01", "sub-1"],
            {"sub-01": ("sub-01", "exact"), "1": ("sub-1", "prefix")},
        ),
        (["a", "A"], ["sub-a", "sub-A"], {"a": ("sub-a", "prefix"), "A": ("sub-A", "prefix")}),
        (["aA"], ["sub-aa", "sub-AA"], {}),
        (["10"], ["sub-1", "sub-100"], {}),
        (["0"], ["sub-000"], {"0": ("sub-000", "zeros")}),
        (["x"], ["sub-y"], {}),
    ],
)
def test_ids_match_by_the_first_rule_that_is_one_to_one(ids, names, matched):
    assert match_ids(ids, names) == matched


def test_the_rule_of_each_id_and_what_did_not_match_is_kept(tmp_path):
    write(tmp_path, participants="participant_id age\n01 20\nsub-9 30")
    found = read_phenotypes(tmp_path, images(("sub-01", None), ("sub-02", None)))
    assert found.matches.fillna("-").to_numpy().tolist() == [
        ["sub-01", "01", "prefix", "participants.tsv"],
        ["-", "sub-9", "none", "participants.tsv"],
        ["sub-02", "-", "none", "participants.tsv"],
    ]
    assert "1 of 2 participants with images have a row (ids matched: 1 prefix)" in found.notes[0]


def test_participants_that_were_not_selected_keep_their_rows(tmp_path):
    write(tmp_path, participants="participant_id age\n1 20")
    for name in ("sub-01", "sub-001"):
        (tmp_path / name).mkdir()
    assert values(tmp_path, images(("sub-01", None)), "age") == [None]


def test_ids_of_the_table_are_listed_once(tmp_path):
    assert participant_ids(tmp_path) == []
    write(tmp_path, participants="participant_id age\nsub-2 1\nsub-1 2\nsub-2 1")
    assert participant_ids(tmp_path) == ["sub-2", "sub-1"]


# -- joining -----------------------------------------------------------------------------------


def test_rows_follow_the_images_whatever_the_index(tmp_path):
    write(tmp_path, participants="participant_id age sex\nsub-2 30 F\nsub-1 20 M")
    shuffled = pd.concat([TWO.iloc[[1]], TWO.iloc[[0]], TWO.iloc[[1]]]).set_index(
        pd.Index([7, 7, 9])
    )
    table = read_phenotypes(tmp_path, shuffled).table
    assert list(table.index) == [0, 1, 2]
    assert list(table["age"]) == [30, 20, 30]
    assert table["age"].dtype == np.float64
    assert list(table["sex"]) == ["F", "M", "F"]


def test_no_table_at_all_is_fine(tmp_path):
    found = read_phenotypes(tmp_path, TWO)
    assert found.table.shape == (2, 0)
    assert len(found.matches) == 0


def test_columns_without_values_are_kept(tmp_path):
    write(tmp_path, participants="participant_id iq\nsub-1 n/a\nsub-2 n/a")
    assert values(tmp_path, TWO, "iq") == [None, None]
    write(tmp_path, participants="participant_id iq\nsub-8 1")
    assert values(tmp_path, TWO, "iq") == [None, None]


def test_values_of_a_session_go_before_those_of_the_participant(tmp_path):
    write(
        tmp_path,
        participants="participant_id age sex\nsub-1 20 F\nsub-2 40 M",
        **{"sub-1__sub-1_sessions": "session_id age mood\nses-b 22 good\nses-a n/a bad"},
    )
    assert values(tmp_path, VISITS, "age") == [20, 22, 40]
    assert values(tmp_path, VISITS, "sex") == ["F", "F", "M"]
    assert values(tmp_path, VISITS, "mood") == ["bad", "good", None]


def test_a_table_may_have_a_row_per_session(tmp_path):
    write(tmp_path, participants="participant_id session_id age\n1 A 20\n1 B 22\n2 A 40")
    assert values(tmp_path, VISITS, "age") == [20, 22, 40]


def test_an_image_without_session_gets_what_all_sessions_agree_on(tmp_path):
    write(
        tmp_path,
        participants="participant_id session_id age sex\nsub-1 a 20 F\nsub-1 b 22 F\nsub-2 a 40 M",
    )
    assert values(tmp_path, TWO, "age") == [None, 40]
    assert values(tmp_path, TWO, "sex") == ["F", "M"]


def test_a_session_that_has_no_row_has_no_value_of_another_session(tmp_path):
    write(tmp_path, participants="participant_id session_id age\nsub-1 a 20\nsub-2 a 40")
    assert values(tmp_path, VISITS, "age") == [20, None, 40]


def test_values_of_a_scan_reach_its_image_alone(tmp_path):
    write(
        tmp_path,
        **{
            "sub-1__ses-b__sub-1_ses-b_scans": "filename snr\nanat/sub-1_ses-b_T1w.nii.gz 9\nfunc/x 1",
            "sub-2__sub-2_scans": "filename snr\nses-a/anat/sub-2_ses-a_T1w.nii.gz 7",
        },
    )
    assert values(tmp_path, VISITS, "snr") == [None, 9, 7]


def test_tables_of_phenotype_are_joined_and_those_without_ids_left_out(tmp_path):
    write(tmp_path, phenotype__iq="participant_id iq\nsub-1 100", phenotype__x="name\na")
    found = read_phenotypes(tmp_path, TWO)
    assert list(found.table.columns) == ["iq"]
    assert any("phenotype/x.tsv" in note and "not used" in note for note in found.notes)


def test_a_column_of_phenotype_that_contradicts_is_renamed(tmp_path):
    write(
        tmp_path,
        participants="participant_id age\nsub-1 20\nsub-2 30",
        phenotype__iq="participant_id age\nsub-1 21",
        phenotype__ok="participant_id age\nsub-1 20.0",
    )
    found = read_phenotypes(tmp_path, TWO)
    assert list(found.table.columns) == ["age", "iq_age"]
    assert list(found.table["age"]) == [20, 30]
    assert any("iq_age" in note for note in found.notes)


def test_a_column_of_a_given_file_takes_the_name(tmp_path):
    write(
        tmp_path,
        participants="participant_id age\nsub-1 20\nsub-2 30",
        more="participant_id age\n1 25\n2 n/a",
    )
    found = read_phenotypes(tmp_path, TWO, [tmp_path / "more.tsv"])
    assert list(found.table["age"].fillna(-1)) == [25, -1]
    assert list(found.table["participants_age"]) == [20, 30]


def test_a_given_file_may_be_csv_with_another_name_of_the_ids(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('Subject,Full name,iq\n1,"Doe, J",100\n2,,90\n')
    assert values(tmp_path, TWO, "iq", path) == [100, 90]
    assert any("'Subject'" in note for note in read_phenotypes(tmp_path, TWO, [path]).notes)


def test_a_column_named_like_one_of_the_index_is_renamed(tmp_path):
    write(tmp_path, participants="participant_id split run\nsub-1 a 1\nsub-2 b 2")
    assert list(read_phenotypes(tmp_path, TWO).table.columns) == [
        "participants_split",
        "participants_run",
    ]


def test_levels_of_the_sidecar_are_read(tmp_path):
    write(tmp_path, participants="participant_id group\nsub-1 1\nsub-2 2")
    (tmp_path / "participants.json").write_text(
        '{"group": {"Levels": {"1": "control", "2": "patient"}}}'
    )
    found = read_phenotypes(tmp_path, TWO)
    assert list(found.table["group"]) == ["control", "patient"]
    assert found.columns["group"]["Levels"]["2"] == "patient"


def test_a_derivative_takes_the_tables_of_the_dataset_around_it(tmp_path):
    write(tmp_path, participants="participant_id age\nsub-1 20\nsub-2 30")
    inner = tmp_path / "derivatives" / "prep"
    inner.mkdir(parents=True)
    assert values(inner, TWO, "age") == [20, 30]
    assert participant_ids(inner) == ["sub-1", "sub-2"]
    write(inner, participants="participant_id age\nsub-1 50")
    assert values(inner, TWO, "age") == [50, None]


# -- doubles -----------------------------------------------------------------------------------


def test_rows_that_agree_are_one_with_a_note(tmp_path):
    write(tmp_path, participants="participant_id age iq\nsub-1 20 n/a\nsub-1 20.0 100\nsub-2 30 90")
    found = read_phenotypes(tmp_path, TWO)
    assert list(found.table["age"]) == [20, 30]
    assert list(found.table["iq"]) == [100, 90]
    assert any("lines 2 3" in note for note in found.notes)


@pytest.mark.parametrize(
    "tables",
    [
        {"participants": "participant_id age\nsub-1 20\nsub-2 30\nsub-1 21"},
        {"participants": "participant_id session_id age\nsub-1 a 20\nsub-2 a 3\nsub-1 a 21"},
        {"phenotype__iq": "participant_id age\nsub-1 20\nsub-2 30\nsub-1 21"},
    ],
)
def test_rows_that_contradict_each_other_are_refused_by_line(tmp_path, tables):
    write(tmp_path, **tables)
    with pytest.raises(UsageError, match=r"lines 2 and 4 .*sub-1.*age is '20' and '21'"):
        read_phenotypes(tmp_path, TWO)


@pytest.mark.parametrize("name", ["participants", "given"])
def test_a_table_without_ids_is_refused(tmp_path, name):
    write(tmp_path, **{name: "name age\nx 1"})
    files = [tmp_path / "given.tsv"] if name == "given" else []
    with pytest.raises(UsageError, match="no column participant_id"):
        read_phenotypes(tmp_path, TWO, files)


def test_a_given_file_must_exist(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.tsv"):
        read_phenotypes(tmp_path, TWO, [tmp_path / "nowhere.tsv"])

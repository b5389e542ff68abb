"""Phenotypes reach the right images, and what did not match is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nidl_dcl.bids.phenotypes import participant_ids, read_phenotypes
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.errors import UsageError


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
    """Write tables whose cells are separated by spaces; `__` in a name is a folder."""
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
        (["sub-01", "1"], ["sub-01", "sub-001"], {"sub-01": ("sub-01", "exact")}),
        (["sub-a", "SUB-a"], ["sub-a", "sub-A"], {"sub-a": ("sub-a", "exact")}),
        (["1.0", "٣", "sub 1", "../sub-1", "=1+1", "<b>1</b>"], ["sub-1", "sub-3"], {}),
    ],
)
def test_ids_match_by_the_first_rule_that_is_one_to_one(ids, names, matched):
    assert match_ids(ids, names) == matched


ALIKE = st.lists(
    st.from_regex(r"(sub-|SUB-)?[aA]?0{0,2}[12]?", fullmatch=True), max_size=6, unique=True
)


@settings(deadline=2000)
@given(ALIKE, ALIKE, st.randoms())
def test_ids_match_one_to_one_in_whatever_order_they_come(ids, names, random):
    matched = match_ids(ids, names)
    assert set(matched) <= set(ids)
    assert {name for name, _ in matched.values()} <= set(names)
    assert len({name for name, _ in matched.values()}) == len(matched)
    assert all(matched[text] == (text, "exact") for text in set(ids) & set(names))
    random.shuffle(ids)
    random.shuffle(names)
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


def test_many_ids_that_match_nobody_are_one_note_and_all_kept(tmp_path):
    rows = "\n".join(f"x{i} {i}" for i in range(10_000))
    write(tmp_path, participants=f"participant_id n\n{rows}\nn/a 3")
    found = read_phenotypes(tmp_path, TWO)
    (note,) = found.notes
    assert note == (
        "participants.tsv: 0 of 2 participants with images have a row; "
        "10000 ids of the table fit no participant, or several (first: 'x0'); "
        "1 rows have no id (first: line 10002)"
    )
    assert len(found.matches) == 10_002
    assert found.matches["rule"].eq("none").all()


def test_the_matches_hold_rows_of_those_without_images_and_images_without_row(tmp_path):
    write(tmp_path, participants="participant_id age\n1 20\n2 30\n3 40")
    for name in ("sub-01", "sub-02"):
        (tmp_path / name).mkdir()
    found = read_phenotypes(tmp_path, images(("sub-01", None), ("sub-04", None)))
    assert found.matches.fillna("-").to_numpy().tolist() == [
        ["sub-01", "1", "zeros", "participants.tsv"],
        ["sub-02", "2", "zeros", "participants.tsv"],
        ["-", "3", "none", "participants.tsv"],
        ["sub-04", "-", "none", "participants.tsv"],
    ]


def test_a_table_of_no_rows_leaves_everybody_without_row(tmp_path):
    found = read_phenotypes(write(tmp_path, participants="participant_id age"), TWO)
    assert list(found.matches["participant_id"]) == ["sub-1", "sub-2"]
    assert "0 of 2 participants" in found.notes[0]
    assert found.table["age"].isna().all()


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


@pytest.mark.parametrize(
    ("folders", "said", "age", "note"),
    [
        ([], "ses-a", 20, ""),
        ([], "a", 20, "sessions matched: 1 prefix"),
        ([], "SES-A", 20, "sessions matched: 1 case"),
        ([], "baseline", None, "1 sessions have no folder (first: 'baseline' of sub-1)"),
        (["ses-A"], "A", 20, "sessions matched: 1 case"),
        (["ses-A", "ses-a"], "A", None, "1 of their images have no row for their session"),
    ],
)
def test_a_session_is_found_by_the_rules_of_ids(tmp_path, folders, said, age, note):
    for name in folders:
        (tmp_path / "sub-1" / name).mkdir(parents=True)
    write(tmp_path, **{"sub-1__sub-1_sessions": f"session_id age\n{said} 20"})
    found = read_phenotypes(tmp_path, images(("sub-1", "ses-a")))
    assert found.table["age"].fillna(-1).item() == (-1 if age is None else age)
    assert note in " ".join(found.notes)
    assert set(found.matches["source"]) == {"sub-*_sessions.tsv"}


def test_sessions_are_told_for_each_participant_alone(tmp_path):
    write(tmp_path, participants="participant_id session_id age\n1 1 20\n2 1 30")
    table = images(("sub-1", "ses-1"), ("sub-2", "ses-01"))
    assert values(tmp_path, table, "age") == [20, 30]


def test_a_session_in_another_unit_is_another_column(tmp_path):
    write(
        tmp_path,
        participants="participant_id age\nsub-1 20\nsub-2 30",
        **{"sub-1__sub-1_sessions": "session_id age\nses-a 241\nses-b 245"},
    )
    (tmp_path / "participants.json").write_text('{"age": {"Units": "years"}}')
    (tmp_path / "sessions.json").write_text('{"age": {"Units": "months"}}')
    found = read_phenotypes(tmp_path, VISITS)
    assert list(found.table["age"]) == [20, 20, 30]
    assert list(found.table["sessions_age"].fillna(-1)) == [241, 245, -1]
    assert found.columns["sessions_age"]["Units"] == "months"
    assert "age is in months here and in years in an earlier table" in " ".join(found.notes)


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


@pytest.mark.parametrize(
    ("listed", "image", "snr"),
    [
        ("anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("anat\\sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("anat/sub-1_T1w.nii", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", 7),
        ("anat/sub-1_T1w.nii.gz", "derivatives/x/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz", 7),
        ("anat/sub-1_run-1_T1w.nii", "d/sub-1/anat/sub-1_run-1_space-M_res-2_desc-p_T1w.nii", 7),
        ("anat/sub-1_run-1_T1w.nii", "d/sub-1/anat/sub-1_run-2_desc-p_T1w.nii", None),
        ("anat/sub-1_run-1_T1w.nii", "d/sub-1/anat/sub-1_desc-p_T1w.nii", None),
        ("anat/sub-1_T2w.nii", "sub-1/anat/sub-1_T1w.nii", None),
        ("mri/T1.mgz", "d/sub-1/mri/T1.mgz", None),
        ("../sub-1/anat/sub-2_T1w.nii", "sub-1/anat/sub-2_T1w.nii", None),
        ("n/a", "sub-1/anat/sub-1_T1w.nii", None),
    ],
)
def test_the_row_of_a_scan_is_found_by_path_else_by_name(tmp_path, listed, image, snr):
    write(tmp_path, **{"sub-1__sub-1_scans": f"filename snr\n{listed} 7"})
    table = images(("sub-1", None)).assign(path=[image])
    found = read_phenotypes(tmp_path, table)
    assert list(found.table.get("snr", pd.Series([-1]))) == [-1 if snr is None else snr]
    assert f"{0 if snr is None else 1} of 1 images have a row" in found.notes[0]


def test_two_scans_of_one_name_are_not_guessed_between(tmp_path):
    rows = "filename snr\nanat/sub-1_T1w.nii 1\nanat/sub-1_T1w.json 2"
    write(tmp_path, **{"sub-1__sub-1_scans": rows})
    assert list(read_phenotypes(tmp_path, images(("sub-1", None))).table.columns) == []


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


def test_every_column_that_contradicts_keeps_a_name_of_its_own(tmp_path):
    write(
        tmp_path,
        participants="participant_id age iq_age\nsub-1 20 5\nsub-2 30 6",
        phenotype__iq="participant_id age\nsub-1 21",
        more__iq="participant_id age iq_age_2\nsub-1 22 9",
    )
    found = read_phenotypes(tmp_path, TWO, [tmp_path / "more" / "iq.tsv"])
    first = {name: column[0] for name, column in found.table.items()}
    assert first == {
        "age": 22,
        "iq_age": 5,
        "iq_age_2": 9,
        "participants_age": 20,
        "iq_iq_age_2": 21,
    }


def test_what_the_system_hides_beside_tables_is_not_read(tmp_path):
    write(tmp_path, phenotype__iq="participant_id iq\nsub-1 100")
    (tmp_path / "phenotype" / "._iq.tsv").write_bytes(b"\x00\x05\x16\x07")
    assert values(tmp_path, TWO, "iq") == [100, None]


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
    assert any("lines 2 and 3" in note for note in found.notes)


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


def test_a_contradiction_between_files_names_both(tmp_path):
    row = "filename snr\n{}anat/sub-1_ses-a_T1w.nii.gz {}"
    write(
        tmp_path,
        **{
            "sub-1__sub-1_scans": row.format("ses-a/", 1),
            "sub-1__ses-a__sub-1_ses-a_scans": row.format("", 2),
        },
    )
    said = (
        "sub-1/sub-1_scans.tsv line 2 and sub-1/ses-a/sub-1_ses-a_scans.tsv line 2 contradict each "
        "other for sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz: snr is '1' and '2'"
    )
    with pytest.raises(UsageError, match=said):
        read_phenotypes(tmp_path, images(("sub-1", "ses-a")))


def test_rows_per_wave_are_refused_with_what_to_do(tmp_path):
    write(tmp_path, phenotype__iq="participant_id wave iq\nsub-1 1 100\nsub-1 2 110")
    with pytest.raises(UsageError, match=r"iq\.tsv: lines 2 and 3 .* in a column session_id"):
        read_phenotypes(tmp_path, TWO)


def test_notes_of_a_table_are_few(tmp_path):
    names = [f"c{i}" for i in range(300)]
    text = "\n".join([" ".join(["participant_id", *names]), " ".join(["sub-1", *["1,5"] * 300])])
    found = read_phenotypes(write(tmp_path, participants=text), TWO)
    assert len(found.notes) == 21
    assert found.notes[-1] == "participants.tsv: 281 more notes like these"


@pytest.mark.parametrize("name", ["participants", "given"])
def test_a_table_without_ids_is_refused(tmp_path, name):
    write(tmp_path, **{name: "name age\nx 1"})
    files = [tmp_path / "given.tsv"] if name == "given" else []
    with pytest.raises(UsageError, match="no column participant_id"):
        read_phenotypes(tmp_path, TWO, files)


def test_a_given_file_must_exist(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.tsv"):
        read_phenotypes(tmp_path, TWO, [tmp_path / "nowhere.tsv"])


CELL = st.sampled_from(["sub-1", "1", "SUB-01", "ses-a", "A", "b", "n/a", "20", "20.0", "M", "2,5"])
NAMES = ["participant_id", "session_id", "filename", "age", "sex", "run", "participants_run", ""]
CONTENT = st.lists(st.lists(CELL, max_size=4), max_size=4).flatmap(
    lambda rows: st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(
        lambda header: "\n".join("\t".join(row) for row in [header, *rows])
    )
)
ABOUT = st.recursive(
    st.none() | st.booleans() | st.floats() | CELL,
    lambda inner: st.dictionaries(
        st.sampled_from(["age", "sex", "Levels", "Units", "20", "M"]), inner, max_size=3
    ),
    max_leaves=8,
)


@settings(deadline=2000)
@given(CONTENT, CONTENT, CONTENT, ABOUT)
def test_any_tables_are_joined_or_refused(tmp_path_factory, people, sessions, scans, about):
    root = tmp_path_factory.getbasetemp() / "any"
    (root / "sub-1").mkdir(parents=True, exist_ok=True)
    (root / "participants.tsv").write_text(people)
    (root / "participants.json").write_text(json.dumps(about))
    (root / "sub-1" / "sub-1_sessions.tsv").write_text(sessions)
    (root / "sub-1" / "sub-1_scans.tsv").write_text(scans)
    try:
        found = read_phenotypes(root, VISITS)
    except UsageError:
        return
    assert len(found.table) == len(VISITS)
    assert not {"run", "participant_id", "session_id"} & set(found.table.columns)
    assert set(found.columns) <= set(found.table.columns)
    seen = found.matches[["id", "source"]].dropna()
    assert not seen.duplicated().any()
    assert all("\n" not in note for note in found.notes)


def test_a_given_file_of_an_unknown_user_is_missing(tmp_path):
    with pytest.raises(UsageError, match="no table ~nobody-here/x"):
        read_phenotypes(tmp_path, TWO, ["~nobody-here/x.tsv"])


@pytest.mark.slow
def test_a_large_study_is_joined_in_seconds(tmp_path):
    from time import process_time

    people = [f"sub-{i:05d}" for i in range(10_000)]
    names = [f"q{j}" for j in range(100)]
    for k in range(3):
        lines = ["\t".join(["participant_id", *(f"{n}_{k}" for n in names)])]
        lines += [
            "\t".join([p, *(f"{i * j % 977}.5" for j in range(100))]) for i, p in enumerate(people)
        ]
        (tmp_path / "phenotype").mkdir(exist_ok=True)
        (tmp_path / "phenotype" / f"{k}.tsv").write_text("\n".join(lines))
    table = images(*[(p, "ses-1") for p in people], *[(p, "ses-2") for p in people[:2000]])
    start = process_time()
    assert read_phenotypes(tmp_path, table).table.shape == (12_000, 300)
    assert process_time() - start < 10


# -- what people's tables look like ---------------------------------------------------------------


def test_sessions_are_matched_to_those_of_the_images_first(tmp_path):
    for session in ("ses-M00", "ses-M06"):
        (tmp_path / "sub-1" / session).mkdir(parents=True)
    write(tmp_path, **{"sub-1__sub-1_sessions": "session_id age\nses-M00 60\nses-M06 61"})
    pipeline = images(("sub-1", "ses-M000"), ("sub-1", "ses-M006"))
    assert values(tmp_path, pipeline, "age") == [60, 61]
    # Two folders of the dataset are two sessions, whatever their zeros.
    (tmp_path / "sub-1" / "ses-M000").mkdir()
    assert values(tmp_path, images(("sub-1", "ses-M000")), "age") == [None]


def test_why_a_value_per_session_is_missing_is_said(tmp_path):
    write(tmp_path, **{"sub-1__sub-1_sessions": "session_id age sex\nses-1 60 F\nses-2 61 F"})
    found = read_phenotypes(tmp_path, images(("sub-1", None)))
    assert found.table["sex"].tolist() == ["F"]
    assert found.table["age"].isna().all()
    assert "known per session and differs" in found.reasons["age"][0]
    assert "have no session" in found.reasons["age"][0]
    assert any("age differs between sessions" in note for note in found.notes)
    assert "sex" not in found.reasons


def test_ids_that_do_not_match_are_shown_from_both_sides_with_their_column(tmp_path):
    write(tmp_path, participants="subject age\nA001 30\nA002 40")
    (reason,) = read_phenotypes(tmp_path, TWO).reasons[""]
    assert all(word in reason for word in ("'subject'", "'A001'", "'sub-1'", "--id-column"))


def test_the_column_of_ids_can_be_named(tmp_path):
    write(tmp_path, participants="id Subject_Code age\nx sub-1 30\ny sub-2 40")
    found = read_phenotypes(tmp_path, TWO, id_column="Subject_Code")
    assert found.table["age"].tolist() == [30, 40]
    with pytest.raises(UsageError, match="no table has that column"):
        read_phenotypes(tmp_path, TWO, id_column="code")


@pytest.mark.parametrize("header", ["their participant_id", "participant_id their"])
def test_ids_can_be_translated_by_a_table(header, tmp_path):
    write(tmp_path / "data", participants="participant_id age\nA001 30\nA002 40")
    pairs = ["A001 sub-2", "A002 1"]
    if header.startswith("participant"):
        pairs = [" ".join(reversed(pair.split())) for pair in pairs]
    write(tmp_path, ids="\n".join([header, *pairs]))
    found = read_phenotypes(tmp_path / "data", TWO, id_map=tmp_path / "ids.tsv")
    assert found.table["age"].tolist() == [40, 30]


@pytest.mark.parametrize("where", ["", "data"])
def test_a_table_beside_the_dataset_is_mentioned(where, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / where / "participants.csv").write_text("participant_id,age\nsub-1,30\n")
    (reason,) = read_phenotypes(data, TWO).reasons[""]
    assert "participants.csv is not read: --phenotypes" in reason
    assert read_phenotypes(data, TWO, [tmp_path / where / "participants.csv"]).reasons == {}


def test_units_in_cells_are_reported_as_units(tmp_path):
    write(tmp_path, participants="participant_id age sex\nsub-1 022Y M\nsub-2 - F")
    found = read_phenotypes(tmp_path, TWO)
    assert found.table["age"].tolist()[0] == 22
    assert found.table["age"].isna().tolist() == [False, True]
    assert found.columns["age"]["Units"] == "years"


def test_a_sidecar_in_latin_1_is_read_as_the_table_is(tmp_path):
    write(tmp_path, participants="participant_id group\nsub-1 1\nsub-2 2")
    text = json.dumps({"group": {"Levels": {"1": "gesund", "2": "müde"}}}, ensure_ascii=False)
    (tmp_path / "participants.json").write_bytes(text.encode("latin-1"))
    found = read_phenotypes(tmp_path, TWO)
    assert found.table["group"].tolist() == ["gesund", "müde"]
    assert any("read as Latin-1" in note for note in found.notes)

"""Tables as people make them, read as text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nidl_dcl.bids.tables import read_sidecar, read_table
from nidl_dcl.errors import UsageError

PLAIN = ["participant_id", "age"], [["sub-1", "20"], ["sub-2", None]]


@pytest.mark.parametrize(
    "data",
    [
        b"participant_id\tage\nsub-1\t20\nsub-2\tn/a\n",
        b"\xef\xbb\xbfparticipant_id\tage\nsub-1\t20\nsub-2\t\n",
        b"participant_id\tage\r\nsub-1\t20\r\nsub-2\tNA\r\n",
        b"participant_id\tage\rsub-1\t20\rsub-2\tNaN",
        b"participant_id \tage\n sub-1\t20 \n\nsub-2\tN/A\n",
        b"participant_id,age\nsub-1,20\nsub-2,\n",
        b'"participant_id";"age"\n"sub-1";"20"\n"sub-2";"null"\n',
        "participant_id\tage\nsub-1\t20\nsub-2\t.\n".encode("utf-16"),
        b"participant_id\tage\t\nsub-1\t20\t\nsub-2\tn/a\t\n",
    ],
)
def test_every_usual_form_of_a_file_gives_the_same_cells(tmp_path, data):
    path = tmp_path / "participants.tsv"
    path.write_bytes(data)
    table = read_table(path)
    assert (table.columns, table.rows) == PLAIN


def test_quotes_between_tabs_are_csv_only_where_the_name_says_so(tmp_path):
    for name, cell in (("t.csv", "a\tb"), ("t.tsv", '"a')):
        (tmp_path / name).write_text(
            '"id"\tx\n"a\tb"\t1\n' if name == "t.csv" else 'id\tx\n"a\t1\n'
        )
        assert read_table(tmp_path / name).rows[0][0] == cell


def test_quotes_in_a_tsv_are_text(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('participant_id\tnote\nsub-1\t"open\nsub-2\tclose"\n')
    assert read_table(path).rows == [["sub-1", '"open'], ["sub-2", 'close"']]


def test_quotes_in_a_csv_hold_commas_and_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id,note\n1,"a, b"\n2,"c\nd"\n')
    assert read_table(path).rows == [["1", "a, b"], ["2", "c\nd"]]


def test_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("id\ta\n\n1\tx\n\n2\ty\n")
    assert read_table(path).lines == [3, 5]


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"id\ta\tb\n1\tx\n", "missing: 1 (first: line 2)"),
        (b"id\ta\n1\t\xe9\n", "Latin-1"),
        (b"id,a\n1,2\n", "not by tabs"),
        (b"\n\nid;a\n1;2,5\n", "not by tabs"),
        (b"id\t\tb\n1\tx\ty\n", "column 2 '' = 'column_2'"),
        (b"id" + b"\ta" * 9 + b"\n", "and 3 more"),
        (b"id\ta\ta\n1\t2\t3\n", "column 3 'a' = 'a_2'"),
    ],
)
def test_what_is_put_right_is_noted(tmp_path, data, note):
    path = tmp_path / "t.tsv"
    path.write_bytes(data)
    assert note in " ".join(read_table(path).notes)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"id\ta\n1\t2\t3\n", "line 2: 3 cells under 2 column names"),
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"id\ta\n\x00\x01\t2\n", "no text file"),
        ("id\ta\n".encode("utf-16-le"), "no text file"),
        ("id\ta\n".encode("utf-32"), "no text file"),
        (b"PK\x03\x04\x00\x00", "no text file"),
        (b'id,a\n1,"open\n2,3\n', "line 3: unexpected end of data"),
        (b'id,a\n1,"' + b"x" * 200_000 + b'"\n', "field larger"),
        (b"version https://git-lfs.github.com/spec/v1\n", "fetch it"),
        (b"/annex/objects/MD5E-s3--a.tsv\n", "fetch it"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, data, said):
    path = tmp_path / "t.tsv"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=said):
        read_table(path)


def make(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    elif kind != "nothing":
        path.symlink_to({"loop": path.name, "device": "/dev/zero"}.get(kind, "annexed"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing", "There is no table"),
        ("dangling", "fetch it"),
        ("folder", "not a file"),
        ("pipe", "not a file"),
        ("device", "not a file"),
        ("loop", "symbolic links"),
        ("huge", "has 1099511627776 bytes"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, kind, said):
    make(tmp_path / "t.tsv", kind)
    with pytest.raises(UsageError, match=said):
        read_table(tmp_path / "t.tsv")
    make(tmp_path / "t.json", kind)
    about, notes = read_sidecar(tmp_path / "t.tsv")
    assert about == {}
    assert (said in " ".join(notes)) is (kind != "nothing")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_a_path_that_cannot_be_is_refused(name):
    with pytest.raises(UsageError, match="cannot be read"):
        read_table(Path(name))


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "t.tsv").write_text("id\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        read_table(tmp_path / "t.tsv")


PIECES = st.sampled_from(
    [b"\t", b"\n", b"\r", b",", b";", b'"', b"\xef\xbb\xbf", b"\xff\xfe", b"id"]
)


@settings(deadline=2000)
@given(st.binary() | st.lists(PIECES | st.binary(max_size=3)).map(b"".join), st.sampled_from("tc"))
def test_any_bytes_are_a_table_or_a_usage_error(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}sv"
    path.write_bytes(data)
    path.with_suffix(".json").write_bytes(data)
    read_sidecar(path)
    try:
        table = read_table(path)
    except UsageError:
        return
    assert len(set(table.columns)) == len(table.columns)
    assert all(table.columns)
    assert {len(row) for row in table.rows} <= {len(table.columns)}
    assert len(table.lines) == len(table.rows)
    assert table.lines == sorted(set(table.lines))


def test_many_rows_and_names_take_no_time(tmp_path):
    from time import process_time

    path = tmp_path / "t.tsv"
    start = process_time()
    path.write_text("id\tage\n" + "".join(f"sub-{i}\t{i % 90}\n" for i in range(100_000)))
    assert len(read_table(path).rows) == 100_000
    path.write_text("c\t" * 50_000 + "c\n")
    assert len(read_table(path).columns) == 50_001
    assert process_time() - start < 5


@pytest.mark.parametrize(
    "text", ["{broken", "[1]", "\ufffe", "[" * 100_000, "9" * 5000, "null", "\0"]
)
def test_a_broken_sidecar_is_a_note(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    about, notes = read_sidecar(tmp_path / "t.tsv")
    assert about == {}
    assert "t.json" in notes[0]


def test_a_sidecar_tells_of_columns(tmp_path):
    (tmp_path / "t.json").write_text('\ufeff{"age": {"Units": "year"}, "x": 1}')
    assert read_sidecar(tmp_path / "t.tsv") == ({"age": {"Units": "year"}}, [])

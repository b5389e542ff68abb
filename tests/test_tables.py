"""Tables as people make them, read as text."""

from __future__ import annotations

import pytest

from nidl_dcl.errors import UsageError
from nidl_dcl.tables import read_sidecar, read_table

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
        (b"id\ta\tb\n1\tx\n", "1 rows are short (first: line 2)"),
        (b"id\ta\n1\t\xe9\n", "Latin-1"),
        (b"id,a\n1,2\n", "not by tabs"),
        (b"id\ta\ta\n1\t2\t3\n", "'a_again'"),
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
    ],
)
def test_a_broken_table_is_refused(tmp_path, data, said):
    path = tmp_path / "t.tsv"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=said):
        read_table(path)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no table"):
        read_table(tmp_path / "t.tsv")
    (tmp_path / "t.tsv").symlink_to("annexed")
    with pytest.raises(UsageError, match="fetch it"):
        read_table(tmp_path / "t.tsv")


@pytest.mark.parametrize("text", ["{broken", "[1]", "\ufffe"])
def test_a_broken_sidecar_is_a_note(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    about, notes = read_sidecar(tmp_path / "t.tsv")
    assert about == {}
    assert "t.json" in notes[0]


def test_a_sidecar_tells_of_columns(tmp_path):
    (tmp_path / "t.json").write_text('\ufeff{"age": {"Units": "year"}, "x": 1}')
    assert read_sidecar(tmp_path / "t.tsv") == ({"age": {"Units": "year"}}, [])

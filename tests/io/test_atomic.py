"""Files that appear whole or not at all, and what JSON and TSV do with odd values."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nidl_dcl.io.atomic import replacing, write_bytes
from nidl_dcl.io.formats import escape_control, to_tsv, write_json, write_npy, write_text, write_tsv

FINITE = np.array([[1.5, -2.0]], dtype=np.float32)

WRITERS = {
    "bytes": (write_bytes, b"\x00\xff"),
    "text": (write_text, "äöü\n"),
    "json": (write_json, {"a": [1, None]}),
    "npy": (write_npy, FINITE),
    "tsv": (write_tsv, pd.DataFrame({"a": [1]})),
}


@pytest.fixture
def umask():
    """Set the process's umask to something unusual and put it back."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_appears_in_missing_folders_and_nothing_is_left_beside_it(
    name: str, tmp_path: Path
) -> None:
    write, value = WRITERS[name]
    write(tmp_path / "new" / "folder" / "file", value)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["file"]
    assert (tmp_path / "new" / "folder" / "file").stat().st_size > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_when_writing_fails_the_old_file_stays_and_nothing_is_left_beside_it(
    error: type[BaseException], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    write_text(file, "old")

    def write_half() -> None:
        with replacing(file) as beside:
            beside.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    with replacing(file) as beside:
        beside.write_text("new")
        assert file.read_text() == "old"
        assert beside.parent == file.parent  # a rename is atomic only within one file system
    assert file.read_text() == "new"


def test_two_writers_of_one_file_do_not_share_the_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file) as one, replacing(file) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert file.read_text() == "one"


def test_the_longest_names_that_a_folder_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_a_folder_in_the_place_of_the_file_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_get_the_rights_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "file", "text")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_threads_that_write_do_not_open_folders_to_everyone(umask: int, tmp_path: Path) -> None:
    def work(thread: int) -> None:
        for number in range(30):
            write_text(tmp_path / f"{thread}" / f"{number}" / "file", "text")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = [p for p in tmp_path.rglob("*") if p.is_dir()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o777 & ~umask}
    assert os.umask(umask) == umask


def test_nothing_asks_for_the_umask_because_asking_clears_it_for_other_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(os, "umask", lambda mask: asked.append(mask) or 0o022)
    write_text(tmp_path / "file", "text")
    assert asked == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (np.float32("nan"), None),
        (np.float64(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([1.0, np.inf]), [1.0, None]),
        (np.array(3), 3),
        (np.array(["a"]), ["a"]),
        (pd.NA, None),
        ((1, (2.0,)), [1, [2.0]]),
        ({"a": {1: Path("b") / "c"}}, {"a": {"1": "b/c"}}),
        ("é\t\u2028", "é\t\u2028"),
        (10**30, 10**30),
    ],
)
def test_values_that_json_does_not_know_become_ones_that_it_does(
    value: Any, expected: Any, tmp_path: Path
) -> None:
    write_json(tmp_path / "file.json", {"value": value})
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == {"value": expected}


def test_json_refuses_what_it_cannot_hold_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "file.json", {"a": object()})
    assert (tmp_path / "file.json").read_text() == "1\n"


def test_names_of_files_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"sub-\xff")
    write_text(tmp_path / "file.txt", name)
    write_json(tmp_path / "file.json", {"name": name})
    assert (tmp_path / "file.txt").read_text("utf-8") == r"sub-\udcff"
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == {"name": name}


def test_an_array_of_objects_is_refused_rather_than_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npy(tmp_path / "file.npy", np.array([{}, []], dtype=object))
    assert list(tmp_path.iterdir()) == []


def test_an_array_comes_back_as_it_was(tmp_path: Path) -> None:
    write_npy(tmp_path / "file.npy", FINITE)
    back = np.load(tmp_path / "file.npy", allow_pickle=False)
    assert back.dtype == FINITE.dtype
    assert np.array_equal(back, FINITE)


@pytest.mark.parametrize(
    "missing", [None, pd.NA, pd.NaT, float("nan"), np.float32("nan"), np.float64("nan"), ""]
)
def test_every_kind_of_missing_value_is_n_a_in_a_table(missing: Any) -> None:
    table = pd.DataFrame({"a": pd.Series([missing, "x"], dtype=object)})
    assert to_tsv(table) == "a\nn/a\nx\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (3, "3"),
        (2.0, "2"),
        (0.1 + 0.2, "0.3"),
        (np.float64(1e-20), "1e-20"),
        ("é å", "é å"),
        ('"quoted"', '"quoted"'),
        ("a\tb\r\nc", r"a\tb\r\nc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("line\u2028end", r"line\u2028end"),
        (os.fsdecode(b"\xff"), r"\udcff"),
    ],
)
def test_a_cell_is_one_printable_text(value: Any, text: str) -> None:
    assert to_tsv(pd.DataFrame({"a": pd.Series([value], dtype=object)})) == f"a\n{text}\n"
    assert escape_control(text) == text


def test_names_of_columns_are_escaped_too() -> None:
    assert to_tsv(pd.DataFrame({"a\tb": [1], "c\n": [2]})) == "a\\tb\tc\\n\n1\t2\n"


def test_a_table_without_rows_has_its_header() -> None:
    assert to_tsv(pd.DataFrame({"a": [], "b": []})) == "a\tb\n"


def test_a_table_written_comes_back_with_its_missing_values(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": ["x", None]})
    write_tsv(tmp_path / "file.tsv", table)
    back = pd.read_csv(tmp_path / "file.tsv", sep="\t", na_values=["n/a"], keep_default_na=False)
    assert back["a"].tolist()[0] == 1
    assert back.isna().sum().tolist() == [1, 1]

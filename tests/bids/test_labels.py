from __future__ import annotations

from pathlib import Path

import pytest

from nidl_dcl.bids.labels import unknown_labels, with_prefix

KNOWN = {"sub-01", "sub-02", "sub-10"}


def test_labels_are_taken_with_and_without_prefix() -> None:
    assert with_prefix(["01", "sub-02"], "sub-") == {"sub-01", "sub-02"}
    assert with_prefix("01", "sub-") == {"sub-01"}
    assert with_prefix([], "sub-") is None


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("01,02", "separated by blanks, each a word of its own: 01 02."),
        ("01;02", "separated by blanks, each a word of its own: 01 02."),
        ("01 02", "separated by blanks, each a word of its own: 01 02."),
        ("sub–01", "is no hyphen (-): sub-01."),
        ("sub—02", "is no hyphen (-): sub-02."),
        ("01–10", "Ranges are not known: name each label."),
        ("01-10", "Ranges are not known: name each label."),
    ],
)
def test_an_unknown_label_gets_a_hint_of_what_was_meant(
    label: str, hint: str, tmp_path: Path
) -> None:
    said = unknown_labels("participant", with_prefix([label], "sub-") or (), KNOWN, tmp_path)
    assert said.startswith("Unknown participant ")
    assert said.endswith(hint)


def test_a_file_of_labels_is_recognized(tmp_path: Path) -> None:
    file = tmp_path / "people.txt"
    file.write_text("01\n02\n")
    said = unknown_labels("participant", {f"sub-{file}"}, KNOWN, tmp_path)
    assert f"$(cat {file})" in said
    assert "--exclude takes a file" in said


def test_a_plain_misspelling_gets_names_that_are_like_it(tmp_path: Path) -> None:
    said = unknown_labels("session", {"ses-o1"}, {"ses-01"}, tmp_path)
    assert said.endswith("There are 1, for instance ses-01.")
    many = {f"sub-x{i}" for i in range(40)}
    assert "and 30 more" in unknown_labels("participant", many, KNOWN, tmp_path)

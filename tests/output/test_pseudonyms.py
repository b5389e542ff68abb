from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nidl_dcl.errors import UsageError
from nidl_dcl.output.pseudonyms import Pseudonyms, default_key, read_key

NAMES = Pseudonyms(b"k" * 32)


@given(st.lists(st.text(), unique=True, max_size=50))
def test_pseudonyms_are_one_to_one_and_the_same_again(ids: list[str]) -> None:
    made = [NAMES.participant(text) for text in ids]
    assert len(set(made)) == len(ids)
    assert made == [Pseudonyms(b"k" * 32).participant(text) for text in ids]


def test_pseudonyms_are_labels_of_bids_and_depend_on_the_key() -> None:
    assert NAMES.participant("sub-01")[4:].isalnum()
    assert NAMES.session("ses-01")[4:].isalnum()
    assert NAMES.participant("sub-01") != Pseudonyms(b"m" * 32).participant("sub-01")
    assert NAMES.fingerprint != Pseudonyms(b"m" * 32).fingerprint


def test_a_uri_and_the_path_it_names_have_one_pseudonym() -> None:
    who = NAMES.participant("sub-01")
    assert NAMES.image("bids:raw:sub-01/T1w.nii", who) == "bids:raw:" + NAMES.image(
        "sub-01/T1w.nii", who
    )
    assert NAMES.image("bids:prep:sub-01/T1w.nii", who) == "bids:raw:" + NAMES.image(
        "derivatives/prep/sub-01/T1w.nii", who
    )


@pytest.mark.parametrize(("text", "kept"), [("1", True), ("99", True), ("20240131", False)])
def test_runs_are_kept_unless_they_are_no_counts(text: str, kept: bool) -> None:
    assert (NAMES.run(text) == text) is kept
    assert NAMES.run(text).isdigit()


def test_ids_in_texts_are_replaced_where_they_stand_alone() -> None:
    text = NAMES.text("mask of sub-01/ses-02/sub-01_T1w.nii is a subsub-01.")
    assert text == (
        f"mask of {NAMES.participant('sub-01')}/{NAMES.session('ses-02')}/"
        f"{NAMES.participant('sub-01')}_T1w.nii is a subsub-01."
    )


def test_a_key_is_made_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "config" / "share.key"
    key = read_key(file, make=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(key) == 64
    assert read_key(file, make=True) == key
    assert read_key(tmp_path / "other.key", make=True) != key


def test_keys_that_protect_nobody_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\. Put it back"):
        read_key(tmp_path / "none", make=False)
    short = tmp_path / "short"
    short.write_text("password")
    short.chmod(0o600)
    with pytest.raises(UsageError, match="it has 8 bytes, 32 to 4096"):
        read_key(short, make=True)
    short.write_text("x" * 40)
    short.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_key(short, make=True)


def test_the_key_is_in_the_folder_of_the_users_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_key() == tmp_path / ".config" / "nidl_dcl" / "share.key"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    assert default_key() == tmp_path / "own" / "nidl_dcl" / "share.key"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nidl_dcl.bids.exclusions import Exclusion, read_exclusions
from nidl_dcl.bids.index import find_images
from nidl_dcl.errors import InputsUnusableError, UsageError


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Return a dataset of three participants: two sessions, two runs, and no session."""
    names = [
        *("sub-001/ses-M00/anat/sub-001_ses-M00_T1w", "sub-001/ses-M12/anat/sub-001_ses-M12_T1w"),
        *("sub-002/anat/sub-002_run-1_T1w", "sub-002/anat/sub-002_run-2_T1w"),
        *("sub-003/anat/sub-003_T1w", "sub-003/anat/sub-003_bad_T1w"),
    ]
    for name in names:
        file = tmp_path / "bids" / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (tmp_path / "bids" / "participants.tsv").write_text("participant_id\nsub-001\nsub-004\n")
    return tmp_path / "bids"


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a list of exclusions."""

    def write(text: str) -> Path:
        file = tmp_path / "exclude.tsv"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def excluded(bids: Path, file: Path | None = None, **more: object) -> dict[str, str]:
    """Return reasons by the name of the file."""
    index = find_images(bids, exclude=file, **more)
    table = index.inputs[index.inputs["code"] == "excluded"]
    assert set(table["status"]) <= {"skip"}
    assert not set(table["path"]) & set(index.images["path"])
    return {str(p).rpartition("/")[2].removesuffix("_T1w.nii.gz"): str(m)
            for p, m in zip(table["path"], table["message"], strict=True)}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("participant_id\treason\nsub-002\tmoved\n", {"sub-002_run-1": "moved", "sub-002_run-2": "moved"}),
        ("participant_id\tsession_id\treason\nsub-001\tses-M12\tcut off\n", {"sub-001_ses-M12": "cut off"}),
        ("participant_id\tsession_id\nsub-001\tM12\n", {"sub-001_ses-M12": "excluded by hand; no reason was given"}),
        ("participant_id\tsession_id\treason\n1\tM012\tzeros\n", {"sub-001_ses-M12": "zeros"}),
        ("participant_id,session_id,run,reasons\nsub-002,n/a,2,\"noise, blur\"\n", {"sub-002_run-2": "noise, blur"}),
        ("participant_id\treason\nsub-003\told\nsub-003\tnew\n", {"sub-003": "old; new", "sub-003_bad": "old; new"}),
        ("participant_id\treason\nsub-004\tno scan\n", {}),  # known, and without an image
        ("participant_id\treason\n", {}),
    ],
)  # fmt: skip
def test_rows_of_a_list_name_participants_sessions_or_runs(
    text: str, expected: dict[str, str], bids: Path, listed: Callable[[str], Path]
) -> None:
    assert excluded(bids, listed(text)) == expected


def test_participants_are_excluded_by_label_too(bids: Path, listed: Callable[[str], Path]) -> None:
    file = listed("participant_id\tsession_id\treason\nsub-001\tM00\tcoil\n")
    found = excluded(bids, file, exclude_participant_label=["001"])
    assert found == {
        "sub-001_ses-M00": "coil",
        "sub-001_ses-M12": "excluded by hand; no reason was given",
    }


def test_the_next_image_of_a_session_takes_the_place_of_an_excluded_one(
    bids: Path, listed: Callable[[str], Path]
) -> None:
    file = listed("participant_id\trun\nsub-002\t1\n")
    found = find_images(bids, exclude=file, select="first")
    assert "sub-002/anat/sub-002_run-2_T1w.nii.gz" in set(found.images["path"])
    assert ("not excluded (1 excluded by hand)", 4) in found.kept


def test_a_row_that_fits_no_image_is_said(bids: Path, listed: Callable[[str], Path]) -> None:
    file = listed("participant_id\tsession_id\nsub-001\tses-M24\n")
    (step,) = [step for step, _ in find_images(bids, exclude=file).kept if "excluded" in step]
    assert step.endswith(f"no image fits {file}, line 2 (sub-001 ses-M24)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sub-001\nsub-002\n", "has no column participant_id"),
        ("participant_id\nsub-001\nsub-0O2\n", "line 3: Unknown participant sub-0O2"),
        ("participant_id\tsession_id\nsub-003\tses-01\n", "line 2: images of sub-003 have no session"),
        ("participant_id\treason\n\tmoved\n", "line 2: no participant_id"),
        ("participant_id\trun\nsub-002\tfirst\n", "line 2: run takes a number"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_a_list_that_would_not_do_what_it_says_is_refused(
    text: str, said: str, bids: Path, listed: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match="--exclude") as refused:
        find_images(bids, exclude=listed(text))
    assert said in str(refused.value)


def test_an_unknown_label_or_file_is_refused(bids: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Unknown participant sub-77"):
        find_images(bids, exclude_participant_label=["77"])
    with pytest.raises(UsageError, match="There is no table"):
        find_images(bids, exclude=tmp_path / "none.tsv")


def test_a_list_is_read_as_text(listed: Callable[[str], Path]) -> None:
    file = listed("\ufeffparticipant_id\tsession_id\trun\treason\n007\tn/a\trun-02\tcavité\n")
    assert read_exclusions(file) == [Exclusion("007", None, 2, "cavité", f"{file}, line 2")]


def test_excluded_images_do_not_count_as_faults(make_heads: Callable[..., Path]) -> None:
    from nidl_dcl.data.image_table import ImageTable

    bids = make_heads(n=6)
    table = ImageTable(bids, exclude_participant_label=["01", "02"], max_skipped=0.0)
    assert len(table.images) == 6
    assert (table.inputs["code"] == "excluded").sum() == 2
    assert len(table.inputs) == 8
    (bids / "sub-05/ses-01/anat/sub-05_ses-01_T1w.nii.gz").write_bytes(b"")
    with pytest.raises(InputsUnusableError, match="1 of 6 candidate images cannot be used"):
        ImageTable(bids, exclude_participant_label=["01", "02"], max_skipped=0.1).check()
    broken = ImageTable(bids, exclude_participant_label=["05"], max_skipped=0.0)
    assert len(broken.images) == 7


def test_an_excluded_image_needs_no_mask(make_heads: Callable[..., Path]) -> None:
    bids = make_heads(n=4)
    (mask,) = (bids / "derivatives" / "masks").rglob("sub-02*_mask.nii.gz")
    mask.unlink()
    found = find_images(bids, exclude_participant_label=["02"])
    assert len(found.images) == found.images["mask_path"].notna().sum() == 4

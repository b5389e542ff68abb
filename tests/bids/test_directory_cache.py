"""What is remembered of folders is what they hold."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nidl_dcl.bids import directory_cache as listings
from nidl_dcl.bids.directory_cache import Listing, Listings, read_folder
from nidl_dcl.bids.index import find_images, index_bids
from nidl_dcl.errors import UsageError


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def outcome(root: Path, **options: Any) -> Any:
    """Return everything that `find_images` says, an error as its text."""
    try:
        found = find_images(root, **options)
    except UsageError as error:
        return str(error)
    images, inputs = (t.astype(object).where(t.notna(), None) for t in (found.images, found.inputs))
    return images.values.tolist(), inputs.values.tolist(), found.kept, found.links


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a dataset of three participants."""
    return touch(
        tmp_path / "ds",
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-2/anat/sub-2_T1w.nii.gz",
        "sub-3/ses-a/anat/sub-3_ses-a_T1w.nii.gz",
        "sub-3/ses-b/anat/sub-3_ses-b_T1w.nii.gz",
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a folder for what is kept; it does not exist yet."""
    return tmp_path / "work" / "index"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders count as old enough, so that a test need not wait two seconds."""
    monkeypatch.setattr(listings, "_SETTLED", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, root: Path) -> Callable[..., list[str]]:
    """Return a function that indexes and tells which folders were read from disk."""
    listing = os.scandir

    def read_by(cache: Path, **options: Any) -> list[str]:
        seen: list[str] = []

        def scandir(path: Any) -> Any:
            seen.append(os.path.relpath(path, root))
            return listing(path)

        with monkeypatch.context() as patched:
            patched.setattr(listings.os, "scandir", scandir)
            outcome(root, cache=cache, **options)
        return sorted(seen)

    return read_by


FOLDERS = [".", "sub-1", "sub-1/anat", "sub-2", "sub-2/anat"]
FOLDERS += ["sub-3", "sub-3/ses-a/anat", "sub-3/ses-b/anat"]


@pytest.mark.usefixtures("settled")
def test_an_unchanged_dataset_is_not_read_again(cache, reads):
    assert reads(cache) == FOLDERS
    before = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert reads(cache) == []
    assert {p: p.stat().st_mtime_ns for p in cache.iterdir()} == before


def add(root: Path) -> None:
    (root / "sub-2/anat/sub-2_acq-x_T1w.nii.gz").touch()


def remove(root: Path) -> None:
    (root / "sub-2/anat/sub-2_T1w.nii.gz").unlink()


def rename(root: Path) -> None:
    (root / "sub-2/anat/sub-2_T1w.nii.gz").rename(root / "sub-2/anat/sub-2_run-1_T1w.nii.gz")


def put_time_back(root: Path) -> None:
    before = (root / "sub-2/anat").stat()
    add(root)
    os.utime(root / "sub-2/anat", ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange_file(root: Path) -> None:
    remove(root)
    (root / "sub-2/anat/sub-2_T1w.nii.gz").mkdir()


def exchange_folder(root: Path) -> None:
    old = root / "sub-2/anat"
    times = old.stat()
    touch(root / "sub-2/new", "sub-2_T2w.nii.gz")
    old.rename(root.parent / "away")
    (root / "sub-2/new").rename(old)
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))


def add_participant(root: Path) -> None:
    touch(root, "sub-4/anat/sub-4_T1w.nii.gz")


def remove_participant(root: Path) -> None:
    shutil.rmtree(root / "sub-2")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("change", "read"),
    [
        (add, ["sub-2/anat"]),
        (remove, ["sub-2/anat"]),
        (rename, ["sub-2/anat"]),
        (put_time_back, ["sub-2/anat"]),
        (exchange_file, ["sub-2/anat"]),
        (exchange_folder, ["sub-2", "sub-2/anat"]),
        (add_participant, [".", "sub-4", "sub-4/anat"]),
        (remove_participant, ["."]),
    ],
)
def test_only_changed_folders_are_read_again(root, cache, reads, change, read):
    find_images(root, cache=cache)
    time.sleep(0.02)  # the clock of a file system ticks every 10 ms at worst
    change(root)
    assert reads(cache) == read
    assert outcome(root, cache=cache) == outcome(root)
    assert reads(cache) == []


@pytest.mark.usefixtures("settled")
def test_what_is_gone_is_forgotten_and_what_was_not_asked_for_is_not(root, cache, reads):
    find_images(root, cache=cache)
    shutil.rmtree(root / "sub-3")
    assert reads(cache, participant_label=["1"]) == ["."]
    assert reads(cache) == []
    (kept,) = cache.iterdir()
    assert b"sub-2/anat" in kept.read_bytes()
    assert b"ses-a" not in kept.read_bytes()


def test_a_folder_that_has_just_changed_is_read_again(cache, reads):
    assert reads(cache) == FOLDERS
    assert reads(cache) == FOLDERS
    assert not cache.exists()


@pytest.mark.usefixtures("settled")
def test_where_a_link_leads_is_looked_up_each_time(root, cache, reads, tmp_path):
    link = root / "sub-1/anat/sub-1_acq-l_T1w.nii.gz"
    link.symlink_to(tmp_path / "target")
    (root / "sub-9").symlink_to(tmp_path / "person")
    told = []
    for change in (
        lambda: None,
        (tmp_path / "target").touch,
        lambda: touch(tmp_path / "person", "anat/sub-9_T1w.nii.gz"),
        (tmp_path / "target").unlink,
        (tmp_path / "target").mkdir,
    ):
        change()
        told.append(outcome(root, cache=cache))
        assert told[-1] == outcome(root)
    assert len({str(rows) for rows in told}) == 5
    assert reads(cache) == []


@pytest.mark.usefixtures("settled")
def test_one_file_serves_every_preset(root, cache, reads):
    touch(root, "sub-1/anat/sub-1_UNIT1.nii.gz")
    find_images(root, cache=cache)
    assert reads(cache, preset="mp2rage") == []
    assert outcome(root, cache=cache, preset="mp2rage") == outcome(root, preset="mp2rage")


@pytest.mark.usefixtures("settled")
def test_masks_of_a_derivative_are_not_listed_again(root, cache, reads):
    for i in (1, 2):
        touch(root, f"derivatives/hd/sub-{i}/anat/sub-{i}_desc-brain_mask.nii.gz")
    asked = {"participant_label": ["1", "2"]}
    first = outcome(root, cache=cache, **asked)
    assert first == outcome(root, **asked)
    assert first[0][0][-1] == "derivatives/hd/sub-1/anat/sub-1_desc-brain_mask.nii.gz"
    assert len(list(cache.iterdir())) == 2
    assert reads(cache, **asked) == ["derivatives"]  # the list of derivatives is not kept


@pytest.mark.usefixtures("settled")
def test_an_interrupted_index_goes_on_from_there(root, cache, reads, monkeypatch):
    listing = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("sub-3"):
            raise KeyboardInterrupt
        return listing(path)

    with monkeypatch.context() as patched:
        patched.setattr(listings.os, "scandir", scandir)
        with pytest.raises(KeyboardInterrupt):
            find_images(root, cache=cache)
    assert reads(cache) == FOLDERS[5:]
    assert outcome(root, cache=cache) == outcome(root)


@pytest.mark.usefixtures("settled")
def test_a_folder_that_cannot_be_read_is_tried_each_time(root, cache, monkeypatch):
    listing = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("sub-2/anat"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    with monkeypatch.context() as patched:
        patched.setattr(listings.os, "scandir", scandir)
        denied = outcome(root)
        assert "permission" in str(denied)
        assert [outcome(root, cache=cache) for _ in range(2)] == [denied, denied]
    assert outcome(root, cache=cache) == outcome(root) != denied


@pytest.mark.usefixtures("settled")
def test_rights_that_are_taken_away_show(root, cache, tmp_path):
    (tmp_path / "closed").mkdir(0o000)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("nothing is forbidden to this user")
    find_images(root, cache=cache)
    for folder in ("sub-1", "sub-2/anat"):
        for mode in (0o000, 0o600, 0o300, 0o500):
            (root / folder).chmod(mode)
            try:
                assert outcome(root, cache=cache) == outcome(root)
            finally:
                (root / folder).chmod(0o700)


@pytest.mark.usefixtures("settled")
def test_another_user_reads_for_themselves(cache, reads, monkeypatch):
    reads(cache)
    monkeypatch.setattr(listings.os, "geteuid", lambda: 4711)
    assert reads(cache) == FOLDERS


# -- the file that is kept ---------------------------------------------------------------------


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data + b"\0",
        lambda data: data.replace(b"sub-2_T1w", b"sub-2_T2w"),
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: data.replace(b"\n", b"\0", 1),
        lambda data: b"\n" + data,
        lambda data: b"\xff" * 1000,
        lambda data: pickle.dumps({"format": 1}),
    ],
)
def test_a_damaged_file_is_as_good_as_none_and_is_replaced(root, cache, reads, damage):
    find_images(root, cache=cache)
    (kept,) = cache.iterdir()
    sound = kept.read_bytes()
    kept.write_bytes(damage(sound))
    assert reads(cache) == FOLDERS
    assert kept.read_bytes() == sound


@pytest.mark.usefixtures("settled")
def test_the_file_of_another_dataset_is_not_used(root, cache, reads, tmp_path):
    other = touch(tmp_path / "other", "sub-1/anat/sub-1_T2w.nii.gz")
    find_images(other, cache=cache)
    (foreign,) = cache.iterdir()
    find_images(root, cache=cache)
    (own,) = set(cache.iterdir()) - {foreign}
    shutil.copy(foreign, own)
    assert reads(cache) == FOLDERS


TEXT = st.text("/d\0\n sub-1T1wnigzé\udcff.", max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=6, max_size=6), st.lists(TEXT, max_size=9))
def test_no_forged_file_makes_the_index_fail(forged, more):
    with tempfile.TemporaryDirectory() as folder:
        root = touch(Path(folder).resolve() / "ds", "sub-1/anat/sub-1_T1w.nii.gz")
        cache = Path(folder) / "index"
        with Listings(root, cache) as kept:
            for path in ("", "sub-1", "sub-1/anat"):
                seen = (root / path).stat()
                state = f"{seen.st_dev} {seen.st_ino} {seen.st_mtime_ns} {seen.st_ctime_ns}"
                kept._now[path] = (state, forged.pop(), forged.pop())
            kept._now |= {path: ("", path, path) for path in more}
            kept._changed = True
        for suffix in ("T1w", ["T1w", "T2w"]):
            find_images(root, cache=cache, filters={"suffix": suffix})


@pytest.mark.usefixtures("settled")
def test_a_pipe_in_place_of_the_file_does_not_block(root, cache):
    find_images(root, cache=cache)
    (kept,) = cache.iterdir()
    kept.unlink()
    os.mkfifo(kept)
    assert outcome(root, cache=cache) == outcome(root)
    assert kept.is_file()


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_is_only_a_warning(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the index is not kept"):
        assert len(find_images(root, cache=tmp_path / "file" / "index").images) == 4


@pytest.mark.usefixtures("settled")
def test_without_a_cache_nothing_is_written(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    find_images(root)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("settled")
def test_a_data_module_keeps_the_listings_in_its_work_folder(heads_made, tmp_path):
    from nidl_dcl.data.datamodule import BIDSDataModule

    told: list[tuple[str, int, int]] = []
    module = BIDSDataModule(heads_made, work_dir=tmp_path, progress=lambda *call: told.append(call))
    assert len(module.images) == 13
    assert len(list((tmp_path / "index").iterdir())) == 2  # the dataset, and its masks
    assert ("indexing", 10, 10) in told


@pytest.mark.usefixtures("settled")
def test_a_table_of_images_may_use_a_cache_too(root, cache):
    assert index_bids(root, cache=str(cache)).equals(index_bids(root))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("settled")
def test_any_name_that_a_file_can_have_is_remembered(tmp_path, cache):
    odd = os.fsdecode(b"not\xfftext")
    names = ["a b", "line\nend", "tab\t", "é", odd, "..x", "d", '"', "\\"]
    root = touch(tmp_path.resolve() / odd, *names)
    (root / "folder\n").mkdir()
    (root / "link").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    for _ in range(2):
        with Listings(root, cache) as kept:
            found = kept.read("")
        assert found == read_folder(root)
        assert list(found.odd.items()) == [("folder\n", "dir"), ("link", "link"), ("pipe", "other")]
        assert found.files() == sorted([*names, "link"])
    assert not kept._changed


def test_an_empty_folder_is_remembered_as_empty(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(listings, "_SETTLED", -(10**12))
    (tmp_path / "ds").mkdir()
    for _ in range(2):
        with Listings(tmp_path / "ds", cache) as kept:
            assert kept.read("") == Listing([], {})


# -- any change at all -------------------------------------------------------------------------

LABELS = ("1", "2", "3")
NAMES = ("T1w.nii.gz", "T1w.nii", "run-1_T1w.nii", "acq-x_T1w.nii.gz", "T2w.nii", "T1w.json")
MASK = "derivatives/m/sub-{0}/anat/sub-{0}_desc-brain_mask.nii.gz"

CHANGES = st.tuples(
    st.sampled_from(
        [
            *("file", "unlink", "rename", "folder", "exchange", "mode", "mask", "unmask", "table"),
            *("link", "target", "untarget", "person", "unperson", "link_person", "session"),
        ]
    ),
    st.sampled_from(LABELS),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
)


def clear(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def apply(root: Path, change: tuple[str, str, str, str]) -> None:
    """Change a dataset; what cannot be done now is left."""
    what, label, name, other = change
    person, anat = root / f"sub-{label}", root / f"sub-{label}" / "anat"
    image, target = anat / f"sub-{label}_{name}", root.parent / f"target-{name}"
    if what == "file" and not image.exists():
        touch(anat, image.name)
    elif what == "unlink":
        clear(image)
    elif what == "rename":
        image.rename(anat / f"sub-{label}_{other}")
    elif what == "folder":
        clear(image)
        image.mkdir()
    elif what == "link":
        clear(image)
        image.symlink_to(target)
    elif what == "target":
        clear(target)
        target.mkdir() if name == other else target.touch()
    elif what == "untarget":
        clear(target)
    elif what == "person":
        touch(anat, f"sub-{label}_{name}", f"sub-{label}_{other}")
    elif what == "unperson":
        clear(person)
    elif what == "link_person":
        clear(person)
        person.symlink_to(root / f"sub-{LABELS[len(name) % 3]}")
    elif what == "session":
        anat.rename(root / "moved")
        (person / "ses-a").mkdir()
        (root / "moved").rename(person / "ses-a" / "anat")
    elif what == "exchange":
        times = anat.stat()
        anat.rename(root.parent / "away")
        touch(anat, f"sub-{label}_{name}")
        os.utime(anat, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "mode":
        anat.chmod(0o300 if name == other else 0o700)
    elif what == "mask":
        touch(root, MASK.format(label))
    elif what == "unmask":
        clear(root / MASK.format(label))
    elif what == "table":
        (root / "participants.tsv").write_text(f"participant_id\nsub-{label}\n")


@pytest.fixture(scope="module")
def at_once() -> Iterator[None]:
    """As `settled`, once for all examples."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(listings, "_SETTLED", -(10**12))
        yield


@pytest.mark.usefixtures("at_once")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(CHANGES, min_size=1, max_size=4), min_size=2, max_size=8))
def test_whatever_changes_the_index_is_that_of_the_disk(rounds):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "ds"
        for label in LABELS:
            touch(root, f"sub-{label}/anat/sub-{label}_T1w.nii.gz", MASK.format(label))
        try:
            for changes in rounds:
                assert outcome(root, cache=Path(folder, "index")) == outcome(root)
                time.sleep(0.012)  # so that the clock of the file system has moved on
                for change in changes:
                    try:
                        apply(root, change)
                    except OSError:
                        shutil.rmtree(root / "moved", ignore_errors=True)
                shutil.rmtree(root.parent / "away", ignore_errors=True)
            assert outcome(root, cache=Path(folder, "index")) == outcome(root)
        finally:
            for anat in root.glob("sub-*/anat"):
                if anat.exists():
                    anat.chmod(0o700)

"""Which folders are visited, in which order, and how progress is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nidl_dcl.bids import walk as bids_walk
from nidl_dcl.bids.index import find_images
from nidl_dcl.bids.presets import PRESETS, Preset
from nidl_dcl.bids.walk import DatasetWalker


def made(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return root


def test_only_the_folders_of_the_preset_are_visited_by_name(tmp_path):
    made(
        tmp_path, "sub-2/ses-b/anat", "sub-2/ses-a/anat", "sub-2/ses-a/func", "sub-1/anat", "x/anat"
    )
    walk = DatasetWalker(tmp_path, PRESETS["raw-t1w"])
    assert [(f.path, f.pattern, f.participant, f.session) for f in walk] == [
        ("sub-1/anat", "sub-*/anat", "sub-1", None),
        ("sub-2/ses-a/anat", "sub-*/ses-*/anat", "sub-2", "ses-a"),
        ("sub-2/ses-b/anat", "sub-*/ses-*/anat", "sub-2", "ses-b"),
    ]
    assert list(walk.participants) == ["sub-1", "sub-2"]
    assert walk.sessions == {"ses-a", "ses-b"}


def test_folders_of_people_not_asked_for_are_known_but_not_visited(tmp_path):
    made(tmp_path, "sub-1/ses-a/anat", "sub-2/ses-b/anat")
    walk = DatasetWalker(tmp_path, PRESETS["raw-t1w"], {"sub-2"})
    assert [folder.path for folder in walk] == ["sub-2/ses-b/anat"]
    assert list(walk.participants) == ["sub-1", "sub-2"]
    assert walk.sessions == {"ses-b"}


def test_a_file_in_place_of_a_folder_is_passed_over(tmp_path):
    made(tmp_path, "sub-1", "sub-2/anat")
    (tmp_path / "sub-1/anat").touch()
    (tmp_path / "sub-3").touch()
    walk = DatasetWalker(tmp_path, PRESETS["raw-t1w"])
    assert [folder.path for folder in walk] == ["sub-2/anat"]
    assert list(walk.participants) == ["sub-1", "sub-2"]


def test_a_folder_without_wildcards_on_the_way_is_not_listed(tmp_path, monkeypatch):
    made(tmp_path, "a/b/sub-1/mri", "a/c")
    scandir = os.scandir
    seen: list[str] = []

    def record(path):
        seen.append(os.path.relpath(path, tmp_path))
        return scandir(path)

    monkeypatch.setattr(bids_walk.os, "scandir", record)
    walk = DatasetWalker(tmp_path, Preset("", folders=("a/b/sub-*/mri", "no/sub-*")))
    assert len(list(walk)) == 1
    assert seen == ["a/b", "a/b/sub-1/mri", "no"]


@pytest.mark.parametrize(("every", "told"), [(0.0, [1, 2, 3, 3]), (99.0, [3])])
def test_progress_counts_the_participants_that_are_visited(tmp_path, monkeypatch, every, told):
    made(tmp_path, *(f"sub-{i}/anat" for i in range(1, 5)))
    monkeypatch.setattr(bids_walk, "_EVERY", every)
    calls: list[tuple[str, int, int]] = []
    find_images(
        tmp_path, participant_label=["1", "2", "4"], progress=lambda *call: calls.append(call)
    )
    assert calls == [("indexing", done, 3) for done in told]

"""Find the images of a BIDS dataset by name alone, and report on every file that could be one.

Opening files is left to `nidl_dcl.volumes`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from nidl_dcl.bids.derivatives import dataset_root, find_preset, named_datasets, search_datasets
from nidl_dcl.bids.entities import is_label, natural_key, read_filters
from nidl_dcl.bids.exclusions import exclude_images
from nidl_dcl.bids.labels import unknown_labels, with_prefix
from nidl_dcl.bids.masks import pair_masks
from nidl_dcl.bids.near_misses import folders_of_others, what_lies_there
from nidl_dcl.bids.phenotypes import participant_ids, read_phenotypes
from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.search import Candidate, SearchResult, select_images
from nidl_dcl.bids.subject_ids import match_ids
from nidl_dcl.bids.walk import Progress
from nidl_dcl.errors import UsageError

_MOST_LOOKED_AT = 1000
"""Participants without an image whose folders are looked into."""

INPUT_COLUMNS = ["participant_id", "session_id", "path", "status", "code", "message"]


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a dataset, and every file that could have been one.

    Attributes
    ----------
    root : Path
        The dataset, absolute; all paths below are relative to it, POSIX.
    images : DataFrame
        ``participant_id session_id run path source mask_path``, one row per usable image, sorted.
        Missing sessions, runs and masks are ``<NA>``. `source` is a BIDS URI.
    inputs : DataFrame
        ``participant_id session_id path status code message``: every candidate image, and the
        participants without one (path ``n/a``). Listed = ok + warn + skip.
    kept : list of (str, int)
        Each step of the selection, and how many images were left after it.
    links : dict of str to Path
        The datasets that the URIs in `source` refer to; ``raw`` is `root`.
    notes : list of str
        What is not taken though its name is near.
    """

    root: Path
    images: pd.DataFrame
    inputs: pd.DataFrame
    kept: list[tuple[str, int]]
    links: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def index_bids(
    bids_dir: str | Path,
    *,
    preset: str = "raw-t1w",
    derivatives: Sequence[str | Path] = (),
    participant_label: Sequence[str] | None = None,
    session_label: Sequence[str] | None = None,
    filters: Mapping[str, Any] | None = None,
    select: str = "all",
    phenotypes: bool | str | Path | Sequence[str | Path] | None = None,
) -> pd.DataFrame:
    """Return one row per image of a BIDS dataset, found by name alone.

    Parameters
    ----------
    bids_dir, preset, derivatives, participant_label, session_label, filters, select
        As in `find_images`.
    phenotypes : bool, path or sequence of path, optional
        True joins the dataset's own tables; paths join those tables as well.

    Returns
    -------
    DataFrame
        ``participant_id session_id run path``, then a column per phenotype.

    Raises
    ------
    UsageError
        As in `find_images`, and for tables that contradict themselves.

    Examples
    --------
    ``MY_DATASET`` is a BIDS dataset.

    >>> from nidl_dcl import index_bids
    >>> images = index_bids("MY_DATASET", participant_label=["01", "03"], phenotypes=True)
    >>> images[["participant_id", "session_id", "age"]].values.tolist()
    [['sub-01', 'ses-01', 48.0], ['sub-03', 'ses-01', 68.0], ['sub-03', 'ses-02', 68.0]]
    """
    index = find_images(
        bids_dir,
        preset=preset,
        derivatives=derivatives,
        participant_label=participant_label,
        session_label=session_label,
        filters=filters,
        select=select,
        mask="none",
    )
    images = index.images[["participant_id", "session_id", "run", "path"]]
    if phenotypes is None or phenotypes is False:
        return images
    files = [phenotypes] if isinstance(phenotypes, str | Path) else phenotypes
    tables = [] if files is True else [Path(file) for file in files]
    columns = read_phenotypes(index.root, index.images, tables).table
    return pd.concat([images, columns.set_index(images.index)], axis=1)


def find_images(
    bids_dir: str | Path,
    *,
    preset: str = "raw-t1w",
    derivatives: Sequence[str | Path] = (),
    participant_label: Sequence[str] | None = None,
    session_label: Sequence[str] | None = None,
    exclude_participant_label: Sequence[str] | None = None,
    exclude: str | Path | None = None,
    filters: Mapping[str, Any] | None = None,
    select: str = "all",
    mask: str = "auto",
    all_masked: bool = True,
    leave_out: Path | None = None,
    progress: Progress | None = None,
) -> DatasetIndex:
    """Return the images of a BIDS dataset, their masks, and every candidate with its status.

    Only names and kinds of files are looked at; no image is opened, and nothing is written.

    Parameters
    ----------
    bids_dir : path
        A raw dataset, or the derivative that the preset describes.
    preset : str, default="raw-t1w"
        Key of `PRESETS`. Images of a derivative are looked for in `derivatives`, then under
        ``derivatives/`` by the pipeline's usual name, then in `bids_dir` itself, then in every
        folder of ``derivatives/``.
    derivatives : sequence of str or path
        Folders with images of the preset or brain masks, as ``PATH`` or ``NAME=PATH``.
    participant_label, session_label : sequence of str, optional
        Only these, with or without ``sub-`` and ``ses-``. Empty means all.
    exclude_participant_label : sequence of str, optional
        Not these. Their images are listed, and not used.
    exclude : path, optional
        A table of images that are not to be used, with reasons (`exclusions.read_exclusions`).
    filters : mapping, optional
        A BIDS filter (see `entities.read_filters`), used instead of the preset's values of the
        same entities.
    select : {"all", "first", "last"}, default="all"
        Which of several images in a session, sorted by acquisition, then run, then path.
    mask : str, default="auto"
        ``"auto"``: the brain masks of the one derivative that has them, used when every image has
        one; ``"none"``; or the name of a derivative.
    all_masked : bool, default=True
        Whether it is an error when only some images have a mask.
    leave_out : Path, optional
        A derivative that is not looked at.
    progress : callable, optional
        Called with ("indexing", participants done, participants in total), now and then.

    Raises
    ------
    UsageError
        For a missing folder, an unknown preset, participant, session or entity, images of the
        preset in several derivatives or in none, and incomplete or ambiguous masks.
    """
    root = dataset_root(bids_dir)
    layout_preset = find_preset(preset)
    if select not in ("all", "first", "last"):
        raise UsageError(f"select is all, first or last, got {select!r}.")
    entity_filters = read_filters(filters, layout_preset)
    participants = with_prefix(participant_label, "sub-")
    sessions = with_prefix(session_label, "ses-")
    datasets = named_datasets(root, derivatives)
    datasets = {name: path for name, path in datasets.items() if path != leave_out}
    home, found = search_datasets(
        datasets,
        derivatives,
        layout_preset,
        entity_filters,
        participants,
        sessions,
        progress=progress,
    )
    folders = set(found.participants)
    if found.root != root:
        folders |= {
            entry.name
            for entry in os.scandir(root)
            if entry.name.startswith("sub-") and not entry.is_file(follow_symlinks=False)
        }
    table = _match_table(root, folders)
    known = {*folders, *table}
    if participants is not None:
        _refuse_unknown("participant", participants, known, root)
    if sessions is not None:
        _refuse_unknown("session", sessions, found.sessions, root)
    if participants is not None or sessions is not None:
        asked = [f"{len(participants)} participants asked for"] if participants else []
        asked += [f"sessions {' '.join(sorted(sessions))}"] if sessions else []
        found.kept[0] = f"{found.kept[0][0]} ({', '.join(asked)})", found.kept[0][1]
    without = with_prefix(exclude_participant_label, "sub-")
    exclude_images(found, known, labels=without, file=exclude)
    if select != "all":
        select_images(found, select)
    found.candidates = _in_order(found.candidates)
    usable = found.usable
    base = _relative(found.root, root)
    masks = pair_masks(
        usable, layout_preset, home, datasets, mask, complete=all_masked, progress=progress
    )
    expected = known if participants is None else known & participants
    inputs = _inputs(found, base, expected, table, layout_preset)
    return DatasetIndex(
        root,
        _images(usable, base, home, masks, datasets, root),
        inputs,
        found.kept,
        datasets,
        _near_notes(found, layout_preset),
    )


def _near_notes(found: SearchResult, preset: Preset) -> list[str]:
    """Say what is not taken of a dataset though its name is near."""
    notes = []
    if count := len(found.passed_over):
        are = "file is not taken: its name goes" if count == 1 else "files are not taken: names go"
        notes.append(f"{count} {are} on after {preset.suffix} (first: {found.passed_over[0]})")
    others = [] if found.candidates else folders_of_others(found.root, preset)
    if others:
        notes.append(
            f"{len(others)} folders hold images, and their names do not begin with sub- "
            f"({', '.join(others[:3])}{', …' * (len(others) > 3)})"
        )
    return [_utf8(note) for note in notes]


def _refuse_unknown(what: str, asked: set[str], known: Iterable[str], root: Path) -> None:
    there = set(known)
    if unknown := asked - there:
        raise UsageError(unknown_labels(what, unknown, there, root))


def _match_table(root: Path, folders: set[str]) -> set[str]:
    """Return the participants of ``participants.tsv``, by the names of their folders."""
    try:
        ids = participant_ids(root)
    except UsageError as error:
        # Images can be found and trained on without the table; read_phenotypes refuses it.
        warnings.warn(f"participants.tsv is not used: {error}", stacklevel=3)
        return set()
    matched = match_ids(ids, folders)
    return {matched[i][0] if i in matched else f"sub-{i.removeprefix('sub-')}" for i in ids}


def _in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return candidates by participant, session and path, ``run-2`` before ``run-10``."""

    def visit(candidate: Candidate) -> tuple[str, str]:
        return candidate.participant, candidate.session or ""

    ordered: list[Candidate] = []
    for _, same in groupby(sorted(candidates, key=visit), visit):
        images = list(same)
        if len(images) > 1:  # the slow part of the key is seldom needed
            images.sort(key=lambda c: natural_key(c.path))
        ordered += images
    return ordered


def _relative(folder: Path, root: Path) -> str:
    base = Path(os.path.relpath(folder, root)).as_posix()
    return "" if base == "." else f"{base}/"


def _images(
    usable: Sequence[Candidate],
    base: str,
    home: str,
    masks: tuple[str, list[str | None]] | None,
    datasets: Mapping[str, Path],
    root: Path,
) -> pd.DataFrame:
    paths: list[str | None] = [None] * len(usable)
    if masks is not None:
        mask_base = _relative(datasets[masks[0]], root)
        paths = [None if path is None else mask_base + path for path in masks[1]]
    runs = [c.entities.get("run") for c in usable]
    return pd.DataFrame(
        {
            "participant_id": pd.array([c.participant for c in usable], dtype="string"),
            "session_id": pd.array([c.session for c in usable], dtype="string"),
            "run": pd.array([None if r is None else int(r) for r in runs], dtype="Int64"),
            "path": pd.array([base + c.path for c in usable], dtype="string"),
            "source": pd.array([f"bids:{home}:{c.path}" for c in usable], dtype="string"),
            "mask_path": pd.array(paths, dtype="string"),
        }
    )


def _inputs(
    found: SearchResult, base: str, expected: set[str], table: set[str], preset: Preset
) -> pd.DataFrame:
    """Return the rows of ``inputs.tsv``: the candidates, and participants without any.

    Of these it is said what lies there instead, for the first of them.
    """
    rows = [
        (*map(_utf8, (c.participant, c.session, base + c.path)), c.status, c.code, c.message)
        for c in found.candidates
    ]
    have = {c.participant for c in found.candidates}
    for number, participant in enumerate(sorted(expected - have)):
        where = "in participants.tsv" if participant in table else "as a folder"
        code, message = "no_image", f"listed {where}, without an image that was asked for"
        if found.rule is not None and number < _MOST_LOOKED_AT:
            there = what_lies_there(found.root, participant, preset, found.rule, found.filters)
            message = f"{message}; {there}"
        if not is_label(participant.removeprefix("sub-")):
            code, message = "bad_id", f"listed {where}; labels are letters and digits only"
        rows.append((_utf8(participant), None, "n/a", "skip", code, _utf8(message)))
    rows.sort(key=lambda row: row[0])
    return pd.DataFrame(rows, columns=INPUT_COLUMNS).astype("string")


def _utf8(text: str | None) -> Any:
    """Return a name as UTF-8 can hold it: bytes that are not text become escapes."""
    return text and text.encode("utf-8", "backslashreplace").decode("utf-8")

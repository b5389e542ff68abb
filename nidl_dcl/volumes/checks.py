"""Open every image of a dataset once, before training, and report faults, copies and what to fetch.

Checking one file is left to `reading`, and deciding how many faults are too many to `nidl_dcl.data`.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from nidl_dcl.io.file_cache import FileMemory, file_status
from nidl_dcl.io.formats import read_json
from nidl_dcl.status import Check
from nidl_dcl.volumes.cache import FORMAT as CHECKS
from nidl_dcl.volumes.cache import check_files, thread_map
from nidl_dcl.volumes.mask_fit import Background, check_mask
from nidl_dcl.volumes.reading import Sample, look_at

_LARGEST_SIDECAR = 10**7

_MOST_NAMES = 5
"""More images than this are fetched by pattern, not by name."""


def check_images(
    root: Path,
    images: pd.DataFrame,
    intensity: str,
    memory: FileMemory,
    workers: int,
    progress: Callable[[str, int, int], None],
) -> list[Check]:
    """Return the result of opening each image; one whose mask cannot be used is skipped, too.

    Parameters
    ----------
    root : Path
        Folder that the paths in `images` are relative to.
    images : DataFrame
        Columns ``path`` and ``mask_path``.
    intensity : str
        As in `reading.check_volume`.
    memory, workers
        As in `cache.check_files`.
    progress : callable
        Called with (what, done, total).
    """
    paths = [root / str(path) for path in images["path"]]
    masks = {i: m for i, m in enumerate(images["mask_path"]) if isinstance(m, str)}
    heads: dict[Path, Background] = {}  # of images with a mask that are opened now
    wanted = {paths[i] for i in masks}

    def keep(path: Path, sample: Sample) -> None:
        if path in wanted:
            heads[path] = Background.of(sample)

    found: list[Check] = []
    checks = check_files(paths, memory, intensity=intensity, workers=workers, opened=keep)
    with closing(checks):
        for check in checks:
            if check.code == "ok" and (fault := _sidecar_fault(paths[len(found)])):
                check = replace(check, status="warn", code="sidecar", message=fault)
            found.append(check)
            progress("checking images", len(found), len(paths))
    pairs = [(paths[i], root / mask) for i, mask in masks.items()]
    with closing(_check_masks(pairs, heads, memory, intensity, workers)) as fits:
        for done, (fit, (i, mask)) in enumerate(zip(fits, masks.items(), strict=True), 1):
            progress("checking masks", done, len(pairs))
            if fit.code == "ok" or found[i].status == "skip":
                continue
            about = replace(found[i], status=fit.status, code=fit.code)
            text = f"mask {mask}: {fit.message}"
            if fit.status == "warn" and found[i].code != "ok":
                about, text = found[i], f"{found[i].message} {text[0].upper()}{text[1:]}"
            found[i] = replace(about, message=text)
    return found


def _check_masks(
    pairs: Sequence[tuple[Path, Path]],
    heads: Mapping[Path, Background],
    memory: FileMemory,
    intensity: str,
    workers: int,
) -> Generator[Check, None, None]:
    """Open every mask once and yield whether it can be used, and fits its image."""

    def check(pair: tuple[Path, Path]) -> Check:
        image, mask = pair
        try:
            fact = f"mask {CHECKS} {memory.sha256(image)}"
            known = memory.recall(mask, fact)
            if known is not None:
                return Check(**known)
            status = file_status(mask)
        except (OSError, TypeError):
            return check_mask(mask, None)
        head = heads.get(image)
        if head is None:  # the image was opened in an earlier run
            sample = look_at(image, intensity=intensity)[1]
            head = None if sample is None else Background.of(sample)
        found = check_mask(mask, head)
        memory.note(mask, status, fact, asdict(found))
        if found.status != "skip":
            memory.sha256(mask)  # for the name of the cache entry, while the file is at hand
        return found

    try:
        yield from thread_map(check, pairs, workers)
    finally:
        memory.save()


def _sidecar_fault(image: Path) -> str:
    """Return what is wrong with the JSON file beside an image; empty if it is sound or missing."""
    sidecar = image.with_name(image.name.partition(".")[0] + ".json")
    try:
        if not sidecar.is_file():
            broken = sidecar.is_symlink()
            return f"{sidecar.name} is a link to nothing; it is not needed." if broken else ""
        fields = read_json(sidecar, _LARGEST_SIDECAR)
    except (OSError, ValueError) as error:
        return f"{sidecar.name} cannot be read ({error}); it is not needed."
    return "" if isinstance(fields, dict) else f"{sidecar.name} holds no JSON object."


def copies(images: pd.DataFrame, checks: list[Check]) -> tuple[list[str | None], list[Check]]:
    """Find images with the same voxels that belong to several participants.

    Returns
    -------
    contents : list of (str or None)
        Checksum of the voxels of each image; None for images that no other participant has.
    checks : list of Check
        As given, with a warning on each shared image.
    """
    people, paths = list(map(str, images["participant_id"])), list(map(str, images["path"]))
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for i, check in enumerate(checks):
        if check.content and check.status != "skip":
            rows_of[check.content].append(i)
    contents: list[str | None] = [None] * len(checks)
    warned = list(checks)
    for content, rows in rows_of.items():
        if len({people[i] for i in rows}) == 1:
            continue
        for i in rows:
            twin = paths[next(k for k in rows if people[k] != people[i])]
            text = f"The same voxels as {twin}: both participants are kept in one group."
            if checks[i].code == "ok":
                warned[i] = replace(checks[i], status="warn", code="duplicate", message=text)
            else:
                warned[i] = replace(checks[i], message=f"{checks[i].message} {text}")
            contents[i] = content
    return contents, warned


def record_checks(inputs: pd.DataFrame, images: pd.DataFrame, checks: list[Check]) -> pd.DataFrame:
    """Return `inputs` with the results of opening images.

    Parameters
    ----------
    inputs : DataFrame
        The candidate images: columns ``path``, ``status``, ``code`` and ``message``.
    images : DataFrame
        The images that were opened: column ``path``.
    checks : list of Check
        The result of each image.
    """
    recorded = inputs.copy()
    row_of = {path: row for row, path in zip(recorded.index, recorded["path"], strict=True)}
    columns = ["status", "code", "message"]
    for path, check in zip(images["path"], checks, strict=True):
        if check.code != "ok":
            recorded.loc[row_of[path], columns] = [getattr(check, name) for name in columns]
    return recorded


def how_to_fetch(root: Path, inputs: pd.DataFrame) -> str:
    """Return in one line how to get the `inputs` of a DataLad dataset that have not been fetched.

    It is empty if there are none.
    """
    absent = inputs.loc[inputs["code"] == "not_fetched", "path"].astype(str)
    if absent.empty:
        return ""
    names = sorted(map(shlex.quote, absent))
    if len(absent) > _MOST_NAMES:
        folders = absent.str.replace(r"\b(sub|ses)-[^/]+(?=/)", r"\1-*", regex=True)
        names = sorted(set(folders.str.replace(r"[^/]+(_[^/_]+)$", r"*\1", regex=True)))
    return (
        f"{len(absent)} of {int((inputs['path'] != 'n/a').sum())} images have not been fetched. "
        f"To get them: cd {shlex.quote(str(root))} && datalad get {' '.join(names)}"
    )

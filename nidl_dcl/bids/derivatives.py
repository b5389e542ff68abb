"""Find the dataset that holds the images of a preset: the raw one or one of its derivatives.

What is in a dataset is left to `search`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nidl_dcl.bids.entities import Allowed
from nidl_dcl.bids.near_misses import folders_of_others
from nidl_dcl.bids.presets import PRESETS, Preset
from nidl_dcl.bids.search import SearchResult, search
from nidl_dcl.bids.walk import Progress, subfolders
from nidl_dcl.errors import UsageError

_RESERVED = ("raw", "auto", "none")


def dataset_root(bids_dir: str | Path) -> Path:
    """Return `bids_dir`, absolute and without links.

    Raises
    ------
    UsageError
        When it is missing, no folder, or not readable.
    """
    root = Path(bids_dir).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(
            f"BIDS_DIR {bids_dir} {what}. Give the folder that holds the sub-* folders."
        )
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"BIDS_DIR {bids_dir} cannot be read. Ask for the right to read it.")
    return root.resolve()


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises
    ------
    UsageError
        For an unknown name.
    """
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def as_list(given: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one or several paths as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def named_datasets(root: Path, given: Sequence[str | Path]) -> dict[str, Path]:
    """Return datasets by name: ``raw``, the derivatives given, the folders of ``derivatives/``.

    Those given are ``PATH`` or ``NAME=PATH``; a relative path may start at ``derivatives/``. The
    name is that of the folder unless one is given, with ``-`` for what BIDS URIs do not allow.

    Raises
    ------
    UsageError
        For a missing folder and for two of one name.
    """
    datasets = {"raw": root}
    for text in as_list(given):
        name, path = _named_path(root, str(text))
        if name in datasets or name in _RESERVED:
            raise UsageError(
                f"--derivatives {text}: the name {name!r} is taken. "
                "Name them: --derivatives NAME=PATH NAME=PATH."
            )
        datasets[name] = path
    own = root / "derivatives"
    taken = set(datasets.values())
    for name in subfolders(os.scandir(own)) if own.is_dir() else ():
        # OpenBHB keeps its participants in derivatives/ itself.
        if name.startswith((".", "sub-")):
            continue
        path, label = (own / name).resolve(), re.sub("[^A-Za-z0-9_-]", "-", name)
        if path not in taken and label not in _RESERVED:
            datasets.setdefault(label, path)
    return datasets


def _named_path(root: Path, text: str) -> tuple[str, Path]:
    name, equals, rest = text.partition("=")
    tries = [("", text)] + ([(name, rest)] if equals else [])
    for label, there in tries:
        for path in (Path(there).expanduser(), root / "derivatives" / there):
            if there and path.is_dir():
                path = path.resolve()
                return re.sub("[^A-Za-z0-9_-]", "-", label or path.name), path
    raise UsageError(f"--derivatives {text}: no such folder. Give PATH or NAME=PATH.")


def search_datasets(
    datasets: Mapping[str, Path],
    given: Sequence[str | Path],
    preset: Preset,
    entity_filters: Mapping[str, Allowed],
    participants: set[str] | None,
    sessions: set[str] | None,
    *,
    progress: Progress | None = None,
) -> tuple[str, SearchResult]:
    """Return the name of the dataset that holds the images, and what was found there.

    A raw preset is searched in ``raw``. The images of a derivative are looked for in those given,
    then by the pipeline's usual name, then in the raw dataset, then in every derivative.

    Parameters
    ----------
    datasets : mapping of str to Path
        As `named_datasets` returns it.
    given : sequence
        The derivatives given, first in `datasets` after ``raw``.
    preset, entity_filters, participants, sessions, progress
        As in `search.search`.

    Raises
    ------
    UsageError
        When several datasets hold such images, or none and nothing tells which was meant.
    """

    def searched(name: str) -> SearchResult:
        return search(
            datasets[name], preset, entity_filters, participants, sessions, progress=progress
        )

    if not preset.derivatives:
        return "raw", searched("raw")
    names = [name for name in datasets if name != "raw"]
    first = names[: len(as_list(given))]
    usual = [n for n in names if n not in first and n.lower().startswith(preset.derivatives)]
    rest = [n for n in names if n not in first and n not in usual]
    finds: dict[str, SearchResult] = {}
    for group in (first, usual, ["raw"], rest):
        finds |= {name: searched(name) for name in group}
        holding = [n for n in group if finds[n].usable]
        if len(holding) > 1:
            raise UsageError(
                f"Several derivatives hold such images: {', '.join(holding)}. "
                f"Say which: --derivatives {holding[0]}={datasets[holding[0]]}"
            )
        if holding:
            return holding[0], finds[holding[0]]
    # No usable image. Report on the dataset with candidates that were left out, or participants.
    meant = [n for n in finds if finds[n].candidates] or [
        n for n in (*first, *usual) if finds[n].participants
    ]
    if meant:
        return meant[0], finds[meant[0]]
    others = {name: folders_of_others(datasets[name], preset) for name in finds}
    for name, folders in others.items():
        if folders:
            raise UsageError(
                f"{datasets[name]} holds such images in folders that do not begin with sub-: "
                f"{', '.join(folders[:3])}{', …' * (len(folders) > 3)}. Rename them, or make links: "
                f"ln -s {folders[0]} sub-{re.sub('[^A-Za-z0-9]', '', folders[0])}"
            )
    how = "Give the folder: --derivatives NAME=PATH"
    if first:
        how = f"Images of this preset lie in {preset.folders[0]} of that folder"
    raise UsageError(
        f"No image of this preset ({preset.summary}) in {datasets['raw']}, nor in its derivatives "
        f"({', '.join(names) or 'none'}). {how}"
    )

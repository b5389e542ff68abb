"""Which folder holds the images of a preset: the dataset itself or one of its derivatives.

What is in a folder is found by `candidates`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nidl_dcl.bids.directory_cache import read_folder
from nidl_dcl.bids.entities import Allowed
from nidl_dcl.bids.presets import PRESETS, Preset
from nidl_dcl.bids.search import SearchResult, search
from nidl_dcl.bids.walk import Progress
from nidl_dcl.errors import UsageError

__all__ = ["dataset_root", "listed", "named_places", "preset_called", "search_places"]

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


def preset_called(name: str) -> Preset:
    """Return a preset by name; an unknown one is a UsageError that lists the known."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def listed(given: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one or several paths as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def named_places(root: Path, given: Sequence[str | Path]) -> dict[str, Path]:
    """Return datasets by name: ``raw``, the derivatives given, the folders of ``derivatives/``.

    Parameters
    ----------
    root : Path
        The dataset.
    given : sequence of str or path
        ``PATH`` or ``NAME=PATH``; a relative path may start at ``derivatives/``. The name is that
        of the folder unless one is given, with ``-`` for what BIDS URIs do not allow.

    Raises
    ------
    UsageError
        For a missing folder and for two of one name.
    """
    places = {"raw": root}
    for text in listed(given):
        name, path = _named_path(root, str(text))
        if name in places or name in _RESERVED:
            raise UsageError(
                f"--derivatives {text}: the name {name!r} is taken. "
                "Name them: --derivatives NAME=PATH NAME=PATH."
            )
        places[name] = path
    own = root / "derivatives"
    taken = set(places.values())
    for name, kind in read_folder(own).odd.items() if own.is_dir() else ():
        path = (own / name).resolve()
        # OpenBHB keeps its participants in derivatives/ itself.
        if kind in ("dir", "link") and not name.startswith((".", "sub-")) and path.is_dir():
            label = re.sub("[^A-Za-z0-9_-]", "-", name)
            if path not in taken and label not in _RESERVED:
                places.setdefault(label, path)
    return places


def _named_path(root: Path, text: str) -> tuple[str, Path]:
    name, equals, rest = text.partition("=")
    tries = [("", text)] + ([(name, rest)] if equals else [])
    for label, there in tries:
        for path in (Path(there).expanduser(), root / "derivatives" / there):
            if there and path.is_dir():
                path = path.resolve()
                return re.sub("[^A-Za-z0-9_-]", "-", label or path.name), path
    raise UsageError(f"--derivatives {text}: no such folder. Give PATH or NAME=PATH.")


def search_places(
    places: Mapping[str, Path],
    given: Sequence[str | Path],
    form: Preset,
    wanted: Mapping[str, Allowed],
    participants: set[str] | None,
    sessions: set[str] | None,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[str, SearchResult]:
    """Return the name of the place that holds the images, and what was found there.

    A raw preset is searched in ``raw``. The images of a derivative are looked for in those given,
    then by the pipeline's usual name, then in the dataset itself, then in every derivative.

    Parameters
    ----------
    places : mapping of str to Path
        As `named_places` returns it.
    given : sequence
        The derivatives given, first in `places` after ``raw``.
    form, wanted, participants, sessions, cache, progress
        As in `candidates.search`.

    Raises
    ------
    UsageError
        When several places at once hold such images, or none and nothing tells which was meant.
    """

    def searched(name: str) -> SearchResult:
        return search(
            places[name], form, wanted, participants, sessions, cache=cache, progress=progress
        )

    if not form.derivatives:
        return "raw", searched("raw")
    names = [name for name in places if name != "raw"]
    first = names[: len(listed(given))]
    usual = [n for n in names if n not in first and n.lower().startswith(form.derivatives)]
    rest = [n for n in names if n not in first and n not in usual]
    finds: dict[str, SearchResult] = {}
    for group in (first, usual, ["raw"], rest):
        finds |= {name: searched(name) for name in group}
        holding = [n for n in group if finds[n].usable]
        if len(holding) > 1:
            raise UsageError(
                f"Several derivatives hold such images: {', '.join(holding)}. "
                f"Say which: --derivatives {holding[0]}={places[holding[0]]}"
            )
        if holding:
            return holding[0], finds[holding[0]]
    # None to use; still, candidates that were left out, or an unknown participant, have a place.
    meant = [n for n in finds if finds[n].candidates] or [
        n for n in (*first, *usual) if finds[n].participants
    ]
    if meant:
        return meant[0], finds[meant[0]]
    raise UsageError(
        f"No image of this preset ({form.summary}) in {places['raw']}, nor in its derivatives "
        f"({', '.join(names) or 'none'}). Give the folder: --derivatives NAME=PATH"
    )

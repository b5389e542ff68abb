"""DatasetWalker the few folders of a dataset where images lie, in the order of their names.

Which folders those are is said by `presets`; they are listed by `listings`, and what is in them is
judged by `candidates`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nidl_dcl.bids.directory_cache import Listing, Listings
from nidl_dcl.bids.entities import LABEL
from nidl_dcl.bids.presets import Preset

__all__ = ["DatasetWalker", "Folder", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


_JOINED = re.compile(f"(sub-{LABEL})_(ses-{LABEL})")


_EVERY = 0.2
"""Seconds between two reports of progress."""


@dataclass(slots=True)
class Folder:
    """A folder where images lie: its listing, or the error that reading it gave.

    Attributes
    ----------
    participant, session : str and (str or None)
        As the folders above say, right or wrong.
    path : str
        Relative to the root, POSIX.
    pattern : str
        The folder of the preset that it is, such as ``sub-*/anat``.
    listing : Listing
        What it holds.
    error : OSError or None
        Why it, or a folder on the way, could not be read.
    """

    participant: str
    session: str | None
    path: str
    pattern: str
    listing: Listing
    error: OSError | None = None


@dataclass(slots=True)
class _Step:
    """A folder of the preset, or one on the way there; its name may end in a wildcard."""

    name: str
    pattern: str
    images: bool = False
    below: dict[str, _Step] = field(default_factory=dict)
    listed: bool = False

    def add(self, parts: list[str]) -> None:
        if not parts:
            self.images = self.listed = True
            return
        pattern = f"{self.pattern}/{parts[0]}".removeprefix("/")
        self.below.setdefault(parts[0], _Step(parts[0], pattern)).add(parts[1:])
        self.below = dict(sorted(self.below.items()))
        self.listed = self.listed or parts[0].endswith("*")


class DatasetWalker:
    """Iterates over the folders of a preset below a root. Loops of links end: depth is fixed.

    Parameters
    ----------
    listings : Listings
        Of the root where to start.
    preset : Preset
        Its folders, such as ``sub-*/ses-*/anat``. Where file names hold no entities, a folder
        ``sub-<label>_ses-<label>`` is a session (FreeSurfer's habit).
    wanted : collection of str, optional
        Only these folders ``sub-…``.
    progress : callable, optional
        Called with ("indexing", participants done, participants in total) now and then, and at the
        end of every folder that holds participants.

    Attributes
    ----------
    participants : dict of str to None
        The participants' folders met so far, wanted or not, in order.
    sessions : set of str
        The sessions of the wanted participants met so far.
    """

    def __init__(
        self,
        listings: Listings,
        preset: Preset,
        wanted: Collection[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.listings = listings
        self.wanted = wanted
        self.progress = progress
        self.splits = preset.file_name is not None
        self.participants: dict[str, None] = {}
        self.sessions: set[str] = set()
        self._done = self._total = 0
        self._told = time.monotonic()
        self._top = _Step("", "")
        for folder in preset.folders:
            self._top.add(folder.split("/"))

    def __iter__(self) -> Iterator[Folder]:
        return self._visit("", self._top, "", None)

    def _visit(
        self, path: str, step: _Step, participant: str, session: str | None
    ) -> Iterator[Folder]:
        inside = f"{path}/" if path else ""
        if not step.listed:
            for name, below in step.below.items():
                yield from self._visit(inside + name, below, participant, session)
            return
        try:
            listing = self.listings.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            yield Folder(participant, session, path, step.pattern, Listing([], {}), error)
            return
        if step.images:
            yield Folder(participant, session, path, step.pattern, listing)
        for part, below in step.below.items():
            if part == "sub-*":
                yield from self._participants(inside, self._matching(path, listing, "sub-"), below)
            elif part == "ses-*":
                for name in self._matching(path, listing, "ses-"):
                    self.sessions.add(name)
                    yield from self._visit(inside + name, below, participant, name)
            elif listing.odd.get(part) in ("dir", "link"):
                yield from self._visit(inside + part, below, participant, session)

    def _matching(self, path: str, listing: Listing, start: str) -> list[str]:
        """Return the folders whose names begin so; where a link leads is looked up each time."""
        return [
            name
            for name, kind in listing.odd.items()
            if name.startswith(start)
            and (
                kind == "dir" or (kind == "link" and Path(self.listings.root, path, name).is_dir())
            )
        ]

    def _participants(self, inside: str, names: list[str], step: _Step) -> Iterator[Folder]:
        people: list[tuple[str, str, str | None]] = []
        for name in names:
            if self.splits and ".long." in name:
                continue  # the same scans again, processed together with those of other sessions
            joined = _JOINED.fullmatch(name) if self.splits else None
            participant, session = (joined[1], joined[2]) if joined else (name, None)
            self.participants[participant] = None
            if self.wanted is None or participant in self.wanted:
                people.append((name, participant, session))
        self._total += len(people)
        for name, participant, session in people:
            if session is not None:
                self.sessions.add(session)
            yield from self._visit(inside + name, step, participant, session)
            self._done += 1
            if self.progress is not None and time.monotonic() - self._told >= _EVERY:
                self._tell()
        if people:
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self._told = time.monotonic()
            self.progress("indexing", self._done, self._total)

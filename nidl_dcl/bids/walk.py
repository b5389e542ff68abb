"""Visit the folders of a dataset where images lie, in the order of their names.

Which folders those are is left to `presets`, judging what is in them to `search`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nidl_dcl.bids.entities import LABEL
from nidl_dcl.bids.presets import Preset

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

_PARTICIPANT_SESSION = re.compile(f"(sub-{LABEL})_(ses-{LABEL})")

_EVERY = 0.2
"""Seconds between two reports of progress."""


def subfolders(entries: Iterable[os.DirEntry[str]], prefix: str = "") -> list[str]:
    """Return the names of folders, and of links to folders, that start with `prefix`, sorted."""
    return sorted(
        entry.name
        for entry in entries
        if entry.name.startswith(prefix)
        # Unlike DirEntry.is_dir, os.path.isdir never raises: not for a link to itself, either.
        and (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())  # noqa: PTH112
    )


@dataclass(slots=True)
class Folder:
    """A folder where images lie: its entries, or the error that reading it gave."""

    participant: str  # as the folders above say, right or wrong; so is the session
    session: str | None
    path: str  # relative to the root, POSIX
    pattern: str  # the folder of the preset that it is, such as sub-*/anat
    entries: list[os.DirEntry[str]]  # in no order
    error: OSError | None = None  # why it, or a folder on the way, could not be read


@dataclass(slots=True)
class _Step:
    """A folder of the preset, or one on the way there, and the folders to visit below it."""

    pattern: str
    images: bool = False
    below: dict[str, _Step] = field(default_factory=dict)
    listed: bool = False

    def add(self, parts: list[str]) -> None:
        if not parts:
            self.images = self.listed = True
            return
        pattern = f"{self.pattern}/{parts[0]}".removeprefix("/")
        self.below.setdefault(parts[0], _Step(pattern)).add(parts[1:])
        self.below = dict(sorted(self.below.items()))
        self.listed = self.listed or parts[0].endswith("*")


class DatasetWalker:
    """Iterate over the folders of a preset below a root.

    The depth is that of the preset, so links that lead back to a folder above end.

    Parameters
    ----------
    root : Path
        Where to start.
    preset : Preset
        Its folders, such as ``sub-*/ses-*/anat``. Where file names hold no entities, a folder
        ``sub-<label>_ses-<label>`` is a session (FreeSurfer's habit).
    selected : collection of str, optional
        Visit only these folders ``sub-…``.
    progress : callable, optional
        Called with ("indexing", participants done, participants in total) now and then, and at the
        end of every folder that holds participants.
    """

    def __init__(
        self,
        root: Path,
        preset: Preset,
        selected: Collection[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.selected = selected
        self.progress = progress
        self._sessions_in_names = preset.file_name is not None
        self.participants: dict[str, None] = {}  # met so far, selected or not, in order
        self.sessions: set[str] = set()  # met so far, of the selected participants
        self._done = self._total = 0
        self._reported = time.monotonic()
        self._top = _Step("")
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
            with os.scandir(f"{self.root}/{path}") as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            yield Folder(participant, session, path, step.pattern, [], error)
            return
        if step.images:
            yield Folder(participant, session, path, step.pattern, entries)
        for part, below in step.below.items():
            if part == "sub-*":
                yield from self._participants(inside, subfolders(entries, "sub-"), below)
            elif part == "ses-*":
                for name in subfolders(entries, "ses-"):
                    self.sessions.add(name)
                    yield from self._visit(inside + name, below, participant, name)
            elif any(entry.name == part for entry in entries):
                yield from self._visit(inside + part, below, participant, session)

    def _participants(self, inside: str, names: list[str], step: _Step) -> Iterator[Folder]:
        visited: list[tuple[str, str, str | None]] = []
        for name in names:
            if self._sessions_in_names and ".long." in name:
                continue  # the same scans again, processed together with those of other sessions
            match = _PARTICIPANT_SESSION.fullmatch(name) if self._sessions_in_names else None
            participant, session = match.groups() if match else (name, None)
            self.participants[participant] = None
            if self.selected is None or participant in self.selected:
                visited.append((name, participant, session))
        self._total += len(visited)
        for name, participant, session in visited:
            if session is not None:
                self.sessions.add(session)
            yield from self._visit(inside + name, step, participant, session)
            self._done += 1
            if time.monotonic() - self._reported >= _EVERY:
                self._report()
        if visited:
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        if self.progress is not None:
            self.progress("indexing", self._done, self._total)

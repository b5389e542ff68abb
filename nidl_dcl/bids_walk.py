"""Walk the few folders of a dataset where images lie; the only place that lists folders.

Which folders those are is said by `presets`; what is in them is judged by `candidates`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nidl_dcl.bids_names import LABEL
from nidl_dcl.presets import Preset

__all__ = ["Folder", "Walk", "read_folder"]

_JOINED = re.compile(f"(sub-{LABEL})_(ses-{LABEL})")

Entries = list[tuple[str, str]]


def read_folder(path: str | Path) -> Entries:
    """Return (name, kind) of everything in a folder, sorted by name.

    Every listing of a folder goes through here, so this is where a cache would stand.

    Parameters
    ----------
    path : path
        The folder.

    Returns
    -------
    list of (str, {"dir", "file", "link", "other"})
        Links are not followed.
    """
    with os.scandir(path) as entries:
        return sorted((entry.name, _kind(entry)) for entry in entries)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_file(follow_symlinks=False):
        return "file"
    if entry.is_dir(follow_symlinks=False):
        return "dir"
    return "link" if entry.is_symlink() else "other"


@dataclass(slots=True)
class Folder:
    """A folder where images lie: its listing, or the error that reading it gave.

    Attributes
    ----------
    participant, session : str and (str or None)
        As the folders above say, right or wrong.
    path : str
        Relative to the root, POSIX.
    entries : list of (str, str)
        See `read_folder`.
    error : OSError or None
        Why it, or a folder on the way, could not be read.
    """

    participant: str
    session: str | None
    path: str
    entries: Entries
    error: OSError | None = None


class Walk:
    """Iterates over the folders of a preset below a root. Loops of links end: depth is fixed.

    Parameters
    ----------
    root : Path
        Where to start.
    preset : Preset
        Its folders, such as ``sub-*/ses-*/anat``. Where file names hold no entities, a folder
        ``sub-<label>_ses-<label>`` is a session (FreeSurfer's habit).
    wanted : collection of str, optional
        Only these folders ``sub-…``.

    Attributes
    ----------
    participants : dict of str to None
        The participants' folders met so far, wanted or not, in order.
    sessions : set of str
        The sessions of the wanted participants met so far.
    """

    def __init__(self, root: Path, preset: Preset, wanted: Collection[str] | None = None) -> None:
        self.root = str(root)
        self.wanted = wanted
        self.splits = preset.file_name is not None
        self.participants: dict[str, None] = {}
        self.sessions: set[str] = set()
        self._tree: dict[str, Any] = {}
        for folder in preset.folders:
            node = self._tree
            for part in folder.split("/"):
                node = node.setdefault(part, {})
            node[""] = {}

    def __iter__(self) -> Iterator[Folder]:
        return self._visit("", self._tree, "", None)

    def _visit(
        self, path: str, node: Mapping[str, Any], participant: str, session: str | None
    ) -> Iterator[Folder]:
        globs = [part for part in node if part.endswith("*")]
        entries: Entries = []
        if globs or "" in node:
            try:
                entries = read_folder(f"{self.root}/{path}")
            except (FileNotFoundError, NotADirectoryError):
                return
            except OSError as error:
                yield Folder(participant, session, path, [], error)
                return
        if "" in node:
            yield Folder(participant, session, path, entries)
        inside = f"{path}/" if path else ""
        below = [(name, kind) for name, kind in entries if kind in ("dir", "link")] if globs else []
        names = {name for name, _ in below}
        for part in sorted(node):
            if part and part not in globs and (not globs or part in names):
                yield from self._visit(inside + part, node[part], participant, session)
            for name, kind in below if part in globs else ():
                if not name.startswith(part[:-1]):
                    continue
                if kind == "link" and not Path(self.root, path, name).is_dir():
                    continue
                if part == "ses-*":
                    self.sessions.add(name)
                    yield from self._visit(inside + name, node[part], participant, name)
                else:
                    yield from self._participant(inside, name, node[part])

    def _participant(self, inside: str, name: str, node: Mapping[str, Any]) -> Iterator[Folder]:
        if self.splits and ".long." in name:
            return  # the same scans again, processed together with those of other sessions
        joined = _JOINED.fullmatch(name) if self.splits else None
        participant, session = (joined[1], joined[2]) if joined else (name, None)
        self.participants[participant] = None
        if self.wanted is not None and participant not in self.wanted:
            return
        if session is not None:
            self.sessions.add(session)
        yield from self._visit(inside + name, node, participant, session)

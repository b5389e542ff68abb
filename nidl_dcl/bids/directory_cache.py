"""What folders hold: read from disk, or remembered where that is provably still true.

The only place that lists folders. Which ones to list is said by `bids_walk`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nidl_dcl.io.atomic import write_bytes

__all__ = ["Listing", "Listings", "read_folder"]

_FORMAT = 1
"""Of the kept file; files of another one are not read."""


_SETTLED = 2_000_000_000
"""Nanoseconds after which the next change of a folder gets another time, on any file system."""


_LETTERS = {"dir": "d", "link": "l", "other": "o"}


_KINDS = {letter: kind for kind, letter in _LETTERS.items()}


_Record = tuple[str, str, str]
"""State of a folder, its names, and which of them are no plain files, as the kept file has them."""


@dataclass(slots=True)
class Listing:
    """What a folder holds.

    Attributes
    ----------
    names : list of str
        Everything in it, sorted.
    odd : dict of str to {"dir", "link", "other"}
        The names that are no plain files, sorted. Links are not followed.
    """

    names: list[str]
    odd: dict[str, str]

    def files(self) -> list[str]:
        """Return the names of plain files and links."""
        return [name for name in self.names if self.odd.get(name, "link") == "link"]


def read_folder(path: str | Path) -> Listing:
    """Return what a folder holds, as the disk has it now.

    Raises
    ------
    OSError
        When it cannot be read.
    """
    names: list[str] = []
    odd: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            names.append(entry.name)
            if not entry.is_file(follow_symlinks=False):
                odd[entry.name] = _kind(entry)
    names.sort()
    return Listing(names, dict(sorted(odd.items())))


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return "dir"
    return "link" if entry.is_symlink() else "other"


class Listings:
    """Lists folders below a root; with a cache, reads only those that changed since.

    A folder is taken from memory when its device, inode, time of last change and time of last
    change of status are what they were: adding, removing or renaming anything in it, or another
    folder in its place, changes one of them, even where a tool puts the first time back. A folder
    that had changed within two seconds before it was read is read again, because a later change
    could carry the same time. Errors are not remembered, and where links lead is not part of a
    listing. What is kept is written when the ``with`` block ends, even by an exception.

    Parameters
    ----------
    root : Path
        Absolute, without links.
    cache : Path, optional
        The folder with one file per root. Files in it that are damaged, or of another root, user
        or version, are as good as none, and are replaced.

    Attributes
    ----------
    root : Path
        As given.
    """

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        self.root = root
        self._root = str(root)
        self._file: Path | None = None
        self._before: dict[str, _Record] = {}
        self._now: dict[str, _Record] = {}
        self._changed = False
        if cache is not None:
            name = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:32]
            self._file = cache / f"{name}.listings"
            self._before = self._load(self._file)

    def read(self, path: str) -> Listing:
        """Return what a folder holds.

        Parameters
        ----------
        path : str
            Relative to the root, POSIX; empty for the root itself.

        Raises
        ------
        OSError
            As `read_folder`.
        """
        full = f"{self._root}/{path}"
        if self._file is None:
            return read_folder(full)
        try:
            seen = os.stat(full)  # noqa: PTH116
        except OSError:
            return read_folder(full)  # says what is wrong as it does without a cache
        state = f"{seen.st_dev} {seen.st_ino} {seen.st_mtime_ns} {seen.st_ctime_ns}"
        record = self._before.get(path)
        if record is not None and record[0] == state:
            self._now[path] = record
            return _unpack(record)
        # State and clock are taken before reading: whatever happens after shows next time.
        settled = max(seen.st_mtime_ns, seen.st_ctime_ns) < time.time_ns() - _SETTLED
        listing = read_folder(full)
        if settled:
            self._now[path] = _pack(state, listing)
            self._changed = True
        return listing

    def __enter__(self) -> Listings:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None or not self._changed:
            return
        # Not met this time: below another preset's folders, or of people not asked for, or gone.
        rest = {path: record for path, record in self._before.items() if path not in self._now}
        if kind is None:
            rest = {p: r for p, r in rest.items() if os.path.isdir(f"{self._root}/{p}")}  # noqa: PTH112
        try:
            self._save(self._file, rest | self._now)
        except OSError as failure:
            warnings.warn(
                f"the index is not kept: {self._file} cannot be written ({failure.strerror})",
                stacklevel=2,
            )

    def _load(self, file: Path) -> dict[str, _Record]:
        try:
            # A pipe of that name would block without O_NONBLOCK.
            with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # noqa: PTH123
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    return {}
                head, _, body = stream.read().partition(b"\n")
        except OSError:
            return {}
        if head != self._head(body):
            return {}
        fields = iter(body.decode("utf-8", "surrogateescape").split("\0"))
        return {
            path: (state, names, odd)
            for path, state, names, odd in zip(fields, fields, fields, fields, strict=False)
        }

    def _save(self, file: Path, records: dict[str, _Record]) -> None:
        fields = [field for path, record in records.items() for field in (path, *record)]
        body = "\0".join(fields).encode("utf-8", "surrogateescape")
        write_bytes(file, self._head(body) + b"\n" + body)

    def _head(self, body: bytes) -> bytes:
        """Return the first line of the file: what must be equal for the rest to be used."""
        facts = {
            "format": _FORMAT,
            "root": self._root,
            # Another user may not be allowed to read the folders.
            "user": [os.geteuid(), *sorted(os.getgroups())],
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        return json.dumps(facts).encode("ascii")


def _pack(state: str, listing: Listing) -> _Record:
    # "/" and NUL are the two characters that no name holds.
    odd = "/".join(_LETTERS[kind] + name for name, kind in listing.odd.items())
    return state, "/".join(listing.names), odd


def _unpack(record: _Record) -> Listing:
    _, names, odd = record
    kinds = {text[1:]: _KINDS.get(text[:1], "other") for text in odd.split("/")} if odd else {}
    return Listing(names.split("/") if names else [], kinds)

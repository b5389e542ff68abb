"""Write files that appear whole or not at all: beside their target, synced and renamed."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_PART = re.compile(r"\..*\.[0-9a-f]{16}\.part", re.DOTALL)

_YOUNG = 1.0
"""Seconds in which a writer has surely locked the file that it made."""


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block ends well.

    On an exception the temporary file is removed and `path` stays as it was. It is locked while its
    writer lives, so that `remove_stale` can tell. Missing parent folders are made. Unless `lasting`
    is False, for what can be made again, the rename, too, outlasts a power cut.

    Raises
    ------
    OSError
        Naming `path`, when the disk is full, for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut, so that the longest name that `path` may have still fits.
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        # Rights come from the umask at creation: asking for it would clear it for other threads.
        held = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with suppress(OSError):  # where there are no locks, age tells
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield beside
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            beside.replace(path)
            if lasting:
                _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            os.close(held)
    except OSError as error:
        if error.filename in (None, os.fspath(beside)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_stale(folders: Iterable[Path]) -> list[Path]:
    """Remove the temporary files that killed writers left below `folders`; return them.

    Those of writers that live, on this machine or another, stay.
    """
    removed = []
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                file = Path(where, name)
                if name.endswith(".part") and _PART.fullmatch(name) and _is_stale(file):
                    with suppress(OSError):
                        file.unlink()
                        removed.append(file)
    return removed


def _is_stale(file: Path) -> bool:
    try:
        if time.time() - file.stat().st_mtime < _YOUNG:
            return False
        handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:  # held, or gone, or not ours
        return False
    return True


def write_together(folder: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Write several files of one folder so that all are new or all are old, to `finish_together`.

    They are written into a hidden folder, which appears by one rename; from there on they are moved
    to their places, by this process or, if it is killed, by the next that calls `finish_together`.

    Parameters
    ----------
    folder : Path
        Where the files go.
    name : str
        Of the set; one writer at a time.
    files : mapping of str to bytes
        Contents by name.
    """
    finish_together(folder, name)
    ready = folder / f".{name}.ready"
    making = folder / f".{name}.making"
    for file, content in files.items():
        write_bytes(making / file, content)
    for left in set(making.iterdir()) - {making / file for file in files}:
        left.unlink()  # of a writer that was killed
    making.replace(ready)
    _sync_folder(folder)
    finish_together(folder, name)


def finish_together(folder: Path, name: str) -> None:
    """Move the files of a `write_together` that was killed to their places; nothing otherwise."""
    ready = folder / f".{name}.ready"
    if ready.is_dir():
        for file in sorted(ready.iterdir()):
            file.replace(folder / file.name)
        _sync_folder(folder)
        with suppress(OSError):  # an empty folder does no harm
            ready.rmdir()


def write_bytes(path: Path, data: bytes | memoryview, *, lasting: bool = True) -> None:
    """Write a file in one step.

    Parameters
    ----------
    path, lasting
        As in `replacing`.
    data : bytes
        Its content.
    """
    with replacing(path, lasting=lasting) as beside:
        beside.write_bytes(data)


def keep_bytes(path: Path, data: bytes) -> None:
    """Write `data` as `write_bytes` does, unless `path` holds just that already."""
    if not (path.is_file() and path.read_bytes() == data):
        write_bytes(path, data)

"""Remember checksums of files and the results of checking them, for as long as the files do not change.

A file is compared by device, inode, size and times, so that an overwritten one is read again even if
its modification time was restored.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from nidl_dcl.io.formats import write_json

_FRESH_NS = 2 * 10**9
"""A file that changed so shortly before it was read could change again with the same times; what is
known of it is not saved."""

_SAVE_EVERY = 20.0


class FileMemory:
    """Facts about files, in memory and in a JSON file that several processes may use.

    The last process to save wins; facts that others saved meanwhile are computed again. A damaged
    file counts as empty; without a `path`, facts are remembered within this process only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, list[Any]] = {}
        self._fresh: set[str] = set()
        self._lock = threading.Lock()
        self._changed = False
        self._saved = time.monotonic()
        if path is not None:
            with suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(known, dict):
                    self._known = {
                        name: entry
                        for name, entry in known.items()
                        if isinstance(entry, list)
                        and len(entry) == 2
                        and isinstance(entry[1], dict)
                    }

    def __getstate__(self) -> dict[str, Any]:
        return {"path": None, "known": self._known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._known = state["known"]

    def recall(self, file: Path, fact: str) -> Any:
        """Return a fact about an unchanged file, None if it is not known."""
        entry = self._known.get(os.fspath(file))
        if entry is None or fact not in entry[1] or entry[0] != file_status(file):
            return None
        return entry[1][fact]

    def sha256(self, file: Path) -> str:
        """Return the checksum of a file's content, which is read if it is new or has changed.

        Changed content is warned of.
        """
        known = self.recall(file, "sha256")
        if isinstance(known, str):
            return known
        status = file_status(file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        before = self._known.get(os.fspath(file), [None, {}])[1].get("sha256", digest)
        if before != digest:
            warnings.warn(f"{file} has changed; it is checked and prepared again.", stacklevel=2)
        self.note(file, status, "sha256", digest)
        return digest

    def note(self, file: Path, status: list[int], fact: str, value: Any) -> None:
        """Remember a fact about a file.

        Parameters
        ----------
        file : Path
            The file.
        status : list of int
            Its `file_status` before it was read.
        fact : str
            Name of the fact.
        value : Any
            Something that JSON can hold.
        """
        name = os.fspath(file)
        with self._lock:
            if time.time_ns() - max(status[3:]) < _FRESH_NS:
                self._fresh.add(name)
            entry = self._known.setdefault(name, [status, {}])
            if entry[0] != status:
                entry[:] = [status, {}]
            entry[1][fact] = value
            self._changed = True
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the JSON file if there is anything new."""
        with self._lock:
            if self.path is not None and self._changed:
                write_json(
                    self.path, {k: v for k, v in self._known.items() if k not in self._fresh}
                )
            self._changed, self._saved = False, time.monotonic()


def file_status(file: Path) -> list[int]:
    """Return device, inode, size and times of a file, of which one changes when the file does."""
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]

"""Read JSON that others wrote: a regular file of bearable size, or one of two errors."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

__all__ = ["read_json"]

LARGEST = 64 * 2**20
"""Bytes of a file that is read; descriptions and filters have a few thousand."""


def read_json(file: Path, largest: int = LARGEST) -> Any:
    """Return what a JSON file holds.

    Parameters
    ----------
    file : Path
        UTF-8, with or without byte order mark.
    largest : int
        Bytes that it may have.

    Raises
    ------
    OSError
        When it cannot be read.
    ValueError
        When it is no regular file (a pipe would block), is too large, is not JSON, or is nested
        deeper than the parser goes.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a file")
    if status.st_size > largest:
        raise ValueError(f"it has {status.st_size} bytes, more than {largest}")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error

"""Files that appear whole or not at all: written beside their target, synced and renamed.

Knows formats (text, JSON, TSV, NPY), nothing of what the files mean.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "escape_control",
    "keep_tsv",
    "replacing",
    "to_tsv",
    "write_bytes",
    "write_json",
    "write_npy",
    "write_text",
    "write_tsv",
]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block ends well.

    Parameters
    ----------
    path : Path
        The file to write; missing parent folders are made.

    Yields
    ------
    Path
        Where to write. On an exception it is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut, so that the longest name that `path` may have still fits.
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    # Rights come from the umask at creation: asking for it would clear it for other threads.
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step."""
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` as UTF-8 with LF line ends, in one step.

    Bytes of file names that are no text, which Python holds as surrogates, become ``\udcNN``.
    """
    write_bytes(path, _encoded(text))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; NaN, infinity and NA become null."""
    write_text(
        path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write `array` to `path` in NumPy's format, without pickling."""
    with replacing(path) as beside, beside.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def escape_control(text: str) -> str:
    r"""Return `text` with control characters (tab and line end too) written as ``\xNN``."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def write_tsv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` as BIDS TSV: missing values `n/a`, control characters escaped."""
    write_text(path, to_tsv(table))


def keep_tsv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` as `write_tsv` does, unless `path` holds just that already."""
    text = to_tsv(table)
    if not (path.is_file() and path.read_bytes() == _encoded(text)):
        write_text(path, text)


def to_tsv(table: pd.DataFrame) -> str:
    """Return `table` as BIDS TSV text (see `write_tsv`)."""
    lines = ["\t".join(escape_control(str(c)) for c in table.columns)]
    lines += ["\t".join(_cell(v) for v in row) for row in table.itertuples(index=False, name=None)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "n/a"
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return "n/a"
        return f"{float(value):.10g}"
    return escape_control(str(value)) or "n/a"


def _finite(value: Any) -> Any:
    """Turn numpy values, paths, missing and non-finite numbers into what JSON knows."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple | set):
        return [_finite(v) for v in value]
    if value is pd.NA:
        return None
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    return value

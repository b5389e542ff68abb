"""Text, JSON, TSV and NPY: values to file contents, and JSON of others read with limits."""

from __future__ import annotations

import datetime
import io
import json
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import keep_bytes, write_bytes


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` as UTF-8 with LF line ends, in one step.

    Bytes of file names that are no text, which Python holds as surrogates, become ``\udcNN``.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; NaN, infinity and NA become null."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return `value` as JSON text (see `write_json`)."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def utc_now() -> str:
    """Return the time in UTC to the second, in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write `array` to `path` in NumPy's format, without pickling."""
    write_bytes(path, to_npy(array))


def to_npy(array: np.ndarray[Any, Any]) -> memoryview:
    """Return `array` as the bytes of a file in NumPy's format (see `write_npy`)."""
    # Not straight to the file: NumPy does not say why that fails.
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getbuffer()


def escape_control(text: str) -> str:
    r"""Return `text` with control characters (tab and line end too) written as ``\xNN``."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def write_tsv(path: Path, table: pd.DataFrame, *, exact: bool = False) -> None:
    """Write `table` to `path` as BIDS TSV: missing values `n/a`, control characters escaped.

    Parameters
    ----------
    path : Path
        The file.
    table : DataFrame
        Its rows; the index is not written.
    exact : bool, default=False
        Whether numbers have all their digits, instead of ten.
    """
    write_text(path, to_tsv(table, exact=exact))


def keep_tsv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` as `write_tsv` does, unless `path` holds just that already."""
    keep_bytes(path, to_tsv(table).encode("utf-8", "backslashreplace"))


def to_tsv(table: pd.DataFrame, *, exact: bool = False) -> str:
    """Return `table` as BIDS TSV text (see `write_tsv`)."""
    lines = ["\t".join(escape_control(str(c)) for c in table.columns)]
    cell = _exact_cell if exact else _cell
    lines += ["\t".join(map(cell, row)) for row in table.itertuples(index=False, name=None)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "n/a"
    if isinstance(value, float | np.floating):
        return "n/a" if np.isnan(value) else f"{float(value):.10g}"
    return escape_control(str(value)) or "n/a"


def _exact_cell(value: Any) -> str:
    if isinstance(value, float | np.floating) and np.isfinite(value):
        return repr(float(value))
    return _cell(value)


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


def beside(stem: Path, ending: str) -> Path:
    """Return the path of a file that is called as `stem` is, and ends in `ending`."""
    return stem.with_name(stem.name + ending)


LARGEST = 64 * 2**20
"""Bytes of a file that is read; descriptions and filters have a few thousand."""


def read_json(file: Path, largest: int = LARGEST) -> Any:
    """Return what a JSON file of at most `largest` bytes holds (UTF-8, byte order mark or not).

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


def camel_case(column: str) -> str:
    """Return `column` as it stands in file names: CamelCase of ASCII letters and digits only.

    ``fluid_intelligence`` gives ``FluidIntelligence``, ``MMSE`` stays, accents are removed.

    Raises
    ------
    UsageError
        When nothing is left of the name.
    """
    plain = unicodedata.normalize("NFKD", str(column)).encode("ascii", "ignore").decode("ascii")
    label = "".join(part[0].upper() + part[1:] for part in re.findall("[A-Za-z0-9]+", plain))
    if not label:
        raise UsageError(
            f"Column {column!r} has no ASCII letter or digit, so it cannot name a file. Rename it."
        )
    return label
